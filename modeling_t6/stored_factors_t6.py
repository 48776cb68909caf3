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
"""Decoded tokens: one kernel after the projections writes their rows into the cache, and forms their queries"""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from .cache_t6 import cached_lengths, reserve_rows, validate_rows
from .factor_pages_t6 import FactorTransform, NewRows, store_factors
from .factors_t6 import Factors
from .flash_tpa_t6 import operator_name


# Whether decoded tokens use the kernel; a benchmark may switch it off.
FUSED = True


def activates_heads(config: PreTrainedConfig) -> bool:
    """Whether the kernel can activate A: a softmax over heads that tensor parallelism splits needs the other processes."""
    return config.head_factor_act != "softmax" or config.num_local_heads == config.num_attention_heads


def store_projected(
    module: nn.Module,
    hidden_states: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor | NewRows,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
) -> Factors:
    """
    Projects tokens, writes their rows into pages, and forms their queries.

    Args:
        module: a [`TensorProductFactors`] of a model that caches B_K and B_V as K and V are formed from them.
        hidden_states: [batch, seq, hidden_size].
        angles: cos and sin [batch or 1, seq, rotary_dim].
        slots, key_pages, value_pages: as [`store_factors`] takes them.

    Returns:
        Factors that hold queries, and constant A_K and A_V if there are any: the caller sets the rows.
    """
    config, shape = module.config, hidden_states.shape[:2]
    norms = (module.q_norm.weight, module.k_norm.weight) if config.qk_norm else (None, None)
    store = _store_in_graph if torch.compiler.is_compiling() else store_factors
    query = store(
        *module.project_tokens(hidden_states.flatten(0, 1)),
        *(x[..., : x.shape[-1] // 2].expand(*shape, -1).flatten(0, 1) for x in angles),
        slots,
        key_pages,
        value_pages,
        FactorTransform(*norms, config.rms_norm_eps, config.head_factor_act, config.qk_norm == "heads"),
    )
    a_k, a_v = (module.k_a, module.v_a) if config.noncontextual_a else (None, None)
    return Factors(angles[0].dtype, a_k=a_k, a_v=a_v, query=query.unflatten(0, shape))


def store_decoded(
    module: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> Factors:
    """
    `TensorProductFactors.project_and_cache` for tokens that FlashTPA attends for. If the cache has rows that a kernel may
    write, the kernel also forms the queries; it computes in float32 and rounds once. Depends on nothing that changes from one
    decoded token to the next.
    """
    (batch_size, count), dtype = hidden_states.shape[:2], position_embeddings[0].dtype
    reserved = None
    if _is_fusible(module, hidden_states):
        reserved = reserve_rows(cache, module.layer_idx, batch_size, count, dtype, hidden_states.device)
    if reserved is None:
        return module.project_and_cache(hidden_states, position_embeddings, cache)
    validate_rows((reserved.keys, reserved.values), (module.key_layout, module.value_layout), module.layer_idx)
    pages = reserved.key_storage[:, 0], reserved.value_storage[:, 0]
    rows = NewRows(reserved.first, count, reserved.length)
    factors = store_projected(module, hidden_states, position_embeddings, rows, *pages)
    factors.key_rows, factors.value_rows = reserved.keys, reserved.values
    factors.lengths = cached_lengths(cache, module.layer_idx)
    return factors


def _is_fusible(module: nn.Module, hidden_states: torch.Tensor) -> bool:
    device, norms = hidden_states.device, [module.q_norm, module.k_norm] if module.config.qk_norm else []
    return (
        FUSED
        and activates_heads(module.config)
        and not torch.is_autocast_enabled(device.type)
        # Offloaded weights arrive only when a module is called.
        and all(norm.weight.device == device for norm in norms)
    )


def _append_factors(
    a_q: torch.Tensor | None,
    b_q: torch.Tensor,
    a_k: torch.Tensor | None,
    b_k: torch.Tensor,
    a_v: torch.Tensor | None,
    b_v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    length: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    first: int,
    count: int,
    eps: float,
    activation: str | None,
    norms_key_heads: bool,
) -> torch.Tensor:
    transform = FactorTransform(q_norm, k_norm, eps, activation, norms_key_heads)
    rows = NewRows(first, count, length)
    return store_factors(a_q, b_q, a_k, b_k, a_v, b_v, cos, sin, rows, key_pages, value_pages, transform)


# For torch.compile, which cannot trace the function. Eager code calls the function itself, which costs the host less.
_append_factors_op = torch.library.custom_op(
    operator_name("append_factors"), _append_factors, mutates_args=("key_pages", "value_pages")
)


@_append_factors_op.register_fake
def _(a_q, b_q, *args):
    return b_q.new_empty((b_q.shape[0], b_q.shape[1] if a_q is None else a_q.shape[1], b_q.shape[2]))


def _store_in_graph(*args) -> torch.Tensor:
    """[`store_factors`] of [`NewRows`], as an operator."""
    *factors, rows, key_pages, value_pages, transform = args
    norms, others = transform[:2], transform[2:]
    return _append_factors_op(
        *factors, rows.length, key_pages, value_pages, *norms, rows.first, rows.count, *others
    )  # fmt: skip
