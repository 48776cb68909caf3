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
"""Rows of factors in 4 bits: B rotated, and quantised with a scale and a zero point per 32 features; A in float8"""

import functools
import math

import torch
from torch import nn


GROUP = 32  # features that share a scale and a zero point
# The order of each 8 features in 4 bytes: first the low halves of the bytes, then the high halves. If the 32-bit word is shifted by
# 0, 4, 8 and 12 bits, the last 4 bits of its two 16-bit halves are then features 0 and 1, 2 and 3, and so on.
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# Each row of A is scaled to this maximum: within the range of float8_e4m3fn, and its products within that of float16.
LARGEST_A = 16.0
SMALLEST_SCALE = 2.0**-24  # float16's smallest positive number
LARGEST_NUMBER = 65504.0  # and its largest


class QuantizedLayout:
    """
    The layout of one token's factors, A [rank, num_heads] and B [rank, head_dim], in one row of `width` bytes:

        rank * head_dim / 2      B, 4 bits per feature, padded to groups of 8 features, whose 4 bytes hold features 0, 4, 1 and 5
                                 in the low halves, 2, 6, 3 and 7 in the high halves
        rank * padded_heads      A, float8_e4m3fn, each row padded by zeros as in `FactorLayout`
        rank * 4 * groups        a scale and a zero point, float16, for each 32 features of each rank
        up to 7                  zeros, to a multiple of 8 bytes

    B is first rotated by `rotate_features` (H), which spreads outliers over features. The 4 bits n of a feature represent
    n * scale + zero. Each row A[r] is divided by a size that makes its largest element 16, by which B[r] is multiplied:

        A[r] = a[r] size[r],    B[r] H = (n[r] scale[r] + zero[r]) / size[r],    A[r] B[r] = a[r] ((n[r] scale[r] + zero[r]) H).

    With constant A factors (`num_heads` 0) the size is 1, and a row holds no A.
    """

    def __init__(self, rank: int, num_heads: int, padded_heads: int, head_dim: int):
        if head_dim % 2 or head_dim == 0:
            raise ValueError(f"Rows of 4 bits need an even number of features, got `head_dim`={head_dim}.")
        self.rank, self.num_heads, self.padded_heads, self.head_dim = rank, num_heads, padded_heads, head_dim
        self.padded_dim, self.groups = math.ceil(head_dim / 8) * 8, math.ceil(head_dim / GROUP)
        self.sizes = (rank * self.padded_dim // 2, rank * padded_heads, rank * 4 * self.groups)
        self.width = math.ceil(sum(self.sizes) / 8) * 8

    def pack(self, a: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
        """
        Packs A [batch, seq, rank, num_heads] and B [batch, seq, rank, head_dim], of any floating-point dtype, into rows
        [batch, 1, seq, width], uint8. A is ignored if `num_heads` is 0.
        """
        b = rotate_features(b.to(torch.float32))
        if self.num_heads == 0:
            stored_a = torch.zeros(*b.shape[:-1], self.padded_heads, dtype=torch.uint8, device=b.device)
        else:
            a = a.to(torch.float32)
            size = a.abs().amax(dim=-1, keepdim=True) / LARGEST_A
            b = b * size
            a = nn.functional.pad(
                a / size.clamp(min=torch.finfo(a.dtype).tiny), (0, self.padded_heads - self.num_heads)
            )
            stored_a = a.to(torch.float8_e4m3fn).view(torch.uint8)
        n, scale, zero = quantize(b)
        n = n.to(torch.uint8).flatten(-2)[..., : self.padded_dim].unflatten(-1, (-1, 8))
        low, high = torch.stack([n[..., i] for i in ORDER], dim=-1).chunk(2, dim=-1)
        scales = torch.cat([scale, zero], dim=-1).flatten(-3).view(torch.uint8)
        parts = [(low | (high << 4)).flatten(-3), stored_a.flatten(-2), scales]
        return nn.functional.pad(torch.cat(parts, dim=-1), (0, self.width - sum(self.sizes))).unsqueeze(1)

    def unpack(self, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Unpacks rows [batch, 1, seq, width], uint8, into `dtype`: a [batch, seq, rank, num_heads], which has no heads with constant A
        factors, and n * scale + zero [batch, seq, rank, head_dim], which is B rotated, times the size of A.
        """
        parts = QuantizedFactors(self, rows, dtype)
        b = parts.features(parts.b, slice(None))
        feature = torch.arange(self.head_dim, device=b.device)
        byte = feature // 8 * 4 + feature % 2 * 2 + feature // 4 % 2
        return parts.heads(parts.a), b[..., byte + feature // 2 % 2 * (self.padded_dim // 2)]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., head_dim] rotated, in the order of `QuantizedFactors.features`: [..., padded_dim]"""
        return x @ self._rotation(x)

    def rotate_back(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., padded_dim] in the order of `QuantizedFactors.features` as features: [..., head_dim]"""
        return x @ self._rotation(x).T

    def _rotation(self, x: torch.Tensor) -> torch.Tensor:
        make = _cached_rotation_matrix if _is_plain(x) else rotation_matrix
        return make(self.head_dim, self.padded_dim, x.dtype, x.device)


class QuantizedFactors:
    """
    Views of the packed factors in rows [batch, 1, seq, width], uint8, and their conversion to `dtype` for some of the tokens.

    Attributes:
        a: float8_e4m3fn [batch, seq, rank, num_heads], a view.
        b: uint8 [batch, seq, rank, padded_dim / 2], a view.
        scales: float16 [batch, seq, rank, groups, 2], scale and zero point, a copy, as they need not lie on even bytes.
    """

    def __init__(self, layout: QuantizedLayout, rows: torch.Tensor, dtype: torch.dtype):
        self.layout, self.dtype = layout, dtype
        b, a, scales, _ = rows.squeeze(1).split([*layout.sizes, layout.width - sum(layout.sizes)], dim=-1)
        a = a.unflatten(-1, (layout.rank, layout.padded_heads))[..., : layout.num_heads]
        self.a = a.view(torch.float8_e4m3fn)
        self.b = b.unflatten(-1, (layout.rank, layout.padded_dim // 2))
        scales = scales.clone(memory_format=torch.contiguous_format).view(torch.float16)
        self.scales = scales.unflatten(-1, (layout.rank, layout.groups, 2))

    def heads(self, a: torch.Tensor) -> torch.Tensor:
        """A divided by its size, [batch, tokens, rank, num_heads], of the tokens whose `a` is given."""
        if not a.is_cpu:
            return a.to(self.dtype)
        # PyTorch's conversion from float8 is not vectorised on a CPU. Float16 has one more exponent bit, and another bias: the same
        # bits, shifted to its layout, are A / 2^8, which is always in range.
        a = ((a.view(torch.int8).to(torch.int16) << 7) & ~0x4000).view(torch.float16)
        return a.to(torch.float32).mul_(2**8).to(self.dtype)

    def features(self, b: torch.Tensor, tokens: slice) -> torch.Tensor:
        """
        n * scale + zero, [batch, tokens, rank, padded_dim], of these `tokens`, whose `b` is given: all low halves of the bytes,
        then all high halves. `QuantizedLayout.rotate` puts vectors into the same basis and order, which preserves dot products.
        """
        dtype = torch.promote_types(self.dtype, torch.float32)
        scales = self.scales[:, tokens].to(dtype)
        if self.layout.groups > 1:
            scales = scales.repeat_interleave(GROUP // 2, dim=-2)[..., : b.shape[-1], :]
        scale, zero = scales.unsqueeze(-3).unbind(-1)
        n = torch.stack([b & 15, b >> 4], dim=-2).to(dtype)
        return torch.addcmul(zero, n, scale).flatten(-2).to(self.dtype)


def quantize(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Quantises b [..., features] to 4 bits, in groups of `GROUP` features; a last group that is smaller is padded with its last feature.

    Returns:
        Integers n from 0 to 15, as float32 [..., groups, GROUP], and scales and zero points, float16 [..., groups, 1], such that
        b is about n * scale + zero.
    """
    missing = -b.shape[-1] % GROUP
    if missing:
        b = torch.cat([b, b[..., -1:].expand(*b.shape[:-1], missing)], dim=-1)
    b = b.clamp(-LARGEST_NUMBER, LARGEST_NUMBER).unflatten(-1, (-1, GROUP))
    zero, largest = b.aminmax(dim=-1, keepdim=True)
    scale = ((largest - zero) / 15).clamp(min=SMALLEST_SCALE).to(torch.float16)
    zero = zero.to(torch.float16)
    return ((b - zero.to(b.dtype)) / scale.to(b.dtype)).round().clamp(0, 15), scale, zero


def rotate_features(x: torch.Tensor) -> torch.Tensor:
    """
    x [..., features] times H, a block-diagonal matrix of normalised Hadamard matrices, whose size is the largest power of 2, up to 64,
    that divides the number of features. H is orthogonal and symmetric: it is its own inverse, and preserves dot products.
    """
    size = min(x.shape[-1] & -x.shape[-1], 64)
    make = _cached_hadamard_matrix if _is_plain(x) else hadamard_matrix
    return (x.unflatten(-1, (-1, size)) @ make(size, x.dtype, x.device)).flatten(-2)


def _is_plain(x: torch.Tensor) -> bool:
    """Whether matrices for `x` may be cached: not those made under torch.compile, nor for fake tensors or other subclasses."""
    return type(x) is torch.Tensor and not torch.compiler.is_compiling()


def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The normalised Hadamard matrix [size, size] of Sylvester's construction, `size` a power of 2."""
    index = torch.arange(size, device=device)
    parity = index[:, None] & index
    for shift in (8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    return (1 - 2 * (parity & 1)).to(dtype) * size**-0.5


@functools.cache
def _cached_hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # tensors made in inference mode cannot be used with gradients
        return hadamard_matrix(size, dtype, device)


def rotation_matrix(head_dim: int, padded_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`rotate_features` as a matrix [head_dim, padded_dim] whose columns are in the order of `QuantizedFactors.features`."""
    place = torch.arange(padded_dim, device=device)
    byte, is_high = place % (padded_dim // 2), place // (padded_dim // 2)
    feature = byte // 4 * 8 + byte // 2 % 2 + byte % 2 * 4 + is_high * 2
    matrix = rotate_features(torch.eye(head_dim, dtype=torch.float32, device=device))
    return nn.functional.pad(matrix, (0, padded_dim - head_dim))[:, feature].to(dtype)


@functools.cache
def _cached_rotation_matrix(head_dim: int, padded_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return rotation_matrix(head_dim, padded_dim, dtype, device)
