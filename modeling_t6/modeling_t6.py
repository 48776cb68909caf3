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
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_t6 import choose_attention, heads_attention_forward
from .cache_t6 import CACHE_NAME, T6Cache, factor_layouts, rename_past_key_values
from .configuration_t6 import T6Config
from .factors_t6 import T6RMSNorm, TensorProductFactors
from .flash_tpa_t6 import flash_tpa_attention_forward
from .generation_t6 import T6GenerationMixin
from .heads_at_once_t6 import project_at_once
from .masks_t6 import create_attention_masks, key_positions, validate_cache, validate_inputs
from .paged_t6 import PagedFactors
from .stored_factors_t6 import store_decoded
from .tensor_parallel_t6 import shared_factors_plan


# The `auto_map` of a saved model, which carries its code.
AUTO_MAP = {
    "AutoConfig": "configuration_t6.T6Config",
    "AutoModel": "modeling_t6.T6Model",
    "AutoModelForCausalLM": "modeling_t6.T6ForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_t6.T6ForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_t6.T6ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_t6.T6ForTokenClassification",
}


class T6RotaryEmbedding(nn.Module):
    def __init__(self, config: T6Config):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings

        if config.c_factor_dim is not None:  # RoPE rotates b, and its functions read the size from `head_dim`
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
            The inverse frequencies [rotary_dim / 2], float32, and the scaling of cos and sin, which is 1.
        """
        base = config.rope_parameters["rope_theta"]
        dim = config.rotary_dim
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim))
        return inv_freq, 1.0

    @dynamic_rope_update  # power user: used with advanced RoPE types (e.g. dynamic rope)
    def forward(self, x: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos = emb.cos() * self.attention_scaling
        sin = emb.sin() * self.attention_scaling

        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


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


class T6Attention(TensorProductFactors):
    """Tensor product attention from 'Tensor Product Attention Is All You Need' paper"""

    def __init__(self, config: T6Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_key_value_groups = config.num_key_value_groups
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.gradient_checkpointing = False  # set by Transformers

        hidden_size, heads_size = config.hidden_size, config.num_attention_heads * self.head_dim
        self.o_proj = nn.Linear(heads_size, hidden_size, bias=config.attention_out_bias)
        self.o_proj.initializer_bound = 0.0
        self._add_qk_norms()
        self.head_norm = T6RMSNorm(self.head_dim, eps=1e-5) if config.head_norm else None
        self.o_gate_proj = None
        if config.output_gate:
            self.o_gate_proj = nn.Linear(hidden_size, heads_size, bias=config.attention_bias)

    @rename_past_key_values
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        attend: Callable = heads_attention_forward,
        key_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        sliding_window: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        As in Llama's attention, and:

        Args:
            position_embeddings: cos and sin [batch or 1, seq, rotary_dim].
            attend: the attention function, as `choose_attention` returns it.
            key_position_embeddings: cos and sin [batch or 1, key_length, rotary_dim] of all rows of the cache, for variants
                that cache B_K before RoPE.
            sliding_window: tokens that a query sees, including its own; `None`: all.
        """
        input_shape = hidden_states.shape[:-1]

        if isinstance(cache, PagedFactors):
            factors = cache.store(self, hidden_states, position_embeddings, key_position_embeddings)
        elif cache is None:
            factors = project_at_once(self, hidden_states, position_embeddings)
            if factors is None:
                factors = self.project(hidden_states, position_embeddings)
        elif attend is flash_tpa_attention_forward:
            factors = store_decoded(self, hidden_states, position_embeddings, cache)
        else:
            factors = self.project_and_cache(hidden_states, position_embeddings, cache, key_position_embeddings)

        attn_output, attn_weights = attend(
            self,
            factors,
            attention_mask,
            implementation=self.config._attn_implementation,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=sliding_window,
            **kwargs,
        )

        if self.head_norm is not None:
            # Some backends, such as vLLM's, return [tokens, h * d].
            attn_output = self.head_norm(attn_output.reshape(*input_shape, -1, self.head_dim))
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        if self.o_gate_proj is not None:
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
        """As in every model, except that `auto_map` names all classes of T6, not just the one that is saved."""
        if self.is_remote_code():
            self.config.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def gather_sharded_state_dict_for_save(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """As in every model, except that tied weights are saved once: gathered from several processes, they share no memory."""
        weights = super().gather_sharded_state_dict_for_save(*args, **kwargs)
        tied = {
            target
            for target, source in self.all_tied_weights_keys.items()
            if target in weights and source in weights and not weights[target].is_meta
            if weights[target].equal(weights[source])
        }
        return {name: weight for name, weight in weights.items() if name not in tied}

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        # "flash" in the name would make Transformers look for FlashAttention. 5.17 puts "paged|" before the name.
        if attn_implementation in ("flash_tpa", "paged|flash_tpa"):
            return attn_implementation
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The paper's initialisation: Xavier uniform factors, output projections at zero; the rest as in Llama."""
        super()._init_weights(module)
        # On each Linear, not on the attention layer: remote code skips modules that have no parameters themselves.
        if hasattr(module, "initializer_bound"):
            init.uniform_(module.weight, -module.initializer_bound, module.initializer_bound)
        if isinstance(module, T6Attention):
            for name, parameter in module.named_parameters(recurse=False):  # constant factors
                if name.endswith("_a"):
                    init.normal_(parameter)
                else:  # gives them the scale of projected B factors, about sqrt(2 / d)
                    init.xavier_uniform_(parameter)


@auto_docstring
class T6Model(T6PreTrainedModel):
    def __init__(self, config: T6Config):
        config.fit_layers()
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        if (
            config._attn_implementation == "vllm" and config.layer_types is None
        ):  # vLLM's Transformers backend reads them
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
            The factors of earlier tokens, as returned by an earlier forward pass: a `T6Cache`, or any cache of
            Transformers. Before Transformers 5.24 it was called `past_key_values`; both names are accepted.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

        if inputs_embeds is None:
            inputs_embeds: torch.Tensor = self.embed_tokens(input_ids)

        if self.training and torch.is_grad_enabled() and self.config.cache_dtype is not None:
            use_cache = False  # quantised rows have no gradient
        if use_cache and cache is None:
            cache = T6Cache(config=self.config)

        stage_cache, layers = self.cache_of_this_stage(cache), self.layers_of_this_stage()
        is_paged = isinstance(cache, PagedAttentionCache)  # continuous batching
        if cache is not None and not is_paged and not torch.compiler.is_compiling():
            validate_cache(stage_cache, self.config, self.row_layouts, layers, inputs_embeds.shape[1])
        validate_inputs(inputs_embeds, attention_mask, stage_cache)

        if position_ids is None:
            past_seen_tokens = stage_cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        if is_paged:
            cache = stage_cache = PagedFactors(self.config, cache, position_ids, kwargs)
        attend = choose_attention(self.config, inputs_embeds, cache)
        attention_masks = create_attention_masks(
            self.config, attend, inputs_embeds, attention_mask, stage_cache, position_ids
        )

        hidden_states = inputs_embeds
        layer_types = self.config.layer_types or ["full_attention"] * len(self.layers)
        position_ids, key_position_ids = key_positions(self.config, position_ids, stage_cache, layers)
        key_position_embeddings = {
            layer_type: self.rotary_emb(hidden_states, position_ids=ids)
            for layer_type, ids in key_position_ids.items()
        }
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)

        for layer_idx, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            layer_type = layer_types[layer_idx]
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=attention_masks[layer_type],
                position_embeddings=position_embeddings,
                key_position_embeddings=key_position_embeddings.get(layer_type),
                position_ids=position_ids,
                use_cache=use_cache,
                attend=attend,
                # Read now, since masks and caches follow the current configuration. Not in the layer, by its index: layers
                # that are compiled separately would then each need a graph of their own.
                sliding_window=self.config.sliding_window if layer_type == "sliding_attention" else None,
                **{CACHE_NAME: cache},  # gradient checkpointing drops it by this name
                **kwargs,
            )

        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            **{CACHE_NAME: cache},
        )

    def layers_of_this_stage(self) -> list[int]:
        """The indices of the layers in this process: with pipeline parallelism those of its stage, else all."""
        return [layer_idx for layer_idx, layer in enumerate(self.layers) if not isinstance(layer, nn.Identity)]

    def cache_of_this_stage(self, cache: Cache | None) -> Cache | None:
        """With pipeline parallelism a shallow copy of the cache with the layers of this stage alone, else the cache."""
        stage_layers = self.layers_of_this_stage()
        if cache is not None and len(stage_layers) < len(self.layers):
            layers = cache.layers
            cache = copy.copy(cache)
            cache.layers = [layers[layer_idx] for layer_idx in stage_layers if layer_idx < len(layers)]
        return cache


@auto_docstring
class T6ForCausalLM(T6PreTrainedModel, T6GenerationMixin):
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
            The factors of earlier tokens, as returned by an earlier forward pass: a `T6Cache`, or any cache of
            Transformers. Before Transformers 5.24 it was called `past_key_values`; both names are accepted.

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


class T6PreTrainedHead(T6PreTrainedModel):
    """Transformers' generic heads build their base model with `AutoModel`, which must know T6 in remote code, too."""

    def __init__(self, config: T6Config):
        # Not at import: with remote code, the class of the configuration may come from another copy of this code.
        AutoModel.register(type(config), T6Model, exist_ok=True)
        super().__init__(config)


class T6ForSequenceClassification(GenericForSequenceClassification, T6PreTrainedHead): ...


class T6ForQuestionAnswering(GenericForQuestionAnswering, T6PreTrainedHead): ...


class T6ForTokenClassification(GenericForTokenClassification, T6PreTrainedHead): ...


__all__ = [
    "T6ForCausalLM",
    "T6Model",
    "T6PreTrainedModel",
    "T6ForSequenceClassification",
    "T6ForQuestionAnswering",
    "T6ForTokenClassification",
]
