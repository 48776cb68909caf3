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
"""Attention of prompts: their K and V, formed from the pages, pass through a workspace of bounded size, piece by piece"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from vllm.config import VllmConfig

from modeling_t6.factor_pages_t6 import slots_of_rows


# Rows of the workspace for K and V, unless a step may add more to one request.
WORKSPACE_ROWS = 16384


@dataclass
class Piece:
    """
    Rows of some requests that are in the workspace together, and the query tokens that attend to them.

    Attributes:
        queries: the slice of the step's tokens that are query tokens of these requests.
        query_starts: int32 [requests + 1] on the device, cumulative numbers of query tokens, from 0.
        row_starts: int32 [requests + 1] on the device, cumulative numbers of rows, from 0.
        slots: int64 [rows] on the device, the slots of these rows in the pages.
        max_queries, max_rows: the most of one request.
        is_first, is_last: whether this is the first, or the last, of the pieces that its query tokens attend to. In the last one
            attention is causal, the last query token being aligned with the last row.
        is_new: whether its rows are exactly those of its query tokens, as the prompts begin in this step.
    """

    queries: slice
    query_starts: torch.Tensor
    row_starts: torch.Tensor
    slots: torch.Tensor
    max_queries: int
    max_rows: int
    is_first: bool
    is_last: bool
    is_new: bool


def workspace_rows(vllm_config: VllmConfig) -> int:
    """The number of rows of the workspace: at least as many as a step adds to one request, plus a sliding window."""
    model_config = vllm_config.model_config
    max_length, most_queries = model_config.max_model_len, vllm_config.scheduler_config.max_num_batched_tokens
    window = getattr(model_config.hf_text_config, "sliding_window", None) or 0
    device = torch.device(vllm_config.device_config.device_type)
    if flash_attention_version(device, model_config.dtype, model_config.hf_text_config.head_dim) is None:
        return max_length  # pieces cannot be merged
    return max(WORKSPACE_ROWS, min(most_queries, max_length) + window)


def plan_pieces(
    query_lengths: list[int],
    lengths: list[int],
    first_request: int,
    first_token: int,
    room: int,
    window: int | None,
    block_table: torch.Tensor,
    block_size: int,
    step_slots: torch.Tensor,
    step_query_starts: torch.Tensor,
) -> list[Piece]:
    """
    Divides the rows of prompts into pieces of at most `room` rows. Consecutive requests share a piece if they fit. A request that
    does not fit alone has several pieces, of which the last has `room` rows. With a sliding window only the rows that query
    tokens see are read, which always fit.

    Args:
        query_lengths: query tokens of each prompt, the last of its `lengths` tokens.
        first_request, first_token: the indices of the first prompt, and of its first token, in the step.
        step_slots: int64 [tokens or more], the slots of the rows of all tokens of the step.
        step_query_starts: int32 [requests + 1 or more], cumulative numbers of query tokens of all requests of the step.
    """
    starts = [max(0, n - q + 1 - window) if window else 0 for q, n in zip(query_lengths, lengths)]
    pieces = []
    request, token = 0, first_token
    while request < len(lengths):
        end, num_rows = request, 0
        while end < len(lengths) and num_rows + lengths[end] - starts[end] <= room:
            num_rows += lengths[end] - starts[end]
            end += 1
        if end > request:
            steps = [list(zip(starts[request:end], lengths[request:end]))]
        else:
            end = request + 1
            start, length = starts[request], lengths[request]
            steps = [
                [span] for span in itertools.pairwise([*range(start, length - room, room), length - room, length])
            ]
        queries, requests = query_lengths[request:end], slice(first_request + request, first_request + end)
        if queries == lengths[request:end]:  # prompts that begin in this step
            query_starts = step_query_starts[requests.start : requests.stop + 1]
            pieces.append(_new_piece(token, queries, query_starts - token if token else query_starts, step_slots))
        else:
            for spans in steps:
                is_first, is_last = spans is steps[0], spans is steps[-1]
                pieces.append(_piece(token, queries, spans, is_first, is_last, block_table[requests], block_size))
        token += sum(queries)
        request = end
    return pieces


def _new_piece(token: int, query_lengths: list[int], query_starts: torch.Tensor, step_slots: torch.Tensor) -> Piece:
    queries = slice(token, token + sum(query_lengths))
    longest = max(query_lengths)
    return Piece(
        queries=queries,
        query_starts=query_starts,
        row_starts=query_starts,
        slots=step_slots[queries],
        max_queries=longest,
        max_rows=longest,
        is_first=True,
        is_last=True,
        is_new=True,
    )


def _piece(
    token: int,
    query_lengths: list[int],
    spans: list[tuple[int, int]],
    is_first: bool,
    is_last: bool,
    block_table: torch.Tensor,
    block_size: int,
) -> Piece:
    device, num_requests, row_lengths = block_table.device, len(spans), [end - start for start, end in spans]
    # One copy to the device, asynchronous to the host.
    query_ends, row_ends = itertools.accumulate(query_lengths), itertools.accumulate(row_lengths)
    numbers = [0, *query_ends, 0, *row_ends, *(start for start, _ in spans)]
    host = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    query_starts, row_starts, first_positions = host.to(device, non_blocking=True).split(
        [num_requests + 1, num_requests + 1, num_requests]
    )
    return Piece(
        queries=slice(token, token + sum(query_lengths)),
        query_starts=query_starts,
        row_starts=row_starts,
        slots=slots_of_rows(block_table, first_positions, row_starts, block_size, sum(row_lengths)),
        max_queries=max(query_lengths),
        max_rows=max(row_lengths),
        is_first=is_first,
        is_last=is_last,
        is_new=False,
    )


def can_merge_pieces(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashAttention may run, which returns the log-sum-exps that merging pieces needs."""
    is_half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and is_half and head_dim % 8 == 0 and head_dim <= 256


def flash_attention_version(device: torch.device, dtype: torch.dtype, head_dim: int) -> int | None:
    """
    The version of FlashAttention that vLLM chooses here. `None` if it has none: pieces can then not be merged, and all rows of a
    request must fit the workspace. Ask once, as this takes longer than a launch.
    """
    if not can_merge_pieces(device, dtype, head_dim):
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    return get_flash_attn_version(head_size=head_dim)


def attend_to_piece(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    piece: Piece,
    scaling: float,
    window: int | None,
    fa_version: int | None,
    earlier: tuple[torch.Tensor, torch.Tensor] | None,
    output: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    Attention of a piece's query tokens to its rows, merged with that to earlier pieces.

    Args:
        query: [tokens, h, d].
        key, value: [rows, key/value heads, d].
        fa_version: from `flash_attention_version`; `None` for PyTorch's attention.
        earlier: what the previous piece of the same request returned, if there is one.
        output: [tokens, h, d], written with the last piece.

    Returns:
        For a piece that is not the last: the output and the log-sum-exp [h, tokens] up to this piece; else `None`.
    """
    if fa_version is None:
        return _attend_in_pytorch(query, key, value, piece, scaling, window, output)
    flash_attn_varlen_func, merge_attn_states = _flash_attention()
    is_only = piece.is_first and piece.is_last
    attended, lse = flash_attn_varlen_func(
        query,
        key,
        value,
        max_seqlen_q=piece.max_queries,
        cu_seqlens_q=piece.query_starts,
        max_seqlen_k=piece.max_rows,
        cu_seqlens_k=piece.row_starts,
        softmax_scale=scaling,
        causal=piece.is_last,
        window_size=[-1, -1] if window is None else [window - 1, 0],
        return_softmax_lse=True,
        out=output if is_only else None,
        fa_version=fa_version,
    )
    if is_only:
        return None
    if piece.is_first:
        return attended, lse
    merged = output if piece.is_last else torch.empty_like(attended)
    merged_lse = torch.empty_like(lse)
    merge_attn_states(merged, *earlier, attended, lse, merged_lse)
    return None if piece.is_last else (merged, merged_lse)


@functools.cache
def _flash_attention() -> tuple[Callable, Callable]:
    """vLLM's functions, which can be imported only on GPUs."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    return flash_attn_varlen_func, merge_attn_states


def _attend_in_pytorch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    piece: Piece,
    scaling: float,
    window: int | None,
    output: torch.Tensor,
) -> None:
    spans = (itertools.pairwise(starts.tolist()) for starts in (piece.query_starts, piece.row_starts))
    for (query_start, query_end), (row_start, row_end) in zip(*spans):
        num_queries, num_rows = query_end - query_start, row_end - row_start
        rows = torch.arange(num_rows, device=query.device)
        own_rows = rows[num_rows - num_queries :, None]
        attended = nn.functional.scaled_dot_product_attention(
            query[query_start:query_end].transpose(0, 1)[None],
            key[row_start:row_end].transpose(0, 1)[None],
            value[row_start:row_end].transpose(0, 1)[None],
            attn_mask=(rows <= own_rows) & (rows > own_rows - (window or num_rows)),
            scale=scaling,
            enable_gqa=key.shape[1] < query.shape[1],
        )
        output[query_start:query_end] = attended[0].transpose(0, 1)
