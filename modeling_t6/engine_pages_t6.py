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
"""Views of the cache of Transformers' continuous batching as pages of contiguous rows, as kernels read them"""

from dataclasses import dataclass

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.continuous_batching import PagedAttentionCache


@dataclass(frozen=True)
class PageGroup:
    """
    Layers that share pages in the engine, and how the engine's indices of tokens map to pages.

    Attributes:
        index: of this group in the engine's lists of indices and of block tables.
        layer_type: `"full_attention"` or `"sliding_attention"`.
        page_size: tokens per page.
        stride: the difference between the engine's indices of tokens in consecutive pages of a layer.
        spare_slot: the slot for rows that are never read.
    """

    index: int
    layer_type: str
    page_size: int
    stride: int
    spare_slot: int

    def pages(self, indices: torch.Tensor) -> torch.Tensor:
        """The pages of the engine's indices of tokens."""
        return indices // self.stride

    def slots(self, indices: torch.Tensor) -> torch.Tensor:
        """The slots, page * page_size + offset, of the engine's indices of tokens."""
        if self.stride == self.page_size:
            return indices
        return indices // self.stride * self.page_size + indices % self.page_size

    def pages_of_table(self, block_table: torch.Tensor) -> torch.Tensor:
        """The pages of one of the engine's block tables; -1 stays -1."""
        scale = self.stride // self.page_size
        return block_table if scale == 1 else block_table // scale


class EnginePages:
    """
    The rows of factors in the engine's cache. Per token and layer, the cache has memory for two rows of one width, for a key and a
    value. Here they are one row, which holds the key row followed by the value row: even if these differ in width, no memory is
    wasted, and each is contiguous.

    Up to Transformers 5.17 the engine has one tensor for keys and one for values: [`join_halves`] makes them the two halves of one
    tensor. From 5.18 on the page of values follows the page of keys of the same tokens: both together are one page of rows here.

    Attributes:
        rows: by layer, [pages, page_size, 2 * width of the engine's rows].
        groups: by layer.
        has_kernel: whether a kernel reads the pages.
    """

    def __init__(self, cache: PagedAttentionCache, config: PreTrainedConfig, has_kernel: bool):
        self.has_kernel = has_kernel
        self.rows: list[torch.Tensor] = []
        self.groups: list[PageGroup] = []
        for layer_idx in range(config.num_hidden_layers):
            layer_type = config.layer_type(layer_idx)
            if hasattr(cache, "key_cache"):
                index, place = cache.layer_index_to_group_indices[layer_idx]
                page_size = stride = cache.block_size
                spare_index = cache.write_trash_index
                halves = cache.key_cache[place], cache.value_cache[place]
                rows = halves[0].as_strided((len(halves[0]), 2 * cache.head_dim), (2 * cache.head_dim, 1))
            else:
                allocator = cache.layer_to_allocator[layer_idx]
                index, page_size, place = (
                    allocator.index,
                    allocator.tokens_per_page,
                    allocator.layer_indices.index(layer_idx),
                )
                stride, spare_index = 2 * page_size, allocator.write_trash_index
                rows = allocator.cache_tensor.view(-1, 2 * allocator.head_dim)[place * page_size :]
            spare_slot = spare_index // stride * page_size + spare_index % page_size
            self.rows.append(rows.unflatten(0, (-1, page_size)))
            self.groups.append(PageGroup(index, layer_type, page_size, stride, spare_slot))


def join_halves(processor) -> None:
    """Replaces the key and value tensors of a batch processor's cache, of Transformers 5.17, by the two halves of one tensor."""
    cache, offloading = processor.cache, processor.offloading_manager
    num_tensors, (num_slots, num_heads, head_dim) = len(cache.key_cache), cache.cache_shape
    has_views = bool(offloading._gpu_key_views)
    # All are freed first, as there may be no memory for both.
    cache.key_cache = cache.value_cache = offloading._gpu_key_views = offloading._gpu_value_views = ()
    if cache.device.type == "cuda":
        torch.cuda.empty_cache()
    halves = []
    for _ in range(num_tensors):
        rows = torch.empty((num_slots, num_heads, 2 * head_dim), dtype=cache.dtype, device=cache.device)
        rows[cache.read_trash_index : cache.write_trash_index] = 0  # the engine reads these for padding
        halves.append(rows.split(head_dim, dim=-1))
    cache.key_cache, cache.value_cache = (list(tensors) for tensors in zip(*halves))
    if has_views:
        shape = (-1, cache.block_size, num_heads, head_dim)
        offloading._gpu_key_views = [keys.view(shape) for keys in cache.key_cache]
        offloading._gpu_value_views = [values.view(shape) for values in cache.value_cache]
