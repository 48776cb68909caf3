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
"""Triton kernels of FlashTPA: attention of a few query tokens over a cache of factors (paper, section 3.2)"""

import os
from typing import NamedTuple


try:  # the remote-code loader passes over packages that are imported here
    import triton
    import triton.language as tl
except ImportError:
    raise


IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# A score tile has a row for each of `BLOCK_N` tokens, and a column for each of `BLOCK_T * BLOCK_H` pairs of a query token and a
# head. Heads come last, as in the cached A: the tile is multiplied by A as it was loaded, and products with B are plain matrix
# products. One product may take `STEP` = 2 ranks, as each product has a latency. If the number of heads is no power of 2, a
# program may have two tiles, of `BLOCK_H` and of `REST_H` heads, which share the loads of B.
#
# Grouped heads share A: a group takes `group_columns` columns, padded to a power of 2, and A has one column for it. Tiles hold
# whole groups, or are part of one. The query tokens of one group are adjacent.
#
# Kernels are specialised by a few constants: `KEYS` and `VALUES` are [`Rows`], `MASK` is a [`Mask`], and `LAUNCH` is the `Launch`
# of flash_tpa_t6. They are tuples because Triton writes constants as JSON for hooks on compilations, such as vLLM's.
#
# If the page size is a multiple of the tile, a tile lies in one page, and takes one entry of the block table. Otherwise each row
# of a tile is looked up. Either way the entries for the next tile are prefetched, since its loads depend on them.


class Rows(NamedTuple):
    """The layout of the factors of keys, or of values, in the rows of a cache."""

    rank: int
    num_heads: int
    head_dim: int
    width: int  # stride between rows, in elements
    padded_heads: int  # elements of a row of A, including padding
    constant_a: bool  # rows hold B alone
    step: int  # ranks in one matrix product
    gathered: bool = False  # whether each row of a tile has its own pointer
    start_8: bool = False  # whether rows are aligned to 8 bytes, though the pointer to the first is not aligned to 16
    groups: int = 1  # query heads that share a column of A
    group_columns: int = 1  # columns of a tile for them; 1 also if A is constant, and loaded for each head
    packed: bool = False  # whether rows are bytes packed by `QuantizedLayout`; `width` is then in bytes
    elements_per_load: int = 1  # of B: in 32 bits 4 of float8, or 8 of 4 bits


class Mask(NamedTuple):
    """What a query may attend to."""

    num_queries: int
    num_heads: int
    causal: bool
    kind: str  # "none", "boolean" or "additive"
    by_column: bool  # whether the mask depends on the query or the head
    sliding: bool = False  # whether there is a sliding window


@triton.jit
def _token_of(rows, STEP: tl.constexpr):
    """
    The token of a tile's row. Of 16 rows, the first 8 are of one rank, the others of the same tokens and the next rank, so that
    one thread holds the results of both.
    """
    if STEP == 1:
        return rows
    return rows // (8 * STEP) * 8 + rows % 8


@triton.jit
def _rank_of(rows, STEP: tl.constexpr):
    return rows // 8 % STEP


@triton.jit
def _sum_ranks(columns, STEP: tl.constexpr):
    """Columns [STEP * BLOCK_N, ...] to [BLOCK_N, ...]"""
    if STEP == 1:
        return columns
    N: tl.constexpr = columns.shape[0] // STEP
    C: tl.constexpr = columns.shape[1]
    return tl.reshape(tl.sum(tl.reshape(columns, [N // 8, STEP, 8, C]), 1), [N, C])


@triton.jit
def _repeat_ranks(columns, STEP: tl.constexpr):
    """Columns [BLOCK_N, ...] to [STEP * BLOCK_N, ...]"""
    if STEP == 1:
        return columns
    N: tl.constexpr = columns.shape[0]
    C: tl.constexpr = columns.shape[1]
    return tl.reshape(tl.broadcast_to(tl.reshape(columns, [N // 8, 1, 8, C]), [N // 8, STEP, 8, C]), [STEP * N, C])


@triton.jit
def _columns(first_column, first_query, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """The head (`num_heads` where there is none) and the query token of each column of a tile."""
    IN_GROUPS: tl.constexpr = (ROWS.group_columns > 1) and (ROWS.group_columns < BLOCK_H)
    TOGETHER: tl.constexpr = ROWS.group_columns if IN_GROUPS else BLOCK_H
    columns = tl.arange(0, BLOCK_T * BLOCK_H)
    if TOGETHER == BLOCK_H:
        heads = first_column + columns % BLOCK_H
        queries = first_query + columns // BLOCK_H
    else:
        heads = first_column + columns // (BLOCK_T * TOGETHER) * TOGETHER + columns % TOGETHER
        queries = first_query + columns // TOGETHER % BLOCK_T
    if ROWS.group_columns > ROWS.groups:
        member = heads % ROWS.group_columns
        heads = tl.where(member < ROWS.groups, heads // ROWS.group_columns * ROWS.groups + member, ROWS.num_heads)
    return heads, queries


@triton.jit
def _initial_state(BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """The initial state of the online softmax of a tile: the maximum, the normalizer by row, the output."""
    # Finite, so that -inf minus it is -inf, and a tile in which a column sees nothing adds nothing.
    maximum = tl.full([BLOCK_C], -1e30, tl.float32)
    return maximum, tl.zeros([BLOCK_N, BLOCK_C], tl.float32), tl.zeros([BLOCK_D, BLOCK_C], tl.float32)


@triton.jit
def _load_query(
    query_ptr,
    queries,
    heads,
    stride_t,
    stride_h,
    num_queries,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    features = tl.arange(0, BLOCK_D)
    return tl.load(
        query_ptr + (queries * stride_t + heads * stride_h)[None, :] + features[:, None],
        mask=((queries < num_queries) & (heads < NUM_HEADS))[None, :] & (features < HEAD_DIM)[:, None],
        other=0.0,
    )


@triton.jit
def _hadamard(HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """
    The matrix [BLOCK, BLOCK] of `rotate_features` for BLOCK features of a head of HEAD_DIM, without its normalisation: its elements
    are -1, 0 and 1.
    """
    SIZE: tl.constexpr = (HEAD_DIM | 64) & -(HEAD_DIM | 64)
    rows = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    parity = rows & columns & (SIZE - 1)
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return tl.where(rows // SIZE == columns // SIZE, 1.0 - 2.0 * (parity & 1), 0.0)


@triton.jit
def _fit_float16(query, scale):
    """
    The query [d, columns] in float16, each column divided by a power of 2 such that its elements are below 2^15, and the scale
    [columns] that scores then have.
    """
    query = query.to(tl.float32)
    exponents = tl.max(tl.abs(query), 0).to(tl.int32, bitcast=True) & 0x7F800000
    unit = tl.maximum(exponents.to(tl.float32, bitcast=True), 2.0**-60) * 2.0**-14
    return (query * (1.0 / unit)[None, :]).to(tl.float16), unit * scale


@triton.jit
def _prepare_query(query, scale, FITS_FLOAT16: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The query as it multiplies B, in the rotated basis if B is packed, and the scale that scores then have."""
    if ROWS.packed:
        HEAD_DIM: tl.constexpr = ROWS.head_dim
        SIZE: tl.constexpr = (HEAD_DIM | 64) & -(HEAD_DIM | 64)
        BLOCK: tl.constexpr = BLOCK_D if BLOCK_D < 64 else 64
        # A batched product: ptxas 12.8 may lose the address of the query for Hopper's instructions, which do not do batches.
        hadamard = _hadamard(HEAD_DIM, BLOCK).to(query.dtype)
        hadamard = tl.broadcast_to(hadamard[None, :, :], [BLOCK_D // BLOCK, BLOCK, BLOCK])
        blocks = tl.reshape(query, [BLOCK_D // BLOCK, BLOCK, query.shape[1]])
        query = tl.reshape(tl.dot(hadamard, blocks, input_precision="tf32x3"), query.shape)
        scale *= SIZE**-0.5
    if FITS_FLOAT16:
        query, scale = _fit_float16(query, scale)
    return query, scale


@triton.jit
def _b_columns(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The indices of the loads of a row of B, each of an element or of a 32-bit word of several."""
    return tl.arange(0, BLOCK_D // ROWS.elements_per_load)


@triton.jit
def _load_b(
    rows_ptr, offsets, is_b, tokens, is_token, rank, ROWS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """B from `rank` on, [step * BLOCK_N, BLOCK_D], in the dtype of the query."""
    if ROWS.packed:
        b = _load_packed_b(rows_ptr, offsets, is_b, tokens, is_token, rank, ROWS, DTYPE, BLOCK_D)
    elif ROWS.elements_per_load == 4:
        N: tl.constexpr = offsets.shape[0]
        rows_ptr = rows_ptr.to(tl.pointer_type(tl.int32))
        words = tl.load(rows_ptr + (offsets + rank * (ROWS.head_dim // 4)), mask=is_b, other=0)
        b = tl.reshape(_four_of_float8(words, DTYPE), [N, BLOCK_D])
    else:
        b = tl.load(rows_ptr + (offsets + rank * ROWS.head_dim), mask=is_b, other=0.0).to(DTYPE)
    return b


@triton.jit
def pairs_of_float8(words):
    """The four float8 in each 32-bit word, as two words of two float16; not for the interpreter."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b16 low, high;
        mov.b32 {low, high}, $2;
        cvt.rn.f16x2.e4m3x2 $0, low;
        cvt.rn.f16x2.e4m3x2 $1, high;
        }
        """,
        "=r,=r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _four_of_float8(words, DTYPE: tl.constexpr):
    """The four float8 in each 32-bit word: [..., 2, 2]"""
    if DTYPE == tl.float16 and not IS_INTERPRETED:
        first, last = pairs_of_float8(words)
        number_0, number_1 = halves(first)
        number_2, number_3 = halves(last)
    else:
        number_0 = words.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
        number_1 = (words >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
        number_2 = (words >> 16).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
        number_3 = (words >> 24).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
    return tl.join(tl.join(number_0, number_2), tl.join(number_1, number_3))


@triton.jit
def _load_packed_b(
    rows_ptr, offsets, is_b, tokens, is_token, rank, ROWS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    HEAD_DIM: tl.constexpr = ROWS.head_dim
    N: tl.constexpr = offsets.shape[0]
    WORDS: tl.constexpr = BLOCK_D // 8
    GROUPS: tl.constexpr = (HEAD_DIM + 31) // 32
    BLOCK_G: tl.constexpr = (BLOCK_D + 31) // 32
    rows_ptr = rows_ptr.to(tl.pointer_type(tl.int32))
    words = tl.load(rows_ptr + (offsets + rank * (HEAD_DIM // 8)), mask=is_b, other=0)
    groups = tl.arange(0, BLOCK_G)
    first: tl.constexpr = ROWS.rank * (HEAD_DIM // 2 + ROWS.padded_heads) // 4
    offsets = tokens * (ROWS.width // 4) + (rank + _rank_of(tl.arange(0, N), ROWS.step)) * GROUPS + first
    scales = tl.load(
        rows_ptr + (offsets[:, None] + groups[None, :]), mask=is_token[:, None] & (groups < GROUPS)[None, :], other=0
    )  # fmt: skip
    words = tl.reshape(words, [N, BLOCK_G, WORDS // BLOCK_G])
    scales = scales[:, :, None]
    pairs_0 = _features(words, scales, DTYPE)
    pairs_1 = _features(words >> 4, scales, DTYPE)
    pairs_2 = _features(words >> 8, scales, DTYPE)
    pairs_3 = _features(words >> 12, scales, DTYPE)
    b = tl.join(tl.join(pairs_0, pairs_2), tl.join(pairs_1, pairs_3))  # [N, groups, words, 2, 2 (i high), 2 (i low)]
    return tl.reshape(tl.permute(b, (0, 1, 2, 4, 5, 3)), [N, BLOCK_D])


@triton.jit
def halves(words):
    """The two float16 in each 32-bit word."""
    low = words.to(tl.int16).to(tl.float16, bitcast=True)
    return low, (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _features(words, scales, DTYPE: tl.constexpr):
    """
    The features n * scale + zero, [..., 2], where n are the last 4 bits of both halves of a 32-bit word; `scales` are words of scale
    and zero point. With n as the last bits of its mantissa, the float16 number 1024 is 1024 + n.
    """
    if DTYPE == tl.float16 and not IS_INTERPRETED:  # two together, which LLVM would split
        pairs = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 n, scale, zero, least;
            mov.b32 least, 0x64006400;
            lop3.b32 n, $1, 0x000F000F, least, 0xEA;
            sub.rn.f16x2 n, n, least;
            prmt.b32 scale, $2, $2, 0x1010;
            prmt.b32 zero, $2, $2, 0x3232;
            fma.rn.f16x2 $0, n, scale, zero;
            }
            """,
            "=r,r,r", [words, scales], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        low, high = halves(pairs)
    else:
        scale, zero = halves(scales)
        low, high = halves((words & 0x000F000F) | 0x64006400)
        low = (low - 1024.0).to(DTYPE) * scale.to(DTYPE) + zero.to(DTYPE)
        high = (high - 1024.0).to(DTYPE) * scale.to(DTYPE) + zero.to(DTYPE)
    return tl.join(low, high)


@triton.jit
def _load_a(
    rows_ptr,
    constant_ptr,
    first_head,
    num_rows,
    rank,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """
    A from `rank` on: [step * BLOCK_N, BLOCK_H] from the cache, where a group of heads has one column, or constant [1, BLOCK_H].
    """
    NUM_COLUMNS: tl.constexpr = BLOCK_H // ROWS.group_columns if BLOCK_H > ROWS.group_columns else 1
    heads = first_head + tl.arange(0, NUM_COLUMNS)
    A_HEADS: tl.constexpr = ROWS.padded_heads
    STEP: tl.constexpr = ROWS.step
    if ROWS.constant_a:
        is_head = heads < ROWS.num_heads
        constant_ptr += rank * (ROWS.num_heads // ROWS.groups)
        a = tl.load(constant_ptr + heads // ROWS.groups, mask=is_head, other=0.0)[None, :]
    else:
        rows = tl.arange(0, STEP * BLOCK_N)
        tokens = _token_of(rows, STEP)
        columns = heads[None, :]
        if A_HEADS % 16 == 8 and A_HEADS > 8 and not ROWS.packed:  # see `FactorLayout`
            columns = (columns + ((rank + _rank_of(rows, STEP)) % 2 * 8)[:, None]) % A_HEADS
        if ROWS.gathered:
            offsets = (_rank_of(rows, STEP) * A_HEADS)[:, None] + columns
        else:
            offsets = (tokens * ROWS.width + _rank_of(rows, STEP) * A_HEADS)[:, None] + columns
        is_a = (tokens < num_rows)[:, None] & (heads < A_HEADS)[None, :]
        B_WIDTH: tl.constexpr = ROWS.head_dim // 2 if ROWS.packed else ROWS.head_dim
        if ROWS.packed:
            rows_ptr = rows_ptr.to(tl.pointer_type(tl.float8e4nv))
        a = tl.load(rows_ptr + (offsets + ROWS.rank * B_WIDTH + rank * A_HEADS), mask=is_a, other=0.0)
    return a


@triton.jit
def _multiply_by_a(columns, a, BLOCK_T: tl.constexpr):
    """Columns [BLOCK_N, BLOCK_T * BLOCK_H] times A [BLOCK_N or 1, BLOCK_H or groups], for each of the BLOCK_T queries."""
    N: tl.constexpr = columns.shape[0]
    C: tl.constexpr = columns.shape[1]
    A: tl.constexpr = a.shape[1]
    if (A == 1) or (BLOCK_T == 1 and A == C):
        columns = columns * a
    elif A * BLOCK_T == C:
        columns = tl.reshape(tl.reshape(columns, [N, BLOCK_T, A]) * a[:, None, :], [N, C])
    else:
        columns = columns * tl.reshape(tl.broadcast_to(a[:, :, None], [N, A, C // A]), [N, C])
    return columns


@triton.jit
def _apply_mask(
    scores,
    mask_ptr,
    queries,
    heads,
    tokens,
    is_row,
    last_token,
    window,
    mask_scale,
    mask_stride_h,
    mask_stride_t,
    mask_stride_n,
    MASK: tl.constexpr,
):
    """Scores, -inf where a query must not attend. Those of invalid rows are -inf already."""
    if MASK.kind == "none" and (MASK.num_queries == 1 or not MASK.causal):
        return scores
    visible = is_row[:, None]
    if MASK.causal and MASK.num_queries > 1:
        visible = visible & (tokens[:, None] <= (last_token + queries)[None, :])
    if MASK.sliding:
        visible = visible & (tokens[:, None] > (last_token + queries - window)[None, :])
    if MASK.kind != "none":
        if MASK.by_column:
            columns = heads * mask_stride_h + queries * mask_stride_t
            is_column = (queries < MASK.num_queries) & (heads < MASK.num_heads)
            offsets = columns[None, :] + (tokens * mask_stride_n)[:, None]
            mask = tl.load(mask_ptr + offsets, mask=is_row[:, None] & is_column[None, :], other=0)
        else:
            mask = tl.load(mask_ptr + tokens * mask_stride_n, mask=is_row, other=0)[:, None]
        if MASK.kind == "boolean":
            visible = visible & (mask != 0)
        else:
            scores += mask.to(tl.float32) * mask_scale
    return tl.where(visible, scores, -float("inf"))


@triton.jit
def _rescale(scores, scale, maximum, normalizer, output):
    """The state of the online softmax, rescaled to a maximum that includes these scores."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 0) * scale)
    decay = tl.exp2(maximum - new_maximum)
    return new_maximum, normalizer * decay[None, :], output * decay[None, :]


@triton.jit
def _scores(
    query, b, rows_ptr, constant_ptr, first_head, num_rows, rank,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Scores of `step` ranks: A (B Q^T)."""
    products = tl.dot(b, query, input_precision="tf32x3")  # three products keep float32's digits
    a = _load_a(rows_ptr, constant_ptr, first_head, num_rows, rank, ROWS, BLOCK_N, BLOCK_H)
    return _sum_ranks(_multiply_by_a(products, a.to(tl.float32), BLOCK_T), ROWS.step)


@triton.jit
def _add_scores(
    scores, rest_scores, query, rest_query, b, rows_ptr, constant_ptr, first_head, num_rows, rank,
    ROWS: tl.constexpr, LAUNCH: tl.constexpr,
):  # fmt: skip
    """Adds the scores of `step` ranks to those of both tiles."""
    scores += _scores(
        query, b, rows_ptr, constant_ptr, first_head, num_rows, rank,
        ROWS, LAUNCH.block_n, LAUNCH.block_t, LAUNCH.block_h,
    )  # fmt: skip
    if LAUNCH.rest_h:
        rest_scores += _scores(
            rest_query, b, rows_ptr, constant_ptr, first_head + LAUNCH.block_h // ROWS.group_columns, num_rows, rank,
            ROWS, LAUNCH.block_n, LAUNCH.block_t, LAUNCH.rest_h,
        )  # fmt: skip
    return scores, rest_scores


@triton.jit
def _times_a(
    weights, output, rows_ptr, constant_ptr, first_head, num_rows, rank,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A P of `step` ranks, whose product with B^T is their part of the output: [step * BLOCK_N, BLOCK_T * BLOCK_H]"""
    a = _load_a(rows_ptr, constant_ptr, first_head, num_rows, rank, ROWS, BLOCK_N, BLOCK_H)
    weights = _repeat_ranks(weights, ROWS.step)
    if ROWS.step > 1 and output.shape[0] == weights.shape[0]:
        # A zero in the layout of a product: Triton 3.6 swizzles A, which meets it, in shared memory only then.
        weights += (output * 0.0).to(weights.dtype)
    return _multiply_by_a(weights, a.to(weights.dtype), BLOCK_T)


@triton.jit
def _add_output(
    output, rest_output, weights, rest_weights, b, rows_ptr, constant_ptr, first_head, num_rows, rank,
    ROWS: tl.constexpr, LAUNCH: tl.constexpr,
):  # fmt: skip
    """Adds the output of `step` ranks, B^T (A P), to that of both tiles."""
    weighted = _times_a(
        weights, output, rows_ptr, constant_ptr, first_head, num_rows, rank,
        ROWS, LAUNCH.block_n, LAUNCH.block_t, LAUNCH.block_h,
    )  # fmt: skip
    # Before either product, and so in another place: where two take turns with one, ptxas 12.8 loses its address.
    if LAUNCH.rest_h:
        rest_weighted = _times_a(
            rest_weights, rest_output, rows_ptr, constant_ptr, first_head + LAUNCH.block_h // ROWS.group_columns,
            num_rows, rank, ROWS, LAUNCH.block_n, LAUNCH.block_t, LAUNCH.rest_h,
        )  # fmt: skip
    output = tl.dot(tl.trans(b), weighted, output, input_precision="tf32x3")
    if LAUNCH.rest_h:
        rest_output = tl.dot(tl.trans(b), rest_weighted, rest_output, input_precision="tf32x3")
    return output, rest_output


@triton.jit
def _store_partial(
    output,
    normalizer,
    maximum,
    partial_ptr,
    lse_ptr,
    row,
    queries,
    heads,
    num_queries,
    NUM_QUERIES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    normalizer = tl.sum(normalizer, 0)
    is_empty = normalizer == 0.0
    normalizer = tl.where(is_empty, 1.0, normalizer)
    lse = tl.where(is_empty, -float("inf"), maximum + tl.log2(normalizer))
    row = (row * NUM_QUERIES + queries) * NUM_HEADS + heads
    is_column = (queries < num_queries) & (heads < NUM_HEADS)
    features = tl.arange(0, BLOCK_D)
    tl.store(
        partial_ptr + row[None, :] * HEAD_DIM + features[:, None],
        output / normalizer[None, :],
        mask=is_column[None, :] & (features < HEAD_DIM)[:, None],
    )
    tl.store(lse_ptr + row, lse, mask=is_column)


@triton.jit
def _store_output(
    output,
    normalizer,
    out_ptr,
    queries,
    heads,
    stride_t,
    stride_h,
    num_queries,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The final output, of a request that one program reads whole."""
    normalizer = tl.sum(normalizer, 0)
    normalizer = tl.where(normalizer == 0.0, 1.0, normalizer)
    features = tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + (queries * stride_t + heads * stride_h)[None, :] + features[:, None],
        output / (normalizer * V_RANK)[None, :],
        mask=((queries < num_queries) & (heads < NUM_HEADS))[None, :] & (features < HEAD_DIM)[:, None],
    )


@triton.jit
def _pages_of(table_ptr, tokens, end, PAGE_SIZE: tl.constexpr):
    """The page of each token; 0 from `end` on, where the block table is undefined."""
    return tl.load(table_ptr + tokens // PAGE_SIZE, mask=tokens < end, other=0, eviction_policy="evict_last")


@triton.jit
def _row_pointers(
    rows_ptr, pages, page_stride, tokens, ROWS: tl.constexpr, PAGE_SIZE: tl.constexpr, STRIDE_UNIT: tl.constexpr
):  # fmt: skip
    """A pointer to the row of each token: [tokens, 1]"""
    rows = (rows_ptr + pages.to(tl.int64) * page_stride * STRIDE_UNIT + tokens % PAGE_SIZE * ROWS.width)[:, None]
    return tl.multiple_of(rows, [8, 8]) if ROWS.start_8 else rows


@triton.jit(
    do_not_specialize=[
        "key_stride_b",
        "value_stride_b",
        "mask_stride_b",
        "mask_stride_h",
        "mask_stride_t",
        "mask_stride_n",
        "length_stride_b",
        "key_length",
        "num_splits",
        "slots_ptr",
        "table_ptr",
        "table_stride",
        "window",
        "out_stride_t",
        "out_stride_h",
    ]
)
def decode_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_a_ptr,
    value_a_ptr,
    mask_ptr,
    length_ptr,
    partial_ptr,
    lse_ptr,
    query_stride_b,
    query_stride_t,
    query_stride_h,
    key_stride_b,
    value_stride_b,
    mask_stride_b,
    mask_stride_h,
    mask_stride_t,
    mask_stride_n,
    length_stride_b,
    key_length,
    num_splits,
    scale,
    log2_e,
    slots_ptr,
    table_ptr,
    out_ptr,
    table_stride,
    window,
    out_stride_t,
    out_stride_h,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    MASK: tl.constexpr,
    LAUNCH: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """
    Attention over one of `num_splits` splits of the cache, for one block of columns of one sequence.

    Writes the output normalised within the split [batch, split, query, head, d] and its log-sum-exp, to base 2,
    [batch, split, query, head], both float32. The splits divide the length, which is read on the device: the grid depends only on
    the capacity of the cache. Batch strides of the rows are in units of `STRIDE_UNIT` elements, which tells the compiler that
    rows start on 16 bytes.

    If the cache is paged, `PAGE_SIZE` is not 0, and the parameters from `slots_ptr` on are used; otherwise they are `None`. A batch
    stride is then that of a page, and a program takes the piece in its slot, see [`schedule_kernel`]. A piece that is a whole
    request is written to the output.
    """
    NUM_QUERIES: tl.constexpr = MASK.num_queries
    NUM_HEADS: tl.constexpr = KEYS.num_heads
    HEAD_DIM: tl.constexpr = KEYS.head_dim
    BLOCK_N: tl.constexpr = LAUNCH.block_n
    BLOCK_T: tl.constexpr = LAUNCH.block_t
    BLOCK_H: tl.constexpr = LAUNCH.block_h
    REST_H: tl.constexpr = LAUNCH.rest_h
    BLOCK_D: tl.constexpr = LAUNCH.block_d
    STAGES: tl.constexpr = LAUNCH.stages
    ALL_H: tl.constexpr = BLOCK_H + REST_H
    GROUP_COLUMNS: tl.constexpr = KEYS.group_columns
    NUM_COLUMNS: tl.constexpr = NUM_HEADS // KEYS.groups * GROUP_COLUMNS if GROUP_COLUMNS > 1 else NUM_HEADS
    HEAD_BLOCKS: tl.constexpr = (NUM_COLUMNS + ALL_H - 1) // ALL_H
    QUERY_BLOCKS: tl.constexpr = (NUM_QUERIES + BLOCK_T - 1) // BLOCK_T
    BLOCK_C: tl.constexpr = BLOCK_T * BLOCK_H
    # Blocks of columns read the same rows. Adjacent programs find them in the L2 cache.
    column_block = tl.program_id(0) % (HEAD_BLOCKS * QUERY_BLOCKS)
    split = tl.program_id(0) // (HEAD_BLOCKS * QUERY_BLOCKS)
    if PAGE_SIZE:
        # Adjacent elements, whose loads do not depend on each other. All layers read them, so the L2 cache should keep them while rows
        # stream through.
        slot_ptr = slots_ptr + 8 * split
        request = tl.load(slot_ptr, eviction_policy="evict_last")
        start = tl.load(slot_ptr + 1, eviction_policy="evict_last")
        end = tl.load(slot_ptr + 2, eviction_policy="evict_last")
        partial_row = tl.load(slot_ptr + 3, eviction_policy="evict_last")
        first_query_token = tl.load(slot_ptr + 4, eviction_policy="evict_last").to(tl.int64)
        last_token = tl.load(slot_ptr + 5, eviction_policy="evict_last")
        num_queries = tl.load(slot_ptr + 6, eviction_policy="evict_last")
        if request < 0:
            return
        if NUM_QUERIES == 1:
            num_queries = NUM_QUERIES
        table_ptr += request.to(tl.int64) * table_stride
        if not KEYS.gathered:
            next_page = tl.load(table_ptr + start // PAGE_SIZE, eviction_policy="evict_last")
        query_ptr += first_query_token * query_stride_t
        out_ptr += first_query_token * out_stride_t
        first_tile = start // BLOCK_N * BLOCK_N
    else:
        batch = tl.program_id(1).to(tl.int64)

        length = key_length
        if HAS_LENGTHS:
            length = tl.minimum(tl.load(length_ptr + batch * length_stride_b).to(tl.int32), key_length)
        piece = tl.cdiv(tl.cdiv(length, num_splits), 16) * 16
        start = split * piece
        end = tl.minimum(start + piece, length)
        num_queries = NUM_QUERIES
        first_tile = start

    first_column = (column_block % HEAD_BLOCKS) * ALL_H
    first_head = first_column  # of A
    if ALL_H < GROUP_COLUMNS:
        first_head = first_column // GROUP_COLUMNS
    elif GROUP_COLUMNS > 1:
        first_head = (column_block % HEAD_BLOCKS) * (ALL_H // GROUP_COLUMNS)
    first_query = (column_block // HEAD_BLOCKS) * BLOCK_T
    if not PAGE_SIZE:
        query_ptr += batch * query_stride_b
    heads, queries = _columns(first_column, first_query, KEYS, BLOCK_T, BLOCK_H)
    query = _load_query(
        query_ptr, queries, heads, query_stride_t, query_stride_h, num_queries, NUM_HEADS, HEAD_DIM, BLOCK_D
    )  # fmt: skip
    # One instruction converts two float8 to float16; to bfloat16, it takes several for each.
    IS_FLOAT8: tl.constexpr = key_ptr.dtype.element_ty == tl.float8e4nv or KEYS.packed
    FITS_FLOAT16: tl.constexpr = (IS_FLOAT8 and query.dtype == tl.bfloat16) or (
        KEYS.packed and query.dtype == tl.float16
    )
    query_scale = scale
    query, scale = _prepare_query(query, query_scale, FITS_FLOAT16, KEYS, BLOCK_D)
    maximum, normalizer, output = _initial_state(BLOCK_N, BLOCK_C, BLOCK_D)
    rest_query, rest_output, rest_scale = query, output, scale  # placeholders if there is no second tile
    if REST_H:
        rest_heads, rest_queries = _columns(first_column + BLOCK_H, first_query, KEYS, BLOCK_T, REST_H)
        rest_query = _load_query(
            query_ptr, rest_queries, rest_heads, query_stride_t, query_stride_h, num_queries, NUM_HEADS, HEAD_DIM, BLOCK_D
        )  # fmt: skip
        rest_query, rest_scale = _prepare_query(rest_query, query_scale, FITS_FLOAT16, KEYS, BLOCK_D)
        rest_maximum, rest_normalizer, rest_output = _initial_state(BLOCK_N, BLOCK_T * REST_H, BLOCK_D)

    if not PAGE_SIZE:
        key_ptr += batch * key_stride_b * STRIDE_UNIT
        value_ptr += batch * value_stride_b * STRIDE_UNIT
        mask_ptr += batch * mask_stride_b
    columns = _b_columns(KEYS, BLOCK_D)
    NUM_B: tl.constexpr = HEAD_DIM // KEYS.elements_per_load
    UNIT: tl.constexpr = (
        4 if KEYS.elements_per_load > 1 else 1
    )  # in words of 4 bytes, strides of rows are divided by this
    k_rows = tl.arange(0, KEYS.step * BLOCK_N)
    v_rows = tl.arange(0, VALUES.step * BLOCK_N)
    k_tokens = _token_of(k_rows, KEYS.step)
    v_tokens = _token_of(v_rows, VALUES.step)
    if KEYS.gathered:
        key_b_offsets = (_rank_of(k_rows, KEYS.step) * HEAD_DIM)[:, None] + columns[None, :]
        value_b_offsets = (_rank_of(v_rows, VALUES.step) * HEAD_DIM)[:, None] + columns[None, :]
        next_k_pages = _pages_of(table_ptr, start + k_tokens, end, PAGE_SIZE)
        if VALUES.step != KEYS.step:
            next_v_pages = _pages_of(table_ptr, start + v_tokens, end, PAGE_SIZE)
    else:
        key_b_offsets = (k_tokens * (KEYS.width // UNIT) + _rank_of(k_rows, KEYS.step) * NUM_B)[:, None] + columns
        value_b_offsets = (v_tokens * (VALUES.width // UNIT) + _rank_of(v_rows, VALUES.step) * NUM_B)[
            :, None
        ] + columns
    K_RANK: tl.constexpr = KEYS.rank
    V_RANK: tl.constexpr = VALUES.rank
    K_STEP: tl.constexpr = KEYS.step
    LAG: tl.constexpr = 7.0 if IS_FLOAT8 else 8.0
    V_STEP: tl.constexpr = VALUES.step
    for first in tl.range(first_tile, end, BLOCK_N, num_stages=STAGES if LAUNCH.unroll else 1):
        if PAGE_SIZE:
            # Tiles end on multiples of BLOCK_N. The first of a piece is shorter if the piece starts in between.
            tile = tl.maximum(first, start)
            next_tile = first + BLOCK_N
            num_rows = tl.minimum(next_tile, end) - tile
            if KEYS.gathered:
                k_pages = next_k_pages
                next_k_pages = _pages_of(table_ptr, next_tile + k_tokens, end, PAGE_SIZE)
                v_pages = k_pages
                if VALUES.step != KEYS.step:
                    v_pages = next_v_pages
                    next_v_pages = _pages_of(table_ptr, next_tile + v_tokens, end, PAGE_SIZE)
                key_rows = _row_pointers(key_ptr, k_pages, key_stride_b, tile + k_tokens, KEYS, PAGE_SIZE, STRIDE_UNIT)
                value_rows = _row_pointers(
                    value_ptr, v_pages, value_stride_b, tile + v_tokens, VALUES, PAGE_SIZE, STRIDE_UNIT
                )  # fmt: skip
            else:
                page = next_page.to(tl.int64)
                next_page = tl.load(
                    table_ptr + next_tile // PAGE_SIZE, mask=next_tile < end, other=0, eviction_policy="evict_last"
                )  # fmt: skip
                key_rows = key_ptr + page * key_stride_b * STRIDE_UNIT + tile % PAGE_SIZE * KEYS.width
                value_rows = value_ptr + page * value_stride_b * STRIDE_UNIT + tile % PAGE_SIZE * VALUES.width
                if KEYS.start_8:
                    key_rows = tl.multiple_of(key_rows, 8)
                if VALUES.start_8:
                    value_rows = tl.multiple_of(value_rows, 8)
            tokens = tile + tl.arange(0, BLOCK_N)
            is_row = tl.arange(0, BLOCK_N) < num_rows
        else:
            key_rows = key_ptr + first * tl.full((), KEYS.width, tl.int64)
            value_rows = value_ptr + first * tl.full((), VALUES.width, tl.int64)
            tokens = first + tl.arange(0, BLOCK_N)
            is_row = tokens < end
            num_rows = end - first
        is_key, is_value = k_tokens < num_rows, v_tokens < num_rows
        is_key_b = is_key[:, None] & (columns < NUM_B)[None, :]
        is_value_b = is_value[:, None] & (columns < NUM_B)[None, :]

        # Unrolled, the loads of all ranks are in flight together; otherwise those of a few ranks.
        no_scores = tl.where(is_row, 0.0, -float("inf"))[:, None]
        scores = tl.broadcast_to(no_scores, [BLOCK_N, BLOCK_C])
        rest_scores = scores
        if REST_H:
            rest_scores = tl.broadcast_to(no_scores, [BLOCK_N, BLOCK_T * REST_H])
        if LAUNCH.unroll:
            for r in tl.static_range(0, K_RANK, K_STEP):
                b = _load_b(key_rows, key_b_offsets, is_key_b, k_tokens, is_key, r, KEYS, query.dtype, BLOCK_D)
                if r == 0 and VALUES.elements_per_load > 1:  # hides the latency of this load behind the scores
                    value_b = _load_b(
                        value_rows, value_b_offsets, is_value_b, v_tokens, is_value, 0, VALUES, query.dtype, BLOCK_D
                    )
                scores, rest_scores = _add_scores(
                    scores, rest_scores, query, rest_query, b, key_rows, key_a_ptr, first_head, num_rows, r,
                    KEYS, LAUNCH,
                )  # fmt: skip
        else:
            for r in tl.range(0, K_RANK, K_STEP, num_stages=STAGES):
                b = _load_b(key_rows, key_b_offsets, is_key_b, k_tokens, is_key, r, KEYS, query.dtype, BLOCK_D)
                scores, rest_scores = _add_scores(
                    scores, rest_scores, query, rest_query, b, key_rows, key_a_ptr, first_head, num_rows, r,
                    KEYS, LAUNCH,
                )  # fmt: skip

        if not PAGE_SIZE:
            last_token = length - NUM_QUERIES
        scores = _apply_mask(
            scores, mask_ptr, queries, heads, tokens, is_row, last_token, window, log2_e / scale,
            mask_stride_h, mask_stride_t, mask_stride_n, MASK,
        )  # fmt: skip
        above = scores * scale - maximum[None, :]
        if REST_H:
            rest_scores = _apply_mask(
                rest_scores, mask_ptr, rest_queries, rest_heads, tokens, is_row, last_token, window, log2_e / rest_scale,
                mask_stride_h, mask_stride_t, mask_stride_n, MASK,
            )  # fmt: skip
            rest_above = rest_scores * rest_scale - rest_maximum[None, :]
            above = tl.maximum(tl.max(above, 1, keep_dims=True), tl.max(rest_above, 1, keep_dims=True))
        # The maximum is updated, by a reduction over tokens for each column, only when weights exceed 2^8. A power of 2 costs no
        # precision, and cancels at the end. For float8 it is 2^7, which times float8's largest number, 448, is still a float16.
        if tl.max(above) > LAG:
            maximum, normalizer, output = _rescale(scores, scale, maximum, normalizer, output)
            if REST_H:
                rest_maximum, rest_normalizer, rest_output = _rescale(
                    rest_scores, rest_scale, rest_maximum, rest_normalizer, rest_output
                )
        weights = tl.exp2(scores * scale - maximum[None, :])
        # Summed over rows after the loop. For a sum here, Triton 3.6 would compute the exponentials twice, in two layouts.
        normalizer += weights
        weights = weights.to(query.dtype)
        rest_weights = weights
        if REST_H:
            rest_weights = tl.exp2(rest_scores * rest_scale - rest_maximum[None, :])
            rest_normalizer += rest_weights
            rest_weights = rest_weights.to(query.dtype)

        if LAUNCH.unroll:
            for r in tl.static_range(0, V_RANK, V_STEP):
                if r == 0 and VALUES.elements_per_load > 1:
                    b = value_b
                else:
                    b = _load_b(
                        value_rows, value_b_offsets, is_value_b, v_tokens, is_value, r, VALUES, query.dtype, BLOCK_D
                    )
                output, rest_output = _add_output(
                    output, rest_output, weights, rest_weights, b, value_rows, value_a_ptr, first_head, num_rows, r,
                    VALUES, LAUNCH,
                )  # fmt: skip
        else:
            for r in tl.range(0, V_RANK, V_STEP, num_stages=STAGES):
                b = _load_b(
                    value_rows, value_b_offsets, is_value_b, v_tokens, is_value, r, VALUES, query.dtype, BLOCK_D
                )
                output, rest_output = _add_output(
                    output, rest_output, weights, rest_weights, b, value_rows, value_a_ptr, first_head, num_rows, r,
                    VALUES, LAUNCH,
                )  # fmt: skip

    if OVERLAP:  # programs of the combine kernel may start on multiprocessors that become free, and wait there
        tl.extra.cuda.gdc_launch_dependents()
    if PAGE_SIZE:
        if partial_row < 0:
            _store_output(
                output, normalizer, out_ptr, queries, heads, out_stride_t, out_stride_h, num_queries,
                NUM_HEADS, HEAD_DIM, V_RANK, BLOCK_D,
            )  # fmt: skip
            if REST_H:
                _store_output(
                    rest_output, rest_normalizer, out_ptr, rest_queries, rest_heads, out_stride_t, out_stride_h,
                    num_queries, NUM_HEADS, HEAD_DIM, V_RANK, BLOCK_D,
                )  # fmt: skip
            return
        row = partial_row.to(tl.int64)
    else:
        row = batch * num_splits + split
    _store_partial(
        output, normalizer, maximum, partial_ptr, lse_ptr, row, queries, heads, num_queries,
        NUM_QUERIES, NUM_HEADS, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    if REST_H:
        _store_partial(
            rest_output, rest_normalizer, rest_maximum, partial_ptr, lse_ptr, row, rest_queries, rest_heads, num_queries,
            NUM_QUERIES, NUM_HEADS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _load_pieces(partial_ptr, first, splits, features, num_splits, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr):
    return tl.load(
        partial_ptr + (first + splits * COLUMNS)[:, None] * HEAD_DIM + features[None, :],
        mask=(splits < num_splits)[:, None] & (features < HEAD_DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _combine(
    partial_ptr,
    lse_ptr,
    first,
    num_splits,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Combines the partial outputs of a column by their log-sum-exps. `first` is the index of the column in the first split."""
    splits = tl.arange(0, BLOCK_S)
    features = tl.arange(0, BLOCK_D)
    # Loaded together with the log-sum-exps, not after them.
    piece = _load_pieces(partial_ptr, first, splits, features, num_splits, COLUMNS, HEAD_DIM)
    all_splits = tl.arange(0, MAX_SPLITS)
    all_lse = tl.load(lse_ptr + first + all_splits * COLUMNS, mask=all_splits < num_splits, other=-float("inf"))
    maximum = tl.max(all_lse, 0)
    maximum = tl.where(maximum == -float("inf"), 0.0, maximum)
    normalizer = tl.sum(tl.exp2(all_lse - maximum), 0)
    normalizer = tl.where(normalizer == 0.0, 1.0, normalizer)

    output = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for _ in tl.range(0, num_splits, BLOCK_S):
        lse = tl.load(lse_ptr + first + splits * COLUMNS, mask=splits < num_splits, other=-float("inf"))
        # Requested before the sum below waits for what was requested before.
        following = _load_pieces(partial_ptr, first, splits + BLOCK_S, features, num_splits, COLUMNS, HEAD_DIM)
        output += piece * tl.exp2(lse - maximum)[:, None]
        splits += BLOCK_S
        piece = following
    return tl.sum(output, 0) / (normalizer * V_RANK)


@triton.jit(do_not_specialize=["num_splits"])
def combine_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    num_splits,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """
    Combines the splits of one column (a head of a query token) into its output. `ROTATED`: the output is in the rotated basis of
    `QuantizedLayout`, and is rotated back.
    """
    if OVERLAP:  # this kernel has started early: wait until the decode kernel's writes are visible
        tl.extra.cuda.gdc_wait()
    column = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    first = batch * num_splits * COLUMNS + column
    output = _combine(
        partial_ptr, lse_ptr, first, num_splits, COLUMNS, HEAD_DIM, V_RANK, BLOCK_D, BLOCK_S, MAX_SPLITS
    )  # fmt: skip
    if ROTATED:
        SIZE: tl.constexpr = (HEAD_DIM | 64) & -(HEAD_DIM | 64)
        BLOCK: tl.constexpr = BLOCK_D if BLOCK_D < 64 else 64
        blocks = tl.reshape(output, [BLOCK_D // BLOCK, 1, BLOCK])
        output = tl.sum(_hadamard(HEAD_DIM, BLOCK)[None, :, :] * blocks, 2) * SIZE**-0.5
        output = tl.reshape(output, [BLOCK_D])
    features = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + (batch * COLUMNS + column) * HEAD_DIM + features, output, mask=features < HEAD_DIM)


@triton.jit
def _load_entry(splits_ptr, i, is_column, COLUMNS: tl.constexpr):
    """For the request of the `i`-th column: its first partial result, the number of its pieces, its query tokens' first and end."""
    entry_ptr = splits_ptr + 4 * (1 + i // COLUMNS)
    place = tl.load(entry_ptr, mask=is_column, other=0, eviction_policy="evict_last")
    num_splits = tl.load(entry_ptr + 1, mask=is_column, other=0, eviction_policy="evict_last")
    token = tl.load(entry_ptr + 2, mask=is_column, other=0, eviction_policy="evict_last")
    end = tl.load(entry_ptr + 3, mask=is_column, other=0, eviction_policy="evict_last")
    return place, num_splits, token, end


@triton.jit(do_not_specialize=["splits_ptr", "out_stride_t", "out_stride_h"])
def combine_pages_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    splits_ptr,
    out_stride_t,
    out_stride_h,
    NUM_QUERIES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """[`combine_kernel`] for the requests that [`schedule_kernel`] has divided: each program loops over columns."""
    COLUMNS: tl.constexpr = NUM_QUERIES * NUM_HEADS
    features = tl.arange(0, BLOCK_D)
    first = tl.program_id(0)
    # The schedule was written before the decode kernel started, so reading it need not wait. There is an entry for every first
    # column, which is read without waiting for the number of columns.
    place, num_splits, token, end = _load_entry(splits_ptr, first, True, COLUMNS)
    num_columns = tl.load(splits_ptr, eviction_policy="evict_last") * COLUMNS
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for i in tl.range(first, num_columns, tl.num_programs(0)):
        column_token = token + i % COLUMNS // NUM_HEADS
        if column_token < end:
            output = _combine(
                partial_ptr, lse_ptr, place.to(tl.int64) * COLUMNS + i % COLUMNS, num_splits,
                COLUMNS, HEAD_DIM, V_RANK, BLOCK_D, BLOCK_S, MAX_SPLITS,
            )  # fmt: skip
            column_ptr = out_ptr + column_token.to(tl.int64) * out_stride_t + i % NUM_HEADS * out_stride_h
            tl.store(column_ptr + features, output, mask=features < HEAD_DIM)
        following = i + tl.num_programs(0)
        place, num_splits, token, end = _load_entry(splits_ptr, following, following < num_columns, COLUMNS)


@triton.jit
def _rows_to_read(length_ptr, query_starts_ptr, requests, is_request, window, TILE: tl.constexpr):
    """For each request the first row that a query sees, the length, the first tile, and the number of tiles."""
    length = tl.load(length_ptr + requests, mask=is_request, other=0).to(tl.int32)
    query_start = tl.load(query_starts_ptr + requests, mask=is_request, other=0)
    num_queries = tl.load(query_starts_ptr + requests + 1, mask=is_request, other=0) - query_start
    length = tl.where(num_queries > 0, length, 0)
    first = tl.maximum(length - num_queries - window + 1, 0)
    first_tile = first // TILE
    return first, length, first_tile, tl.cdiv(length, TILE) - first_tile


@triton.jit
def _count_pieces(first, length, num_tiles, piece, MAX_SPLITS: tl.constexpr):
    """The number of pieces of about `piece` times 16 rows into which each request is divided."""
    return tl.minimum(tl.minimum(tl.cdiv(tl.cdiv(length - first, 16), piece), num_tiles), MAX_SPLITS)


@triton.jit(do_not_specialize=["length_ptr", "query_starts_ptr", "num_requests", "num_slots", "at_once", "window"])
def schedule_kernel(
    length_ptr,
    query_starts_ptr,
    slots_ptr,
    splits_ptr,
    num_requests,
    num_slots,
    at_once,
    window,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """
    Divides the rows of all requests into pieces of about the same length, and assigns each to a slot.

    A slot [8] is the request (-1: none), the first row and the end of the piece, the index of its partial result (-1: the piece is
    the whole request), the request's first query token, the last row that this token sees, the number of query tokens, and an unused
    element. `splits` [1 + requests, 4] is the number of requests that are divided, then for each of them the index of its first
    partial result, the number of its pieces, and its query tokens' first and end. Pieces start on multiples of `TILE`, except for
    the first one of a sliding window.

    All programs compute the same pieces, and each fills `BLOCK_S` slots.
    """
    requests = tl.arange(0, BLOCK_R)
    first, length, _, num_tiles = _rows_to_read(
        length_ptr, query_starts_ptr, requests, requests < num_requests, window, TILE
    )
    units = tl.cdiv(length - first, 16)
    total, longest, num_used = tl.sum(units, 0), tl.max(units, 0), tl.sum((units > 0).to(tl.int32), 0)
    for block in range(BLOCK_R, num_requests, BLOCK_R):
        requests = block + tl.arange(0, BLOCK_R)
        more_first, more_length, _, _ = _rows_to_read(
            length_ptr, query_starts_ptr, requests, requests < num_requests, window, TILE
        )
        units = tl.cdiv(more_length - more_first, 16)
        total += tl.sum(units, 0)
        longest = tl.maximum(longest, tl.max(units, 0))
        num_used += tl.sum((units > 0).to(tl.int32), 0)

    # Candidates: the shortest pieces of which there are at most `at_once` (one wave), two or three times as many, or `at_once` in
    # addition to one for each request. Each is found by bisection.
    rounds = tl.arange(1, 5)
    budget = tl.where((rounds < 4) & (rounds * at_once <= num_slots), rounds * at_once, num_used + at_once)
    high = tl.zeros([4], tl.int32) + tl.maximum(longest, 1)
    low = tl.minimum(tl.maximum(tl.cdiv(total, budget), 1), high)
    count = tl.zeros([4], tl.int32)
    while tl.max(high - low, 0) >= 0:
        middle = (low + high) // 2
        counts = _count_pieces(first[None, :], length[None, :], num_tiles[None, :], middle[:, None], MAX_SPLITS)
        num_pieces = tl.sum(counts, 1)
        for block in range(BLOCK_R, num_requests, BLOCK_R):
            requests = block + tl.arange(0, BLOCK_R)
            more_first, more_length, _, more_tiles = _rows_to_read(
                length_ptr, query_starts_ptr, requests, requests < num_requests, window, TILE
            )
            counts = _count_pieces(
                more_first[None, :], more_length[None, :], more_tiles[None, :], middle[:, None], MAX_SPLITS
            )
            num_pieces += tl.sum(counts, 1)
        fits = (num_pieces <= budget) & (low <= high)
        count = tl.where(fits, num_pieces, count)
        high, low = tl.where(fits, middle - 1, high), tl.where(fits | (low > high), low, middle + 1)
    # `low` is the shortest length that fits. The time is that of the longest piece in each wave, plus the cost of a wave.
    num_rounds = tl.cdiv(count, at_once)
    time = (num_rounds * (low + 8)).to(tl.float32) * (1.0 + 0.06 * num_rounds)
    time = tl.where(num_used <= budget, time, float("inf"))
    piece = tl.min(tl.where(time == tl.min(time, 0), low, 2147483647), 0)

    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    slot_request = tl.zeros([BLOCK_S], tl.int32) - 1
    slot_first = tl.zeros([BLOCK_S], tl.int32)
    slot_partial = tl.zeros([BLOCK_S], tl.int32)
    num_pieces, num_partial, num_splits = 0, 0, 0
    for block in range(0, num_requests, BLOCK_R):
        requests = block + tl.arange(0, BLOCK_R)
        first, length, _, num_tiles = _rows_to_read(
            length_ptr, query_starts_ptr, requests, requests < num_requests, window, TILE
        )
        counts = _count_pieces(first, length, num_tiles, piece, MAX_SPLITS)
        is_split = (counts > 1).to(tl.int32)
        first_pieces = num_pieces + tl.cumsum(counts, 0) - counts
        first_partials = num_partial + tl.cumsum(counts * is_split, 0) - counts * is_split
        is_here = (slots[:, None] >= first_pieces[None, :]) & (slots[:, None] < (first_pieces + counts)[None, :])
        slot_request += tl.sum(tl.where(is_here, requests[None, :] + 1, 0), 1)
        slot_first += tl.sum(tl.where(is_here, first_pieces[None, :], 0), 1)
        slot_partial += tl.sum(tl.where(is_here, first_partials[None, :], 0), 1)
        entry_ptr = splits_ptr + 4 * (num_splits + tl.cumsum(is_split, 0))
        is_mine = (counts > 1) & (tl.full([BLOCK_R], tl.program_id(0), tl.int32) == 0)
        tl.store(entry_ptr, first_partials, mask=is_mine)
        tl.store(entry_ptr + 1, counts, mask=is_mine)
        tl.store(entry_ptr + 2, tl.load(query_starts_ptr + requests, mask=is_mine, other=0), mask=is_mine)
        tl.store(entry_ptr + 3, tl.load(query_starts_ptr + requests + 1, mask=is_mine, other=0), mask=is_mine)
        num_pieces += tl.sum(counts, 0)
        num_partial += tl.sum(counts * is_split, 0)
        num_splits += tl.sum(is_split, 0)
    if tl.program_id(0) == 0:
        tl.store(splits_ptr, num_splits)

    is_slot = slots < num_slots
    is_used = slot_request >= 0
    first, length, first_tile, num_tiles = _rows_to_read(
        length_ptr, query_starts_ptr, slot_request, is_used, window, TILE
    )
    query_start = tl.load(query_starts_ptr + slot_request, mask=is_used, other=0)
    num_queries = tl.load(query_starts_ptr + slot_request + 1, mask=is_used, other=0) - query_start
    counts = tl.maximum(_count_pieces(first, length, num_tiles, piece, MAX_SPLITS), 1)
    index = slots - slot_first
    start = tl.maximum((first_tile + index * num_tiles // counts) * TILE, first)
    end = tl.minimum((first_tile + (index + 1) * num_tiles // counts) * TILE, length)
    slot_ptr = slots_ptr + 8 * slots
    tl.store(slot_ptr, slot_request, mask=is_slot)
    tl.store(slot_ptr + 1, start, mask=is_slot)
    tl.store(slot_ptr + 2, end, mask=is_slot)
    tl.store(slot_ptr + 3, tl.where(counts > 1, slot_partial + index, -1), mask=is_slot)
    tl.store(slot_ptr + 4, query_start, mask=is_slot)
    tl.store(slot_ptr + 5, length - num_queries, mask=is_slot)
    tl.store(slot_ptr + 6, num_queries, mask=is_slot)
