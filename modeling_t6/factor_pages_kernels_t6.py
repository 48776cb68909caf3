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
"""Triton kernels between projections and pages of factors: rows written, and keys and values formed of them again"""

from typing import NamedTuple


try:  # the remote-code loader passes over packages that are imported here
    import triton
    import triton.language as tl
except ImportError:
    raise


class PagedRows(NamedTuple):
    """How the factors of keys, or of values, lie in a page: one row for each token, as `FactorLayout` packs it."""

    rank: int
    num_heads: int
    head_dim: int
    padded_heads: int  # of a row of A, with its padding
    rotates: bool  # whether every other row of A begins with its last 8 numbers
    kind: str  # "cached": A is in the row; "constant": a tensor [R, h]; "selected": one rank, and its weight, for each head


class Rotation(NamedTuple):
    """What becomes of B factors before they are stored, and of queries."""

    rotary_dim: int
    has_norm: bool
    norms_key_heads: bool = False  # whether that of keys is of the heads that A and B form, not of rows of B


@triton.jit
def _load_angles(cos_ptr, sin_ptr, ROTARY_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """For each feature: the other one of its pair, whether RoPE rotates it, its cosine, and its sine with the pair's sign."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    features = tl.arange(0, BLOCK_D)
    is_first = features < HALF
    is_rotated = features < ROTARY_DIM
    cos = tl.load(cos_ptr + features % HALF, mask=is_rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + features % HALF, mask=is_rotated, other=0.0).to(tl.float32)
    return tl.where(is_first, features + HALF, features - HALF), is_rotated, cos, tl.where(is_first, -sin, sin)


@triton.jit
def _normalize(rows, paired_rows, norm_ptr, features, pairs, is_rotated, eps, HEAD_DIM: tl.constexpr):
    """RMS norm of rows [n, BLOCK_D], zero beyond d, and of the same rows with the features of each pair exchanged."""
    scale = tl.rsqrt(tl.sum(rows * rows, 1) / HEAD_DIM + eps)[:, None]
    weight = tl.load(norm_ptr + features, mask=features < HEAD_DIM, other=0.0).to(tl.float32)
    paired_weight = tl.load(norm_ptr + pairs, mask=is_rotated, other=0.0).to(tl.float32)
    return rows * scale * weight[None, :], paired_rows * scale * paired_weight[None, :]


@triton.jit
def _activate(a, is_head, ACTIVATION: tl.constexpr):
    """A [n, heads], all heads of each of n ranks."""
    if ACTIVATION == "sigmoid":
        a = tl.sigmoid(a)
    elif ACTIVATION == "softmax":
        a = tl.where(is_head, a, -1e30)  # finite, for rows that hold no head
        a = tl.exp(a - tl.max(a, 1, keep_dims=True))
        a = a / tl.sum(a, 1, keep_dims=True)
    return a


@triton.jit
def _as_stored(x, DTYPE: tl.constexpr):
    """What is beyond the range of float8 becomes its largest number, not NaN."""
    if DTYPE == tl.float8e4nv:
        x = tl.clamp(x, -448.0, 448.0)
    return x.to(DTYPE)


@triton.jit
def _padded(a, is_head, DTYPE: tl.constexpr):
    """
    A as it is stored, zero where there is no head. Zeros are not converted to float8: of two equal pairs that are known
    when compiling, ptxas 12.8 converts one, and takes whatever is in a register for the other.
    """
    return tl.where(is_head, _as_stored(a, DTYPE), 0.0)


@triton.jit
def _load_projected_a(
    a_ptr, heads, rank,
    NUM_HEADS: tl.constexpr, RANK: tl.constexpr, CONSTANT_A: tl.constexpr, ACTIVATION: tl.constexpr,
    ALL_HEADS: tl.constexpr,
):  # fmt: skip
    """A of some heads and one rank, activated."""
    if CONSTANT_A:
        return tl.load(a_ptr + rank * NUM_HEADS + heads, mask=heads < NUM_HEADS, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + heads * RANK + rank, mask=heads < NUM_HEADS, other=0.0).to(tl.float32)
    if ACTIVATION == "sigmoid":
        a = tl.sigmoid(a)
    elif ACTIVATION == "softmax":
        others = tl.arange(0, ALL_HEADS)
        others = tl.load(a_ptr + others * RANK + rank, mask=others < NUM_HEADS, other=-float("inf")).to(tl.float32)
        maximum = tl.max(others, 0)
        a = tl.exp(a - maximum) / tl.sum(tl.exp(others - maximum), 0)
    return a


@triton.jit
def _form_query(
    a_ptr, b_ptr, cos_ptr, sin_ptr, norm_ptr, query_ptr, first_head, has_row, eps,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr, CONSTANT_A: tl.constexpr,
    ACTIVATION: tl.constexpr, ROTATION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, ALL_HEADS: tl.constexpr,
):  # fmt: skip
    """
    The query of one token for some heads; NaN where the token has no row. Without factors (`RANK` 0), B is the query
    itself.
    """
    heads = first_head + tl.arange(0, BLOCK_H)
    features = tl.arange(0, BLOCK_D)
    is_query = (heads < NUM_HEADS)[:, None] & (features < HEAD_DIM)[None, :]
    pairs, is_rotated, cos, sin = _load_angles(cos_ptr, sin_ptr, ROTATION.rotary_dim, BLOCK_D)
    # Heads are rotated after they are formed where a norm comes between, else the factors are.
    ROTATES_HEADS: tl.constexpr = ROTATION.has_norm or RANK == 0
    if RANK == 0:
        rows = b_ptr + (heads * HEAD_DIM)[:, None]
        is_pair = (heads < NUM_HEADS)[:, None] & is_rotated[None, :]
        query = tl.load(rows + features[None, :], mask=is_query, other=0.0).to(tl.float32)
        paired = tl.load(rows + pairs[None, :], mask=is_pair, other=0.0).to(tl.float32)
    else:
        query = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        paired = query
        for r in tl.static_range(RANK):
            a = _load_projected_a(a_ptr, heads, r, NUM_HEADS, RANK, CONSTANT_A, ACTIVATION, ALL_HEADS)[:, None]
            b = tl.load(b_ptr + (r * HEAD_DIM + features), mask=features < HEAD_DIM, other=0.0).to(tl.float32)
            paired_b = tl.load(b_ptr + (r * HEAD_DIM + pairs), mask=is_rotated, other=0.0).to(tl.float32)
            if ROTATES_HEADS:
                query += a * b[None, :]
                paired += a * paired_b[None, :]
            else:
                query += a * (b * cos + paired_b * sin)[None, :]
        query = query / RANK
        paired = paired / RANK
    if ROTATION.has_norm:
        query, paired = _normalize(query, paired, norm_ptr, features, pairs, is_rotated, eps, HEAD_DIM)
    if ROTATES_HEADS:
        query = query * cos[None, :] + paired * sin[None, :]
    query = tl.where(has_row, query, float("nan"))
    offsets = (heads * HEAD_DIM)[:, None] + features[None, :]
    tl.store(query_ptr + offsets, query.to(query_ptr.dtype.element_ty), mask=is_query)


@triton.jit
def _store_normed_a(
    a_ptr, b_ptr, row_ptr, first_head, eps,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, ALL_HEADS: tl.constexpr,
):  # fmt: skip
    """A of one token for some heads, divided by the size of the heads that it forms: see `T6KeyHeadRMSNorm`."""
    A_HEADS: tl.constexpr = ROWS.padded_heads
    HEAD_DIM: tl.constexpr = ROWS.head_dim
    RANK: tl.constexpr = ROWS.rank
    heads = first_head + tl.arange(0, BLOCK_H)
    features = tl.arange(0, BLOCK_D)
    key = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for r in tl.static_range(RANK):
        a = _load_projected_a(a_ptr, heads, r, ROWS.num_heads, RANK, False, ACTIVATION, ALL_HEADS)
        b = tl.load(b_ptr + (r * HEAD_DIM + features), mask=features < HEAD_DIM, other=0.0).to(tl.float32)
        key += a[:, None] * b[None, :]
    key = key / RANK
    scale = tl.rsqrt(tl.sum(key * key, 1) / HEAD_DIM + eps)
    for r in tl.static_range(RANK):
        a = _load_projected_a(a_ptr, heads, r, ROWS.num_heads, RANK, False, ACTIVATION, ALL_HEADS)
        columns = heads
        if ROWS.rotates and r % 2 == 1:
            columns = (heads + 8) % A_HEADS
        offsets = ROWS.rank * ROWS.head_dim + r * A_HEADS + columns
        a = _padded(a * scale, heads < ROWS.num_heads, row_ptr.dtype.element_ty)
        tl.store(row_ptr + offsets, a, mask=heads < A_HEADS)


@triton.jit
def _load_b(
    b_ptr, cos_ptr, sin_ptr, norm_ptr, ranks, eps, ROWS: tl.constexpr, ROTATION: tl.constexpr, BLOCK_D: tl.constexpr
):
    """
    B of one token and some ranks, [n, BLOCK_D]: of keys normalised (or, where their heads are, times the weight of the norm)
    and rotated, of values (no `ROTATION`) as it is.
    """
    HEAD_DIM: tl.constexpr = ROWS.head_dim
    RANK: tl.constexpr = ROWS.rank
    features = tl.arange(0, BLOCK_D)
    offsets = (ranks * HEAD_DIM)[:, None] + features[None, :]
    is_b = (ranks < RANK)[:, None] & (features < HEAD_DIM)[None, :]
    b = tl.load(b_ptr + offsets, mask=is_b, other=0.0).to(tl.float32)
    if ROTATION is not None:
        pairs, is_rotated, cos, sin = _load_angles(cos_ptr, sin_ptr, ROTATION.rotary_dim, BLOCK_D)
        is_pair = (ranks < RANK)[:, None] & is_rotated[None, :]
        paired = tl.load(b_ptr + ((ranks * HEAD_DIM)[:, None] + pairs[None, :]), mask=is_pair, other=0.0)
        paired = paired.to(tl.float32)
        if ROTATION.norms_key_heads:
            weight = tl.load(norm_ptr + features, mask=features < HEAD_DIM, other=0.0).to(tl.float32)
            paired_weight = tl.load(norm_ptr + pairs, mask=is_rotated, other=0.0).to(tl.float32)
            b, paired = b * weight[None, :], paired * paired_weight[None, :]
        elif ROTATION.has_norm:
            b, paired = _normalize(b, paired, norm_ptr, features, pairs, is_rotated, eps, HEAD_DIM)
        b = b * cos[None, :] + paired * sin[None, :]
    return b, offsets, is_b


@triton.jit
def _store_b(
    b_ptr, cos_ptr, sin_ptr, norm_ptr, row_ptr, eps,
    ROWS: tl.constexpr, ROTATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """B of one token, `BLOCK_R` ranks at a time."""
    RANK: tl.constexpr = ROWS.rank
    for first in tl.static_range(0, RANK, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        b, offsets, is_b = _load_b(b_ptr, cos_ptr, sin_ptr, norm_ptr, ranks, eps, ROWS, ROTATION, BLOCK_D)
        tl.store(row_ptr + offsets, _as_stored(b, row_ptr.dtype.element_ty), mask=is_b)


@triton.jit
def _form_new_heads(
    a_ptr, b_ptr, cos_ptr, sin_ptr, norm_ptr, out_ptr, first_head, eps,
    ROWS: tl.constexpr, ROTATION: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, ALL_HEADS: tl.constexpr,
):  # fmt: skip
    """
    K or V of one token for some heads, of its projections: as [`_form_heads`] forms them of the row, whose dtype is that
    of the heads.
    """
    HEAD_DIM: tl.constexpr = ROWS.head_dim
    NUM_HEADS: tl.constexpr = ROWS.num_heads
    RANK: tl.constexpr = ROWS.rank
    heads = first_head + tl.arange(0, BLOCK_H)
    features = tl.arange(0, BLOCK_D)
    states = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for r in tl.static_range(RANK):
        a = _load_projected_a(a_ptr, heads, r, NUM_HEADS, RANK, False, ACTIVATION, ALL_HEADS)
        a = a.to(out_ptr.dtype.element_ty).to(tl.float32)
        b, _, _ = _load_b(b_ptr, cos_ptr, sin_ptr, norm_ptr, r + tl.arange(0, 1), eps, ROWS, ROTATION, BLOCK_D)
        states += a[:, None] * b.to(out_ptr.dtype.element_ty).to(tl.float32)
    offsets = (heads * HEAD_DIM)[:, None] + features[None, :]
    is_number = (heads < NUM_HEADS)[:, None] & (features < HEAD_DIM)[None, :]
    tl.store(out_ptr + offsets, (states / RANK).to(out_ptr.dtype.element_ty), mask=is_number)


@triton.jit
def _store_a(
    a_ptr, row_ptr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, ALL_HEADS: tl.constexpr
):
    """A of one token, head-major as it is projected, into the rows of its ranks, padded with zeros."""
    A_HEADS: tl.constexpr = ROWS.padded_heads
    RANK: tl.constexpr = ROWS.rank
    columns = tl.arange(0, ALL_HEADS)[None, :]
    for first in tl.static_range(0, RANK, BLOCK_R):
        ranks = (first + tl.arange(0, BLOCK_R))[:, None]
        heads = columns
        if ROWS.rotates:
            heads = (columns + ranks % 2 * (A_HEADS - 8)) % A_HEADS
        is_row = (ranks < RANK) & (columns < A_HEADS)
        is_head = is_row & (heads < ROWS.num_heads) & (ROWS.kind == "cached")
        a = tl.load(a_ptr + heads * RANK + ranks, mask=is_head, other=0.0).to(tl.float32)
        a = _padded(_activate(a, is_head, ACTIVATION), is_head, row_ptr.dtype.element_ty)
        offsets = ROWS.rank * ROWS.head_dim + ranks * A_HEADS + columns
        tl.store(row_ptr + offsets, a, mask=is_row)


@triton.jit
def _find_row(
    slots_ptr, token, num_slots, first_row, new_rows, room, PAGE_SIZE: tl.constexpr, HAS_LENGTH: tl.constexpr
):
    """
    The block that a token's row is in, its place there, and whether it has one: by its slot; without pages (`PAGE_SIZE`
    0), where a block is a sequence that gets `new_rows` rows, from `first_row` on, which counts from a length on the device
    if there is one.
    """
    if PAGE_SIZE == 0:
        block = token // new_rows
        offset = token % new_rows + first_row
        if HAS_LENGTH:
            offset += tl.load(slots_ptr).to(tl.int64)
        has_row = offset < room
    else:
        slot = tl.load(slots_ptr + token, mask=token < num_slots, other=-1).to(tl.int64)
        block = slot // PAGE_SIZE
        offset = slot % PAGE_SIZE
        has_row = slot >= 0
    return block, offset, has_row


@triton.jit(
    do_not_specialize=[
        "a_q_stride",
        "b_q_stride",
        "a_k_stride",
        "b_k_stride",
        "a_v_stride",
        "b_v_stride",
        "cos_stride",
        "sin_stride",
        "key_block_stride",
        "key_row_stride",
        "value_block_stride",
        "value_row_stride",
        "num_slots",
        "first_row",
        "new_rows",
        "room",
        "first_formed",
    ]
)
def store_factors_kernel(
    a_q_ptr,
    b_q_ptr,
    a_k_ptr,
    b_k_ptr,
    a_v_ptr,
    b_v_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    slots_ptr,
    key_pages_ptr,
    value_pages_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    a_q_stride,
    b_q_stride,
    a_k_stride,
    b_k_stride,
    a_v_stride,
    b_v_stride,
    cos_stride,
    sin_stride,
    key_block_stride,
    key_row_stride,
    value_block_stride,
    value_row_stride,
    num_slots,
    first_row,
    new_rows,
    room,
    first_formed,
    eps,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    Q_RANK: tl.constexpr,
    CONSTANT_A: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROTATION: tl.constexpr,
    B_UNIT: tl.constexpr,
    PAGE_UNIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    FORMS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALL_HEADS: tl.constexpr,
):
    """
    For each token: a program for each block of heads, which forms their query, one for the key row, one for the value row.
    Where heads of keys are normalised, also one for each block of the A of these; where K and V are wanted, too (`FORMS`), of
    tokens from `first_formed` on that have a row, also one for each block of heads of each.

    Strides of B and of pages count `B_UNIT` and `PAGE_UNIT` numbers, which tells the compiler how rows are aligned.
    """
    HEAD_DIM: tl.constexpr = KEYS.head_dim
    HEAD_BLOCKS: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    KEY_BLOCKS: tl.constexpr = (KEYS.padded_heads + BLOCK_H - 1) // BLOCK_H if ROTATION.norms_key_heads else 0
    FORMED_BLOCKS: tl.constexpr = (KEYS.num_heads + BLOCK_H - 1) // BLOCK_H if FORMS else 0
    STORED: tl.constexpr = HEAD_BLOCKS + 2 + KEY_BLOCKS
    part = tl.program_id(0) % (STORED + 2 * FORMED_BLOCKS)
    token = (tl.program_id(0) // (STORED + 2 * FORMED_BLOCKS)).to(tl.int64)
    cos_ptr += token * cos_stride
    sin_ptr += token * sin_stride
    if part < HEAD_BLOCKS:
        has_row = True
        if HAS_LENGTH:
            _, _, has_row = _find_row(slots_ptr, token, num_slots, first_row, new_rows, room, PAGE_SIZE, HAS_LENGTH)
        _form_query(
            a_q_ptr + token * a_q_stride, b_q_ptr + token * b_q_stride * B_UNIT, cos_ptr, sin_ptr, q_norm_ptr,
            query_ptr + token * (NUM_HEADS * HEAD_DIM), part * BLOCK_H, has_row, eps,
            NUM_HEADS, HEAD_DIM, Q_RANK, CONSTANT_A, ACTIVATION, ROTATION, BLOCK_H, BLOCK_D, ALL_HEADS,
        )  # fmt: skip
    else:
        block, offset, has_row = _find_row(
            slots_ptr, token, num_slots, first_row, new_rows, room, PAGE_SIZE, HAS_LENGTH
        )
        if FORMS:
            if (part >= STORED) & has_row & (token >= first_formed):
                formed = (token - first_formed) * (KEYS.num_heads * HEAD_DIM)
                if part < STORED + FORMED_BLOCKS:
                    _form_new_heads(
                        a_k_ptr + token * a_k_stride, b_k_ptr + token * b_k_stride * B_UNIT, cos_ptr, sin_ptr,
                        k_norm_ptr, key_ptr + formed, (part - STORED) * BLOCK_H, eps,
                        KEYS, ROTATION, ACTIVATION, BLOCK_H, BLOCK_D, ALL_HEADS,
                    )  # fmt: skip
                else:
                    _form_new_heads(
                        a_v_ptr + token * a_v_stride, b_v_ptr + token * b_v_stride * B_UNIT, cos_ptr, sin_ptr,
                        k_norm_ptr, value_ptr + formed, (part - STORED - FORMED_BLOCKS) * BLOCK_H, eps,
                        VALUES, None, ACTIVATION, BLOCK_H, BLOCK_D, ALL_HEADS,
                    )  # fmt: skip
            has_row = has_row & (part < STORED)
        if has_row:
            if part != HEAD_BLOCKS + 1:
                row_ptr = key_pages_ptr + (block * key_block_stride + offset * key_row_stride) * PAGE_UNIT
                b_ptr = b_k_ptr + token * b_k_stride * B_UNIT
                a_ptr = a_k_ptr + token * a_k_stride
                if part == HEAD_BLOCKS:
                    _store_b(b_ptr, cos_ptr, sin_ptr, k_norm_ptr, row_ptr, eps, KEYS, ROTATION, BLOCK_R, BLOCK_D)
                    if KEYS.padded_heads and KEY_BLOCKS == 0:
                        _store_a(a_ptr, row_ptr, KEYS, ACTIVATION, BLOCK_R, ALL_HEADS)
                elif KEY_BLOCKS:
                    _store_normed_a(
                        a_ptr, b_ptr, row_ptr, (part - HEAD_BLOCKS - 2) * BLOCK_H, eps,
                        KEYS, ACTIVATION, BLOCK_H, BLOCK_D, ALL_HEADS,
                    )  # fmt: skip
            else:
                row_ptr = value_pages_ptr + (block * value_block_stride + offset * value_row_stride) * PAGE_UNIT
                b_ptr = b_v_ptr + token * b_v_stride * B_UNIT
                _store_b(b_ptr, cos_ptr, sin_ptr, k_norm_ptr, row_ptr, eps, VALUES, None, BLOCK_R, BLOCK_D)
                if VALUES.padded_heads:
                    _store_a(a_v_ptr + token * a_v_stride, row_ptr, VALUES, ACTIVATION, BLOCK_R, ALL_HEADS)


@triton.jit
def _form_heads(
    rows, a_ptr, ranks_ptr, heads, is_pair, out_ptr, out_rows, out_stride,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(1 / R) A^T B of some pairs of a token and a head, of rows that begin at `rows`."""
    HEAD_DIM: tl.constexpr = ROWS.head_dim
    A_HEADS: tl.constexpr = ROWS.padded_heads
    RANK: tl.constexpr = ROWS.rank
    features = tl.arange(0, BLOCK_D)
    is_number = is_pair[:, None] & (features < HEAD_DIM)[None, :]
    # Heads of one token find its row of B in the L1 cache.
    b_rows = rows[:, None] + features[None, :]
    if ROWS.kind == "selected":
        rank = tl.load(ranks_ptr + heads, mask=is_pair, other=0)
        a = tl.load(a_ptr + heads, mask=is_pair, other=0.0).to(tl.float32)
        b = tl.load(b_rows + (rank * HEAD_DIM)[:, None], mask=is_number, other=0.0)
        states = a[:, None] * b.to(tl.float32)
    else:
        states = tl.zeros([heads.shape[0], BLOCK_D], tl.float32)
        for r in tl.static_range(RANK):
            if ROWS.kind == "constant":
                a = tl.load(a_ptr + r * ROWS.num_heads + heads, mask=is_pair, other=0.0)
            else:
                columns = heads
                if ROWS.rotates and r % 2 == 1:
                    columns = (heads + 8) % A_HEADS
                a = tl.load(rows + (ROWS.rank * ROWS.head_dim + r * A_HEADS + columns), mask=is_pair, other=0.0)
            b = tl.load(b_rows + r * HEAD_DIM, mask=is_number, other=0.0)
            states += a.to(tl.float32)[:, None] * b.to(tl.float32)
    offsets = (out_rows * out_stride + heads * HEAD_DIM)[:, None] + features[None, :]
    tl.store(out_ptr + offsets, (states / RANK).to(out_ptr.dtype.element_ty), mask=is_number)


@triton.jit(
    do_not_specialize=[
        "slots_ptr",  # of a part of a step's tokens, which starts anywhere
        "key_block_stride",
        "key_row_stride",
        "value_block_stride",
        "value_row_stride",
        "num_slots",
    ]
)
def form_heads_kernel(
    key_pages_ptr,
    value_pages_ptr,
    key_a_ptr,
    value_a_ptr,
    key_ranks_ptr,
    value_ranks_ptr,
    slots_ptr,
    key_ptr,
    value_ptr,
    key_block_stride,
    key_row_stride,
    value_block_stride,
    value_row_stride,
    num_slots,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    PAGE_UNIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """
    K (of programs (i, 0)) and V (of programs (i, 1)), `BLOCK_M` pairs of a token and a head at a time: in a workspace
    [room, h, d] they lie one after the other, whatever h is.
    """
    NUM_HEADS: tl.constexpr = KEYS.num_heads
    pairs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = pairs // NUM_HEADS
    heads = pairs % NUM_HEADS
    slots = tl.load(slots_ptr + rows, mask=rows < num_slots, other=-1).to(tl.int64)
    is_pair = slots >= 0
    blocks = slots // PAGE_SIZE
    offsets = slots % PAGE_SIZE
    rows = rows.to(tl.int64)
    if tl.program_id(1) == 0:
        factors = key_pages_ptr + (blocks * key_block_stride + offsets * key_row_stride) * PAGE_UNIT
        _form_heads(factors, key_a_ptr, key_ranks_ptr, heads, is_pair, key_ptr, rows, KEY_STRIDE, KEYS, BLOCK_D)
    else:
        factors = value_pages_ptr + (blocks * value_block_stride + offsets * value_row_stride) * PAGE_UNIT
        _form_heads(
            factors, value_a_ptr, value_ranks_ptr, heads, is_pair, value_ptr, rows, VALUE_STRIDE, VALUES, BLOCK_D
        )
