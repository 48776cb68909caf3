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
"""Rows of factors in 4 bits: B rotated and quantised, A in 8 bits, one scale for each rank"""

import functools
import math

import torch
from torch import nn


# The step of a row of B is this part of its largest number / 7.5. Of 64 normally distributed numbers it leaves an error of
# 9.7% of their norm, of 128 10.4%; the best of 30 steps for each row leaves 9.4% and 9.9%, and the whole range 10.1% and 11%.
CLIP = 0.94
# What the largest number of a row of A becomes: below float8_e4m3fn's 448 by more than the scale's rounding.
LARGEST_A = 256.0
SMALLEST_SCALE = 2.0**-24  # float16's smallest number


class QuantizedLayout:
    """
    How the factors of one token, A [rank, num_heads] and B [rank, head_dim], lie in one row of `width` bytes:

        rank * head_dim / 2      B, 4 bits a feature: byte j of a row of B has feature j in its low half, and feature
                                 j + head_dim / 2 in its high half
        rank * padded_heads      A, float8_e4m3fn, each row padded by zeros as in `FactorLayout`
        rank * 2                 the scales, float16
        up to 15                 zeros, to a multiple of 16 bytes

    B's features are rotated first, by `rotate_features`: after that none stands out, and they are close to normally
    distributed. The 4 bits n of a feature stand for n - 7.5. The scale of a rank is that of its A times that of its B: a
    head's product with them needs no other,

        B[r] H = (n[r] - 7.5) step[r],    A[r] = a[r] scale[r] / step[r],    A[r] B[r] = scale[r] a[r] ((n[r] - 7.5) H).

    With constant A factors (`num_heads` 0) it is the step of B, and a row holds B and scales alone.
    """

    def __init__(self, rank: int, num_heads: int, padded_heads: int, head_dim: int):
        if head_dim % 2 or head_dim == 0:
            raise ValueError(f"Rows of 4 bits need an even number of features, got `head_dim`={head_dim}.")
        self.rank, self.num_heads, self.padded_heads, self.head_dim = rank, num_heads, padded_heads, head_dim
        self.sizes = (rank * head_dim // 2, rank * padded_heads, 2 * rank)
        self.width = math.ceil(sum(self.sizes) / 16) * 16

    def pack(self, a: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
        """
        A [batch, seq, rank, num_heads] and B [batch, seq, rank, head_dim] of any floating dtype as rows, uint8
        [batch, 1, seq, width]. A is not looked at if `num_heads` is 0.
        """
        b = rotate_features(b.to(torch.float32))
        step = b.abs().amax(dim=-1, keepdim=True) * (CLIP / 7.5)
        if self.num_heads == 0:
            scale = step.clamp(min=SMALLEST_SCALE).to(torch.float16)
            step = scale.to(torch.float32)  # B is rounded to what will be read
            stored_a = torch.zeros(*b.shape[:-1], self.padded_heads, dtype=torch.uint8, device=b.device)
        else:
            a = a.to(torch.float32)
            scale = (step * a.abs().amax(dim=-1, keepdim=True) / LARGEST_A).clamp(min=SMALLEST_SCALE).to(torch.float16)
            # What rounding changes of the scale, A makes up for.
            a = (a * (step / scale.to(torch.float32))).clamp(-448, 448)
            stored_a = nn.functional.pad(a, (0, self.padded_heads - self.num_heads))
            stored_a = stored_a.to(torch.float8_e4m3fn).view(torch.uint8)
        step = step.clamp(min=torch.finfo(step.dtype).tiny)  # of zeros
        low, high = (b / step + 7.5).round().clamp(0, 15).to(torch.uint8).chunk(2, dim=-1)
        parts = [(low | (high << 4)).flatten(-2), stored_a.flatten(-2), scale.flatten(-2).view(torch.uint8)]
        return nn.functional.pad(torch.cat(parts, dim=-1), (0, self.width - sum(self.sizes))).unsqueeze(1)

    def unpack(self, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Factors of `rows`, uint8 [batch, 1, seq, width], in `dtype`: A times the scale [batch, seq, rank, num_heads], and
        n - 7.5 [batch, seq, rank, head_dim], which is B rotated, in units of its step. With constant A factors the scale
        is in B.
        """
        parts = QuantizedFactors(self, rows, dtype)
        every = slice(None)
        return parts.heads(parts.a, every), parts.features(parts.b, every)


class QuantizedFactors:
    """
    The factors of `rows`, uint8 [batch, 1, seq, width], as they lie, and what makes numbers of `dtype` of some of them.

    Attributes:
        a: float8_e4m3fn [batch, seq, rank, num_heads], a view.
        b: uint8 [batch, seq, rank, head_dim / 2], a view.
        scale: float16 [batch, seq, rank, 1], a copy, as they need not lie on even bytes.
    """

    def __init__(self, layout: QuantizedLayout, rows: torch.Tensor, dtype: torch.dtype):
        self.layout, self.dtype = layout, dtype
        b, a, scale, _ = rows.squeeze(1).split([*layout.sizes, layout.width - sum(layout.sizes)], dim=-1)
        a = a.unflatten(-1, (layout.rank, layout.padded_heads))[..., : layout.num_heads]
        self.a = a.view(torch.float8_e4m3fn)
        self.b = b.unflatten(-1, (layout.rank, layout.head_dim // 2))
        self.scale = scale.clone(memory_format=torch.contiguous_format).view(torch.float16).unsqueeze(-1)

    def heads(self, a: torch.Tensor, tokens: slice) -> torch.Tensor:
        """A times the scale of those `tokens` whose `a` it is, [batch, tokens, rank, num_heads]."""
        # In float32, where no product of the two is too small.
        scale = self.scale[:, tokens].to(torch.float32)
        if a.is_cpu:
            # PyTorch converts float8 one number after another there. As float16, which has a bit of exponent more and another
            # bias, the same bits are A / 2^8; NaN, which they would not stay, is in the scale as well.
            a, scale = ((a.view(torch.int8).to(torch.int16) << 7) & ~0x4000).view(torch.float16), scale * 2**8
        return (a.to(torch.float32) * scale).to(self.dtype)

    def features(self, b: torch.Tensor, tokens: slice) -> torch.Tensor:
        """n - 7.5 of those `tokens` whose `b` it is, [batch, tokens, rank, head_dim]; times the scale if A is constant."""
        b = torch.cat([b & 15, b >> 4], dim=-1).to(self.dtype) - 7.5
        return (b * self.scale[:, tokens].to(torch.float32)).to(self.dtype) if self.layout.num_heads == 0 else b


def rotate_features(x: torch.Tensor) -> torch.Tensor:
    """
    x [..., features] times H: normalised Hadamard matrices along the diagonal, of the largest power of 2 that divides the
    features. H is orthogonal and symmetric: it is its own inverse, and products of rotated vectors are those of the vectors.
    """
    size = x.shape[-1] & -x.shape[-1]
    make = hadamard_matrix if torch.compiler.is_compiling() else _cached_hadamard_matrix
    return (x.unflatten(-1, (-1, size)) @ make(size, x.dtype, x.device)).flatten(-2)


def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The normalised Hadamard matrix [size, size] of Sylvester's construction, `size` a power of 2."""
    index = torch.arange(size, device=device)
    parity = index[:, None] & index
    for shift in (8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    return (1 - 2 * (parity & 1)).to(dtype) * size**-0.5


@functools.cache
def _cached_hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # what it makes could not be used where gradients are wanted
        return hadamard_matrix(size, dtype, device)
