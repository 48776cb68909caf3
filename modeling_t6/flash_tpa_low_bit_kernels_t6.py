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
"""FlashTPA's decode kernel for one query token over rows of float8 or 4 bits"""

from typing import NamedTuple

from .flash_tpa_kernels_t6 import IS_INTERPRETED, halves, pairs_of_float8


try:  # the remote-code loader passes over packages that are imported here
    import triton
    import triton.language as tl
except ImportError:
    raise


# Each warp processes its own tokens and shares nothing with the others until the end: matrix products are batched over warps.
# Operands are converted in registers, from 32-bit words that each thread loads in the layout of the instruction mma.m16n8k16. Of
# the 32 threads of a warp, thread 4 g + t holds features 2 t and 2 t + 1 (and 8 more) of token g of a tile of 8 keys, and tokens
# 2 t and 2 t + 1 of feature g of values. The order of features, and of heads, in a product is arbitrary, so it is chosen such that a
# thread holds those that are adjacent in memory:
#
#     heads     8 i + g                   are heads 4 g + i in memory: one word of A in float8,
#     features  16 q + 8 i + 2 t + e      of keys are 16 t + 4 q + 2 i + e: 16 bytes of float8, 8 of 4 bits,
#     features  8 k + g                   of values are 8 g + k: 8 bytes of float8, 4 of 4 bits.
#
# The scores of each head are in units of a power of 2, which is 1 unless queries times the scale of scores overflow float16.
#
# If the cache is paged, tokens of a tile that are certain to lie in one page share a pointer: 8 or more, since the words of a thread
# are of tokens 8 apart. Block table entries are read two tiles ahead, and words one tile ahead.

HEADS = tl.constexpr(32)  # per program


class LowBitLaunch(NamedTuple):
    """Sizes with which the kernel is compiled and launched."""

    block_n: int  # tokens in a tile of a warp
    warps: int
    programs_per_sm: int  # resident on a multiprocessor
    registers: int | None = None  # the most per thread, so that the programs fit

    @property
    def tile(self) -> int:
        """Tokens in the tiles of all warps."""
        return self.block_n * self.warps

    def column_blocks(self, num_queries: int, num_heads: int) -> int:
        return -(-num_heads // HEADS.value)


class Pages(NamedTuple):
    """The layout of rows in pages."""

    size: int = 0  # tokens per page; 0: not paged, the rows of a sequence are consecutive
    together: int = 0  # consecutive tokens of a tile that are certain to lie in one page: 8 or more


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _without_order(x):
    """The same integers, hidden from the compiler's analysis of contiguity, so that it keeps the order of dimensions over lanes."""
    if not IS_INTERPRETED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    return x


@triton.jit
def _halves(words):
    """The two float16 in each 32-bit word, [..., 2]"""
    low, high = halves(words)
    return tl.join(low, high)


@triton.jit
def _pair(low, high):
    """Two tensors of float16 packed into 32-bit words."""
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _byte(words, i: tl.constexpr):
    return (words >> (8 * i)).to(tl.int8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _four(words):
    """The four float8 in each 32-bit word, as two words of two float16."""
    if IS_INTERPRETED:
        first = _pair(_byte(words, 0).to(tl.float16), _byte(words, 1).to(tl.float16))
        last = _pair(_byte(words, 2).to(tl.float16), _byte(words, 3).to(tl.float16))
    else:
        first, last = pairs_of_float8(words)
    return first, last


@triton.jit
def _four_float32(words):
    """The four float8 in each 32-bit word, as float32."""
    if IS_INTERPRETED:
        a, b = _byte(words, 0).to(tl.float32), _byte(words, 1).to(tl.float32)
        c, d = _byte(words, 2).to(tl.float32), _byte(words, 3).to(tl.float32)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high, x, y;
            .reg .b32 pair;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 pair, low;
            mov.b32 {x, y}, pair;
            cvt.f32.f16 $0, x;
            cvt.f32.f16 $1, y;
            cvt.rn.f16x2.e4m3x2 pair, high;
            mov.b32 {x, y}, pair;
            cvt.f32.f16 $2, x;
            cvt.f32.f16 $3, y;
            }
            """,
            "=f,=f,=f,=f,r", [words], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return a, b, c, d


@triton.jit
def _four_pairs(words, others):
    """The four float8 in each of two words: four words, each with the i-th element of both in float16."""
    if IS_INTERPRETED:
        a = _pair(_byte(words, 0).to(tl.float16), _byte(others, 0).to(tl.float16))
        b = _pair(_byte(words, 1).to(tl.float16), _byte(others, 1).to(tl.float16))
        c = _pair(_byte(words, 2).to(tl.float16), _byte(others, 2).to(tl.float16))
        d = _pair(_byte(words, 3).to(tl.float16), _byte(others, 3).to(tl.float16))
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high;
            .reg .b32 pairs;
            prmt.b32 pairs, $4, $5, 0x5140;
            mov.b32 {low, high}, pairs;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            prmt.b32 pairs, $4, $5, 0x7362;
            mov.b32 {low, high}, pairs;
            cvt.rn.f16x2.e4m3x2 $2, low;
            cvt.rn.f16x2.e4m3x2 $3, high;
            }
            """,
            "=&r,=&r,=r,=r,r,r", [words, others], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return a, b, c, d


@triton.jit
def _four_nibbles(words, scales, zeros):
    """
    n * scale + zero for each of the 4-bit numbers n in the words, where `scales` and `zeros` have one for each half of a word.

    With n as the last bits of its mantissa, the float16 number 1024 is 1024 + n; 4 bits higher, it is 1024 + 16 n.
    """
    if IS_INTERPRETED:
        a, b = _scaled(words, scales, zeros), _scaled(words >> 4, scales, zeros)
        c, d = _scaled(words >> 8, scales, zeros), _scaled(words >> 12, scales, zeros)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 w, n, least, sixteenth, less;
            mov.b32 least, 0x64006400;
            mov.b32 sixteenth, 0x2C002C00;
            mov.b32 less, 0xD400D400;
            lop3.b32 n, $4, 0x000F000F, least, 0xEA;
            sub.rn.f16x2 n, n, least;
            fma.rn.f16x2 $0, n, $5, $6;
            lop3.b32 n, $4, 0x00F000F0, least, 0xEA;
            fma.rn.f16x2 n, n, sixteenth, less;
            fma.rn.f16x2 $1, n, $5, $6;
            shr.b32 w, $4, 8;
            lop3.b32 n, w, 0x000F000F, least, 0xEA;
            sub.rn.f16x2 n, n, least;
            fma.rn.f16x2 $2, n, $5, $6;
            lop3.b32 n, w, 0x00F000F0, least, 0xEA;
            fma.rn.f16x2 n, n, sixteenth, less;
            fma.rn.f16x2 $3, n, $5, $6;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r", [words, scales, zeros],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return a, b, c, d


@triton.jit
def _float16(words, shift: tl.constexpr):
    return (words >> shift).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _scaled(words, scales, zeros):
    low = (words & 15).to(tl.float32) * _float16(scales, 0) + _float16(zeros, 0)
    high = ((words >> 16) & 15).to(tl.float32) * _float16(scales, 16) + _float16(zeros, 16)
    return _pair(low.to(tl.float16), high.to(tl.float16))


@triton.jit
def _halves_of(words, others):
    """The low halves of both words packed into one, and their high halves."""
    if IS_INTERPRETED:
        low, high = (words & 0xFFFF) | (others << 16), ((words >> 16) & 0xFFFF) | (others & -65536)
    else:
        low, high = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
            "=&r,=r,r,r", [words, others], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return low, high


@triton.jit
def _exponentials(first, second):
    """2 to the power of both, in float16, packed into 32-bit words."""
    if IS_INTERPRETED:
        words = _pair(tl.exp2(first).to(tl.float16), tl.exp2(second).to(tl.float16))
    else:
        words = tl.inline_asm_elementwise(
            """
            {
            .reg .f32 x, y;
            ex2.approx.ftz.f32 x, $1;
            ex2.approx.ftz.f32 y, $2;
            cvt.rn.f16x2.f32 $0, y, x;
            }
            """,
            "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return words


@triton.jit
def _product(words, others):
    if IS_INTERPRETED:
        low = _float16(words, 0) * _float16(others, 0)
        words = _pair(low, _float16(words, 16) * _float16(others, 16))
    else:
        words = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [words, others], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
    return words


@triton.jit
def _join_4(a, b, c, d):
    """[..., 4], as [..., 2, 2]"""
    return tl.join(tl.join(a, c), tl.join(b, d))


# Pointers are sums of what differs between threads, and then of compile-time constants, which become offsets of load instructions.


@triton.jit
def _load(pointers, tokens, num_rows, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=tokens < num_rows, other=0)
    return tl.load(pointers)


@triton.jit
def _load_pair(pointers, tokens, num_rows, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """The words of even tokens, and those of the odd tokens that follow them."""
    even = _load(pointers, tokens, num_rows, MASKED)
    return even, _load(pointers + ROWS.width // 4, tokens + 1, num_rows, MASKED)


@triton.jit
def _pages_of(table_ptr, first, end, LAUNCH: tl.constexpr, PAGES: tl.constexpr):
    """The pages of a tile, one for each `PAGES.together` tokens; 0 from `end` on, where the block table is undefined."""
    pages = ()
    if PAGES.size:
        for i in tl.static_range(0, LAUNCH.warps * LAUNCH.block_n // PAGES.together):
            token = first + i * PAGES.together
            page_ptr = table_ptr + token // PAGES.size
            pages += (tl.load(page_ptr, mask=token < end, other=0, eviction_policy="evict_last"),)
    return pages


@triton.jit
def _rows_at(tile, warps, tokens, ROWS: tl.constexpr, LAUNCH: tl.constexpr, PAGES: tl.constexpr):
    """
    Pointers relative to which the rows of a tile's tokens, of these warps, can be addressed as if they were consecutive. `tile`: a
    pointer to all rows, the stride between pages in words, the first token of the tile, and its pages.
    """
    rows_ptr, page_stride, first, pages = tile
    WIDTH: tl.constexpr = ROWS.width // 4
    N: tl.constexpr = LAUNCH.block_n
    if PAGES.size == 0:
        rows = rows_ptr + first * tl.full((), WIDTH, tl.int64)
    elif PAGES.together == LAUNCH.warps * N:
        rows = rows_ptr + pages[0].to(tl.int64) * page_stride + first % PAGES.size * WIDTH
    else:
        PARTS: tl.constexpr = N // PAGES.together
        WARPS: tl.constexpr = LAUNCH.warps
        for i in tl.static_range(0, PARTS):
            page = pages[i]
            for w in tl.static_range(1, WARPS):
                page = tl.where(warps == w, pages[w * PARTS + i], page)
            start = warps * N + i * PAGES.together
            row = (first + start) % PAGES.size - start
            part = rows_ptr + page.to(tl.int64) * page_stride + row * WIDTH
            if i == 0:
                rows = part
            else:
                rows = tl.where(tokens >= start, part, rows)
    return rows


@triton.jit
def _load_a(
    tile, first_head, num_rows, r,
    ROWS: tl.constexpr, LAUNCH: tl.constexpr, PAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A of even and of odd tokens, in words of four heads: [4 (tokens), 8 (heads), warps, tokens // 8]"""
    W: tl.constexpr = LAUNCH.warps
    N: tl.constexpr = LAUNCH.block_n
    D: tl.constexpr = ROWS.head_dim
    WIDTH: tl.constexpr = ROWS.width // 4
    B_BYTES: tl.constexpr = D // 2 if ROWS.packed else D
    A_WORDS: tl.constexpr = ROWS.padded_heads // 4
    t = tl.arange(0, 4)[:, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None]
    w = tl.arange(0, W)[None, None, :, None]
    j = tl.arange(0, N // 8)[None, None, None, :]
    rows_ptr = _rows_at(tile, w, w * N + j * 8, ROWS, LAUNCH, PAGES)
    rows_ptr += ROWS.rank * B_BYTES // 4 + r * A_WORDS
    if A_WORDS % 8:
        g = tl.minimum(g + first_head // 4, A_WORDS - 1)  # heads beyond the last read another's A; their query is zero
        if A_WORDS % 4 == 2 and A_WORDS > 2 and r % 2 and not ROWS.packed:  # see `FactorLayout`
            g = (g + 2) % A_WORDS
    else:
        rows_ptr += first_head // 4
    pointers = rows_ptr + ((w * N + 2 * t) * WIDTH + _without_order(g)) + j * (8 * WIDTH)
    return _load_pair(pointers, w * N + j * 8 + 2 * t, num_rows, ROWS, MASKED)


@triton.jit
def _load_keys(
    tile, first_head, num_rows, r,
    ROWS: tl.constexpr, LAUNCH: tl.constexpr, PAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The words of a rank of keys: those of A, of B, and of the scales of 4 bits."""
    W: tl.constexpr = LAUNCH.warps
    N: tl.constexpr = LAUNCH.block_n
    J: tl.constexpr = N // 8
    D: tl.constexpr = ROWS.head_dim
    C: tl.constexpr = D // 64
    UNIT: tl.constexpr = 8 if ROWS.packed else 4
    WIDTH: tl.constexpr = ROWS.width // 4
    WORDS: tl.constexpr = 64 // UNIT
    even_a, odd_a = _load_a(tile, first_head, num_rows, r, ROWS, LAUNCH, PAGES, MASKED)
    g = tl.arange(0, 8)[:, None, None, None]
    w = tl.arange(0, W)[None, :, None, None]
    x = tl.arange(0, C * J)[None, None, :, None]
    word = tl.arange(0, WORDS)[None, None, None, :]
    rows_ptr = _rows_at(tile, w, w * N + x % J * 8, ROWS, LAUNCH, PAGES)
    pointers = rows_ptr + r * (D // UNIT) + ((w * N + g) * WIDTH + word) + (x % J * (8 * WIDTH) + x // J * WORDS)
    loaded = even_a, odd_a, _load(pointers, w * N + x % J * 8 + g, num_rows, MASKED)
    if ROWS.packed:
        first: tl.constexpr = ROWS.rank * (D // 2 + ROWS.padded_heads) // 4
        t = tl.arange(0, 4)[:, None, None, None]
        g = tl.arange(0, 8)[None, :, None, None]
        w = tl.arange(0, W)[None, None, :, None]
        x = tl.arange(0, C * J)[None, None, None, :]
        pointers = rows_ptr + (first + r * (D // 32)) + ((w * N + g) * WIDTH + t // 2)
        pointers += x % J * (8 * WIDTH) + x // J * 2
        loaded += (_load(pointers, w * N + x % J * 8 + g, num_rows, MASKED),)
    return loaded


@triton.jit
def _key_b(loaded, ROWS: tl.constexpr, LAUNCH: tl.constexpr):
    """B of keys, [warps, head_dim, tokens]"""
    W: tl.constexpr = LAUNCH.warps
    N: tl.constexpr = LAUNCH.block_n
    J: tl.constexpr = N // 8
    D: tl.constexpr = ROWS.head_dim
    C: tl.constexpr = D // 64
    if ROWS.packed:
        scales = tl.permute(loaded[3], (1, 2, 3, 0))
        scale, zero = _halves_of(scales, scales)
        word_0, word_1 = tl.split(tl.reshape(loaded[2], [8, W, C * J, 4, 2]))
        a, b, c, d = _four_nibbles(word_0, scale, zero)
        first_pairs = _join_4(a, b, c, d)
        a, b, c, d = _four_nibbles(word_1, scale, zero)
        pairs = tl.join(first_pairs, _join_4(a, b, c, d))  # [8, W, C * J, 4, i // 2, i % 2, z]
        b = tl.reshape(_halves(pairs), [8, W, C, J, 4, 2, 2, 2, 2])
        b = tl.permute(b, (1, 2, 7, 5, 4, 6, 8, 3, 0))
    else:
        first_pairs, last_pairs = _four(loaded[2])
        b = _halves(tl.join(first_pairs, last_pairs))
        b = tl.permute(tl.reshape(b, [8, W, C, J, 4, 4, 2, 2]), (1, 2, 5, 4, 6, 7, 3, 0))
    return tl.reshape(b, [W, D, N])


@triton.jit
def _load_values(
    tile, first_head, num_rows, r,
    ROWS: tl.constexpr, LAUNCH: tl.constexpr, PAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The words of a rank of values, of even and of odd tokens: those of A, of B, and of the scales of 4 bits."""
    W: tl.constexpr = LAUNCH.warps
    N: tl.constexpr = LAUNCH.block_n
    J: tl.constexpr = N // 8
    D: tl.constexpr = ROWS.head_dim
    C: tl.constexpr = D // 64
    UNIT: tl.constexpr = 8 if ROWS.packed else 4
    WIDTH: tl.constexpr = ROWS.width // 4
    even_a, odd_a = _load_a(tile, first_head, num_rows, r, ROWS, LAUNCH, PAGES, MASKED)
    t = tl.arange(0, 4)[:, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None]
    w = tl.arange(0, W)[None, None, :, None]
    x = tl.arange(0, C * J)[None, None, None, :]
    tokens = w * N + x % J * 8 + 2 * t
    lanes = (w * N + 2 * t) * WIDTH
    rows_ptr = _rows_at(tile, w, w * N + x % J * 8, ROWS, LAUNCH, PAGES)
    b_ptr = rows_ptr + r * (D // UNIT)
    if ROWS.packed:
        pointers = b_ptr + (lanes + _without_order(g)) + (x % J * (8 * WIDTH) + x // J * 8)
        even, odd = _load_pair(pointers, tokens, num_rows, ROWS, MASKED)
        first: tl.constexpr = ROWS.rank * (D // 2 + ROWS.padded_heads) // 4
        rows_ptr += first + r * (D // 32)
        pointers = rows_ptr + (lanes + _without_order(g // 4)) + (x % J * (8 * WIDTH) + x // J * 2)
        even_scales, odd_scales = _load_pair(pointers, tokens, num_rows, ROWS, MASKED)
        loaded = even_a, odd_a, even, odd, even_scales, odd_scales
    else:
        z = tl.arange(0, 2)[None, None, None, None, :]
        if PAGES.size and PAGES.together < W * N:
            b_ptr = b_ptr[:, :, :, :, None]
        pointers = b_ptr + ((lanes + 2 * g)[:, :, :, :, None] + z)
        pointers += (x % J * (8 * WIDTH) + x // J * 16)[:, :, :, :, None]
        even, odd = _load_pair(pointers, tokens[:, :, :, :, None], num_rows, ROWS, MASKED)
        loaded = even_a, odd_a, even, odd
    return loaded


@triton.jit
def _value_b(loaded, ROWS: tl.constexpr, LAUNCH: tl.constexpr):
    """B of values, [warps, tokens, head_dim]"""
    W: tl.constexpr = LAUNCH.warps
    N: tl.constexpr = LAUNCH.block_n
    J: tl.constexpr = N // 8
    D: tl.constexpr = ROWS.head_dim
    C: tl.constexpr = D // 64
    if ROWS.packed:
        scale, zero = _halves_of(loaded[4], loaded[5])
        even, odd = _halves_of(loaded[2], loaded[3])
        a, b, c, d = _four_nibbles(even, scale, zero)
        even = _join_4(a, b, c, d)
        a, b, c, d = _four_nibbles(odd, scale, zero)
        b = _halves(tl.join(even, _join_4(a, b, c, d)))
    else:
        a, b, c, d = _four_pairs(loaded[2], loaded[3])
        b = _halves(_join_4(a, b, c, d))
    b = tl.permute(tl.reshape(b, [4, 8, W, C, J // 2, 2, 2, 2, 2, 2]), (2, 4, 0, 5, 9, 3, 6, 7, 8, 1))
    return tl.reshape(b, [W, N, D])


@triton.jit
def _heads_of(columns):
    """The heads in memory of the heads of a product."""
    return columns % 8 * 4 + columns // 8


@triton.jit
def _heads_first(a, LAUNCH: tl.constexpr):
    """[tokens // 8, warps, 8, 4, 2, 2] to [warps, heads, tokens // 2]"""
    return tl.reshape(tl.permute(a, (2, 4, 5, 1, 3, 0)), [LAUNCH.warps, HEADS, LAUNCH.block_n // 2])


@triton.jit
def _weights(words, LAUNCH: tl.constexpr):
    """Weights [warps, heads, tokens] of words [warps, heads, tokens // 2], each of two tokens."""
    weights = tl.reshape(_halves(words), [LAUNCH.warps, HEADS, LAUNCH.block_n // 16, 2, 4, 2])
    return tl.reshape(tl.permute(weights, (0, 1, 2, 4, 3, 5)), [LAUNCH.warps, HEADS, LAUNCH.block_n])


@triton.jit
def _load_ahead(
    i: tl.constexpr, cache, tiles, first_head, end,
    KEYS: tl.constexpr, VALUES: tl.constexpr, LAUNCH: tl.constexpr, PAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """
    The words of the `i`-th rank of two tiles, where the first tile comes before the second, and keys before values.

    `tiles`: for each the first token, and the pages. `cache`: pointers to rows of keys and of values, and their strides between pages,
    in words.
    """
    K_RANK: tl.constexpr = KEYS.rank
    RANKS: tl.constexpr = K_RANK + VALUES.rank
    key_ptr, value_ptr, key_stride, value_stride = cache
    first, pages = tiles[i // RANKS]
    if i % RANKS < K_RANK:
        tile = key_ptr, key_stride, first, pages
        loaded = _load_keys(tile, first_head, end - first, i % RANKS, KEYS, LAUNCH, PAGES, MASKED)
    else:
        tile = value_ptr, value_stride, first, pages
        loaded = _load_values(tile, first_head, end - first, i % RANKS - K_RANK, VALUES, LAUNCH, PAGES, MASKED)
    return loaded


@triton.jit
def _add_tile(
    query, unit, in_units, maximum, normalizer, output, loaded, later, cache, tiles, first_head, end, is_first,
    KEYS: tl.constexpr, VALUES: tl.constexpr, LAUNCH: tl.constexpr, PAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """
    Adds the first of two `tiles` to the state of the online softmax. `loaded` and `later` are the words of its first two ranks. Those
    of the second tile are returned, unless this is the last tile, which may have fewer rows (`MASKED`).
    """
    W: tl.constexpr = LAUNCH.warps
    N: tl.constexpr = LAUNCH.block_n
    K_RANK: tl.constexpr = KEYS.rank
    V_RANK: tl.constexpr = VALUES.rank
    even = tl.broadcast_to(-maximum[:, :, None], [W, HEADS, N // 2])
    odd = even
    for r in tl.static_range(0, K_RANK):
        products = tl.dot(query, _key_b(loaded, KEYS, LAUNCH))
        even_products, odd_products = tl.split(tl.reshape(products, [W, HEADS, N // 2, 2]))
        p, q, s, t = _four_float32(loaded[0])
        even += even_products * _heads_first(_join_4(p, q, s, t), LAUNCH)
        p, q, s, t = _four_float32(loaded[1])
        odd += odd_products * _heads_first(_join_4(p, q, s, t), LAUNCH)
        loaded = later
        if (r + 2 < K_RANK + V_RANK) or (not MASKED):
            later = _load_ahead(r + 2, cache, tiles, first_head, end, KEYS, VALUES, LAUNCH, PAGES, MASKED)
    if MASKED:
        tokens = tiles[0][0] + tl.arange(0, W)[:, None, None] * N + 2 * tl.arange(0, N // 2)[None, None, :]
        even = tl.where(tokens < end, even, -float("inf"))
        odd = tl.where(tokens + 1 < end, odd, -float("inf"))
    weights = _exponentials(even, odd)
    # The maximum is updated only if a weight is 2 or more (float16 numbers from 2 on have the bit 0x4000). Units other than 1, which are rare,
    # are handled in this branch alone.
    if is_first | in_units | ((tl.reduce(weights, None, _or) & 0x40004000) != 0):
        ahead = tl.max(tl.maximum(even, odd), 2) + 6.0 / unit
        ahead = tl.maximum(ahead, tl.where(is_first, -1e30, 0.0))
        raised = maximum + ahead
        # The difference of rounded maxima, so that all weights are relative to the same. With large units, its rounding error would
        # make weights 0 or infinite.
        shift = tl.where(unit == 1.0, maximum - raised, -ahead)
        decay = tl.where(is_first, 0.0, tl.exp2(shift * unit))
        even = (even + shift[:, :, None]) * unit[:, :, None]
        weights = _exponentials(even, (odd + shift[:, :, None]) * unit[:, :, None])
        normalizer *= decay[:, :, None]
        output *= decay[:, :, None]
        maximum = raised
    ones = tl.full([W, N, 8], 1.0, tl.float16)
    normalizer = tl.dot(_weights(weights, LAUNCH), ones, normalizer)
    for r in tl.static_range(0, V_RANK):
        p, q, s, t = _four_pairs(loaded[0], loaded[1])
        weighted = _product(weights, _heads_first(_join_4(p, q, s, t), LAUNCH))
        output = tl.dot(_weights(weighted, LAUNCH), _value_b(loaded, VALUES, LAUNCH), output)
        loaded = later
        if (K_RANK + r + 2 < K_RANK + V_RANK) or (not MASKED):
            later = _load_ahead(K_RANK + r + 2, cache, tiles, first_head, end, KEYS, VALUES, LAUNCH, PAGES, MASKED)
    return maximum, normalizer, output, loaded, later


@triton.jit
def _prepare_query(
    query_ptr, first_head, stride_h, scale, ROWS: tl.constexpr, LAUNCH: tl.constexpr
):  # fmt: skip
    """
    Queries times `scale` in float16, in the rotated basis if rows are packed, [warps, heads, head_dim], and their units [warps, heads]:
    powers of 2 by which a head is divided if its largest element is not between 2^-10 and 2^15, else 1.
    """
    W: tl.constexpr = LAUNCH.warps
    D: tl.constexpr = ROWS.head_dim
    heads = first_head + _heads_of(tl.arange(0, HEADS))[:, None]
    features = tl.arange(0, D)[None, :]
    query = tl.load(query_ptr + heads * stride_h + features, mask=heads < ROWS.num_heads, other=0.0)
    if ROWS.packed:
        blocks = tl.permute(tl.reshape(query, [HEADS, D // 64, 64]), (1, 0, 2))
        parity = tl.arange(0, 64)[:, None] & tl.arange(0, 64)[None, :]
        parity ^= parity >> 4
        parity ^= parity >> 2
        parity ^= parity >> 1
        hadamard = (1.0 - 2.0 * (parity & 1)).to(query.dtype)
        hadamard = tl.broadcast_to(hadamard[None, :, :], [D // 64, 64, 64])
        query = tl.reshape(tl.permute(tl.dot(blocks, hadamard) * 0.125, (1, 0, 2)), [HEADS, D])
    query = query.to(tl.float32) * scale
    largest = tl.max(tl.abs(query), 1)
    exponents = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    fits = (largest < 32768.0) & ((largest >= 2.0**-10) | (largest == 0.0))
    unit = tl.where(fits, 1.0, tl.maximum(exponents, 2.0**-100) * 2.0**-14)
    query = (query * (1.0 / unit)[:, None]).to(tl.float16)
    query = tl.permute(tl.reshape(query, [HEADS, D // 64, 4, 4, 4]), (0, 1, 3, 2, 4))
    query = tl.reshape(query, [HEADS, D])
    return tl.broadcast_to(query[None, :, :], [W, HEADS, D]), tl.broadcast_to(unit[None, :], [W, HEADS])


@triton.jit(
    do_not_specialize=[
        "key_stride_b",
        "value_stride_b",
        "length_stride_b",
        "key_length",
        "num_splits",
        "slots_ptr",
        "table_ptr",
        "table_stride",
        "out_stride_t",
        "out_stride_h",
    ]
)
def low_bit_decode_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    length_ptr,
    partial_ptr,
    lse_ptr,
    query_stride_b,
    query_stride_h,
    key_stride_b,
    value_stride_b,
    length_stride_b,
    key_length,
    num_splits,
    scale,
    slots_ptr,
    table_ptr,
    out_ptr,
    table_stride,
    out_stride_t,
    out_stride_h,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    LAUNCH: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """
    Attention of one query token over one of `num_splits` splits of the cache, for a block of heads of one sequence. It writes what
    [`decode_kernel`] writes.

    If the cache is paged, `PAGES.size` is not 0, and the parameters from `slots_ptr` on are used; otherwise they are `None`. A batch
    stride is then that of a page, and a program takes the piece in its slot, see [`schedule_kernel`]. A piece that is a whole
    request is written to the output.
    """
    NUM_HEADS: tl.constexpr = KEYS.num_heads
    D: tl.constexpr = KEYS.head_dim
    W: tl.constexpr = LAUNCH.warps
    N: tl.constexpr = LAUNCH.block_n
    TILE: tl.constexpr = W * N
    HEAD_BLOCKS: tl.constexpr = (KEYS.padded_heads + HEADS - 1) // HEADS
    first_head = tl.program_id(0) % HEAD_BLOCKS * HEADS
    split = tl.program_id(0) // HEAD_BLOCKS
    if PAGES.size:
        # All layers read these, so the L2 cache should keep them while rows stream through.
        slot_ptr = slots_ptr + 8 * split
        request = tl.load(slot_ptr, eviction_policy="evict_last")
        start = tl.load(slot_ptr + 1, eviction_policy="evict_last")
        end = tl.load(slot_ptr + 2, eviction_policy="evict_last")
        partial_row = tl.load(slot_ptr + 3, eviction_policy="evict_last")
        batch = tl.load(slot_ptr + 4, eviction_policy="evict_last").to(tl.int64)  # the query token
        if request < 0:
            return
        table_ptr += request.to(tl.int64) * table_stride
        whole = start + (end - start) // TILE * TILE
    else:
        batch = tl.program_id(1).to(tl.int64)
        length = key_length
        if HAS_LENGTHS:
            length = tl.minimum(tl.load(length_ptr + batch * length_stride_b).to(tl.int32), key_length)
        # Splits are whole tiles, whose numbers differ by at most one.
        num_tiles = tl.cdiv(length, TILE)
        start = (split * num_tiles // num_splits) * TILE
        end = tl.minimum(((split + 1) * num_tiles // num_splits) * TILE, length)
        whole = end // TILE * TILE
        key_ptr += batch * key_stride_b * STRIDE_UNIT
        value_ptr += batch * value_stride_b * STRIDE_UNIT
    key_stride, value_stride = key_stride_b * (STRIDE_UNIT // 4), value_stride_b * (STRIDE_UNIT // 4)
    key_ptr, value_ptr = key_ptr.to(tl.pointer_type(tl.int32)), value_ptr.to(tl.pointer_type(tl.int32))
    if KEYS.start_8:
        key_ptr = tl.multiple_of(key_ptr, 8)
    if VALUES.start_8:
        value_ptr = tl.multiple_of(value_ptr, 8)
    cache = key_ptr, value_ptr, key_stride, value_stride
    pages = _pages_of(table_ptr, start, whole, LAUNCH, PAGES)
    next_pages = _pages_of(table_ptr, tl.maximum(tl.minimum(start + TILE, whole - TILE), start), whole, LAUNCH, PAGES)
    tiles = (start, pages), (start, pages)
    loaded = _load_ahead(0, cache, tiles, first_head, whole, KEYS, VALUES, LAUNCH, PAGES, True)
    later = _load_ahead(1, cache, tiles, first_head, whole, KEYS, VALUES, LAUNCH, PAGES, True)
    query, unit = _prepare_query(query_ptr + batch * query_stride_b, first_head, query_stride_h, scale, KEYS, LAUNCH)
    in_units = tl.max(tl.max((unit != 1.0).to(tl.int32), 1), 0) > 0
    maximum = tl.zeros([W, HEADS], tl.float32)
    normalizer = tl.zeros([W, HEADS, 8], tl.float32)
    output = tl.zeros([W, HEADS, D], tl.float32)
    for first in tl.range(start, whole, TILE, num_stages=1):  # prefetching is explicit, in registers
        following = tl.minimum(first + TILE, whole - TILE)
        later_pages = _pages_of(table_ptr, tl.minimum(first + 2 * TILE, whole - TILE), whole, LAUNCH, PAGES)
        tiles = (first, pages), (following, next_pages)
        maximum, normalizer, output, loaded, later = _add_tile(
            query, unit, in_units, maximum, normalizer, output, loaded, later, cache, tiles, first_head, whole,
            first == start, KEYS, VALUES, LAUNCH, PAGES, False,
        )  # fmt: skip
        pages, next_pages = next_pages, later_pages
    if whole < end:
        pages = _pages_of(table_ptr, whole, end, LAUNCH, PAGES)
        tiles = (whole, pages), (whole, pages)
        loaded = _load_ahead(0, cache, tiles, first_head, end, KEYS, VALUES, LAUNCH, PAGES, True)
        later = _load_ahead(1, cache, tiles, first_head, end, KEYS, VALUES, LAUNCH, PAGES, True)
        maximum, normalizer, output, _, _ = _add_tile(
            query, unit, in_units, maximum, normalizer, output, loaded, later, cache, tiles, first_head, end,
            whole == start, KEYS, VALUES, LAUNCH, PAGES, True,
        )  # fmt: skip

    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    highest = tl.max(maximum, 0)
    decay = tl.exp2((maximum - highest[None, :]) * unit)
    normalizer = tl.sum(tl.max(normalizer, 2) * decay, 0)
    output = tl.sum(output * decay[:, :, None], 0)
    is_empty = normalizer == 0.0
    normalizer = tl.where(is_empty, 1.0, normalizer)
    lse = tl.where(is_empty, -float("inf"), highest * tl.max(unit, 0) + tl.log2(normalizer))
    heads = first_head + _heads_of(tl.arange(0, HEADS))
    partial = partial_row.to(tl.int64) if PAGES.size else batch * num_splits + split
    row = partial * NUM_HEADS + heads
    output = tl.reshape(output * (1.0 / normalizer)[:, None], [HEADS, D // 64, 8, 8])
    output = tl.reshape(tl.permute(output, (0, 1, 3, 2)), [HEADS, D])
    features = tl.arange(0, D)[None, :]
    is_head = heads < NUM_HEADS
    if PAGES.size:
        if partial_row < 0:
            V_RANK: tl.constexpr = VALUES.rank
            out_ptr += batch * out_stride_t
            tl.store(
                out_ptr + heads[:, None] * out_stride_h + features, output * (1.0 / V_RANK), mask=is_head[:, None]
            )
            return
    tl.store(partial_ptr + row[:, None] * D + features, output, mask=is_head[:, None])
    tl.store(lse_ptr + row, lse, mask=is_head)
