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
"""Triton kernels that form heads from the factors of tokens, and their gradients: small products, one for each token"""

try:  # the remote-code loader passes over packages that are imported here
    import triton
    import triton.language as tl
except ImportError:
    raise


@triton.jit
def _load(ptr, rows, columns, row_stride, column_stride, NUM_ROWS: tl.constexpr, NUM_COLUMNS: tl.constexpr):
    """A matrix by the indices of its rows and columns, one of which goes down and the other across; zeros beyond it."""
    offsets = rows * row_stride + columns * column_stride
    return tl.load(ptr + offsets, mask=(rows < NUM_ROWS) & (columns < NUM_COLUMNS), other=0.0)


@triton.jit
def form_kernel(
    a_ptr, b_ptr, out_ptr, num_tokens,
    a_stride_n, a_stride_t, a_stride_r, a_stride_h,
    b_stride_n, b_stride_t, b_stride_r,
    RANK: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(1 / R) A^T B of a token and `BLOCK_H` heads, into [batch, tokens, h, d] without gaps."""
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    features = tl.arange(0, BLOCK_D)[None, :]
    ranks_of_a, ranks_of_b = tl.arange(0, BLOCK_R)[None, :], tl.arange(0, BLOCK_R)[:, None]
    place = tl.program_id(0).to(tl.int64)
    sequence, token = place // num_tokens, place % num_tokens
    a_ptr += sequence * a_stride_n + token * a_stride_t
    b_ptr += sequence * b_stride_n + token * b_stride_t
    a = _load(a_ptr, heads, ranks_of_a, a_stride_h, a_stride_r, NUM_HEADS, RANK)
    b = _load(b_ptr, ranks_of_b, features, b_stride_r, 1, RANK, HEAD_DIM)
    formed = tl.dot(a, b, input_precision="ieee") / RANK
    tl.store(
        out_ptr + place * (NUM_HEADS * HEAD_DIM) + heads * HEAD_DIM + features,
        formed.to(out_ptr.dtype.element_ty),
        mask=(heads < NUM_HEADS) & (features < HEAD_DIM),
    )


@triton.jit
def gradients_kernel(
    gradient_ptr, a_ptr, b_ptr, a_gradient_ptr, b_gradient_ptr, num_tokens,
    gradient_stride_n, gradient_stride_t, gradient_stride_h,
    a_stride_n, a_stride_t, a_stride_r, a_stride_h,
    b_stride_n, b_stride_t, b_stride_r,
    RANK: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """
    The gradients of A, into [batch, tokens, h, R], and of B, into [batch, tokens, R, d], without gaps, of a token: the gradient
    of its heads is read once.
    """
    features_of_b, features = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_D)[None, :]
    ranks, ranks_of_b = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_R)[None, :]
    place = tl.program_id(0).to(tl.int64)
    sequence, token = place // num_tokens, place % num_tokens
    gradient_ptr += sequence * gradient_stride_n + token * gradient_stride_t
    a_ptr += sequence * a_stride_n + token * a_stride_t
    b_ptr += sequence * b_stride_n + token * b_stride_t
    b = _load(b_ptr, ranks_of_b, features_of_b, b_stride_r, 1, RANK, HEAD_DIM)
    b_gradient = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first_head in tl.static_range(0, NUM_HEADS, BLOCK_H):
        heads, heads_of_a = first_head + tl.arange(0, BLOCK_H)[:, None], first_head + tl.arange(0, BLOCK_H)[None, :]
        gradient = _load(gradient_ptr, heads.to(tl.int64), features, gradient_stride_h, 1, NUM_HEADS, HEAD_DIM)
        a = _load(a_ptr, heads_of_a, ranks, a_stride_h, a_stride_r, NUM_HEADS, RANK)
        a_gradient = tl.dot(gradient, b, input_precision="ieee") / RANK
        tl.store(
            a_gradient_ptr + place * (NUM_HEADS * RANK) + heads * RANK + ranks_of_b,
            a_gradient.to(a_gradient_ptr.dtype.element_ty),
            mask=(heads < NUM_HEADS) & (ranks_of_b < RANK),
        )
        b_gradient = tl.dot(a, gradient, b_gradient, input_precision="ieee")
    tl.store(
        b_gradient_ptr + place * (RANK * HEAD_DIM) + ranks * HEAD_DIM + features,
        (b_gradient / RANK).to(b_gradient_ptr.dtype.element_ty),
        mask=(ranks < RANK) & (features < HEAD_DIM),
    )


@triton.jit
def _rotation(cos_ptr, sin_ptr, places, features, mask, ROTARY_DIM: tl.constexpr):
    """
    RoPE of tokens, whose angles lie at `places`, as x cos + x[partners] sin: the cos and sin of each feature, and the feature with
    which it is mixed, half of the `ROTARY_DIM` rotated ones away. Those beyond are multiplied by 1 and mixed with nothing.
    """
    half: tl.constexpr = ROTARY_DIM // 2
    is_rotated = mask & (features < ROTARY_DIM)
    cos = tl.load(cos_ptr + places + features, mask=is_rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + places + features, mask=is_rotated, other=0.0).to(tl.float32)
    partners = tl.where(features < half, features + half, tl.where(features < ROTARY_DIM, features - half, features))
    return cos, tl.where(features < half, -sin, sin), partners


@triton.jit
def _rows_of_b(
    b_ptr, features, mask, cos, sin, partners, RANK: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATES: tl.constexpr
):
    """B / R of tokens, rotated, in float32: for each of its rows a tile of tokens and features."""
    rows = ()
    for r in tl.static_range(RANK):
        row = tl.load(b_ptr + r * HEAD_DIM + features, mask=mask, other=0.0).to(tl.float32)
        if ROTATES:
            row = row * cos + tl.load(b_ptr + r * HEAD_DIM + partners, mask=mask, other=0.0).to(tl.float32) * sin
        rows = rows + (row / RANK,)
    return rows


@triton.jit
def _products_of_rows(b, RANK: tl.constexpr):
    """
    B B^T of tokens, for each row the products with those before it, twice, as they are met twice in A^T (B B^T) A, and with itself.
    """
    products = ()
    for r in tl.static_range(RANK):
        for s in tl.static_range(r):
            products = products + (2.0 * tl.sum(b[r] * b[s], axis=1),)
        products = products + (tl.sum(b[r] * b[r], axis=1),)
    return products


@triton.jit
def _form_part(
    product_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, num_tokens, length, angles_stride_n, eps,
    A_START: tl.constexpr, B_START: tl.constexpr, WIDTH: tl.constexpr,
    RANK: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, ROTATES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """
    The heads of `BLOCK_T` tokens, into [tokens, h, d] without gaps, of A [h, R] from `A_START` and B [R, d] from `B_START`. With the
    weight [d] of a norm, they are normalised before RoPE: the weight goes into the angles, and the squares of a head's size are
    A^T (B B^T) A.
    """
    NORMED: tl.constexpr = weight_ptr is not None
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    features = tl.arange(0, BLOCK_D)[None, :]
    is_token = tokens < num_tokens
    mask = is_token[:, None] & (features < HEAD_DIM)
    places = ((tokens // length).to(tl.int64) * angles_stride_n + tokens % length * ROTARY_DIM)[:, None]
    tokens = tokens.to(tl.int64)
    cos, sin, partners = _rotation(cos_ptr, sin_ptr, places, features, mask & ROTATES, ROTARY_DIM)
    factors_ptr = product_ptr + tokens * WIDTH
    b_ptr = factors_ptr[:, None] + B_START
    if NORMED:
        cos *= tl.load(weight_ptr + features, mask=features < HEAD_DIM, other=0.0).to(tl.float32)
        sin *= tl.load(weight_ptr + partners, mask=features < HEAD_DIM, other=0.0).to(tl.float32)
        b = _rows_of_b(b_ptr, features, mask, cos, sin, partners, RANK, HEAD_DIM, False)
        products = _products_of_rows(b, RANK)
    b = _rows_of_b(b_ptr, features, mask, cos, sin, partners, RANK, HEAD_DIM, ROTATES)
    out_ptr += (tokens * (NUM_HEADS * HEAD_DIM))[:, None] + features
    for head in range(NUM_HEADS):
        formed = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        all_a, variance = (), tl.zeros([BLOCK_T], tl.float32)
        for r in tl.static_range(RANK):
            a = tl.load(factors_ptr + (A_START + head * RANK + r), mask=is_token, other=0.0).to(tl.float32)
            formed += a[:, None] * b[r]
            if NORMED:
                all_a, mixed = all_a + (a,), tl.zeros([BLOCK_T], tl.float32)
                for s in tl.static_range(r + 1):
                    mixed += all_a[s] * products[r * (r + 1) // 2 + s]
                variance += a * mixed
        if NORMED:
            # What is left of a head whose terms cancel may be below zero.
            formed *= tl.rsqrt(tl.maximum(variance / HEAD_DIM, 0.0) + eps)[:, None]
        tl.store(out_ptr + head * HEAD_DIM, formed.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def form_at_once_kernel(
    product_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_ptr, k_ptr, v_ptr, num_tokens, length, angles_stride_n, eps,
    WIDTH: tl.constexpr, Q_RANK: tl.constexpr, K_RANK: tl.constexpr, V_RANK: tl.constexpr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """
    Q, K and V of tokens, in this order along the second axis of the grid, of factors in rows [tokens, WIDTH]: B_Q, B_K and B_V, A_Q,
    A_K and A_V. Q and K are normalised, if there are weights of norms, and rotated. With a `Q_RANK` of 0 there is no Q, and no program
    for it.
    """
    a_q: tl.constexpr = (Q_RANK + K_RANK + V_RANK) * HEAD_DIM
    a_k: tl.constexpr = a_q + Q_RANK * NUM_HEADS
    part = tl.program_id(1) + (1 if Q_RANK == 0 else 0)
    if part == 0:
        if Q_RANK > 0:
            _form_part(
                product_ptr, cos_ptr, sin_ptr, q_weight_ptr, q_ptr, num_tokens, length, angles_stride_n, eps,
                a_q, 0, WIDTH, Q_RANK, NUM_HEADS, HEAD_DIM, ROTARY_DIM, True, BLOCK_T, BLOCK_D,
            )  # fmt: skip
    elif part == 1:
        _form_part(
            product_ptr, cos_ptr, sin_ptr, k_weight_ptr, k_ptr, num_tokens, length, angles_stride_n, eps,
            a_k, Q_RANK * HEAD_DIM, WIDTH, K_RANK, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM, True, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    else:
        _form_part(
            product_ptr, cos_ptr, sin_ptr, None, v_ptr, num_tokens, length, angles_stride_n, eps,
            a_k + K_RANK * NUM_KV_HEADS, (Q_RANK + K_RANK) * HEAD_DIM, WIDTH, V_RANK, NUM_KV_HEADS, HEAD_DIM,
            ROTARY_DIM, False, BLOCK_T, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _tokens_of_a_sequence(length, TOKENS: tl.constexpr):
    """The sequence, and the first of the `TOKENS` tokens of it, of a program of the grid's first axis; both are int64."""
    blocks = tl.cdiv(length, TOKENS)
    return (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks * TOKENS).to(tl.int64)


@triton.jit
def _first_columns(x, NUM_COLUMNS: tl.constexpr):
    """The first 8, or all, of 16 columns; as they lie in a product, no thread has to know of another's."""
    if NUM_COLUMNS == 8:
        x, _ = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, 8]), (0, 2, 1)))
    return x


@triton.jit
def _first_rows(x, NUM_ROWS: tl.constexpr):
    """The first 8, or all, of 16 rows."""
    if NUM_ROWS == 8:
        x, _ = tl.split(tl.permute(tl.reshape(x, [2, 8, x.shape[1]]), (1, 2, 0)))
    return x


@triton.jit
def _gradients_of_part(
    gradient_ptr, product_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, weight_gradient_ptr, length, angles_stride_n, eps,
    gradient_stride_n, gradient_stride_t, gradient_stride_h,
    A_START: tl.constexpr, B_START: tl.constexpr, WIDTH: tl.constexpr,
    RANK: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, ROTATES: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """
    The gradients of A and B of up to `TOKENS` tokens of a sequence, one after another, of that of the heads, which is read once,
    tokens before it is needed: Triton does so if no product has it turned. They go where A and B are in the rows of the product.
    Features are in three tiles: the two halves of those that RoPE mixes, and the rest.

    With the weight g [d] of a norm, heads are RoPE(g * u_h) / s_h of u_h = (1 / R) sum_r A[r, h] B[r], as `_form_part` makes them. With
    P the products of the heads' gradient and the rows of RoPE(g * B), and W = A (B B^T) / (R^2 d), no head has to be formed:

        s_h^2 = sum_r A[r, h] W[h, r] + eps,  c_h = sum_r A[r, h] P[h, r] / s_h^2,  dA[r, h] = (P[h, r] - c_h W[h, r]) / (R s_h)
        dB[r] = g * Z[r] - sum_s M[r, s] B[s],  M[r, s] = sum_h c_h A[r, h] A[s, h] / (R^3 d s_h),  dg = sum_r B[r] * Z[r]

    where Z is the gradient of g * B before RoPE, of A / (R s). The gradient of g is summed over the tokens, into [programs, d].
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    BLOCK_R: tl.constexpr = 8 if RANK <= 8 else 16
    DTYPE: tl.constexpr = product_ptr.dtype.element_ty
    NORMED: tl.constexpr = weight_ptr is not None
    # What is no number of a head's, nor its gradient, may be beyond the range of float16.
    WIDE: tl.constexpr = tl.float32 if DTYPE == tl.float16 else DTYPE
    PRECISION: tl.constexpr = "tf32x3" if DTYPE == tl.float16 else "ieee"
    ranks, ranks_down = tl.arange(0, BLOCK_R)[None, :], tl.arange(0, BLOCK_R)[:, None]
    ranks_of_a = tl.arange(0, 16)[:, None]  # the least rows of a product
    features, others = tl.arange(0, BLOCK_HALF)[None, :], 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    is_half, is_rest = features < HALF, others < HEAD_DIM
    is_b, is_rest_of_b = is_half & (ranks_down < RANK), is_rest & (ranks_down < RANK)
    is_b_gradient, is_rest_gradient = is_half & (ranks_of_a < RANK), is_rest & (ranks_of_a < RANK)
    places = B_START + ranks_down * HEAD_DIM
    gradient_places = B_START + ranks_of_a * HEAD_DIM
    sequence, first = _tokens_of_a_sequence(length, TOKENS)
    product_ptr += (sequence * length + first) * WIDTH
    out_ptr += (sequence * length + first) * WIDTH
    gradient_ptr += sequence * gradient_stride_n + first * gradient_stride_t
    cos_ptr += sequence * angles_stride_n + first * ROTARY_DIM
    sin_ptr += sequence * angles_stride_n + first * ROTARY_DIM
    if NORMED:
        # once for each row of B: so they lie as B does
        left_weight = tl.load(weight_ptr + features + 0 * ranks_down, mask=is_b, other=0.0).to(tl.float32)
        right_weight = tl.load(weight_ptr + HALF + features + 0 * ranks_down, mask=is_b, other=0.0).to(tl.float32)
        left_sum = tl.zeros([BLOCK_R, BLOCK_HALF], tl.float32)
        right_sum = tl.zeros([BLOCK_R, BLOCK_HALF], tl.float32)
        if HEAD_DIM > 2 * HALF:
            rest_weight = tl.load(weight_ptr + others + 0 * ranks_down, mask=is_rest_of_b, other=0.0).to(tl.float32)
            rest_sum = tl.zeros([BLOCK_R, BLOCK_REST], tl.float32)
    for i in tl.range(tl.minimum(TOKENS, length - first).to(tl.int32), num_stages=STAGES):
        factors_ptr, factor_gradients_ptr = product_ptr + i * WIDTH, out_ptr + i * WIDTH
        token_ptr = gradient_ptr + i * gradient_stride_t
        left = tl.load(factors_ptr + places + features, mask=is_b, other=0.0)
        right = tl.load(factors_ptr + places + HALF + features, mask=is_b, other=0.0)
        if NORMED:
            left_rows = tl.load(factors_ptr + gradient_places + features, mask=is_b_gradient, other=0.0)
            right_rows = tl.load(factors_ptr + gradient_places + HALF + features, mask=is_b_gradient, other=0.0)
            products = tl.dot(left_rows, tl.trans(left), input_precision="ieee")
            products = tl.dot(right_rows, tl.trans(right), products, input_precision="ieee")
            left_b, right_b = left.to(tl.float32), right.to(tl.float32)
        if ROTATES:
            angles = i * ROTARY_DIM + features
            # once for each row of B: such a tile is read ahead, too
            cos = tl.load(cos_ptr + angles + 0 * ranks_down, mask=is_b, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + angles + 0 * ranks_down, mask=is_b, other=0.0).to(tl.float32)
            x, y = left.to(tl.float32), right.to(tl.float32)
            if NORMED:
                x, y = x * left_weight, y * right_weight
            left, right = (x * cos - y * sin).to(DTYPE), (y * cos + x * sin).to(DTYPE)
            if not NORMED:
                cos = tl.load(cos_ptr + angles, mask=is_half, other=0.0).to(tl.float32)
                sin = tl.load(sin_ptr + angles, mask=is_half, other=0.0).to(tl.float32)
        left_gradient = tl.zeros([16, BLOCK_HALF], tl.float32)
        right_gradient = tl.zeros([16, BLOCK_HALF], tl.float32)
        if HEAD_DIM > 2 * HALF:
            rest = tl.load(factors_ptr + places + others, mask=is_rest_of_b, other=0.0)
            rest_gradient = tl.zeros([16, BLOCK_REST], tl.float32)
        if NORMED:
            if HEAD_DIM > 2 * HALF:
                rest_rows = tl.load(factors_ptr + gradient_places + others, mask=is_rest_gradient, other=0.0)
                products = tl.dot(rest_rows, tl.trans(rest), products, input_precision="ieee")
                rest_b = rest.to(tl.float32)
                rest = (rest_b * rest_weight).to(DTYPE)
            products *= 1.0 / (RANK * RANK * HEAD_DIM)
            high = products.to(WIDE)
            low = (products - high.to(tl.float32)).to(WIDE)
            mixing = tl.zeros([16, 16], tl.float32)
        for first_head in tl.static_range(0, NUM_HEADS, BLOCK_H):
            heads = first_head + tl.arange(0, BLOCK_H)[:, None]
            heads_of_a = first_head + tl.arange(0, BLOCK_H)[None, :]
            is_head = heads < NUM_HEADS
            head_ptr = token_ptr + heads.to(tl.int64) * gradient_stride_h
            left_of_head = tl.load(head_ptr + features, mask=is_head & is_half, other=0.0)
            right_of_head = tl.load(head_ptr + HALF + features, mask=is_head & is_half, other=0.0)
            a = tl.load(
                factors_ptr + A_START + heads_of_a * RANK + ranks_of_a,
                mask=(heads_of_a < NUM_HEADS) & (ranks_of_a < RANK),
                other=0.0,
            )
            a_gradient = tl.dot(left_of_head, tl.trans(left), input_precision="ieee")
            a_gradient = tl.dot(right_of_head, tl.trans(right), a_gradient, input_precision="ieee")
            if NORMED:
                if HEAD_DIM > 2 * HALF:
                    rest_of_head = tl.load(head_ptr + others, mask=is_head & is_rest, other=0.0)
                    a_gradient = tl.dot(rest_of_head, tl.trans(rest), a_gradient, input_precision="ieee")
                all_ranks = tl.arange(0, 16)[None, :]
                # not A turned: neither would be read ahead
                a_of_heads = tl.load(
                    factors_ptr + A_START + heads * RANK + all_ranks, mask=is_head & (all_ranks < RANK), other=0.0
                )
                mixed = tl.dot(a_of_heads.to(WIDE), high, input_precision=PRECISION)
                if DTYPE == tl.bfloat16:  # of 16 digits: the terms of a small head cancel
                    mixed = tl.dot(a_of_heads, low, mixed, input_precision=PRECISION)
                wide_a = _first_columns(a_of_heads, BLOCK_R).to(tl.float32)
                inverse = tl.rsqrt(tl.maximum(tl.sum(wide_a * mixed, axis=1), 0.0) + eps)
                along = tl.sum(wide_a * a_gradient, axis=1) * inverse * inverse
                inverse *= 1.0 / RANK
                a_gradient = (a_gradient - mixed * along[:, None]) * inverse[:, None]
                scaled_a = a.to(tl.float32) * inverse[None, :]
                weighted_a = (scaled_a * along[None, :]).to(WIDE)
                mixing = tl.dot(weighted_a, a_of_heads.to(WIDE), mixing, input_precision=PRECISION)
                a = scaled_a.to(DTYPE)
            left_gradient = tl.dot(a, left_of_head, left_gradient, input_precision="ieee")
            right_gradient = tl.dot(a, right_of_head, right_gradient, input_precision="ieee")
            if HEAD_DIM > 2 * HALF:
                if not NORMED:
                    rest_of_head = tl.load(head_ptr + others, mask=is_head & is_rest, other=0.0)
                    a_gradient = tl.dot(rest_of_head, tl.trans(rest), a_gradient, input_precision="ieee")
                rest_gradient = tl.dot(a, rest_of_head, rest_gradient, input_precision="ieee")
            if not NORMED:
                a_gradient = a_gradient * (1.0 / RANK)
            a_gradient = a_gradient.to(DTYPE)
            tl.store(factor_gradients_ptr + A_START + heads * RANK + ranks, a_gradient, mask=is_head & (ranks < RANK))
        if NORMED:
            mixing = (mixing * (-1.0 / (RANK * RANK * HEAD_DIM))).to(WIDE)
            x, y = _first_rows(left_gradient, BLOCK_R), _first_rows(right_gradient, BLOCK_R)
            if ROTATES:
                x, y = x * cos + y * sin, y * cos - x * sin
            left_sum += left_b * x
            right_sum += right_b * y
            left_mixed = tl.dot(mixing, left_rows.to(WIDE), input_precision=PRECISION)
            right_mixed = tl.dot(mixing, right_rows.to(WIDE), input_precision=PRECISION)
            x = x * left_weight + _first_rows(left_mixed, BLOCK_R)
            y = y * right_weight + _first_rows(right_mixed, BLOCK_R)
            tl.store(factor_gradients_ptr + places + features, x.to(DTYPE), mask=is_b)
            tl.store(factor_gradients_ptr + places + HALF + features, y.to(DTYPE), mask=is_b)
            if HEAD_DIM > 2 * HALF:
                x = _first_rows(rest_gradient, BLOCK_R)
                rest_sum += rest_b * x
                rest_mixed = tl.dot(mixing, rest_rows.to(WIDE), input_precision=PRECISION)
                x = x * rest_weight + _first_rows(rest_mixed, BLOCK_R)
                tl.store(factor_gradients_ptr + places + others, x.to(DTYPE), mask=is_rest_of_b)
        else:
            x, y = left_gradient * (1.0 / RANK), right_gradient * (1.0 / RANK)
            if ROTATES:
                x, y = x * cos + y * sin, y * cos - x * sin
            tl.store(factor_gradients_ptr + gradient_places + features, x.to(DTYPE), mask=is_b_gradient)
            tl.store(factor_gradients_ptr + gradient_places + HALF + features, y.to(DTYPE), mask=is_b_gradient)
            if HEAD_DIM > 2 * HALF:
                rest_gradient = (rest_gradient * (1.0 / RANK)).to(DTYPE)
                tl.store(factor_gradients_ptr + gradient_places + others, rest_gradient, mask=is_rest_gradient)
    if NORMED:
        weight_gradient_ptr += tl.program_id(0).to(tl.int64) * HEAD_DIM
        tl.store(weight_gradient_ptr + features, tl.sum(left_sum, axis=0)[None, :], mask=is_half)
        tl.store(weight_gradient_ptr + HALF + features, tl.sum(right_sum, axis=0)[None, :], mask=is_half)
        if HEAD_DIM > 2 * HALF:
            tl.store(weight_gradient_ptr + others, tl.sum(rest_sum, axis=0)[None, :], mask=is_rest)


@triton.jit
def gradients_at_once_kernel(
    q_ptr, k_ptr, v_ptr, product_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, out_ptr, weight_gradient_ptr,
    length, angles_stride_n, eps,
    q_stride_n, q_stride_t, q_stride_h, k_stride_n, k_stride_t, k_stride_h, v_stride_n, v_stride_t, v_stride_h,
    WIDTH: tl.constexpr, Q_RANK: tl.constexpr, K_RANK: tl.constexpr, V_RANK: tl.constexpr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """
    The gradient of the rows that [`form_at_once_kernel`] reads, of those of Q, K and V; zeros where they have no factors. And of the
    norms' weights, float32 [2, programs of the first axis, d], what the tokens of each program add to them.
    """
    a_q: tl.constexpr = (Q_RANK + K_RANK + V_RANK) * HEAD_DIM
    a_k: tl.constexpr = a_q + Q_RANK * NUM_HEADS
    a_v: tl.constexpr = a_k + K_RANK * NUM_KV_HEADS
    part = tl.program_id(1) + (1 if Q_RANK == 0 else 0)
    if part == 0:
        if Q_RANK > 0:
            _gradients_of_part(
                q_ptr, product_ptr, cos_ptr, sin_ptr, q_weight_ptr, out_ptr, weight_gradient_ptr,
                length, angles_stride_n, eps, q_stride_n, q_stride_t, q_stride_h, a_q, 0, WIDTH,
                Q_RANK, NUM_HEADS, HEAD_DIM, ROTARY_DIM, True, TOKENS, BLOCK_H, BLOCK_HALF, BLOCK_REST, STAGES,
            )  # fmt: skip
    elif part == 1:
        if k_weight_ptr is not None:
            weight_gradient_ptr += tl.num_programs(0).to(tl.int64) * HEAD_DIM
        _gradients_of_part(
            k_ptr, product_ptr, cos_ptr, sin_ptr, k_weight_ptr, out_ptr, weight_gradient_ptr,
            length, angles_stride_n, eps, k_stride_n, k_stride_t, k_stride_h, a_k, Q_RANK * HEAD_DIM, WIDTH,
            K_RANK, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM, True, TOKENS, BLOCK_H, BLOCK_HALF, BLOCK_REST, STAGES,
        )  # fmt: skip
    else:
        _gradients_of_part(
            v_ptr, product_ptr, cos_ptr, sin_ptr, None, out_ptr, None,
            length, angles_stride_n, eps, v_stride_n, v_stride_t, v_stride_h, a_v, (Q_RANK + K_RANK) * HEAD_DIM, WIDTH,
            V_RANK, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM, False, TOKENS, BLOCK_H, BLOCK_HALF, BLOCK_REST, STAGES,
        )  # fmt: skip
        sequence, first = _tokens_of_a_sequence(length, TOKENS)
        tokens = first + tl.arange(0, TOKENS)[:, None]
        columns = a_v + V_RANK * NUM_KV_HEADS + tl.arange(0, 8)[None, :]
        mask = (tokens < length) & (columns < WIDTH)
        zeros = tl.zeros([TOKENS, 8], out_ptr.dtype.element_ty)
        tl.store(out_ptr + (sequence * length + tokens) * WIDTH + columns, zeros, mask=mask)
