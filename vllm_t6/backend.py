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
"""vLLM's attention backend over pages of factors: the layout of pages, and the metadata of each step's batch"""

from typing import ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from modeling_t6.factor_pages_t6 import has_kernels
from modeling_t6.flash_tpa_pages_t6 import Pieces, schedule_pieces

from .attention import FactorImpl
from .metadata import FactorMetadata
from .prefill import plan_pieces


# The most query tokens per request that FlashTPA takes: one, and those that speculative decoding proposes.
MAX_QUERIES = 16
# The default number of tokens per page where FlashTPA's kernels do not run.
BLOCK_SIZE = 64


class FactorBackend(AttentionBackend):
    """Pages [blocks, 1, block_size, key row + value row] of any size."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "FLASH_TPA"

    @staticmethod
    def get_impl_cls() -> type[FactorImpl]:
        return FactorImpl

    @staticmethod
    def get_builder_cls() -> type["FactorMetadataBuilder"]:
        return FactorMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(8)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The size of FlashTPA's tiles, each of which then lies in one page."""
        layers = get_layers_from_vllm_config(get_current_vllm_config(), AttentionLayerBase)
        device = torch.device(current_platform.device_type)
        pieces = [
            layer.impl.empty_pieces(1, 1, device)
            for layer in layers.values()
            if issubclass(layer.get_attn_backend(), FactorBackend)
        ]
        return max((BLOCK_SIZE if one is None else one.tile for one in pieces), default=BLOCK_SIZE)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    # Up to vLLM 0.28 a backend defines the layout of its pages. From 0.29 on vLLM does, in the same way.

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return num_blocks, num_kv_heads, block_size, head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)


class SlidingFactorBackend(FactorBackend):
    """
    The backend of layers with a sliding window. It is a class of its own because vLLM may put both kinds of layers into one group
    of pages, and makes one metadata builder per backend there.
    """


class FactorMetadataBuilder(AttentionMetadataBuilder[FactorMetadata]):
    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.reorder_batch_threshold = min(self.reorder_batch_threshold, MAX_QUERIES)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.impl = layer.impl
        self.pieces: dict[tuple[int, int], Pieces | None] = {}
        # vLLM's upper bound of a request's length includes tokens that are only proposed. Prompts have none, unless decoding
        # requests with many proposed tokens are treated as prompts.
        self.bound_is_exact = _most_queries(vllm_config) <= MAX_QUERIES

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        # Layers whose rows differ in width have one spec together, which holds theirs, all of one dtype.
        spec = next(iter(getattr(kv_cache_spec, "kv_cache_specs", {"": kv_cache_spec}).values()))
        if not has_kernels(torch.device(current_platform.device_type), spec.dtype):
            return AttentionCGSupport.NEVER
        if _most_queries(vllm_config) > MAX_QUERIES:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.UNIFORM_BATCH

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FactorMetadata:
        common = common_attn_metadata
        num_decodes, num_prompts, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold
        )
        metadata = FactorMetadata(
            slots=common.slot_mapping,
            block_table=common.block_table_tensor[:num_decodes],
            lengths=common.seq_lens[:num_decodes],
            query_starts=common.query_start_loc[: num_decodes + 1],
            num_decodes=num_decodes,
            max_decode_queries=min(common.max_query_len, self.reorder_batch_threshold),
        )
        if num_decodes:
            metadata.decode_pieces = self._schedule(metadata)
        if num_prompts:
            query_lengths = common.query_start_loc_cpu[num_decodes:].diff().tolist()
            lengths = common.seq_lens_cpu_upper_bound if self.bound_is_exact and not fast_build else common.seq_lens
            lengths = lengths[num_decodes : common.num_reqs].tolist()
            metadata.prompt_pieces = plan_pieces(
                query_lengths,
                lengths,
                num_decodes,
                num_decode_tokens,
                self.impl.room,
                self.impl.sliding_window,
                common.block_table_tensor,
                self.kv_cache_spec.block_size,
                common.slot_mapping,
                common.query_start_loc,
            )
        return metadata

    def _schedule(self, metadata: FactorMetadata) -> Pieces | None:
        """FlashTPA's schedule of the requests that decode; one object for each number of them, as CUDA graphs read its memory."""
        num_requests, max_queries = metadata.num_decodes, metadata.max_decode_queries
        if (num_requests, max_queries) not in self.pieces:
            self.pieces[num_requests, max_queries] = self.impl.empty_pieces(num_requests, max_queries, self.device)
        pieces = self.pieces[num_requests, max_queries]
        if pieces is not None:
            schedule_pieces(metadata.lengths, metadata.query_starts, pieces)
        return pieces


def _most_queries(vllm_config: VllmConfig) -> int:
    """The most query tokens of a request that decodes: one, and those that speculative decoding proposes."""
    speculation = vllm_config.speculative_config
    return 1 + (0 if speculation is None else speculation.num_speculative_tokens or 0)
