# Copyright 2026 The T6 for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The choice among T6's attention functions, which share one signature, and attention over heads (paper, sections 3.1 and 3.3)"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_t6 import T6Config
from .factor_product_t6 import is_exporting
from .factor_space_t6 import attend_in_factor_space, factor_space_attention_forward
from .factors_t6 import Factors
from .flash_tpa_t6 import decode_with_flash_tpa, flash_tpa_attention_forward
from .heads_at_once_t6 import UnsplitFactors, heads_at_once
from .heads_t6 import form_all_heads
from .paged_t6 import PagedFactors, paged_attention_forward


# Whether training saves factors for the backward pass and recomputes heads there: under torch.compile, which fuses the
# recomputation, and in eager mode, where a graph can then not be retained (`retain_graph`). `benchmarks/training_step.py`
# measures both.
RECOMPUTE_HEADS_COMPILED = True
RECOMPUTE_HEADS_EAGER = False
# Parts of the names of attention operators, in PyTorch and in packages, whose outputs are saved.
ATTENTION_OPERATORS = ("scaled_dot_product", "flex_attention", "flash_attn", "flash_attention")


# T6's attention functions take an attention layer, its `Factors` and a mask:
#
#     attend(module, factors, attention_mask, scaling=, implementation=, dropout=, sliding_window=, **kwargs)
#         -> output [batch, seq, h, d], probabilities [batch, h, seq, key_length] or None
#
# `implementation` is the name of an attention function of Transformers, which only some of them call.


def choose_attention(config: T6Config, hidden_states: torch.Tensor, cache: Cache | PagedFactors | None) -> Callable:
    """
    The attention function of all layers in this forward pass, for new tokens `hidden_states` [batch, seq, hidden_size]. It
    depends on nothing that changes from one decoded token to the next, so that a compiled decoding step stays one graph.
    """
    if isinstance(cache, PagedFactors):
        return paged_attention_forward
    if decode_with_flash_tpa(config, hidden_states, cache):
        return flash_tpa_attention_forward
    if attend_in_factor_space(hidden_states.shape[1], cache):
        return factor_space_attention_forward
    return heads_attention_forward


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    if module.num_key_value_groups > 1:
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attn_weights = attn_weights.masked_fill(~attention_mask, torch.finfo(attn_weights.dtype).min)
    elif attention_mask is not None:
        attn_weights = attn_weights + attention_mask

    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=softmax_dtype).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value)
    attn_output = attn_output.transpose(1, 2).contiguous()

    return attn_output, attn_weights


def heads_attention_forward(
    module: nn.Module,
    factors: Factors | UnsplitFactors,
    attention_mask: torch.Tensor | None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Forms Q, K and V, and calls Transformers' attention function `implementation` on them: training and prefill."""
    attend = _attend_to_heads
    if should_recompute_heads(factors.key_rows, is_checkpointed=module.gradient_checkpointing and module.training):
        attend = functools.partial(with_recomputed_heads, attend)
    return attend(module, factors, attention_mask, **kwargs)


def _attend_to_heads(
    module: nn.Module,
    factors: Factors | UnsplitFactors,
    attention_mask: torch.Tensor | None,
    implementation: str,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(factors, UnsplitFactors):
        query, key, value = heads_at_once(module, factors)
    else:
        a_k, b_k, a_v, b_v = module.unpack(factors, factors.key_rows, factors.value_rows)
        query = module.queries(factors, form_all_heads)
        key = form_all_heads(a_k, module.features(b_k, rotation=factors.key_rotation))
        value = form_all_heads(a_v, module.features(b_v))
    attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    return attention_interface(module, query, key, value, attention_mask, **kwargs)


def should_recompute_heads(cached_rows: torch.Tensor | None, is_checkpointed: bool) -> bool:
    """
    Whether the backward pass recomputes heads from saved factors. Not over a cache, whose rows may have changed by then; nor
    under gradient checkpointing (`is_checkpointed`), which recomputes the whole layer.
    """
    enabled = RECOMPUTE_HEADS_COMPILED if torch.compiler.is_compiling() else RECOMPUTE_HEADS_EAGER
    wanted = torch.is_grad_enabled() and cached_rows is None and not is_checkpointed
    return enabled and wanted and not is_exporting()


def with_recomputed_heads(attend: Callable, *args, dropout: float = 0.0, **kwargs):
    """
    `attend(*args, dropout=dropout, **kwargs)` under selective checkpointing: its arguments (the factors) and the results of
    attention operators (outputs and log-sum-exps) are saved. The backward pass recomputes the rest, which is mainly heads.
    """
    return checkpoint(
        attend,
        *args,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, _save_attention),
        preserve_rng_state=dropout > 0,  # eager attention has dropout outside of an attention operator
        dropout=dropout,
        **kwargs,
    )


def _save_attention(context, operator, *args, **kwargs) -> CheckpointPolicy:
    is_attention = any(name in str(operator) for name in ATTENTION_OPERATORS)
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.MUST_RECOMPUTE
