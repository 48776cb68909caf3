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
"""PyTorch T6 model"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_t6 import (
    attend_in_factor_space,
    factor_space_attention,
    form_all_heads,
    form_heads,
    keep_factors,
    rebuild_heads,
)
from .cache_t6 import (
    CACHE_NAME,
    T6Cache,
    allocate_static_cache,
    factor_layouts,
    quantization_group_size,
    rename_past_key_values,
    validate_cache,
)
from .configuration_t6 import T6Config
from .flash_tpa_t6 import cached_lengths, decode_with_flash_tpa, flash_tpa, padding_mask
from .paged_t6 import PagedFactors, page_factors, paged_attention
from .tensor_parallel_t6 import shared_factors_plan
from .variants_t6 import activate_head_factors, row_positions, third_order_features, validate_positions


logger = logging.get_logger(__name__)

# What a saved model tells the Auto classes; it carries its code.
AUTO_MAP = {
    "AutoConfig": "configuration_t6.T6Config",
    "AutoModel": "modeling_t6.T6Model",
    "AutoModelForCausalLM": "modeling_t6.T6ForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_t6.T6ForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_t6.T6ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_t6.T6ForTokenClassification",
}


class T6RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        """T6RMSNorm is equivalent to LlamaRMSNorm, but keeps float64 inputs in float64."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.promote_types(input_dtype, torch.float32))
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class T6RotaryEmbedding(nn.Module):
    def __init__(self, config: T6Config):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings

        if config.c_factor_dim is not None:  # RoPE's functions take `head_dim` for the size of what is rotated
            config = copy.copy(config)
            config.head_dim, config.c_factor_dim = config.b_dim, None
        self.config = config

        self.rope_type = self.config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(self.config)

        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: T6Config, device: torch.device | None = None, **kwargs
    ) -> tuple[torch.Tensor, float]:
        """
        Inverse frequencies of the original RoPE, over the rotated part of a head.

        Returns:
            The inverse frequencies [rotary_dim / 2], float32, and the scaling of cos and sin (1: unused here).
        """
        base = config.rope_parameters["rope_theta"]
        dim = config.rotary_dim
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim))
        return inv_freq, 1.0

    @torch.no_grad()
    @dynamic_rope_update  # power user: used with advanced RoPE types (e.g. dynamic rope)
    def forward(self, x: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos = emb.cos() * self.attention_scaling
        sin = emb.sin() * self.attention_scaling

        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Rotates half the hidden dims of the input."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Applies RoPE to the first `rotary_dim` features of `x` [batch, seq, n, head_dim], n factors or heads alike;
    rotating the B factors rotates the heads that they form (Theorem 3.1). Constant factors are [n, head_dim].
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    x_rot, x_pass = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    x_rot = (x_rot * cos) + (rotate_half(x_rot) * sin)
    return torch.cat((x_rot, x_pass.expand(*x_rot.shape[:-1], -1)), dim=-1) if x_pass.shape[-1] else x_rot


class T6MLP(nn.Module):
    def __init__(self, config: T6Config):
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=config.mlp_bias)
        self.down_proj.initializer_bound = 0.0
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


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


class TensorMaskConfig:
    """A `T6Config`, as it is now, for the functions that make masks: they make tensors for it."""

    _attn_implementation = "eager"

    def __init__(self, config: T6Config):
        self._config = config

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_config"], name)

    def get_text_config(self, *args, **kwargs) -> "TensorMaskConfig":
        return self


def _layer_type(config: T6Config, layer_idx: int) -> str:
    return "full_attention" if config.layer_types is None else config.layer_types[layer_idx]


class T6Attention(nn.Module):
    """Tensor product attention from 'Tensor Product Attention Is All You Need' paper"""

    def __init__(self, config: T6Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.q_rank = config.q_rank
        self.k_rank, self.v_rank = config.ranks(layer_idx)
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.key_layout, self.value_layout = factor_layouts(config, layer_idx)
        self.head_mesh = None  # with tensor parallelism, the processes that share the heads
        self.gradient_checkpointing = False  # of the layer: Transformers sets it

        num_heads = config.num_attention_heads
        # The outputs of an A projection are head-major, [h, R]; those of a B projection rank-major, [R, d].
        if self.q_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, num_heads * self.head_dim, bias=config.attention_bias)
        for name, rank in (("q", self.q_rank), ("k", self.k_rank), ("v", self.v_rank)):
            if rank is not None and config.noncontextual_a:
                setattr(self, f"{name}_a", nn.Parameter(torch.empty(rank, num_heads)))
            elif rank is not None:
                setattr(self, f"{name}_a_proj", self._factor_proj(num_heads, rank))
            if rank is None or (name == "v" and config.shared_b):
                continue
            if config.noncontextual_b:
                setattr(self, f"{name}_b", nn.Parameter(torch.empty(rank, self.head_dim)))
            else:
                setattr(self, f"{name}_b_proj", self._factor_proj(rank, config.b_dim))
            if config.c_factor_dim is not None:
                setattr(self, f"{name}_c_proj", self._factor_proj(rank, config.c_factor_dim))
        self.o_proj = nn.Linear(num_heads * self.head_dim, config.hidden_size, bias=config.attention_out_bias)
        self.o_proj.initializer_bound = 0.0
        if config.qk_norm:
            self.q_norm = T6RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = T6RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        if config.head_norm:
            self.head_norm = T6RMSNorm(self.head_dim, eps=1e-5)
        if config.output_gate:
            self.o_gate_proj = nn.Linear(config.hidden_size, num_heads * self.head_dim, bias=config.attention_bias)

    @property
    def sliding_window(self) -> int | None:
        """What the configuration says now, as masks and caches follow it."""
        is_sliding = _layer_type(self.config, self.layer_idx) == "sliding_attention"
        return self.config.sliding_window if is_sliding else None

    def _factor_proj(self, n1: int, n2: int) -> nn.Linear:
        """The projection to a factor [n1, n2], initialised as Xavier's of the weight viewed as [hidden, n1, n2]."""
        hidden_size = self.config.hidden_size
        proj = nn.Linear(hidden_size, n1 * n2, bias=self.config.attention_bias)
        proj.initializer_bound = (6 / ((hidden_size + n1) * n2)) ** 0.5  # fans: hidden * n2 and n1 * n2
        return proj

    def _head_factors(self, name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """A_Q, A_K or A_V of the tokens [batch, seq, R, h], or constant [R, h]."""
        if self.config.noncontextual_a:
            return getattr(self, f"{name}_a")
        a = getattr(self, f"{name}_a_proj")(hidden_states)
        a = a.unflatten(-1, (-1, getattr(self, f"{name}_rank"))).transpose(-1, -2)
        return activate_head_factors(a, self.config.head_factor_act, self.head_mesh)

    def _feature_factors(self, name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """B_Q, B_K or B_V before RoPE, [batch, seq, R, d] or constant [R, d]; with a third factor, b and c side by side."""
        if self.config.noncontextual_b:
            return getattr(self, f"{name}_b")
        b = getattr(self, f"{name}_b_proj")(hidden_states).unflatten(-1, (-1, self.config.b_dim))
        if self.config.c_factor_dim is None:
            return b
        c = getattr(self, f"{name}_c_proj")(hidden_states).unflatten(-1, (-1, self.config.c_factor_dim))
        return torch.cat([b, c], dim=-1)

    def _features(
        self,
        b: torch.Tensor,
        rows: slice = slice(None),
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        What heads are made of, [batch, seq, R, d], of B factors as they are cached: for most models the same. `rotation`
        is cos and sin for all rows of a cache that holds B_K before RoPE; `rows` are those that `b` is from.
        """
        if rotation is not None:
            cos, sin = rotation
            b = apply_rotary_pos_emb(b, cos[:, rows], sin[:, rows])
        return b if self.config.c_factor_dim is None else third_order_features(b, self.config.b_dim)

    def _queries(
        self,
        a_q: torch.Tensor | None,
        b_q: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        form: Callable = form_heads,
    ) -> torch.Tensor:
        """Q [batch, seq, h, d], normalised and rotated, of A_Q and B_Q before RoPE; without factors, of `None` and Q."""
        cos, sin = position_embeddings
        query_states = b_q
        if a_q is not None:
            if not self.config.qk_norm:
                b_q = apply_rotary_pos_emb(b_q, cos, sin)
            query_states = form(a_q, self._features(b_q))
        if self.config.qk_norm:
            query_states = self.q_norm(query_states)
        if self.config.qk_norm or a_q is None:
            # In blocks of the rotated size: with a third factor a head has d_c of them (theorem C.1), else one.
            blocks = query_states.unflatten(-1, (-1, self.config.b_dim)).flatten(2, 3)
            query_states = apply_rotary_pos_emb(blocks, cos, sin).view_as(query_states)
        return query_states

    def _attend(
        self,
        a_q: torch.Tensor | None,
        b_q: torch.Tensor,
        a_k: torch.Tensor,
        b_k: torch.Tensor,
        a_v: torch.Tensor,
        b_v: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        key_rotation: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From factors to attention's output [batch, seq, h, d] and, maybe, probabilities: heads, then the interface."""
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attention_interface(
            self,
            self._queries(a_q, b_q, position_embeddings, form_all_heads).transpose(1, 2),
            form_all_heads(a_k, self._features(b_k, rotation=key_rotation)).transpose(1, 2),
            form_all_heads(a_v, self._features(b_v)).transpose(1, 2),
            attention_mask,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )

    @rename_past_key_values
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        factor_space: bool = False,
        use_flash_tpa: bool = False,
        key_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        cos, sin = position_embeddings

        if self.q_rank is None:
            a_q, b_q = None, self.q_proj(hidden_states).view(*input_shape, -1, self.head_dim)
        else:
            a_q, b_q = self._head_factors("q", hidden_states), self._feature_factors("q", hidden_states)
        a_k, a_v = self._head_factors("k", hidden_states), self._head_factors("v", hidden_states)
        b_k = self._feature_factors("k", hidden_states)
        if self.config.qk_norm:
            b_k = self.k_norm(b_k)
        b_v = b_k if self.config.shared_b else self._feature_factors("v", hidden_states)
        key_rotation = None
        if self.config.rotates_on_read:
            key_rotation = position_embeddings if cache is None else key_position_embeddings
        else:
            b_k = apply_rotary_pos_emb(b_k, cos, sin)

        constant_a = self.config.noncontextual_a
        is_paged = isinstance(cache, PagedFactors)
        # Under autocast factors come in several dtypes. A cache holds that of the model, as without, and what reads rows
        # takes a query of the same.
        dtype = hidden_states.dtype
        if cache is not None and not is_paged:
            key_rows, value_rows = cache.update(
                self.key_layout.pack(a_k, b_k).to(dtype), self.value_layout.pack(a_v, b_v).to(dtype), self.layer_idx
            )
            if not use_flash_tpa:  # which reads rows as they are stored
                cached_a_k, cached_b_k = self.key_layout.unpack(key_rows.to(dtype))
                cached_a_v, cached_b_v = self.value_layout.unpack(value_rows.to(dtype))
                if not constant_a:
                    a_k, a_v = cached_a_k, cached_a_v
                if not self.config.noncontextual_b:
                    b_k, b_v = cached_b_k, cached_b_k if self.config.shared_b else cached_b_v

        if is_paged:
            attn_weights = None
            attn_output = paged_attention(
                self,
                self._queries(a_q, b_q, position_embeddings).to(dtype),
                (a_k, b_k),
                (a_v, b_v),
                cache,
                key_rotation,
            )
        elif use_flash_tpa:
            attn_weights = None
            attn_output = flash_tpa(
                self._queries(a_q, b_q, position_embeddings).to(dtype),
                key_rows,
                value_rows,
                self.k_rank,
                self.v_rank,
                self.scaling,
                key_a=a_k if constant_a else None,
                value_a=a_v if constant_a else None,
                mask=attention_mask,
                lengths=cached_lengths(cache, self.layer_idx),
                # A mask with a row for each query says all that there is to say.
                causal=attention_mask is None or attention_mask.shape[2] == 1,
            )
        elif factor_space:
            attn_output, attn_weights = factor_space_attention(
                self._queries(a_q, b_q, position_embeddings).to(dtype),
                (a_k, b_k),
                (a_v, b_v),
                attention_mask,
                scaling=self.scaling,
                output_attentions=self.config._attn_implementation == "eager",
                key_features=functools.partial(self._features, rotation=key_rotation),
                value_features=self._features,
            )
        else:
            attend = self._attend
            if rebuild_heads(cache, is_checkpointed=self.gradient_checkpointing and self.training):
                attend = functools.partial(keep_factors, attend)
            attn_output, attn_weights = attend(
                a_q,
                b_q,
                a_k,
                b_k,
                a_v,
                b_v,
                position_embeddings,
                key_rotation,
                attention_mask,
                dropout=0.0 if not self.training else self.attention_dropout,
                **kwargs,
            )

        if self.config.head_norm:
            # Some backends, such as vLLM's, return [tokens, h * d].
            attn_output = self.head_norm(attn_output.reshape(*input_shape, -1, self.head_dim))
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        if self.config.output_gate:
            attn_output = attn_output * torch.sigmoid(self.o_gate_proj(hidden_states))
        attn_output = self.o_proj(attn_output)
        return attn_output, attn_weights


class T6DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: T6Config, layer_idx: int):
        super().__init__()
        self.hidden_size = config.hidden_size

        self.self_attn = T6Attention(config=config, layer_idx=layer_idx)

        self.mlp = T6MLP(config)
        self.input_layernorm = T6RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = T6RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @rename_past_key_values
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        # Self Attention
        hidden_states, _ = self.self_attn(
            hidden_states,  # by position, as PEFT's wrappers of constant factors pass it on
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states

        # Fully Connected
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


@auto_docstring
class T6PreTrainedModel(PreTrainedModel):
    config: T6Config
    config_class = T6Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["T6DecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True

    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": T6DecoderLayer,
        "attentions": T6Attention,
    }

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in every model; the `auto_map` written names all of T6's classes, not just the one that is saved."""
        if self.is_remote_code():
            self.config.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def gather_sharded_state_dict_for_save(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """As in every model; but tied weights, which come from several processes as tensors of their own, are saved once."""
        weights = super().gather_sharded_state_dict_for_save(*args, **kwargs)
        tied = {
            target
            for target, source in self.all_tied_weights_keys.items()
            if target in weights and source in weights and not weights[target].is_meta
            if weights[target].equal(weights[source])
        }
        return {name: weight for name, weight in weights.items() if name not in tied}

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        # Its name would send Transformers looking for FlashAttention; 5.17 puts "paged|" before it.
        if attn_implementation in ("flash_tpa", "paged|flash_tpa"):
            return attn_implementation
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The paper's initialisation: Xavier uniform factors, output projections at zero; the rest as Llama."""
        super()._init_weights(module)
        # By Linear, not by attention layer: in remote code, modules without parameters of their own are passed over.
        if hasattr(module, "initializer_bound"):
            init.uniform_(module.weight, -module.initializer_bound, module.initializer_bound)
        if isinstance(module, T6Attention):
            for name, parameter in module.named_parameters(recurse=False):  # constant factors
                if name.endswith("_a"):
                    init.normal_(parameter)
                else:  # the scale of projected B factors, about sqrt(2 / d)
                    init.xavier_uniform_(parameter)


@auto_docstring
class T6Model(T6PreTrainedModel):
    def __init__(self, config: T6Config):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        if config._attn_implementation == "vllm" and config.layer_types is None:  # vLLM reads the type of each layer
            config.layer_types = ["full_attention"] * config.num_hidden_layers

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [T6DecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = T6RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = T6RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.row_layouts = [factor_layouts(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]

        # Initialize weights and apply final processing
        self.post_init()
        self._tp_plan |= shared_factors_plan(self)

    @rename_past_key_values
    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            The factors of the tokens seen before, as returned by an earlier step: a `T6Cache`, or any cache of
            Transformers. Called `past_key_values` before Transformers 5.24; both names are taken.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

        if inputs_embeds is None:
            inputs_embeds: torch.Tensor = self.embed_tokens(input_ids)

        if use_cache and cache is None:
            cache = T6Cache(config=self.config)

        stage_cache, layer_types = self._of_this_stage(cache)
        is_paged = isinstance(cache, PagedAttentionCache)  # continuous batching
        if cache is not None and not is_paged and not torch.compiler.is_compiling():
            validate_cache(stage_cache, self.config, self.row_layouts, self._layers_of_this_stage())
        _validate_inputs(inputs_embeds, attention_mask, stage_cache)

        if position_ids is None:
            past_seen_tokens = stage_cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        if is_paged:
            cache = stage_cache = PagedFactors(self.config, cache, position_ids, kwargs)
        use_flash_tpa = decode_with_flash_tpa(self.config, inputs_embeds, cache)
        factor_space = use_flash_tpa or attend_in_factor_space(inputs_embeds.shape[1], cache)
        causal_masks = self.create_causal_masks(inputs_embeds, attention_mask, stage_cache, position_ids)

        hidden_states = inputs_embeds
        key_position_embeddings = {}
        if self.config.rotates_on_read and cache is not None:
            if isinstance(cache, PagedFactors):
                key_positions = cache.row_positions
            else:
                position_ids, key_positions = row_positions(
                    layer_types, stage_cache, inputs_embeds.shape[1], inputs_embeds.device
                )
            for layer_type, ids in key_positions.items():
                key_position_embeddings[layer_type] = self.rotary_emb(hidden_states, position_ids=ids)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)

        for layer_idx, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_masks[_layer_type(self.config, layer_idx)],
                position_embeddings=position_embeddings,
                key_position_embeddings=key_position_embeddings.get(_layer_type(self.config, layer_idx)),
                position_ids=position_ids,
                use_cache=use_cache,
                factor_space=factor_space,
                use_flash_tpa=use_flash_tpa,
                **{CACHE_NAME: cache},  # the name by which gradient checkpointing drops it
                **kwargs,
            )

        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            **{CACHE_NAME: cache},
        )

    def _layers_of_this_stage(self) -> list[int]:
        """The indices of the layers that this process has: in a pipeline those of its stage, else all."""
        return [layer_idx for layer_idx, layer in enumerate(self.layers) if not isinstance(layer, nn.Identity)]

    def _of_this_stage(self, cache: Cache | None) -> tuple[Cache | None, list[str]]:
        """
        The cache without the layers that other stages of a pipeline have, and fill, and the types of those that are left.
        Without a pipeline all are.
        """
        here = self._layers_of_this_stage()
        if cache is not None and len(here) < len(self.layers):
            layers = cache.layers
            cache = copy.copy(cache)
            cache.layers = [layers[layer_idx] for layer_idx in here if layer_idx < len(layers)]
        return cache, [_layer_type(self.config, layer_idx) for layer_idx in here]

    def create_causal_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        cache: Cache | None,
        position_ids: torch.LongTensor | None,
    ) -> dict:
        """
        By layer type, the mask as the path that runs reads it: what the attention interface takes, or a tensor. `cache`
        is that of this stage.
        """
        if isinstance(attention_mask, dict):  # made ahead by `generate()`
            return attention_mask
        if isinstance(cache, PagedFactors):  # goes by the lengths of the requests
            return dict.fromkeys(cache.groups)
        if attention_mask is not None and attention_mask.dim() == 2:  # one for the whole batch, maybe
            attention_mask = attention_mask.expand(inputs_embeds.shape[0], -1)
        if self.config.rotates_on_read and cache is not None and position_ids is not None:
            if not torch.compiler.is_compiling():
                validate_positions(position_ids, attention_mask, cache)
        config, implementation = self.config, self.config._attn_implementation
        is_static = cache is not None and cache.is_compileable
        use_flash_tpa = decode_with_flash_tpa(config, inputs_embeds, cache)
        if use_flash_tpa and config.sliding_window is None:
            return {"full_attention": padding_mask(attention_mask, cache, inputs_embeds.shape[1])}
        if use_flash_tpa or attend_in_factor_space(inputs_embeds.shape[1], cache):
            # Factor space reads tensors, and over a static or sliding cache always one: only it tells which rows to read.
            if implementation != "sdpa" or is_static or config.sliding_window is not None:
                config = TensorMaskConfig(config)
        elif implementation == "flex_attention" and is_static:
            # flex_attention asks the mask late, when the cache has moved its length in place: show it another.
            cache = copy.copy(cache)
            cache.layers = [copy.copy(layer) for layer in cache.layers]
            for layer in cache.layers:
                layer.cumulative_length = layer.cumulative_length.clone()
        functions = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {
            layer_type: functions[layer_type](
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_NAME: cache},
            )
            for layer_type in set(config.layer_types or ["full_attention"])
        }


def _validate_inputs(inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None) -> None:
    """Refuses an empty prompt, and masks that would be misread rather than fail."""
    batch_size, query_length = inputs_embeds.shape[:2]
    if query_length == 0:
        raise ValueError("The prompt is empty: `input_ids` (or `inputs_embeds`) must hold at least one token.")
    if not isinstance(attention_mask, torch.Tensor) or torch.compiler.is_compiling():
        return
    mask_shape, dtype = list(attention_mask.shape), attention_mask.dtype
    if attention_mask.dim() == 4:
        if mask_shape[0] not in (1, batch_size) or mask_shape[2] != query_length:
            raise ValueError(
                f"A 4D `attention_mask` must be [{batch_size}, 1, {query_length}, key_length], got {mask_shape}."
            )
        if dtype != torch.bool and not dtype.is_floating_point:
            raise ValueError(
                f"A 4D `attention_mask` must be boolean (True: attend) or additive floating point, got {dtype}."
            )
    elif attention_mask.dim() == 2:
        # A static cache counts its tokens in a tensor: reading it once a step costs less than a wrong answer.
        past_length = int(cache.get_seq_length()) if cache is not None else 0
        if mask_shape[0] not in (1, batch_size) or mask_shape[1] < past_length + query_length:
            raise ValueError(
                f"`attention_mask` must cover {past_length} cached and {query_length} new tokens of {batch_size} "
                f"sequences, [{batch_size}, {past_length + query_length}], got {mask_shape}."
            )
        if dtype.is_floating_point and not ((attention_mask == 0) | (attention_mask == 1)).all():
            raise ValueError(
                "A 2D `attention_mask` holds 1 for tokens and 0 for padding, got other values in "
                f"{dtype}: pass an additive mask as [batch, 1, query_length, key_length]."
            )
    else:
        raise ValueError(
            f"`attention_mask` must be [batch, key_length] or [batch, 1, query_length, key_length], got {mask_shape}."
        )


@auto_docstring
class T6ForCausalLM(T6PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: T6Config):
        super().__init__(config)
        self.model = T6Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # Initialize weights and apply final processing
        self.post_init()

    @rename_past_key_values
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            The factors of the tokens seen before, as returned by an earlier step: a `T6Cache`, or any cache of
            Transformers. Called `past_key_values` before Transformers 5.24; both names are taken.

        Example:

        ```python
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> model = AutoModelForCausalLM.from_pretrained("someone/t6-model", trust_remote_code=True)
        >>> tokenizer = AutoTokenizer.from_pretrained("someone/t6-model")

        >>> inputs = tokenizer("Once more unto the breach", return_tensors="pt")
        >>> generate_ids = model.generate(**inputs, max_new_tokens=30)
        >>> tokenizer.batch_decode(generate_ids, skip_special_tokens=True)[0]
        ```"""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

        hidden_states = outputs.last_hidden_state
        # Only compute necessary logits, and do not upcast them to float if we are not computing the loss
        slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, slice_indices, :])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def init_continuous_batching(self, *args, **kwargs) -> ContinuousBatchingManager:
        """As in every model; the pages of the cache hold factors."""
        return page_factors(super().init_continuous_batching(*args, **kwargs))

    def create_masks_for_generate(
        self,
        config: T6Config,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None = None,
        **kwargs,
    ):
        """The masks that `generate()` makes ahead of a step over a static cache."""
        cache, _ = self.model._of_this_stage(kwargs[CACHE_NAME])
        return self.model.create_causal_masks(inputs_embeds, attention_mask, cache, position_ids)

    def _get_static_cache_init_shape(self) -> None:
        # Key and value rows may differ in width, which this hook cannot say: see `_prepare_cache_for_generation`.
        return None

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs):
        """
        `generate()`'s dynamic caches become `T6Cache`s, its static ones are allocated for rows of factors, and its
        quantised ones group numbers by a size that divides a row.
        """
        if "cache" in model_kwargs:  # the user's, under the name of `forward`
            model_kwargs[CACHE_NAME] = model_kwargs.pop("cache")
        user_defined = model_kwargs.get(CACHE_NAME) is not None
        if generation_config.cache_implementation == "quantized":
            cache_config = generation_config.cache_config or {}
            generation_config.cache_config = {"q_group_size": quantization_group_size(self.config), **cache_config}
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        if user_defined:
            return
        if type(cache) is DynamicCache:
            # On the CPU there is nowhere to offload to. Weights on the disk, "meta", are computed with on an accelerator.
            has_accelerator = self.device.type != "cpu" and torch.accelerator.is_available()
            offloading = cache.offloading and has_accelerator
            model_kwargs[CACHE_NAME] = T6Cache(config=self.config, offloading=offloading)
            if any(getattr(layer, "record_past", False) for layer in cache.layers):  # an assistant's, which is cropped
                model_kwargs[CACHE_NAME].activate_past_recording()
        elif isinstance(cache, StaticCache) and len(set(getattr(self, "hf_device_map", {}).values())) <= 1:
            batch_size = args[1] if len(args) > 1 else kwargs["batch_size"]
            batch_size *= max(generation_config.num_beams, generation_config.num_return_sequences)
            if self.device.type != "meta":  # else weights are on the disk, and the first rows tell the device
                layers = self.model._layers_of_this_stage()
                allocate_static_cache(cache, self.config, batch_size, self.dtype, self.device, layers)


class T6ForSequenceClassification(GenericForSequenceClassification, T6PreTrainedModel): ...


class T6ForQuestionAnswering(GenericForQuestionAnswering, T6PreTrainedModel): ...


class T6ForTokenClassification(GenericForTokenClassification, T6PreTrainedModel): ...


__all__ = [
    "T6ForCausalLM",
    "T6Model",
    "T6PreTrainedModel",
    "T6ForSequenceClassification",
    "T6ForQuestionAnswering",
    "T6ForTokenClassification",
]
