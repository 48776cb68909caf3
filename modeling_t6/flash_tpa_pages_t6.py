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
"""FlashTPA over a paged cache: decoding attention of a batch of requests of different lengths"""

import functools
import math
from dataclasses import dataclass

import torch

from .flash_tpa_t6 import (
    COMBINE_WARPS,
    COMBINED_SPLITS,
    LAUNCH_OPTIONS,
    LOG2_E,
    MAX_HEAD_DIM,
    MAX_QUERIES,
    MAX_SPLITS,
    can_overlap,
    choose_launch,
    choose_low_bit_launch,
    columns_of_heads,
    device_limits,
    power_of_2,
    rows_of,
    stride_unit,
)
from .launch_t6 import KeptKernel, keep


try:
    import triton

    from .flash_tpa_kernels_t6 import Mask, combine_pages_kernel, decode_kernel, schedule_kernel
    from .flash_tpa_low_bit_kernels_t6 import LowBitLaunch, Pages, low_bit_decode_kernel
except ImportError:
    triton = None


NO_WINDOW = 2**30  # longer than any request
SCHEDULED_REQUESTS, SCHEDULED_SLOTS, SCHEDULE_WARPS = 1024, 16, 8  # per program of the schedule kernel
COMBINE_PROGRAMS = 5  # per multiprocessor, as many as its registers hold


def _bucket(max_query_length: int) -> int:
    """The number of query tokens that the kernel is compiled for: 1, 2, 4, 8 or 16."""
    if not 1 <= max_query_length <= MAX_QUERIES:
        raise ValueError(f"max_query_length must be 1 to {MAX_QUERIES}, got {max_query_length}.")
    return 1 << (max_query_length - 1).bit_length()


@dataclass(frozen=True)
class Pieces:
    """
    The schedule of a batch of `num_requests`: its rows, divided into pieces of similar length, one for each program of the decode
    kernel. [`schedule_pieces`] fills it at each step, and [`paged_flash_tpa`] reads it in each layer. The tensors keep their
    addresses, so that CUDA graphs may read them.

    Attributes:
        slots: int32 [num_slots, 8], one piece each: the request (-1: unused), the first row and the end, the index of the partial
            result (-1: none, as the piece is a whole request), and more that `schedule_kernel` documents.
        splits: int32 [1 + num_requests, 4]: the number of requests that have several pieces, then for each of them the index of
            its first partial result, their number, and its query tokens' first and end.
        num_at_once: the number of pieces that the GPU processes concurrently.
        num_partials: the number of partial results for which there is memory.
        tile: pieces start on multiples of this many tokens, except for the first one of a sliding window.
        sliding_window: tokens that a query sees, including its own; `None`: all.
    """

    slots: torch.Tensor
    splits: torch.Tensor
    num_at_once: int
    num_partials: int
    tile: int
    sliding_window: int | None

    @property
    def num_requests(self) -> int:
        return self.splits.shape[0] - 1

    @classmethod
    def empty(
        cls,
        num_requests: int,
        max_query_length: int,
        num_heads: int,
        head_dim: int,
        k_rank: int,
        v_rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
        constant_a: bool = False,
        sliding_window: int | None = None,
        groups: int = 1,
    ) -> "Pieces":
        """
        An unfilled schedule for batches of `num_requests`, including those without tokens, and layers of this shape. Other
        layers with the same window may read it, too.

        Args:
            dtype: of the cache.
            groups: h / h_kv.
        """
        device = torch.device(device)
        num_queries = _bucket(max_query_length)
        num_sms, shared_memory = device_limits(device)
        launch = _low_bit_launch(
            num_queries, num_heads, head_dim, k_rank, v_rank, torch.bfloat16, dtype, constant_a, sliding_window, groups
        ) or choose_launch(
            num_queries, num_heads, head_dim, k_rank, v_rank, constant_a, dtype.itemsize, shared_memory, groups=groups
        )  # fmt: skip
        columns = launch.column_blocks(num_queries, columns_of_heads(num_heads, groups, constant_a))
        resident = num_sms * launch.programs_per_sm
        at_once = max(1, resident // columns)
        # The number of waves as in `choose_splits`, by how full they are if all requests have one length.
        per_split = num_requests * columns
        filled = {n: n * resident // per_split * per_split / (n * resident) for n in (1, 2, 3)}
        waves = max(filled, key=lambda n: filled[n] - 0.06 * n)
        num_slots = max(waves * at_once, at_once + num_requests)
        slots = torch.empty(num_slots, 8, dtype=torch.int32, device=device)
        splits = torch.empty(1 + num_requests, 4, dtype=torch.int32, device=device)
        return cls(slots, splits, at_once, min(num_slots, 3 * at_once), launch.tile, sliding_window)

    def new_partials(self, query: torch.Tensor, max_query_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Memory for partial results, float32: outputs [num_partials, queries, h, d], and log-sum-exps [num_partials, queries, h].
        `query` is [tokens, h, d].
        """
        shape = (self.num_partials, _bucket(max_query_length), *query.shape[1:])
        return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape[:-1], dtype=torch.float32)


def _low_bit_launch(
    num_queries, num_heads, head_dim, k_rank, v_rank, dtype, stored_dtype, constant_a, sliding_window, groups
) -> "LowBitLaunch | None":  # fmt: skip
    """`None` for shapes that `decode_kernel` reads instead. With a window, pieces may start within a tile."""
    if not num_queries == groups == 1 or constant_a or sliding_window is not None:
        return None
    return choose_low_bit_launch(num_heads, head_dim, k_rank, v_rank, dtype, stored_dtype)


def schedule_pieces(lengths: torch.Tensor, query_starts: torch.Tensor, pieces: Pieces) -> Pieces:
    """
    Divides the rows of a batch evenly among the programs of the GPU, whatever the lengths of the requests: one short launch for
    all layers with the same window. Does not wait for the device.

    Args:
        lengths: int32 [num_requests], the number of rows of each request, including those of its query tokens.
        query_starts: int32 [num_requests + 1], cumulative numbers of query tokens, from 0.

    Returns:
        `pieces`, filled.

    Raises:
        ValueError: if `lengths` or `query_starts` are for another number of requests.
    """
    num_slots, num_requests = pieces.slots.shape[0], pieces.num_requests
    if lengths.shape != (num_requests,) or query_starts.shape != (num_requests + 1,):
        raise ValueError(
            f"Pieces for {num_requests} requests need lengths [{num_requests}] and query_starts [{num_requests + 1}], got "
            f"{list(lengths.shape)} and {list(query_starts.shape)}."
        )
    kernel = keep(
        schedule_kernel,
        TILE=pieces.tile,
        BLOCK_R=SCHEDULED_REQUESTS,
        BLOCK_S=SCHEDULED_SLOTS,
        MAX_SPLITS=MAX_SPLITS,
        num_warps=SCHEDULE_WARPS,
        **LAUNCH_OPTIONS,
    )
    window = NO_WINDOW if pieces.sliding_window is None else pieces.sliding_window
    kernel(
        (triton.cdiv(num_slots, SCHEDULED_SLOTS), 1, 1),
        [lengths.contiguous(), query_starts.contiguous(), pieces.slots, pieces.splits],
        [num_requests, num_slots, pieces.num_at_once, window],
    )
    return pieces


def _check(query, key_pages, value_pages, block_table, pieces, max_query_length, sliding_window, output):
    if query.dim() != 3 or query.shape[2] > MAX_HEAD_DIM:
        raise ValueError(f"query must be [tokens, h, d] with d at most {MAX_HEAD_DIM}, got {list(query.shape)}.")
    if key_pages.shape[:2] != value_pages.shape[:2] or key_pages.stride(2) != 1 or value_pages.stride(2) != 1:
        raise ValueError(
            "key_pages and value_pages must be [blocks, page_size, width] of as many pages, with the numbers of a row side "
            f"by side, got {list(key_pages.shape)} and {list(value_pages.shape)} with strides {key_pages.stride()} and "
            f"{value_pages.stride()}."
        )
    if block_table.shape[0] < pieces.num_requests or block_table.stride(1) != 1:
        raise ValueError(
            f"block_table must have a contiguous row for each of {pieces.num_requests} requests, got {list(block_table.shape)}."
        )
    if pieces.sliding_window != sliding_window:
        raise ValueError(f"sliding_window is {sliding_window}, that of the pieces {pieces.sliding_window}.")
    if output is not None and (output.shape != query.shape or output.stride(2) != 1 or output.dtype != query.dtype):
        raise ValueError(
            f"output must be {query.dtype} {list(query.shape)} with contiguous heads, got {output.dtype} {list(output.shape)}."
        )


def paged_flash_tpa(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    pieces: Pieces,
    k_rank: int,
    v_rank: int,
    scaling: float,
    max_query_length: int,
    key_a: torch.Tensor | None = None,
    value_a: torch.Tensor | None = None,
    sliding_window: int | None = None,
    output: torch.Tensor | None = None,
    groups: int = 1,
    partials: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    [`flash_tpa`] of a few query tokens of each request over its pages. No gradient. Does not wait for the device, and its
    launches depend on shapes alone.

    Args:
        query: [tokens, h, d], rotated, the tokens of all requests concatenated; bfloat16, float16 or float32; d at most 256.
        key_pages, value_pages: [blocks, page_size, width] of rows as `FactorLayout` packs them, in the query's dtype or
            float8_e4m3fn, with any strides between pages and between rows. Fastest if `pieces.tile` divides the page size.
        block_table: int32 [requests or more, pages], the blocks of each request. Entries beyond its length, or before all
            windows, are ignored.
        lengths: int32 [requests], the number of rows of each request, including those of its query tokens: the last query token
            sees all of them, the one before it one less, and so on. 0 for a request without tokens.
        pieces: filled by [`schedule_pieces`] from the same lengths, and from the numbers of query tokens.
        scaling: of the scores, positive.
        max_query_length: the largest number of query tokens of a request, 1 to 16.
        key_a, value_a: constant A factors [R_K, h_kv] and [R_V, h_kv]; rows then hold B alone.
        sliding_window: how many tokens a query sees, including its own.
        output: where to write the output, [tokens, h, d].
        groups: h / h_kv, the number of consecutive heads that share a column of A.
        partials: memory from `pieces.new_partials`, which consecutive calls may share.

    Returns:
        Output [tokens, h, d]: `output`, if given. Tokens that belong to no request are not written.

    Raises:
        ValueError: if shapes or strides do not fit, or `pieces` are for another window.
    """
    _check(query, key_pages, value_pages, block_table, pieces, max_query_length, sliding_window, output)
    num_queries = _bucket(max_query_length)
    _, num_heads, head_dim = query.shape
    if query.stride(-1) != 1:
        query = query.contiguous()
    if output is None:
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
    if key_a is not None:
        key_a, value_a = key_a.contiguous(), value_a.contiguous()
    starts = key_pages.data_ptr() % 16, value_pages.data_ptr() % 16
    overlap = can_overlap(query.device)
    launches = _launches(
        num_queries, num_heads, head_dim, k_rank, v_rank, key_a is not None, sliding_window, groups, scaling, overlap,
        query.device, query.dtype, key_pages.dtype, key_pages.shape[1:], key_pages.stride(), value_pages.shape[2],
        value_pages.stride(), starts, pieces.tile,
    )  # fmt: skip
    partial, lse = pieces.new_partials(query, max_query_length) if partials is None else partials
    out_strides = output.stride()[:2]
    tensors = [lengths, partial, lse, pieces.slots, block_table, output]
    numbers = [*query.stride()[:2], *launches.numbers, block_table.stride(0)]
    if launches.is_low_bit:
        tensors = [query, key_pages, value_pages, *tensors]
        numbers = [*numbers, *out_strides]
    else:
        constants = (query if key_a is None else key_a), (query if value_a is None else value_a)
        tensors = [query, key_pages, value_pages, *constants, query, *tensors]
        numbers = [0, *numbers, NO_WINDOW if sliding_window is None else sliding_window, *out_strides]
    launches.decode((launches.columns * pieces.slots.shape[0], 1, 1), tensors, numbers)
    # No more programs than pairs of a query token and a head.
    columns = pieces.num_requests * num_queries * num_heads
    launches.combine(
        (min(launches.combine_programs, columns), 1, 1), [partial, lse, output, pieces.splits], out_strides
    )
    return output


@dataclass(frozen=True)
class _Launches:
    """
    What the launches for one shape of layer have in common in all steps.

    Attributes:
        columns: blocks of columns, each of which is a program, for one piece.
        combine_programs: the maximum for the combine kernel.
        numbers: the arguments of the decode kernel from the strides of pages to the scale of scores.
        is_low_bit: whether the decode kernel is `low_bit_decode_kernel`.
    """

    decode: KeptKernel
    combine: KeptKernel
    columns: int
    combine_programs: int
    numbers: tuple[int | float, ...]
    is_low_bit: bool


@functools.lru_cache(4096)
def _launches(
    num_queries, num_heads, head_dim, k_rank, v_rank, constant_a, sliding_window, groups, scaling, overlap, device, dtype,
    stored_dtype, key_sizes, key_strides, value_width, value_strides, starts, tile,
) -> _Launches:  # fmt: skip
    """`key_sizes` are (page_size, width); `starts` are the addresses of the pages modulo 16; `tile` is that of the pieces."""
    num_sms, shared_memory = device_limits(device)
    (page_size, key_width), itemsize = key_sizes, stored_dtype.itemsize
    unit = stride_unit(itemsize, key_strides[0], value_strides[0])
    # Asynchronous copies may move 8 bytes instead of 16, as for float8 rows of values, which may start on 8.
    offsets = [*starts, key_strides[1] * itemsize, value_strides[1] * itemsize]
    is_aligned = unit * itemsize >= 8 and not any(offset % 8 for offset in offsets)
    low_bit_launch = None
    if is_aligned and page_size % 8 == 0:
        low_bit_launch = _low_bit_launch(
            num_queries, num_heads, head_dim, k_rank, v_rank, dtype, stored_dtype, constant_a, sliding_window, groups
        )  # fmt: skip
    launch, step, gathered = low_bit_launch, 1, False
    if launch is None:
        launch = choose_launch(
            num_queries, num_heads, head_dim, k_rank, v_rank, constant_a, itemsize, shared_memory, is_aligned, groups
        )
        step, gathered = launch.step, page_size % launch.block_n != 0
    keys, values = (
        rows_of(
            rank,
            num_heads,
            head_dim,
            strides[1],
            width,
            constant_a,
            step,
            gathered,
            start_8=is_aligned and start == 8,
            groups=groups,
        )
        for rank, strides, width, start in (
            (k_rank, key_strides, key_width, starts[0]),
            (v_rank, value_strides, value_width, starts[1]),
        )
    )
    constants = {
        "KEYS": keys, "VALUES": values, "LAUNCH": launch, "HAS_LENGTHS": True, "STRIDE_UNIT": unit, "OVERLAP": overlap,
        "num_warps": launch.warps, **LAUNCH_OPTIONS,
    }  # fmt: skip
    # The zeros are arguments for rows that are not paged: stride of lengths, key length and number of splits.
    numbers = key_strides[0] // unit, value_strides[0] // unit, 0, 0, 0
    scale = LOG2_E * scaling / k_rank
    if low_bit_launch is None:
        visible = Mask(
            num_queries, num_heads, causal=True, kind="none", by_column=False,
            sliding=sliding_window is not None and num_queries > 1,
        )  # fmt: skip
        decode = keep(decode_kernel, MASK=visible, PAGE_SIZE=page_size, **constants)
        mask_strides = 0, 0, 0, 0
        numbers = *numbers[:2], *mask_strides, *numbers[2:], scale, LOG2_E
    else:
        pages = Pages(page_size, math.gcd(page_size, launch.tile, tile))
        decode = keep(low_bit_decode_kernel, PAGES=pages, maxnreg=launch.registers, **constants)
        numbers = *numbers, scale
    combine = keep(
        combine_pages_kernel,
        NUM_QUERIES=num_queries,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        V_RANK=v_rank,
        BLOCK_D=power_of_2(head_dim, least=16),
        BLOCK_S=COMBINED_SPLITS,
        MAX_SPLITS=MAX_SPLITS,
        OVERLAP=overlap,
        num_warps=COMBINE_WARPS,
        **({"launch_pdl": True} if overlap else {}),
        **LAUNCH_OPTIONS,
    )
    return _Launches(
        decode,
        combine,
        columns=launch.column_blocks(num_queries, columns_of_heads(num_heads, groups, constant_a)),
        combine_programs=COMBINE_PROGRAMS * num_sms,
        numbers=numbers,
        is_low_bit=low_bit_launch is not None,
    )
