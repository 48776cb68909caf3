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
"""FlashTPA: decoding attention that reads the cached factors once. The choice of kernels and sizes, and their launches."""

import functools
import math
import os
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .cache_t6 import FactorLayout
from .factors_t6 import Factors


try:
    import triton

    from .flash_tpa_kernels_t6 import Mask, Rows, combine_kernel, decode_kernel
    from .flash_tpa_low_bit_kernels_t6 import LowBitLaunch, Pages, low_bit_decode_kernel
except ImportError:
    triton = None


LOG2_E = 1 / math.log(2)
MAX_QUERIES = 16
MAX_HEAD_DIM = 256
MAX_SPLITS = 1024
COMBINED_SPLITS = 64  # in one iteration of the combine kernel
COMBINE_WARPS = 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# On Hopper and newer, the launch of the combine kernel overlaps the decode kernel; a benchmark may switch it off.
OVERLAP = True
# Of every kernel's launch. Products and sums are one instruction: Triton's default up to 3.9, which warns that the next one's is another.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}
# Arguments of the decode kernel that only a paged cache needs.
WITHOUT_PAGES = {
    **dict.fromkeys(("slots_ptr", "table_ptr", "out_ptr", "table_stride", "window", "out_stride_t", "out_stride_h")),
    "PAGE_SIZE": 0,
}
# Tests run the kernels on a CPU, in Triton's interpreter.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Launch(NamedTuple):
    """
    Sizes with which the decode kernel is compiled and launched. A program computes score tiles of `block_n` tokens by columns,
    one for each pair of a query token and a head.
    """

    block_n: int  # tokens in a tile
    block_t: int  # query tokens in a tile
    block_h: int  # heads in a tile
    rest_h: int  # heads in a second, narrower tile of the same program, or 0
    block_d: int  # features of a head, padded to a power of 2
    unroll: bool  # whether the loop over ranks is unrolled, so that the loads of all ranks are in flight together
    stages: int  # pipeline stages of the loop over tokens, or over ranks if that is not unrolled
    step: int  # ranks in one matrix product, if that divides the rank
    warps: int
    programs_per_sm: int  # resident on a multiprocessor

    @property
    def tile(self) -> int:
        return self.block_n

    def column_blocks(self, num_queries: int, num_heads: int) -> int:
        return -(-num_queries // self.block_t) * -(-num_heads // (self.block_h + self.rest_h))


def power_of_2(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


def columns_of_group(groups: int, constant_a: bool) -> int:
    """Columns for the `groups` heads that share a column of a cached A; a constant A is loaded for each head."""
    return 1 if constant_a else power_of_2(groups)


def columns_of_heads(num_heads: int, groups: int, constant_a: bool) -> int:
    """Columns for all heads of one query token, including those that pad groups to a power of 2."""
    return num_heads if constant_a else num_heads // groups * power_of_2(groups)


@functools.cache
def choose_launch(
    num_queries: int,
    num_heads: int,
    head_dim: int,
    k_rank: int,
    v_rank: int,
    constant_a: bool,
    itemsize: int,
    shared_memory: int,
    is_aligned: bool = True,
    groups: int = 1,
    elements_per_load: int = 1,
    is_float32: bool = False,
) -> Launch:
    """
    The sizes for one shape of model: the fastest of `benchmarks/flash_tpa_sweep.py` on an H200, with rules for the shapes in
    between. Tiles of heads, and the sizes for float32, are those that the compiler fits into registers.

    Args:
        itemsize: bytes of an element of the cache.
        shared_memory: bytes available to a program.
        is_aligned: whether rows start on 16 bytes (in pages, whose alignment the kernel is told, on 8).
        groups: query heads that share a column of A.
        elements_per_load: of B, see `Rows`.
        is_float32: whether queries are float32, to which rows are then converted in registers.
    """
    register_bytes = 4 if is_float32 else max(2, itemsize)  # of an element in registers
    group_columns = columns_of_group(groups, constant_a)
    num_heads = columns_of_heads(num_heads, groups, constant_a)
    block_d = power_of_2(head_dim, least=16)
    block_t, block_h, rest_h = _choose_columns(
        num_queries, num_heads, block_d, group_columns, itemsize, register_bytes
    )
    columns = block_t * (block_h + rest_h)
    is_converted = elements_per_load > 1

    def bytes_used(block_n: int, stages: int, ranks: int = k_rank + v_rank) -> int:
        """
        Shared memory of a program: buffers of B and, one less, of A, the query, and the weights of a tile. Overestimates A of
        grouped heads.
        """
        a_columns = 0 if constant_a else block_h + rest_h
        b_columns = block_d // 2 if elements_per_load == 8 else block_d
        buffers = block_n * ranks * (stages * b_columns + (stages - 1) * a_columns) * itemsize
        converted = block_n * block_d * register_bytes if is_converted else 0  # to the layout of tensor cores
        operand_bytes = register_bytes if is_converted else itemsize
        return buffers + converted + (max(64, block_n) + block_d) * columns * operand_bytes

    # A matrix product takes two ranks together; with 8-bit elements, in narrow tiles alone.
    unroll = register_bytes < 4 and k_rank + v_rank <= 6
    has_even_ranks = not constant_a and k_rank % 2 == v_rank % 2 == 0
    pairs_ranks = unroll and has_even_ranks and (columns <= 32 or itemsize == 2) and not is_converted
    step = 2 if pairs_ranks and bytes_used(32, stages=2) <= shared_memory else 1
    if register_bytes == 4:
        block_n = 16  # more would spill registers
    elif step == 2:  # products of 64 rows or more
        block_n = 64 if itemsize == 2 and bytes_used(64, stages=3) <= 150_000 else 32
    else:
        is_small = itemsize == 2 or columns <= 32 and block_d <= 64  # 8-bit elements are converted in registers
        block_n = 128 if k_rank + v_rank == 2 and is_small and bytes_used(128, stages=3) <= 150_000 else 64
    unroll = unroll and bytes_used(block_n, stages=2) <= shared_memory
    ranks = k_rank + v_rank if unroll else 1
    # A third stage, except where another program per multiprocessor is worth more: with wide tiles that heads do not fill, and
    # with 8-bit elements.
    is_full = columns <= 32 or step == 2 or 3 * num_heads > 2 * columns * -(-num_heads // columns)
    is_8_bit = itemsize == 1 and block_n == 128
    most_bytes = min(190_000 if columns > 32 and is_full else 150_000, shared_memory)
    stages = 3 if bytes_used(block_n, 3, ranks) <= most_bytes and is_full and not is_8_bit else 2
    programs_that_fit = (shared_memory + 1024) // (bytes_used(block_n, stages, ranks) + 1024)
    programs_per_sm = max(1, min(programs_that_fit, 4 if is_8_bit else 3 if itemsize == 1 and step == 2 else 2))
    if is_converted:  # registers are the limit
        programs_per_sm = 3 if block_n < 128 and columns <= 32 and block_d <= 64 else 2
    warps = 8 if register_bytes == 4 or block_d >= 128 and not unroll else 4
    # Asynchronous copies move 4 bytes or more. A B that is not aligned to that, or an A of few groups, is loaded through
    # registers, without a pipeline. There Triton 3.6 miscompiles some unrolled loops; and where the tensor cores read tiles of
    # 64 tokens from the one buffer that remains, ptxas 12.8 loses its address.
    a_bytes = max(1, min(block_h, rest_h or block_h) // group_columns) * itemsize
    is_narrow = group_columns > 1 and (a_bytes < 4 or a_bytes * step * block_n < 4 * 32 * warps)
    if not is_aligned or head_dim * itemsize % 4 or is_narrow:
        block_n, unroll, step = min(block_n, 32), False, 1
    return Launch(block_n, block_t, block_h, rest_h, block_d, unroll, stages, step, warps, programs_per_sm)


def _choose_columns(
    num_queries: int, num_heads: int, block_d: int, group_columns: int, itemsize: int, register_bytes: int
) -> tuple[int, int, int]:
    """`block_t`, `block_h` and `rest_h` of a [`Launch`], as many as fit the registers."""
    # Triton 3.6 miscompiles products of 8 columns per group of 4 warps (its issue 7830). So 16 columns are the fewest, and 8
    # warps are used only where they divide the features.
    narrowest = 16 if block_d <= 64 and register_bytes == 2 else 32
    widest = 64 if block_d == 64 and register_bytes == 2 else 32
    block_h, rest_h = min(power_of_2(num_heads, narrowest), widest), 0
    if num_queries == 1:
        widths = [(width, 0) for width in (16, 32, 64) if narrowest <= width <= widest]
        if widest == 64 and itemsize == 2 and group_columns <= 16:  # else tiles would end within groups
            widths += [(32, 16), (64, 16)]
        # Few columns without a head, in few programs, since each reads B again.
        block_h, rest_h = min(reversed(widths), key=lambda width: -(-num_heads // sum(width)) * (sum(width) + 32))
    block_t = min(widest // block_h, 1 << (num_queries - 1).bit_length())
    return block_t, block_h, rest_h


@functools.cache
def elements_per_load(k_rank: int, v_rank: int, head_dim: int, stored_dtype: torch.dtype, is_aligned: bool) -> int:
    """
    How many elements of B one load of 32 bits takes: 8 if they are packed in 4 bits; 4 if they are float8 and a rank is odd, else 1.
    With even ranks, products of two ranks together, of elements that are loaded singly, take two thirds of the time.
    """
    if stored_dtype == torch.uint8:
        return 8
    is_even = k_rank % 2 == v_rank % 2 == 0
    return 4 if stored_dtype == torch.float8_e4m3fn and is_aligned and head_dim % 4 == 0 and not is_even else 1


@functools.cache
def choose_low_bit_launch(
    num_heads: int, head_dim: int, k_rank: int, v_rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
) -> "LowBitLaunch | None":  # fmt: skip
    """
    The sizes of the low-bit kernel, for one query token over rows of float8 or of 4 bits, where A has a column for each head
    and there is no mask. `None` for shapes that [`decode_kernel`] reads instead: other sizes of heads, heads that fill less
    than half of a block of 32, or queries of float32.
    """
    is_low_bit = stored_dtype in (torch.float8_e4m3fn, torch.uint8) and dtype != torch.float32
    if not (is_low_bit and num_heads > 8 and head_dim == 64 and max(k_rank, v_rank) <= 2):
        return None
    # Measured: programs of one warp are fastest, but for float8 of rank 2, of two warps.
    warps = 1 if stored_dtype == torch.uint8 else max(k_rank, v_rank)
    return LowBitLaunch(block_n=32, warps=warps, programs_per_sm=8 // warps)


def rows_of(
    rank: int,
    num_heads: int,
    head_dim: int,
    stride: int,
    width: int,
    constant_a: bool,
    step: int,
    gathered: bool = False,
    start_8: bool = False,
    groups: int = 1,
    packed: bool = False,
    elements_per_load: int = 1,
) -> "Rows":
    """`Rows` of `width` elements that are `stride` elements apart, read `step` ranks together where that divides the rank."""
    step = step if rank % step == 0 else 1
    padded_heads, group_columns = width // rank - head_dim, columns_of_group(groups, constant_a)
    if packed:
        padded_heads = FactorLayout(rank, 0 if constant_a else num_heads // groups, head_dim).padded_heads
    return Rows(
        rank, num_heads, head_dim, stride, padded_heads, constant_a, step, gathered, start_8, groups, group_columns, packed,
        elements_per_load,
    )  # fmt: skip


@functools.lru_cache  # each length is asked for by all layers
def choose_splits(programs: int, resident_programs: int, num_blocks: int) -> int:
    """
    Into how many splits the cache is divided (split-KV), each of `programs` programs: as many as fill the GPU, which holds
    `resident_programs`, in one wave, or in two to four waves where the last one is then fuller.
    """
    splits = {waves: waves * resident_programs // programs for waves in (1, 2, 3, 4)}
    long_enough = [n for n in splits if n == 1 or 8 * splits[n] <= num_blocks]
    best = max(long_enough, key=lambda n: splits[n] * programs / (n * resident_programs) - 0.06 * n)
    return max(1, min(splits[best], num_blocks, MAX_SPLITS))


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """The number of multiprocessors, and the bytes of shared memory available to a program."""
    if device.type != "cuda":
        return 4, 232448
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def can_overlap(device: torch.device) -> bool:
    """Whether the GPU has programmatic dependent launch, by which a kernel starts before the previous one has ended."""
    return OVERLAP and device.type == "cuda" and capability(device) >= (9, 0)


@functools.lru_cache(4096)
def stride_unit(itemsize: int, *strides: int) -> int:
    """The largest power of 2, up to 16 bytes, that divides all strides (in elements)."""
    return math.gcd(16 // itemsize, *strides)


def _aligned_to_8(rows: torch.Tensor) -> torch.Tensor:
    """Rows of 4 bits, copied unless each starts on 8 bytes and the first on 16, as those of a cache do."""
    if rows.stride(-1) == 1 and not (rows.stride(0) % 8 or rows.stride(2) % 8 or rows.data_ptr() % 16):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _prepare_rows(key_rows: torch.Tensor, value_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """
    Returns:
        The rows, copied if the kernels could not read them; the unit, in elements, in which kernels are given their batch
        strides; and the largest power of 2, up to 16, of bytes on which every row is known to start.
    """
    packed = key_rows.dtype == torch.uint8
    if packed:
        key_rows, value_rows = (_aligned_to_8(rows) for rows in (key_rows, value_rows))
    key_rows, value_rows = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (key_rows, value_rows))
    itemsize = key_rows.element_size()
    unit = stride_unit(itemsize, key_rows.stride(0), value_rows.stride(0))
    alignment = 16 if packed else 1
    if key_rows.data_ptr() % 16 == value_rows.data_ptr() % 16 == 0 and not packed:
        alignment = math.gcd(16, *(n * itemsize for n in (unit, key_rows.stride(2), value_rows.stride(2))))
    return key_rows, value_rows, unit, alignment


def _new_partials(query: torch.Tensor, num_splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Uninitialised partial results of the splits, float32: outputs [batch, splits, query_length, h, d], and log-sum-exps
    [batch, splits, query_length, h].
    """
    shape = (query.shape[0], num_splits, *query.shape[1:])
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape[:-1], dtype=torch.float32)


def _batch_stride(lengths: torch.Tensor | None) -> int:
    """0 for one length of all sequences."""
    return lengths.stride(0) if lengths is not None and lengths.shape[0] > 1 else 0


def _flash_tpa(
    query: torch.Tensor,
    key_rows: torch.Tensor,
    value_rows: torch.Tensor,
    key_a: torch.Tensor | None,
    value_a: torch.Tensor | None,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    k_rank: int,
    v_rank: int,
    scaling: float,
    causal: bool,
    groups: int,
) -> torch.Tensor:
    """[`flash_tpa`]"""
    batch_size, num_queries, num_heads, head_dim = query.shape
    key_length = key_rows.shape[2]
    num_sms, shared_memory = device_limits(query.device)
    constant_a = key_a is not None
    if query.stride(-1) != 1:
        query = query.contiguous()
    packed = key_rows.dtype == torch.uint8
    key_rows, value_rows, unit, alignment = _prepare_rows(key_rows, value_rows)
    if num_queries == groups == 1 and not constant_a and mask is None and alignment >= 8:
        low_bit_launch = choose_low_bit_launch(num_heads, head_dim, k_rank, v_rank, query.dtype, key_rows.dtype)
        if low_bit_launch is not None:
            return _flash_tpa_low_bit(
                query, key_rows, value_rows, lengths, k_rank, v_rank, scaling, unit, low_bit_launch
            )  # fmt: skip
    is_aligned = alignment == 16
    per_load = elements_per_load(k_rank, v_rank, head_dim, key_rows.dtype, is_aligned)
    launch = choose_launch(
        num_queries,
        num_heads,
        head_dim,
        k_rank,
        v_rank,
        constant_a,
        key_rows.element_size(),
        shared_memory,
        is_aligned,
        groups,
        per_load,
        query.dtype == torch.float32,
    )
    keys, values = (
        rows_of(
            rank, num_heads, head_dim, rows.stride(2), rows.shape[-1], constant_a, launch.step, groups=groups,
            packed=packed, elements_per_load=per_load,
        )
        for rank, rows in ((k_rank, key_rows), (v_rank, value_rows))
    )  # fmt: skip
    mask_strides = (0, 0, 0, 0)
    if mask is not None:
        mask_strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
    kind = "none" if mask is None else "boolean" if mask.dtype == torch.bool else "additive"
    visible = Mask(num_queries, num_heads, causal, kind, by_column=mask_strides[1:3] != (0, 0))

    columns = launch.column_blocks(num_queries, columns_of_heads(num_heads, groups, constant_a))
    num_splits = choose_splits(
        batch_size * columns, num_sms * launch.programs_per_sm, -(-key_length // launch.block_n)
    )
    partial, lse = _new_partials(query, num_splits)
    with torch.cuda.device_of(query):
        decode_kernel[(columns * num_splits, batch_size)](
            query,
            key_rows,
            value_rows,
            query if key_a is None else key_a.contiguous(),
            query if value_a is None else value_a.contiguous(),
            query if mask is None else mask,
            query if lengths is None else lengths,
            partial,
            lse,
            *query.stride()[:3],
            key_rows.stride(0) // unit,
            value_rows.stride(0) // unit,
            *mask_strides,
            _batch_stride(lengths),
            key_length,
            num_splits,
            LOG2_E * scaling / k_rank,
            LOG2_E,
            **WITHOUT_PAGES,
            KEYS=keys,
            VALUES=values,
            MASK=visible,
            LAUNCH=launch,
            HAS_LENGTHS=lengths is not None,
            STRIDE_UNIT=unit,
            OVERLAP=can_overlap(query.device),
            num_warps=launch.warps,
            **LAUNCH_OPTIONS,
        )
    return _combine(query, partial, lse, v_rank, packed)


def _flash_tpa_low_bit(
    query: torch.Tensor,
    key_rows: torch.Tensor,
    value_rows: torch.Tensor,
    lengths: torch.Tensor | None,
    k_rank: int,
    v_rank: int,
    scaling: float,
    unit: int,
    launch: "LowBitLaunch",
) -> torch.Tensor:
    batch_size, _, num_heads, head_dim = query.shape
    packed = key_rows.dtype == torch.uint8
    keys, values = (
        rows_of(rank, num_heads, head_dim, rows.stride(2), rows.shape[-1], False, 1, packed=packed)
        for rank, rows in ((k_rank, key_rows), (v_rank, value_rows))
    )
    blocks = launch.column_blocks(1, num_heads)
    num_splits = choose_splits(
        batch_size * blocks,
        device_limits(query.device)[0] * launch.programs_per_sm,
        -(-key_rows.shape[2] // launch.tile),
    )
    partial, lse = _new_partials(query, num_splits)
    with torch.cuda.device_of(query):
        low_bit_decode_kernel[(blocks * num_splits, batch_size)](
            query,
            key_rows,
            value_rows,
            query if lengths is None else lengths,
            partial,
            lse,
            query.stride(0),
            query.stride(2),
            key_rows.stride(0) // unit,
            value_rows.stride(0) // unit,
            _batch_stride(lengths),
            key_rows.shape[2],
            num_splits,
            LOG2_E * scaling / k_rank,
            slots_ptr=None,
            table_ptr=None,
            out_ptr=None,
            table_stride=None,
            out_stride_t=None,
            out_stride_h=None,
            KEYS=keys,
            VALUES=values,
            LAUNCH=launch,
            HAS_LENGTHS=lengths is not None,
            STRIDE_UNIT=unit,
            PAGES=Pages(),
            OVERLAP=can_overlap(query.device),
            num_warps=launch.warps,
            maxnreg=launch.registers,
            **LAUNCH_OPTIONS,
        )
    return _combine(query, partial, lse, v_rank, packed)


def _combine(query: torch.Tensor, partial: torch.Tensor, lse: torch.Tensor, v_rank: int, packed: bool) -> torch.Tensor:
    """The output, from the partial results of [`_new_partials`]."""
    batch_size, num_splits, num_queries, num_heads, head_dim = partial.shape
    output, overlap = query.new_empty(query.shape), can_overlap(query.device)
    with torch.cuda.device_of(query):
        combine_kernel[(num_queries * num_heads, batch_size)](
            partial,
            lse,
            output,
            num_splits,
            COLUMNS=num_queries * num_heads,
            HEAD_DIM=head_dim,
            V_RANK=v_rank,
            BLOCK_D=power_of_2(head_dim, least=16),
            BLOCK_S=COMBINED_SPLITS,
            MAX_SPLITS=MAX_SPLITS,
            OVERLAP=overlap,
            ROTATED=packed,
            num_warps=COMBINE_WARPS,
            **({"launch_pdl": True} if overlap else {}),
            **LAUNCH_OPTIONS,
        )
    return output


def operator_name(function: str) -> str:
    """
    A name that is not yet taken. The code of a model on the Hub may be imported beside this package, and if one copy defined an
    operator again, that would remove the one which the other copy calls.
    """
    name, copies = function, 1
    while hasattr(torch.ops.t6, name):
        copies += 1
        name = f"{function}_{copies}"
    return f"t6::{name}"


# For torch.compile, which cannot trace the function. Eager code calls the function itself, which costs the host less.
_flash_tpa_op = torch.library.custom_op(operator_name("flash_tpa"), _flash_tpa, mutates_args=())


@_flash_tpa_op.register_fake
def _(query, *args):
    return query.new_empty(query.shape)


def flash_tpa(
    query: torch.Tensor,
    key_rows: torch.Tensor,
    value_rows: torch.Tensor,
    k_rank: int,
    v_rank: int,
    scaling: float,
    key_a: torch.Tensor | None = None,
    value_a: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    causal: bool = True,
    groups: int = 1,
) -> torch.Tensor:
    """
    Attention over a cache of factors without forming K and V (section 3.2 of the paper), in one pass over its rows:

        softmax(Q K^T * scaling) V,    K = (1 / R_K) A_K^T B_K,    V = (1 / R_V) A_V^T B_V.

    [`factor_space_attention`] computes the same in PyTorch. No gradient. Also the operator `torch.ops.t6.flash_tpa`.

    Args:
        query: [batch, query_length, h, d], rotated; bfloat16, float16 or float32; at most 16 tokens, d at most 256.
        key_rows, value_rows: [batch, 1, key_length, width], any strides: as `FactorLayout` packs them, in the query's dtype or
            float8_e4m3fn; or as `QuantizedLayout` does, uint8, if d is a multiple of 8.
        key_a, value_a: constant A factors [R_K, h_kv] and [R_V, h_kv]; rows then hold B alone.
        mask: boolean (True: attend) or additive, [batch or 1, h or 1, query_length or 1, number of valid rows].
        scaling: of the scores, positive.
        lengths: int [batch] or [1], the number of valid rows, read on the device; `None` if all are valid.
        causal: whether the last query sees all valid rows, the one before it one row less, and so on.
        groups: h / h_kv, the number of consecutive heads that share a column of A.

    Returns:
        Output [batch, query_length, h, d], in the dtype of the query; zero for a query that sees nothing.
    """
    function = _flash_tpa_op if torch.compiler.is_compiling() else _flash_tpa
    return function(
        query, key_rows, value_rows, key_a, value_a, mask, lengths, k_rank, v_rank, float(scaling), causal, groups
    )  # fmt: skip


def flash_tpa_attention_forward(
    module: nn.Module,
    factors: Factors,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """[`flash_tpa`] over the rows of the cache."""
    constant_a = module.config.noncontextual_a
    output = flash_tpa(
        module.queries(factors).to(factors.dtype),
        factors.key_rows,
        factors.value_rows,
        module.k_rank,
        module.v_rank,
        scaling,
        key_a=factors.a_k if constant_a else None,
        value_a=factors.a_v if constant_a else None,
        mask=attention_mask,
        lengths=factors.lengths,
        # A mask with a row for each query includes causality.
        causal=attention_mask is None or attention_mask.shape[2] == 1,
        groups=module.num_key_value_groups,
    )
    return output, None


def decode_with_flash_tpa(config: PreTrainedConfig, hidden_states: torch.Tensor, cache: Cache | None) -> bool:
    """
    Whether the kernels run: for at most 16 query tokens over a cache, without gradients, on an NVIDIA GPU from Ampere on (from
    Ada on if the cache is in float8 or 4 bits), for variants that cache the B factors that K and V are formed from. Asked for
    by `attn_implementation="sdpa"`, Transformers' default, or by name, `"flash_tpa"`. Depends on nothing that changes from one
    decoded token to the next.
    """
    implementations = ("flash_tpa", "sdpa") if hidden_states.is_cuda else ("flash_tpa",)
    if triton is None or cache is None or config._attn_implementation not in implementations:
        return False
    if config.rotates_on_read or config.c_factor_dim is not None:
        return False
    stored_dtypes = [getattr(layer, "stored_dtype", None) for layer in getattr(cache, "layers", ())]
    if torch.uint8 in stored_dtypes and config.head_dim % 8:
        return False
    if hidden_states.is_cuda:
        has_float8 = not {torch.float8_e4m3fn, torch.uint8}.isdisjoint(stored_dtypes)
        runs = is_supported(hidden_states.device, has_float8)
    else:
        runs = IS_INTERPRETED
    return (
        runs
        and hidden_states.shape[1] <= MAX_QUERIES
        and config.head_dim <= MAX_HEAD_DIM
        and hidden_states.dtype in DTYPES
        and not torch.is_grad_enabled()
    )


@torch.compiler.assume_constant_result
def is_supported(device: torch.device, is_float8: bool) -> bool:
    """Whether a GPU runs the kernels: NVIDIA's from Ampere on, for float8 from Ada on."""
    return capability(device) >= ((8, 9) if is_float8 else (8, 0))


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return (0, 0) if torch.version.cuda is None else torch.cuda.get_device_capability(device)


# Prefill and training form K and V, and use PyTorch's attention.
ALL_ATTENTION_FUNCTIONS.register("flash_tpa", ALL_ATTENTION_FUNCTIONS["sdpa"])
ALL_MASK_ATTENTION_FUNCTIONS.register("flash_tpa", sdpa_mask)
