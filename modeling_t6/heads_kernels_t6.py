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
