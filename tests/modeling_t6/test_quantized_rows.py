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
"""Rows of 4 bits: their bytes, what is lost, and what reads them"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_t6.cache_t6 import FactorLayout
from modeling_t6.quantized_rows_t6 import QuantizedLayout, rotate_features


SHAPES = pytest.mark.parametrize(
    ("rank", "num_heads", "head_dim"),
    [(1, 78, 64), (2, 78, 64), (3, 5, 40), (4, 34, 64), (1, 6, 128), (2, 0, 64), (3, 7, 10), (1, 0, 2)],
    ids=lambda n: str(n),
)


def layout_of(rank: int, num_heads: int, head_dim: int) -> QuantizedLayout:
    plain = FactorLayout(rank, num_heads, head_dim)
    return QuantizedLayout(rank, num_heads, plain.padded_heads, head_dim)


def random_factors(rank: int, num_heads: int, head_dim: int, tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank * 1000 + num_heads * 10 + head_dim)
    a = torch.randn(2, tokens, rank, num_heads, generator=generator) * 0.3
    b = torch.randn(2, tokens, rank, head_dim, generator=generator) * 2
    b[:, ::2, :, 0] *= 8  # a feature that stands out
    return a, b


def reference_hadamard(head_dim: int) -> np.ndarray:
    """Blocks of Sylvester's matrices, of at most 64: H_2n = [[H_n, H_n], [H_n, -H_n]]."""
    size = 1
    while head_dim % (2 * size) == 0 and size < 64:
        size *= 2
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(head_dim // size), h / np.sqrt(size))


def reference_factors(
    row: np.ndarray, rank: int, num_heads: int, head_dim: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """
    (A [num_heads], B [head_dim]) of each rank, in float64, of the bytes of one row: number by number. Without heads A is 1.
    """
    padded = FactorLayout(rank, num_heads, head_dim).padded_heads
    num_bytes, groups, factors = -(-head_dim // 8) * 4, -(-head_dim // 32), []
    scales = row[rank * (num_bytes + padded) :][: rank * groups * 4].copy().view(np.float16).astype(np.float64)
    for r, group_scales in enumerate(scales.reshape(rank, groups, 2)):
        packed = row[r * num_bytes :]
        b = np.zeros(head_dim)
        for i in range(head_dim):
            place, is_high = {0: (0, 0), 4: (1, 0), 1: (2, 0), 5: (3, 0), 2: (0, 1), 6: (1, 1), 3: (2, 1), 7: (3, 1)}[
                i % 8
            ]
            n = int(packed[i // 8 * 4 + place]) // 16**is_high % 16
            b[i] = n * group_scales[i // 32, 0] + group_scales[i // 32, 1]
        start = rank * num_bytes + r * padded
        a = np.array([float8_value(int(byte)) for byte in row[start : start + num_heads]])
        assert not row[start + num_heads : start + padded].any()
        factors.append((a if num_heads else np.ones(1), b @ reference_hadamard(head_dim)))
    end = rank * (num_bytes + padded + 4 * groups)
    assert not row[end:].any() and len(row) % 8 == 0 and len(row) - end < 8
    return factors


def float8_value(byte: int) -> float:
    """e4m3fn: a sign, 4 bits of exponent with a bias of 7, 3 bits after the point; subnormal below 2^-6."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    assert (exponent, mantissa) != (15, 7)  # NaN
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


@SHAPES
def test_rows_are_as_described(rank, num_heads, head_dim):
    """What the bytes stand for, read number by number, is what `unpack` reads, and near what was packed."""
    layout, (a, b) = layout_of(rank, num_heads, head_dim), random_factors(rank, num_heads, head_dim, tokens=3)
    rows = layout.pack(a if num_heads else None, b)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 1, 3, layout.width)
    read_a, read_b = layout.unpack(rows, torch.float32)
    assert read_a.shape == a.shape and read_b.shape == b.shape
    for batch, token in ((0, 0), (0, 1), (1, 2)):
        expected = reference_factors(rows[batch, 0, token].numpy(), rank, num_heads, head_dim)
        for r, (ref_a, ref_b) in enumerate(expected):
            heads = np.outer(ref_a, ref_b)
            exact_a = a[batch, token, r].double().numpy() if num_heads else np.ones(1)
            exact = np.outer(exact_a, b[batch, token, r].double().numpy())
            assert np.linalg.norm(heads - exact) <= 0.17 * np.linalg.norm(exact)
            my_a = read_a[batch, token, r].double().numpy() if num_heads else np.ones(1)
            mine = np.outer(my_a, rotate_features(read_b[batch, token, r].double()).numpy())
            np.testing.assert_allclose(mine, heads, rtol=1e-6, atol=1e-6 * np.abs(heads).max())


@pytest.mark.parametrize("head_dim", [2, 10, 40, 64, 128])
def test_rotation(head_dim):
    x = torch.randn(3, head_dim, dtype=torch.float64)
    np.testing.assert_allclose(rotate_features(x).numpy(), x.numpy() @ reference_hadamard(head_dim), atol=1e-12)
    torch.testing.assert_close(rotate_features(rotate_features(x)), x)


@pytest.mark.parametrize(("head_dim", "bound"), [(40, 0.079), (64, 0.083), (128, 0.083)])
def test_error_of_normal_rows(head_dim, bound):
    """
    Of 32 normally distributed features the smallest and the largest are 4.1 deviations apart: 15 steps leave an error of
    0.275 / 12 ** 0.5 = 7.9% of their norm, to which the rounding of A to 8 bits adds 2.6%, at a right angle.
    """
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(1, 2000, 2, head_dim, generator=generator)
    a = torch.randn(1, 2000, 2, 17, generator=generator)
    layout = layout_of(2, 17, head_dim)
    read_a, read_b = layout.unpack(layout.pack(a, b), torch.float32)
    heads, exact = (torch.einsum("bsrh,bsrd->bsrhd", *both) for both in ((read_a, rotate_features(read_b)), (a, b)))
    errors = (heads - exact).flatten(-2).norm(dim=-1) / exact.flatten(-2).norm(dim=-1)
    assert 0.9 * bound < errors.square().mean().sqrt() < bound


@pytest.mark.parametrize("num_heads", [0, 5])
def test_extreme_numbers(num_heads):
    """Zeros stay zeros, and neither tiny nor huge factors become NaN or lose more than others."""
    layout = layout_of(1, num_heads, 16)
    a, b = random_factors(1, num_heads, 16)
    read_a, read_b = layout.unpack(layout.pack(a * 0, b * 0), torch.float32)
    heads = read_a.transpose(-1, -2) @ read_b if num_heads else read_b
    assert heads.abs().max() < 1e-6
    for size in (1e-3, 1e3):
        read_a, read_b = layout.unpack(layout.pack(a, b * size), torch.float32)
        heads = read_a.transpose(-1, -2) @ rotate_features(read_b) if num_heads else rotate_features(read_b)
        exact = a.transpose(-1, -2) @ b * size if num_heads else b * size
        assert (heads - exact).norm() < 0.12 * exact.norm()


def test_tensors_without_numbers_leave_none_behind():
    """As those by which packages plan: matrices made for them are not kept for others."""
    layout, numbers = layout_of(1, 3, 56), random_factors(1, 3, 56)
    with FakeTensorMode():
        a, b = torch.empty(2, 9, 1, 3), torch.empty(2, 9, 1, 56)
        assert layout.rotate(b).shape == b.shape and layout.pack(a, b).shape == (2, 1, 9, layout.width)
    assert [type(x) for x in (layout.rotate(numbers[1]), layout.pack(*numbers))] == [torch.Tensor] * 2


def test_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="even number of features, got `head_dim`=15"):
        QuantizedLayout(1, 4, 4, 15)
