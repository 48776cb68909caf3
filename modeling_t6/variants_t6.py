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
"""What the paper's variants change of the factors: their activation, third factors, and RoPE where they are read"""

import torch
from transformers.cache_utils import Cache

from .tensor_parallel_t6 import softmax_over_heads


def activate_head_factors(a: torch.Tensor, activation: str | None, head_mesh=None) -> torch.Tensor:
    """
    Sigmoid of A [batch, seq, R, h], or its softmax over the heads ("nonlinear head factors", appendix G; the research
    code has the sigmoid). They are cached so, and all that reads a cache of factors reads these too. `head_mesh`: the
    processes that have the other heads, if any.
    """
    if activation is None:
        return a
    if activation == "sigmoid":
        return torch.sigmoid(a)
    softmax_dtype = torch.promote_types(a.dtype, torch.float32)
    if head_mesh is not None:
        return softmax_over_heads(a.to(softmax_dtype), head_mesh).to(a.dtype)
    return torch.softmax(a, dim=-1, dtype=softmax_dtype).to(a.dtype)


def third_order_features(bc: torch.Tensor, b_dim: int) -> torch.Tensor:
    """
    vec(b (x) c) of appendix C: b and c side by side [..., d_b + d_c] to features [..., d_c * d_b], the columns of the
    matrix b c^T one after the other.
    """
    b, c = bc[..., :b_dim], bc[..., b_dim:]
    return (c[..., :, None] * b[..., None, :]).flatten(-2)


def row_positions(
    layer_types: list[str], cache: Cache, query_length: int, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Positions for models that rotate B_K where it is read. Such a cache holds no positions, and RoPE needs only their
    differences: a token's position is the number of rows before its own, padding included. `layer_types` are those of
    the cache's layers.

    Returns:
        Those of the new tokens [1, query_length], and by layer type those of all rows that the cache will return, from
        the first new token's update on, [1, key_length].
    """
    new = torch.arange(query_length, device=device) + cache.get_seq_length()
    rows = {}
    for layer_type in set(layer_types):
        length, offset = cache.get_mask_sizes(query_length, layer_types.index(layer_type))
        # Rows that a static cache has not filled are masked; their positions must not lengthen a dynamic RoPE.
        rows[layer_type] = torch.minimum(torch.arange(length, device=device) + offset, new[-1])[None]
    return new[None], rows


def validate_positions(position_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache) -> None:
    """
    Refuses `position_ids` [1 or batch, query_length] whose differences are not those of `row_positions`: they must count
    the rows of the cache, or the tokens after left padding, as `generate()` does. Padding itself may have any.
    """
    past, query_length = int(cache.get_seq_length()), position_ids.shape[1]
    rows = torch.arange(past, past + query_length, device=position_ids.device)
    is_padding, left_padding = torch.zeros_like(position_ids, dtype=torch.bool), 0
    if attention_mask is not None and attention_mask.dim() == 2:
        mask = attention_mask.to(position_ids.device) != 0
        is_padding = ~mask[:, past : past + query_length]
        left_padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    count_rows = ((position_ids == rows) | is_padding).all(-1)
    count_tokens = ((position_ids == rows - left_padding) | is_padding).all(-1)
    if not (count_rows | count_tokens).all():
        raise ValueError(
            "With `noncontextual_b` or `shared_b` the cache holds no positions: `position_ids` must go up by one from "
            f"row to row, starting at 0 or after left padding, here {rows.tolist()} or that less the padding, got "
            f"{position_ids.tolist()}. Padding between or after the tokens, packed sequences and trees of tokens need "
            "`use_cache=False`."
        )
