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
"""T6's attention layer for vLLM, whose KV cache holds rows of factors"""

import torch
from torch import nn
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import _encode_layer_name, kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec, get_kv_quant_mode

from modeling_t6.cache_t6 import factor_layouts
from modeling_t6.configuration_t6 import ConfigView, T6Config, local_share

from .attention import FactorImpl
from .backend import FactorBackend, SlidingFactorBackend
from .self_check import check_pages


CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32", "fp8", "fp8_e4m3")


class LocalConfig(ConfigView):
    """A `T6Config` whose local heads are those of this process in vLLM's tensor parallel group."""

    @property
    def num_local_heads(self) -> int:
        return self._local_share("num_attention_heads")

    @property
    def num_local_key_value_heads(self) -> int:
        return self._local_share("num_key_value_heads")

    def _local_share(self, field: str) -> int:
        return local_share(self, field, get_tensor_model_parallel_world_size(), "`tensor_parallel_size`")


class FactorAttention(nn.Module, AttentionLayerBase):
    """
    From the projections of a step's tokens to the outputs of this process's heads. In the cache, a token is its key row followed
    by its value row, as `FactorLayout` packs them: for vLLM, one key/value head.

    Args:
        owner: the module with `q_norm` and `k_norm` (which may be `None`), and the constant A factors, if any.
        config: of the model.
        layer_idx: the index of the layer, on which ranks and the layer type may depend.
        projection_sizes: sizes of the parts of the projections' outputs, by name, in order.
        cache_config: vLLM's.
        prefix: the layer's name in vLLM.
    """

    def __init__(
        self,
        owner: nn.Module,
        config: T6Config,
        layer_idx: int,
        projection_sizes: dict[str, int],
        cache_config: CacheConfig | None,
        prefix: str,
    ):
        super().__init__()
        vllm_config = get_current_vllm_config()
        local_config = LocalConfig(config)
        self.layer_name = prefix
        self.num_heads, self.num_kv_heads = local_config.num_local_heads, local_config.num_local_key_value_heads
        self.head_dim = config.head_dim
        self.key_layout, self.value_layout = factor_layouts(local_config, layer_idx)
        is_sliding = config.layer_type(layer_idx) == "sliding_attention"
        self.sliding_window = config.sliding_window if is_sliding else None

        self.kv_cache_dtype = "auto" if cache_config is None else cache_config.cache_dtype
        if self.kv_cache_dtype not in CACHE_DTYPES:
            raise ValueError(
                f"`kv_cache_dtype` of a T6 model must be one of {CACHE_DTYPES}, got {self.kv_cache_dtype!r}."
            )
        self.stored_dtype = kv_cache_dtype_str_to_dtype(self.kv_cache_dtype, vllm_config.model_config)
        self.projection_sizes = projection_sizes
        self.impl = FactorImpl(owner, self, config, layer_idx)

        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        layers[prefix] = self
        self._kv_cache = torch.tensor([])

    @property
    def kv_cache(self) -> torch.Tensor:
        """[blocks, 1, block_size, key width + value width]; empty until vLLM has allocated it."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, kv_cache: torch.Tensor) -> None:
        self._kv_cache = kv_cache
        self.impl.pages_changed()
        if kv_cache.numel() > 0:
            check_pages(self.impl, kv_cache)

    def forward(self, projections: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """
        Args:
            projections: [tokens, columns], the outputs of the layer's fused projection.
            cos, sin: of the tokens' positions, [tokens, rotary_dim / 2].

        Returns:
            [tokens, h * d], before `head_norm` and the output gate.
        """
        output = projections.new_empty(projections.shape[0], self.num_heads * self.head_dim)
        # The operator of vLLM's own attention layers, at which it splits graphs for compilation and capture.
        torch.ops.vllm.unified_attention_with_output(
            projections, cos, sin, output, _encode_layer_name(self.layer_name)
        )
        return output

    def get_attn_backend(self) -> type[AttentionBackend]:
        return FactorBackend if self.sliding_window is None else SlidingFactorBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        fields = {
            "block_size": vllm_config.cache_config.block_size,
            "num_kv_heads": 1,
            # vLLM asks the backend for the shape of pages with `head_size` alone.
            "head_size": self.key_layout.width + self.value_layout.width,
            "head_size_v": 0,
            "dtype": self.stored_dtype,
            "kv_quant_mode": get_kv_quant_mode(self.kv_cache_dtype),
        }
        if self.sliding_window is None:
            return FullAttentionSpec(**fields)
        return SlidingWindowSpec(sliding_window=self.sliding_window, **fields)
