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

from dataclasses import dataclass


try:  # the remote-code loader passes over packages that are imported here
    import triton
    import triton.language as tl
except ImportError:
    raise


# A block of tokens is a tile's rows; its columns are pairs of a query token and a head, `BLOCK_T * BLOCK_H` of them.
# Heads come last, as A lies in the cache: a score tile is weighted by A as it was loaded, and B's products are plain
# matrix products. A product may go through `STEP` = 2 ranks at once, since each has to be waited for. Heads that are no
# power of 2 may take two tiles, of `BLOCK_H` and of `REST_H` heads, which share the loads of B.
#
# What a kernel is compiled for comes in a few constants: `KEYS` and `VALUES` are [`Rows`], `MASK` is a [`Mask`], and `LAUNCH`
# is the `Launch` of flash_tpa_t6.


@dataclass(frozen=True)
class Rows:
    """How the factors of keys, or of values, lie in the rows of a cache."""

    rank: int
    num_heads: int
    head_dim: int
    width: int  # numbers from a row to the next
    padded_heads: int  # of a row of A, with its padding
    constant_a: bool  # rows hold B alone
    step: int  # ranks that one product goes through

    @property
    def a_start(self) -> int:
        return self.rank * self.head_dim


@dataclass(frozen=True)
class Mask:
    """What a query must not look at."""

    num_queries: int
    num_heads: int
    causal: bool
    kind: str  # "none", "boolean" or "additive"
    by_column: bool  # whether it differs from a query, or a head, to the next


@triton.jit
def _token_of(rows, STEP: tl.constexpr):
    """
    The token of a tile's row. Of 16 rows, the first 8 are one rank's, the others the same tokens' of the next rank:
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
def _columns(first_head, first_query, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """The head and the query token of each of a tile's columns."""
    columns = tl.arange(0, BLOCK_T * BLOCK_H)
    return first_head + columns % BLOCK_H, first_query + columns // BLOCK_H


@triton.jit
def _no_tokens(BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """The running sums of a tile: the maximum, the normalizer of each row, the output."""
    # Finite, so that -inf less it is -inf: a block in which a column sees nothing adds nothing.
    maximum = tl.full([BLOCK_C], -1e30, tl.float32)
    return maximum, tl.zeros([BLOCK_N, BLOCK_C], tl.float32), tl.zeros([BLOCK_D, BLOCK_C], tl.float32)


@triton.jit
def _load_query(
    query_ptr,
    queries,
    heads,
    stride_t,
    stride_h,
    NUM_QUERIES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    features = tl.arange(0, BLOCK_D)
    return tl.load(
        query_ptr + (queries * stride_t + heads * stride_h)[None, :] + features[:, None],
        mask=((queries < NUM_QUERIES) & (heads < NUM_HEADS))[None, :] & (features < HEAD_DIM)[:, None],
        other=0.0,
    )


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
    """A from `rank` on: [step * BLOCK_N, BLOCK_H] from the cache, or [1, BLOCK_H] of the constants."""
    heads = first_head + tl.arange(0, BLOCK_H)
    A_HEADS: tl.constexpr = ROWS.padded_heads
    STEP: tl.constexpr = ROWS.step
    if ROWS.constant_a:
        is_head = heads < ROWS.num_heads
        a = tl.load(constant_ptr + rank * ROWS.num_heads + heads, mask=is_head, other=0.0)[None, :]
    else:
        rows = tl.arange(0, STEP * BLOCK_N)
        tokens = _token_of(rows, STEP)
        columns = heads[None, :]
        if A_HEADS % 16 == 8 and A_HEADS > 8:  # see `FactorLayout`
            columns = (columns + ((rank + _rank_of(rows, STEP)) % 2 * 8)[:, None]) % A_HEADS
        offsets = (tokens * ROWS.width + _rank_of(rows, STEP) * A_HEADS)[:, None] + columns
        is_a = (tokens < num_rows)[:, None] & (heads < A_HEADS)[None, :]
        a = tl.load(rows_ptr + (offsets + ROWS.a_start + rank * A_HEADS), mask=is_a, other=0.0)
    return a


@triton.jit
def _weigh(columns, a, BLOCK_T: tl.constexpr):
    """Columns [BLOCK_N, BLOCK_T * BLOCK_H], for each of the BLOCK_T queries times A [BLOCK_N or 1, BLOCK_H]."""
    if BLOCK_T == 1:
        return columns * a
    N: tl.constexpr = columns.shape[0]
    C: tl.constexpr = columns.shape[1]
    return tl.reshape(tl.reshape(columns, [N, BLOCK_T, C // BLOCK_T]) * a[:, None, :], [N, C])


@triton.jit
def _hide(
    scores,
    mask_ptr,
    queries,
    heads,
    tokens,
    is_row,
    last_token,
    mask_scale,
    mask_stride_h,
    mask_stride_t,
    mask_stride_n,
    MASK: tl.constexpr,
):
    """Scores, -inf where a query must not look. Those of rows that do not count are so already."""
    if MASK.kind == "none" and (MASK.num_queries == 1 or not MASK.causal):
        return scores
    visible = is_row[:, None]
    if MASK.causal and MASK.num_queries > 1:
        visible = visible & (tokens[:, None] <= (last_token + queries)[None, :])
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
def _above(scores, scale, maximum):
    """By how much each row's scores are above the running maximum at most."""
    return tl.max(scores * scale - maximum[None, :], 1, keep_dims=True)


@triton.jit
def _raise(scores, scale, maximum, normalizer, output):
    """The running sums relative to a maximum over these scores, too."""
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
    return _sum_ranks(_weigh(products, a.to(tl.float32), BLOCK_T), ROWS.step)


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
            rest_query, b, rows_ptr, constant_ptr, first_head + LAUNCH.block_h, num_rows, rank,
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
    return _weigh(weights, a.to(weights.dtype), BLOCK_T)


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
            rest_weights, rest_output, rows_ptr, constant_ptr, first_head + LAUNCH.block_h, num_rows, rank,
            ROWS, LAUNCH.block_n, LAUNCH.block_t, LAUNCH.rest_h,
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
    is_column = (queries < NUM_QUERIES) & (heads < NUM_HEADS)
    features = tl.arange(0, BLOCK_D)
    tl.store(
        partial_ptr + row[None, :] * HEAD_DIM + features[:, None],
        output / normalizer[None, :],
        mask=is_column[None, :] & (features < HEAD_DIM)[:, None],
    )
    tl.store(lse_ptr + row, lse, mask=is_column)


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
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    MASK: tl.constexpr,
    LAUNCH: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """
    Attention over one of `num_splits` pieces of the cache, for one block of columns of one sequence.

    Writes the output normalised within the piece [batch, split, query, head, d] and the log2 of its sum of
    exponentials [batch, split, query, head], both float32. The pieces divide the length that is on the device: the
    grid depends on the room in the cache alone. Batch strides of the rows count `STRIDE_UNIT` numbers, which tells the
    compiler that rows start on 16 bytes.
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
    HEAD_BLOCKS: tl.constexpr = (NUM_HEADS + ALL_H - 1) // ALL_H
    QUERY_BLOCKS: tl.constexpr = (NUM_QUERIES + BLOCK_T - 1) // BLOCK_T
    BLOCK_C: tl.constexpr = BLOCK_T * BLOCK_H
    # Blocks of columns read the same rows: side by side, they find them in the L2 cache.
    column_block = tl.program_id(0) % (HEAD_BLOCKS * QUERY_BLOCKS)
    split = tl.program_id(0) // (HEAD_BLOCKS * QUERY_BLOCKS)
    batch = tl.program_id(1).to(tl.int64)

    length = key_length
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(length_ptr + batch * length_stride_b).to(tl.int32), key_length)
    piece = tl.cdiv(tl.cdiv(length, num_splits), 16) * 16
    start = split * piece
    end = tl.minimum(start + piece, length)

    first_head = (column_block % HEAD_BLOCKS) * ALL_H
    first_query = (column_block // HEAD_BLOCKS) * BLOCK_T
    query_ptr += batch * query_stride_b
    heads, queries = _columns(first_head, first_query, BLOCK_T, BLOCK_H)
    query = _load_query(
        query_ptr, queries, heads, query_stride_t, query_stride_h, NUM_QUERIES, NUM_HEADS, HEAD_DIM, BLOCK_D
    )  # fmt: skip
    maximum, normalizer, output = _no_tokens(BLOCK_N, BLOCK_C, BLOCK_D)
    rest_query, rest_output = query, output  # stand for a second tile where there is none
    if REST_H:
        rest_heads, rest_queries = _columns(first_head + BLOCK_H, first_query, BLOCK_T, REST_H)
        rest_query = _load_query(
            query_ptr, rest_queries, rest_heads, query_stride_t, query_stride_h, NUM_QUERIES, NUM_HEADS, HEAD_DIM, BLOCK_D
        )  # fmt: skip
        rest_maximum, rest_normalizer, rest_output = _no_tokens(BLOCK_N, BLOCK_T * REST_H, BLOCK_D)

    key_ptr += batch * key_stride_b * STRIDE_UNIT
    value_ptr += batch * value_stride_b * STRIDE_UNIT
    mask_ptr += batch * mask_stride_b
    features = tl.arange(0, BLOCK_D)
    k_rows = tl.arange(0, KEYS.step * BLOCK_N)
    v_rows = tl.arange(0, VALUES.step * BLOCK_N)
    k_tokens = _token_of(k_rows, KEYS.step)
    v_tokens = _token_of(v_rows, VALUES.step)
    key_b_offsets = (k_tokens * KEYS.width + _rank_of(k_rows, KEYS.step) * HEAD_DIM)[:, None] + features[None, :]
    value_b_offsets = (v_tokens * VALUES.width + _rank_of(v_rows, VALUES.step) * HEAD_DIM)[:, None] + features[None, :]
    K_RANK: tl.constexpr = KEYS.rank
    V_RANK: tl.constexpr = VALUES.rank
    K_STEP: tl.constexpr = KEYS.step
    V_STEP: tl.constexpr = VALUES.step
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES if LAUNCH.unroll else 1):
        key_rows = key_ptr + first * tl.full((), KEYS.width, tl.int64)
        value_rows = value_ptr + first * tl.full((), VALUES.width, tl.int64)
        tokens = first + tl.arange(0, BLOCK_N)
        is_row = tokens < end
        is_key_b = (k_tokens < end - first)[:, None] & (features < HEAD_DIM)[None, :]
        is_value_b = (v_tokens < end - first)[:, None] & (features < HEAD_DIM)[None, :]

        # Loads of every rank are in flight at once if there is room for them, else those of a few ranks.
        no_scores = tl.where(is_row, 0.0, -float("inf"))[:, None]
        scores = tl.broadcast_to(no_scores, [BLOCK_N, BLOCK_C])
        rest_scores = scores
        if REST_H:
            rest_scores = tl.broadcast_to(no_scores, [BLOCK_N, BLOCK_T * REST_H])
        if LAUNCH.unroll:
            for r in tl.static_range(0, K_RANK, K_STEP):
                b = tl.load(key_rows + (key_b_offsets + r * HEAD_DIM), mask=is_key_b, other=0.0).to(query.dtype)
                scores, rest_scores = _add_scores(
                    scores, rest_scores, query, rest_query, b, key_rows, key_a_ptr, first_head, end - first, r,
                    KEYS, LAUNCH,
                )  # fmt: skip
        else:
            for r in tl.range(0, K_RANK, K_STEP, num_stages=STAGES):
                b = tl.load(key_rows + (key_b_offsets + r * HEAD_DIM), mask=is_key_b, other=0.0).to(query.dtype)
                scores, rest_scores = _add_scores(
                    scores, rest_scores, query, rest_query, b, key_rows, key_a_ptr, first_head, end - first, r,
                    KEYS, LAUNCH,
                )  # fmt: skip

        scores = _hide(
            scores, mask_ptr, queries, heads, tokens, is_row, length - NUM_QUERIES, log2_e / scale,
            mask_stride_h, mask_stride_t, mask_stride_n, MASK,
        )  # fmt: skip
        above = _above(scores, scale, maximum)
        if REST_H:
            rest_scores = _hide(
                rest_scores, mask_ptr, rest_queries, rest_heads, tokens, is_row, length - NUM_QUERIES, log2_e / scale,
                mask_stride_h, mask_stride_t, mask_stride_n, MASK,
            )  # fmt: skip
            above = tl.maximum(above, _above(rest_scores, scale, rest_maximum))
        # The maximum may lag by 2^8 before it is worth a reduction over tokens for each column: a power of 2 changes
        # no digit, and is undone at the end.
        if tl.max(above) > 8.0:
            maximum, normalizer, output = _raise(scores, scale, maximum, normalizer, output)
            if REST_H:
                rest_maximum, rest_normalizer, rest_output = _raise(
                    rest_scores, scale, rest_maximum, rest_normalizer, rest_output
                )
        weights = tl.exp2(scores * scale - maximum[None, :])
        # Summed over rows at the end: for a sum here, in a layout of its own, Triton 3.6 computes the exponentials again.
        normalizer += weights
        weights = weights.to(query.dtype)
        rest_weights = weights
        if REST_H:
            rest_weights = tl.exp2(rest_scores * scale - rest_maximum[None, :])
            rest_normalizer += rest_weights
            rest_weights = rest_weights.to(query.dtype)

        if LAUNCH.unroll:
            for r in tl.static_range(0, V_RANK, V_STEP):
                b = tl.load(value_rows + (value_b_offsets + r * HEAD_DIM), mask=is_value_b, other=0.0).to(query.dtype)
                output, rest_output = _add_output(
                    output, rest_output, weights, rest_weights, b, value_rows, value_a_ptr, first_head, end - first, r,
                    VALUES, LAUNCH,
                )  # fmt: skip
        else:
            for r in tl.range(0, V_RANK, V_STEP, num_stages=STAGES):
                b = tl.load(value_rows + (value_b_offsets + r * HEAD_DIM), mask=is_value_b, other=0.0).to(query.dtype)
                output, rest_output = _add_output(
                    output, rest_output, weights, rest_weights, b, value_rows, value_a_ptr, first_head, end - first, r,
                    VALUES, LAUNCH,
                )  # fmt: skip

    if OVERLAP:  # the combine kernel's programs may take the places that empty, and wait there
        tl.extra.cuda.gdc_launch_dependents()
    row = batch * num_splits + split
    _store_partial(
        output, normalizer, maximum, partial_ptr, lse_ptr, row, queries, heads,
        NUM_QUERIES, NUM_HEADS, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    if REST_H:
        _store_partial(
            rest_output, rest_normalizer, rest_maximum, partial_ptr, lse_ptr, row, rest_queries, rest_heads,
            NUM_QUERIES, NUM_HEADS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _load_pieces(partial_ptr, first, splits, features, num_splits, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr):
    return tl.load(
        partial_ptr + (first + splits * COLUMNS)[:, None] * HEAD_DIM + features[None, :],
        mask=(splits < num_splits)[:, None] & (features < HEAD_DIM)[None, :],
        other=0.0,
    )


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
):
    """The pieces of one column (a query token's head) into its output: their mean, weighted by exponentials."""
    if OVERLAP:  # started early: until the decode kernel is complete, and what it wrote is visible
        tl.extra.cuda.gdc_wait()
    column = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    first = batch * num_splits * COLUMNS + column
    splits = tl.arange(0, BLOCK_S)
    features = tl.arange(0, BLOCK_D)
    # Sent for with the sums, not after them.
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
        output += piece * tl.exp2(lse - maximum)[:, None]
        splits += BLOCK_S
        piece = _load_pieces(partial_ptr, first, splits, features, num_splits, COLUMNS, HEAD_DIM)
    output = tl.sum(output, 0) / (normalizer * V_RANK)
    tl.store(out_ptr + (batch * COLUMNS + column) * HEAD_DIM + features, output, mask=features < HEAD_DIM)
