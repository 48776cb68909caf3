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
"""Decoding where FlashTPA's kernels do not run, as on a CPU: attention in factor space, request by request"""

import itertools

import torch

from modeling_t6.cache_t6 import FactorLayout
from modeling_t6.factor_pages_t6 import rows_at
from modeling_t6.factor_space_t6 import factor_space_attention


def paged_factor_space_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    query_starts: torch.Tensor,
    layouts: tuple[FactorLayout, FactorLayout],
    constant_a: tuple[torch.Tensor | None, torch.Tensor | None],
    scaling: float,
    sliding_window: int | None,
    output: torch.Tensor,
) -> None:
    """
    `paged_flash_tpa` in PyTorch. In place of ranks it takes the `layouts` of key rows and value rows; `constant_a` are A_K and A_V
    where they are constants.
    """
    block_size = key_pages.shape[1]
    for request, (start, end) in enumerate(itertools.pairwise(query_starts.tolist())):
        length = int(lengths[request])
        if start == end:
            continue
        first = 0 if sliding_window is None else max(0, length - (end - start) + 1 - sliding_window)
        positions = torch.arange(first, length, device=query.device)
        slots = block_table[request, positions // block_size].long() * block_size + positions % block_size
        factors = []
        for pages, layout, a in zip((key_pages, value_pages), layouts, constant_a):
            cached_a, b = layout.unpack(rows_at(pages, slots).to(query.dtype)[None, None])
            factors.append((cached_a if a is None else a, b))
        own_positions = positions[len(positions) - (end - start) :, None]
        visible = (positions <= own_positions) & (positions > own_positions - (sliding_window or length))
        attended, _ = factor_space_attention(query[None, start:end], *factors, visible[None, None], scaling)
        output[start:end] = attended[0]
