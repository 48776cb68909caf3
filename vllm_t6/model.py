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
"""T6 in vLLM's layers; its attention is [`FactorAttention`]"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import set_default_torch_dtype

from modeling_t6.configuration_t6 import T6Config
from modeling_t6.modeling_t6 import T6RotaryEmbedding

from .compatibility import warn_of_untested_version
from .layer import FactorAttention, LocalConfig
from .variants import refuse_unserved_variants, warn_of_cache_dtype


class T6MLP(nn.Module):
    def __init__(self, config: T6Config, quant_config=None, prefix: str = ""):
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=config.mlp_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=config.mlp_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = get_act_and_mul_fn(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        x, _ = self.down_proj(self.act_fn(gate_up))
        return x


def projection_names(config: T6Config) -> list[str]:
    """The parts of a layer's product of factors, in order. B comes first: its rows then start on 16 bytes."""
    factorised = "kv" if config.q_rank is None else "qkv"
    names = [*(["q_proj"] if config.q_rank is None else []), *(f"{name}_b_proj" for name in factorised)]
    return names if config.noncontextual_a else [*names, *(f"{name}_a_proj" for name in factorised)]


class T6Attention(nn.Module):
    """
    All factors of a token come from one product: the A projections of this process's heads, the B projections whole.
    """

    def __init__(self, config: T6Config, cache_config=None, quant_config=None, prefix: str = ""):
        super().__init__()
        layer_idx = extract_layer_index(prefix)
        k_rank, v_rank = config.ranks(layer_idx)
        local_config, head_dim = LocalConfig(config), config.head_dim
        num_heads, num_kv_heads = local_config.num_local_heads, local_config.num_local_key_value_heads
        self.head_dim = head_dim

        ranks = {"q": config.q_rank, "k": k_rank, "v": v_rank}
        sizes = {"q_proj": num_heads * head_dim}
        sizes |= {f"{name}_b_proj": rank and rank * head_dim for name, rank in ranks.items()}
        a_heads = {"q": num_heads, "k": num_kv_heads, "v": num_kv_heads}
        sizes |= {f"{name}_a_proj": rank and rank * a_heads[name] for name, rank in ranks.items()}
        sizes = {name: sizes[name] for name in projection_names(config)}
        # 34 heads make products that tensor cores are slow at. The outputs that fill up are not looked at.
        padding = 0 if quant_config is not None else -sum(sizes.values()) % 8
        self.factors_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [*sizes.values(), *([padding] if padding else [])],
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.factors_proj",
            disable_tp=True,  # `load_weights` takes this process's share of the A projections
        )
        for name, rank in ranks.items():
            if config.noncontextual_a and rank is not None:
                setattr(self, f"{name}_a", nn.Parameter(torch.empty(rank, a_heads[name]), requires_grad=False))
        self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.head_norm = RMSNorm(head_dim, eps=1e-5) if config.head_norm else None
        self.o_gate_proj = None
        if config.output_gate:
            self.o_gate_proj = ColumnParallelLinear(
                config.hidden_size,
                config.num_attention_heads * head_dim,
                bias=config.attention_bias,
                quant_config=quant_config,
                prefix=f"{prefix}.o_gate_proj",
            )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * head_dim,
            config.hidden_size,
            bias=config.attention_out_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.attn = FactorAttention(self, config, layer_idx, sizes, cache_config, prefix=f"{prefix}.attn")

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        projections, _ = self.factors_proj(hidden_states)
        attn_output = self.attn(projections, cos, sin)
        if self.head_norm is not None:
            attn_output = self.head_norm(attn_output.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        if self.o_gate_proj is not None:
            gate, _ = self.o_gate_proj(hidden_states)
            attn_output = attn_output * torch.sigmoid(gate)
        output, _ = self.o_proj(attn_output)
        return output


class T6DecoderLayer(nn.Module):
    def __init__(self, config: T6Config, cache_config=None, quant_config=None, prefix: str = ""):
        super().__init__()
        self.self_attn = T6Attention(config, cache_config, quant_config, prefix=f"{prefix}.self_attn")
        self.mlp = T6MLP(config, quant_config, prefix=f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Self Attention
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states, cos, sin)

        # Fully Connected
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


class RotaryTable(nn.Module):
    """Cos and sin of every position [max_model_len, rotary_dim / 2], as `T6RotaryEmbedding` computes them."""

    def __init__(self, config: T6Config, max_model_len: int, dtype: torch.dtype):
        super().__init__()
        # vLLM makes models with the model's dtype as the default; angles need more digits.
        with set_default_torch_dtype(torch.float32):
            positions = torch.arange(max_model_len)
            cos, sin = T6RotaryEmbedding(config)(positions.new_empty(0, dtype=dtype), positions[None])
        half = cos.shape[-1] // 2  # the other half is the same
        self.register_buffer("cos", cos[0, :, :half].contiguous(), persistent=False)
        self.register_buffer("sin", sin[0, :, :half].contiguous(), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos[positions], self.sin[positions]


@support_torch_compile
class T6Model(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        config, quant_config = model_config.hf_config, vllm_config.quant_config
        refuse_unserved_variants(config, vllm_config)
        warn_of_cache_dtype(config, vllm_config)
        self.config = config

        if get_pp_group().is_first_rank or (config.tie_word_embeddings and get_pp_group().is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=f"{prefix}.embed_tokens"
            )
        else:
            self.embed_tokens = PPMissingLayer()
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: T6DecoderLayer(config, vllm_config.cache_config, quant_config, prefix=prefix),
            prefix=f"{prefix}.layers",
        )
        if get_pp_group().is_last_rank:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        else:
            self.norm = PPMissingLayer()
        self.rotary_emb = RotaryTable(config, model_config.max_model_len, model_config.dtype)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            hidden_states = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]

        cos, sin = self.rotary_emb(positions)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(hidden_states, residual, cos, sin)

        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class T6ForCausalLM(nn.Module, SupportsPP):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        warn_of_untested_version()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.config = config
        self.packed_modules_mapping = {
            "factors_proj": projection_names(config),
            "gate_up_proj": ["gate_proj", "up_proj"],
        }
        if quant_config is not None:
            quant_config.packed_modules_mapping = self.packed_modules_mapping
        self.is_loaded = False
        self.model = T6Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The tensors of a T6 folder, under the names that Transformers gives them: at first all, later any."""
        parameters = dict(self.named_parameters())
        kinds = ("weight", "bias", "q_a", "k_a", "v_a")  # not what a quantisation adds
        wanted = {name for target in parameters if target.endswith(kinds) for name in self._parts(target)}
        loaded = set()
        for name, weight in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings or is_pp_missing_parameter(name, self):
                continue
            *path, module, kind = name.split(".")
            shard, fused = self._fused(path, module)
            target = ".".join([*path, fused, kind])
            if target not in parameters:
                raise ValueError(f"The checkpoint has {name!r}, which a T6 model of this configuration has not.")
            weight = self._local_share(kind if module == "self_attn" else module, weight)
            loader = getattr(parameters[target], "weight_loader", default_weight_loader)
            loader(parameters[target], weight, *([] if shard is None else [shard]))
            wanted.discard(name)
            loaded.add(target)
        if wanted and not self.is_loaded:
            raise ValueError(f"The checkpoint lacks {min(wanted)!r}, which a T6 model of this configuration has.")
        self.is_loaded = True
        for module in self.modules():
            if isinstance(module, FactorAttention):
                module.impl.weights_changed()
        return loaded

    def _parts(self, target: str) -> list[str]:
        """The names in a checkpoint of what a parameter here is made of."""
        *path, module, kind = target.split(".")
        if module == "factors_proj":
            parts = self.get_submodule(".".join(path)).attn.projection_sizes
        else:
            parts = ("gate_proj", "up_proj") if module == "gate_up_proj" else (module,)
        return [".".join([*path, part, kind]) for part in parts]

    def _fused(self, path: list[str], module: str) -> tuple[int | None, str]:
        """Which part of which fused product a projection is; `None` and itself if it is none."""
        if path and path[-1] == "self_attn":
            parts = self.get_submodule(".".join(path)).attn.projection_sizes
            if module in parts:
                return list(parts).index(module), "factors_proj"
        if path and path[-1] == "mlp" and module in ("gate_proj", "up_proj"):
            return ("gate_proj", "up_proj").index(module), "gate_up_proj"
        return None, module

    def _local_share(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """This process's heads of a head-major projection [h * n, ...], or of constant A factors [R, h]."""
        rank, num_processes = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        if num_processes == 1:
            return weight
        if name in ("q_proj", "q_a_proj", "k_a_proj", "v_a_proj"):
            return weight.chunk(num_processes, dim=0)[rank]
        if name in ("q_a", "k_a", "v_a"):
            return weight.chunk(num_processes, dim=1)[rank]
        return weight
