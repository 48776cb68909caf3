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
"""
Factors in pages: from projections to queries and rows, and from rows to the keys and values of prompts. In Triton on a GPU,
elsewhere in PyTorch.

Pages are two tensors of rows that `FactorLayout` packs, [blocks, page_size, key width] and [blocks, page_size, value width], in
the model's dtype or another one; float8_e4m3fn may come as uint8. The elements of a row are contiguous, other strides are
arbitrary: both may be views of one tensor. A slot is `block * page_size + offset`. A cache that is not paged,
[batch, capacity, width], has one page per sequence, and [`NewRows`] in place of slots.
"""

import functools
import math
from typing import NamedTuple

import torch

from .cache_t6 import FactorLayout
from .factors_t6 import activate_head_factors, apply_rotary_pos_emb, form_heads, norm_key_heads
from .flash_tpa_t6 import DTYPES, IS_INTERPRETED, LAUNCH_OPTIONS, is_supported, power_of_2, stride_unit
from .launch_t6 import KeptKernel, keep


try:
    import triton

    from .factor_pages_kernels_t6 import PagedRows, Rotation, form_heads_kernel, store_factors_kernel
except ImportError:
    triton = None


# Launch sizes of the kernels.
QUERY_TILE = 1024  # the most elements of a block of heads that one program forms
QUERY_NUMBERS = 32  # of these per thread
PAIRS_TILE = 4096  # elements of keys or values that one program forms
PAIRS_NUMBERS = 32  # of these per thread
# Up to this many tokens, the kernel that stores factors also forms K and V, with one warp per program. For more, a separate launch
# of the kernel that forms heads is faster.
MAX_FORMED_TOKENS = 2048


class SelectedRanks(NamedTuple):
    """
    A constant A with one nonzero element per head: key/value head g is `weights[g] / R` times row `ranks[g]` of B. Attention
    then has G key/value heads, each shared by equally many consecutive query heads, as in GQA.

    Attributes:
        ranks: int32 [G].
        weights: [G], the nonzero elements of A.
    """

    ranks: torch.Tensor
    weights: torch.Tensor


class NewRows(NamedTuple):
    """
    Where the rows of new tokens go in a cache that is not paged: consecutive rows, the same in each sequence. The tokens of one
    sequence follow those of another.

    Attributes:
        first: the index of the first row, relative to `length` if that is given.
        count: new tokens per sequence.
        length: int64 [1] on the device. A token whose row would be beyond the capacity of the cache is not written, and its
            query is NaN: the host cannot raise an error.
    """

    first: int
    count: int
    length: torch.Tensor | None = None


def select_ranks(a: torch.Tensor) -> SelectedRanks | None:
    """
    The [`SelectedRanks`] of a constant A [R, h] in which each head has one nonzero element, and consecutive groups of h / G heads
    are equal, as in models converted from MHA, GQA or MQA. `None` for any other A. Reads A on the host.
    """
    a = a.detach()
    num_heads = a.shape[1]
    if ((a != 0).sum(0) != 1).any():
        return None
    changes = (a[:, 1:] != a[:, :-1]).any(0).nonzero()[:, 0] + 1
    size = int(changes[0]) if len(changes) else num_heads
    if num_heads % size or changes.tolist() != list(range(size, num_heads, size)):
        return None
    ranks = (a[:, ::size] != 0).int().argmax(0)
    return SelectedRanks(ranks.to(torch.int32), a[ranks, torch.arange(0, num_heads, size, device=a.device)])


def rows_at(pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The rows [slots, width] of pages [blocks, page_size, width] in these slots, none of them negative, by PyTorch."""
    # As bytes, since not every version of PyTorch implements indexing for float8.
    numbers = pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages
    return numbers[slots // pages.shape[1], slots % pages.shape[1]].view(pages.dtype)


class FactorTransform(NamedTuple):
    """
    What is applied to the factors of tokens between their projections and the cache, apart from RoPE.

    Attributes:
        q_norm, k_norm: weights [d] of the RMS norms before RoPE of query heads and of keys; both, or `None`.
        eps: of the norms.
        activation: of A: "sigmoid", "softmax" over these heads, or `None`.
        norms_key_heads: whether the norm of keys acts on the heads that A_K and B_K form, instead of on rows of B_K.
    """

    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 1e-6
    activation: str | None = None
    norms_key_heads: bool = False


NO_TRANSFORM = FactorTransform()


class FactorColumns(NamedTuple):
    """
    Which columns of one product [tokens, columns] are the factors that [`store_factors`] takes: for each the first column, n
    and m, where its n * m columns are [n, m]. `None` for an A that is `None` or constant.
    """

    a_q: tuple[int, int, int] | None
    b_q: tuple[int, int, int]
    a_k: tuple[int, int, int] | None
    b_k: tuple[int, int, int]
    a_v: tuple[int, int, int] | None
    b_v: tuple[int, int, int]

    def views(self, product: torch.Tensor) -> list[torch.Tensor | None]:
        """The factors as [tokens, n, m]."""
        return [None if part is None else _view_columns(product, *part) for part in self]


def _view_columns(product: torch.Tensor, start: int, n: int, m: int) -> torch.Tensor:
    # `unflatten` would not preserve the stride of a single token, for which the kernel would be compiled again.
    return product.as_strided((product.shape[0], n, m), (product.stride(0), m, 1), product.storage_offset() + start)


def store_factors(
    a_q: torch.Tensor | None,
    b_q: torch.Tensor,
    a_k: torch.Tensor | None,
    b_k: torch.Tensor,
    a_v: torch.Tensor | None,
    b_v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor | NewRows,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    transform: FactorTransform = NO_TRANSFORM,
    kernels: bool | None = None,
) -> torch.Tensor:
    """
    Writes the factors of tokens into pages, and forms their queries: what `TensorProductFactors.project` and `queries`
    do after the projections, in float32, in one launch.

    Args:
        a_q: [tokens, h, R_Q] as projected, a constant [R_Q, h], or `None` for queries without factors.
        b_q: [tokens, R_Q, d] before RoPE, or the queries [tokens, h, d].
        a_k, a_v: [tokens, h_kv, R_K] and [tokens, h_kv, R_V] as projected; `None` if they are constants, and rows hold B alone.
        b_k, b_v: [tokens, R_K, d] and [tokens, R_V, d]. All six may be views of one product, with any stride between
            tokens; the elements of one token are contiguous.
        cos, sin: [tokens, rotary_dim / 2], for the first half of the rotated features (the second half has the same).
        slots: int64 [tokens] or fewer. Tokens with a negative slot, or without one, are not written. Or [`NewRows`].
        key_pages, value_pages: see the top of this file. float8 saturates.
        kernels: whether Triton does it, or PyTorch. `None`: Triton where it can.

    Returns:
        Queries [tokens, h, d], normalised and rotated, in the dtype of `b_q`.

    Raises:
        ValueError: if the pages have another width, or the elements of a token are not contiguous.
    """
    (_, k_rank, head_dim), v_rank, num_heads = b_k.shape, b_v.shape[1], 0 if a_k is None else a_k.shape[1]
    key_pages, value_pages, *layouts = _rows_of(key_pages, value_pages, k_rank, v_rank, num_heads, head_dim)
    kernels = _in_triton(b_q, key_pages) if kernels is None else kernels
    store = _store_in_triton if kernels else _store_in_torch
    return store(a_q, b_q, a_k, b_k, a_v, b_v, cos, sin, slots, key_pages, value_pages, transform, *layouts)


def store_projections(
    product: torch.Tensor,
    columns: FactorColumns,
    constant_a_q: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    query: torch.Tensor,
    transform: FactorTransform = NO_TRANSFORM,
    kernels: bool | None = None,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    first_formed: int = 0,
) -> None:
    """
    [`store_factors`] of factors that are columns of one product. It makes no views of the product, which would take the host
    longer than the launch.

    Args:
        product: [tokens, columns].
        columns: where the factors are; A_Q is `constant_a_q` instead if that is given.
        query: output [tokens, h, d], contiguous.
        key, value: outputs [tokens from `first_formed` on, h_kv, d], contiguous: K and V as [`form_heads_from_pages`] forms them
            from the rows; `None` if A is constant. Formed in the same launch if there are few tokens, rows have the dtype of
            the heads, and the key heads have no norm.
    """
    (_, k_rank, head_dim), v_rank, num_heads = (
        columns.b_k,
        columns.b_v[1],
        0 if columns.a_k is None else columns.a_k[1],
    )
    key_pages, value_pages, *layouts = _rows_of(key_pages, value_pages, k_rank, v_rank, num_heads, head_dim)
    forms_heads = False  # in the same launch
    if _in_triton(product, key_pages) if kernels is None else kernels:
        offsets, strides = _offsets_of_columns(columns, product.element_size(), product.stride(0))
        factors = [product] * 6
        if constant_a_q is not None:
            factors[0] = constant_a_q.contiguous()
        q_rank = 0 if columns.a_q is None and constant_a_q is None else columns.b_q[1]
        forms_heads = (
            key is not None
            and len(key) <= MAX_FORMED_TOKENS
            and not transform.norms_key_heads
            and key_pages.dtype == key.dtype
        )
        _launch_store(
            factors, offsets, strides, cos, sin, slots, key_pages, value_pages, query, q_rank, constant_a_q is not None,
            transform, *layouts, *((key, value, first_formed) if forms_heads else ()),
        )  # fmt: skip
    else:
        a_q, *others = columns.views(product)
        a_q = a_q if constant_a_q is None else constant_a_q
        query.copy_(_store_in_torch(a_q, *others, cos, sin, slots, key_pages, value_pages, transform, *layouts))
    if key is not None and not forms_heads:
        slots = slots[first_formed : first_formed + len(key)]
        form_heads_from_pages(key_pages, value_pages, slots, key, value, k_rank, v_rank)


def slots_of_rows(
    block_table: torch.Tensor, first_positions: torch.Tensor, row_starts: torch.Tensor, page_size: int, room: int
) -> torch.Tensor:
    """
    The slots of consecutive tokens of each request, concatenated. Computed once for all layers, without waiting for the device.

    Args:
        block_table: int32 [requests, max pages], the blocks of each request in order.
        first_positions: int32 [requests], the position of the first of these tokens in each request.
        row_starts: int32 [requests + 1], cumulative numbers of tokens, from 0.
        room: the size of the result.

    Returns:
        int64 [room], -1 after the last request.
    """
    rows = torch.arange(room, dtype=row_starts.dtype, device=row_starts.device)
    requests = torch.searchsorted(row_starts, rows, right=True) - 1
    is_asked = requests < len(block_table)
    requests = requests.clamp(max=len(block_table) - 1)
    positions = first_positions[requests] + rows - row_starts[requests]
    pages = (positions // page_size).clamp(max=block_table.shape[1] - 1)
    slots = block_table[requests, pages].long() * page_size + positions % page_size
    return torch.where(is_asked, slots, -1)


def form_heads_from_pages(
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_rank: int,
    v_rank: int,
    key_a: torch.Tensor | SelectedRanks | None = None,
    value_a: torch.Tensor | SelectedRanks | None = None,
) -> None:
    """
    Forms K = (1 / R_K) A_K^T B_K and V = (1 / R_V) A_V^T B_V of the tokens in these slots, in float32.

    Args:
        slots: int64 [rows], as from [`slots_of_rows`]. Rows with a negative slot are not written.
        key, value: outputs [rows or more, h_kv, d], where the elements of a token are contiguous.
        key_a, value_a: constant factors [R_K, h_kv] and [R_V, h_kv]; or both as [`SelectedRanks`], for outputs
            [rows or more, G, d].

    Raises:
        ValueError: if the pages have another width.
    """
    num_heads = key.shape[1] if key_a is None else 0
    key_pages, value_pages, *layouts = _rows_of(key_pages, value_pages, k_rank, v_rank, num_heads, key.shape[2])
    form = _form_in_triton if _in_triton(key, key_pages) else _form_in_torch
    form(key_pages, value_pages, slots, key, value, key_a, value_a, *layouts)


@functools.cache
def _layouts(k_rank: int, v_rank: int, num_heads: int, head_dim: int) -> tuple[FactorLayout, FactorLayout]:
    return FactorLayout(k_rank, num_heads, head_dim), FactorLayout(v_rank, num_heads, head_dim)


def _as_float8(pages: torch.Tensor) -> torch.Tensor:
    return pages.view(torch.float8_e4m3fn) if pages.dtype == torch.uint8 else pages


def _rows_of(
    key_pages: torch.Tensor, value_pages: torch.Tensor, k_rank: int, v_rank: int, num_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, FactorLayout, FactorLayout]:
    """The pages, as float8 if they are bytes, and the layouts of their rows, whose width is checked. `num_heads` is 0 for constant A."""
    key_layout, value_layout = _layouts(k_rank, v_rank, num_heads, head_dim)
    if key_pages.shape[-1] != key_layout.width or value_pages.shape[-1] != value_layout.width:
        raise ValueError(
            f"`key_pages` and `value_pages` must have rows of {key_layout.width} and {value_layout.width} numbers, got sizes "
            f"{list(key_pages.shape)} and {list(value_pages.shape)}."
        )
    return _as_float8(key_pages), _as_float8(value_pages), key_layout, value_layout


def _in_triton(states: torch.Tensor, pages: torch.Tensor) -> bool:
    return triton is not None and states.dtype in DTYPES and has_kernels(states.device, pages.dtype)


@functools.cache
def has_kernels(device: torch.device, pages_dtype: torch.dtype) -> bool:
    """Whether kernels on pages run: on GPUs as `is_supported` says, and in Triton's interpreter."""
    if device.type != "cuda" or torch.version.cuda is None:
        return triton is not None and IS_INTERPRETED
    return triton is not None and is_supported(device, pages_dtype.itemsize == 1)


# In PyTorch.


def _store_in_torch(
    a_q, b_q, a_k, b_k, a_v, b_v, cos, sin, slots, key_pages, value_pages, transform, key_layout, value_layout
) -> torch.Tensor:  # fmt: skip
    dtype = b_q.dtype
    q_norm, k_norm, eps, activation, norms_key_heads = transform
    cos, sin = (torch.cat([x, x], dim=-1)[None].float() for x in (cos, sin))

    def head_factors(a: torch.Tensor | None) -> torch.Tensor | None:
        return None if a is None else activate_head_factors(a[None].float().transpose(-1, -2), activation)

    def normalize(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return x if weight is None else torch.nn.functional.rms_norm(x, x.shape[-1:], weight.float(), eps)

    query = b_q[None].float()
    if a_q is not None:
        query = form_heads(a_q.float() if a_q.dim() == 2 else head_factors(a_q), query)
    query = apply_rotary_pos_emb(normalize(query, q_norm), cos, sin)[0].to(dtype)

    a_k, a_v, b_k = head_factors(a_k), head_factors(a_v), b_k[None].float()
    if norms_key_heads:
        a_k, b_k = norm_key_heads(a_k, b_k, k_norm.float(), eps)
    else:
        b_k = normalize(b_k, k_norm)
    b_k = apply_rotary_pos_emb(b_k, cos, sin)
    if isinstance(slots, NewRows):
        tokens = torch.arange(len(query), device=query.device)
        offsets = tokens % slots.count + slots.first + (0 if slots.length is None else slots.length)
        is_stored = offsets < min(key_pages.shape[1], value_pages.shape[1])
        query[~is_stored] = math.nan
        indices = (tokens // slots.count)[is_stored], offsets[is_stored]
    else:
        is_stored = slots >= 0
        indices = slots[is_stored] // key_pages.shape[1], slots[is_stored] % key_pages.shape[1]
    for pages, layout, a, b in (
        (key_pages, key_layout, a_k, b_k), (value_pages, value_layout, a_v, b_v[None].float())
    ):  # fmt: skip
        rows = layout.pack(a, b)[0, 0, : len(is_stored)][is_stored]
        if pages.dtype == torch.float8_e4m3fn:  # as bytes: not every PyTorch indexes float8 itself
            limits = torch.finfo(pages.dtype)
            rows, pages = rows.clamp(limits.min, limits.max).to(pages.dtype).view(torch.uint8), pages.view(torch.uint8)
        pages[indices] = rows.to(pages.dtype)
    return query


def _form_in_torch(key_pages, value_pages, slots, key, value, key_a, value_a, key_layout, value_layout) -> None:
    rows = (slots >= 0).nonzero()[:, 0]
    slots = slots[rows]
    for pages, layout, constant_a, states in (
        (key_pages, key_layout, key_a, key), (value_pages, value_layout, value_a, value)
    ):  # fmt: skip
        a, b = layout.unpack(rows_at(pages, slots)[None, None].float())
        if isinstance(constant_a, SelectedRanks):
            heads = constant_a.weights.float()[:, None] * b[:, :, constant_a.ranks] / layout.rank
        else:
            heads = form_heads(a if constant_a is None else constant_a.float(), b)
        states[rows] = heads[0].to(states.dtype)


# In Triton.


def _page_units(itemsize: int, page_size: int, *strides: int) -> tuple[tuple[int, ...], dict]:
    """
    The strides of pages and rows, of keys and of values, in units, and the constants that tell the kernel. Pages without gaps
    between them are treated as pages of one row.
    """
    if page_size and strides[0] == page_size * strides[1] and strides[2] == page_size * strides[3]:
        page_size, strides = 1, (strides[1], 0, strides[3], 0)
    unit = stride_unit(itemsize, *strides)
    return tuple(stride // unit for stride in strides), {"PAGE_UNIT": unit, "PAGE_SIZE": page_size}


@functools.lru_cache(4096)
def _offsets_of_columns(columns: FactorColumns, itemsize: int, stride: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each factor the bytes before its first column, and the stride between tokens in elements; 0 for an A that is `None`."""
    starts = tuple(0 if part is None else itemsize * part[0] for part in columns)
    return starts, tuple(0 if part is None else stride for part in columns)


@functools.cache
def _paged_rows(layout: FactorLayout, num_heads: int, kind: str) -> "PagedRows":
    return PagedRows(layout.rank, num_heads, layout.head_dim, layout.padded_heads, layout.rotates, kind)


@functools.cache
def _store_sizes(num_heads: int, key_layout: FactorLayout, value_layout: FactorLayout) -> dict:
    block_d = power_of_2(key_layout.head_dim, 16)
    all_heads = power_of_2(max(num_heads, key_layout.padded_heads, value_layout.padded_heads))
    # Few blocks of heads, few of whose heads are none.
    widths = [n for n in (1, 2, 4, 8, 16, 32, 64) if n * block_d <= QUERY_TILE]
    block_h = min(reversed(widths), key=lambda n: -(-num_heads // n) * (n + 8))
    return {
        "BLOCK_H": block_h,
        "BLOCK_D": block_d,
        "BLOCK_R": max(
            1, min(power_of_2(max(key_layout.rank, value_layout.rank)), QUERY_TILE // max(block_d, all_heads))
        ),
        "ALL_HEADS": all_heads,
        "num_warps": max(1, min(8, block_h * block_d // (32 * QUERY_NUMBERS))),
    }


def _token_stride(name: str, x: torch.Tensor | None, is_constant: bool = False) -> int:
    """The stride between tokens of factors whose elements of one token must be contiguous; 0 if `x` is constant or `None`."""
    if x is None or is_constant:
        return 0
    strides = x.stride()
    if len(strides) != 3 or strides[1:] != (x.shape[2], 1):
        raise ValueError(
            f"`{name}` must be [tokens, n, m] with contiguous numbers of one token, got size {list(x.shape)} with strides "
            f"{list(strides)}."
        )
    return strides[0]


def _store_in_triton(
    a_q, b_q, a_k, b_k, a_v, b_v, cos, sin, slots, key_pages, value_pages, transform, key_layout, value_layout
) -> torch.Tensor:  # fmt: skip
    constant_a = a_q is not None and a_q.dim() == 2
    strides = (
        *(_token_stride("a_q", a_q, constant_a), _token_stride("b_q", b_q)),
        *(_token_stride("a_k", a_k), _token_stride("b_k", b_k)),
        *(_token_stride("a_v", a_v), _token_stride("b_v", b_v)),
    )
    factors = [
        *(b_q if a_q is None else a_q.contiguous() if constant_a else a_q, b_q),
        *(b_k if a_k is None else a_k, b_k),
        *(b_v if a_v is None else a_v, b_v),
    ]
    num_heads, q_rank = (b_q.shape[1], 0) if a_q is None else (a_q.shape[1], b_q.shape[1])
    query = b_q.new_empty((b_q.shape[0], num_heads, b_q.shape[2]))
    _launch_store(
        factors, None, strides, cos, sin, slots, key_pages, value_pages, query, q_rank, constant_a,
        transform, key_layout, value_layout,
    )  # fmt: skip
    return query


def _launch_store(
    factors, offsets, strides, cos, sin, slots, key_pages, value_pages, query, q_rank, constant_a,
    transform, key_layout, value_layout, key=None, value=None, first_formed=0,
) -> None:  # fmt: skip
    """`factors` are A and B of queries, keys and values, with their strides; `offsets` are where they start in one product."""
    num_tokens, num_heads, _ = query.shape
    if num_tokens == 0:
        return
    q_norm, k_norm, eps, activation, norms_key_heads = transform
    page_size, has_length, new_rows = key_pages.shape[1], False, (0, 1, 0)
    if isinstance(slots, NewRows):
        new_rows, page_size, has_length = (slots.first, slots.count, page_size), 0, slots.length is not None
        slots = slots.length if has_length else query
    kernel, programs, numbers = _store_kernel(
        num_heads, q_rank, constant_a, key_layout, value_layout, activation, 2 * cos.shape[1], q_norm is not None,
        norms_key_heads, has_length, key is not None, query.element_size(), strides, cos.stride(0), sin.stride(0),
        key_pages.element_size(), page_size, *key_pages.stride()[:2], *value_pages.stride()[:2],
    )  # fmt: skip
    no_norm = factors[1] if offsets is None else query
    q_norm, k_norm = no_norm if q_norm is None else q_norm, no_norm if k_norm is None else k_norm
    states = (query, query) if key is None else (key, value)
    tensors = [*factors, cos, sin, q_norm, k_norm, slots, key_pages, value_pages, query, *states]
    if offsets is not None:
        offsets = (*offsets, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    numbers = [*numbers, slots.shape[0], *new_rows, first_formed, float(eps)]
    kernel((num_tokens * programs, 1, 1), tensors, numbers, offsets)


@functools.lru_cache(4096)
def _store_kernel(
    num_heads, q_rank, constant_a, key_layout, value_layout, activation, rotary_dim, has_norm, norms_key_heads, has_length, forms,
    itemsize, strides, cos_stride, sin_stride, page_itemsize, page_size, *page_strides,
) -> tuple[KeptKernel, int, tuple[int, ...]]:  # fmt: skip
    """The kernel with its constants, the programs per token, and all strides in their units."""
    sizes = _store_sizes(num_heads, key_layout, value_layout)
    head_blocks = -(-num_heads // sizes["BLOCK_H"])
    key_blocks = -(-key_layout.padded_heads // sizes["BLOCK_H"]) if norms_key_heads else 0
    formed_blocks = 2 * -(-key_layout.num_heads // sizes["BLOCK_H"]) if forms else 0
    page_strides, page_constants = _page_units(page_itemsize, page_size, *page_strides)
    b_unit = stride_unit(itemsize, *strides[1::2])
    kind = "constant" if key_layout.num_heads == 0 else "cached"
    kernel = keep(
        store_factors_kernel,
        KEYS=_paged_rows(key_layout, key_layout.num_heads, kind),
        VALUES=_paged_rows(value_layout, value_layout.num_heads, kind),
        NUM_HEADS=num_heads,
        Q_RANK=q_rank,
        CONSTANT_A=constant_a,
        ACTIVATION=activation,
        ROTATION=Rotation(rotary_dim, has_norm, norms_key_heads),
        B_UNIT=b_unit,
        HAS_LENGTH=has_length,
        FORMS=forms,
        **page_constants,
        **sizes,
        **LAUNCH_OPTIONS,
    )
    units = [stride // b_unit if i % 2 else stride for i, stride in enumerate(strides)]
    return kernel, head_blocks + 2 + key_blocks + formed_blocks, (*units, cos_stride, sin_stride, *page_strides)


def _form_in_triton(key_pages, value_pages, slots, key, value, key_a, value_a, key_layout, value_layout) -> None:
    num_rows, num_heads, head_dim = len(slots), key.shape[1], key.shape[2]
    if num_rows == 0:
        return
    weights, ranks, kinds = [], [], []
    for pages, a in ((key_pages, key_a), (value_pages, value_a)):
        is_selected = isinstance(a, SelectedRanks)
        weights.append(pages if a is None else a.weights if is_selected else a.contiguous())
        ranks.append(a.ranks if is_selected else pages)
        kinds.append("cached" if a is None else "selected" if is_selected else "constant")
    kernel, pairs, page_strides = _form_kernel(
        num_heads, head_dim, key_layout, value_layout, *kinds, _token_stride("key", key), _token_stride("value", value),
        key_pages.element_size(), key_pages.shape[1], *key_pages.stride()[:2], *value_pages.stride()[:2],
    )  # fmt: skip
    tensors = [key_pages, value_pages, *weights, *ranks, slots, key, value]
    kernel((-(-num_rows * num_heads // pairs), 2, 1), tensors, [*page_strides, num_rows])


@functools.lru_cache(4096)
def _form_kernel(
    num_heads, head_dim, key_layout, value_layout, key_kind, value_kind, key_stride, value_stride,
    page_itemsize, page_size, *page_strides,
) -> tuple[KeptKernel, int, tuple[int, ...]]:  # fmt: skip
    """The kernel with its constants, the pairs of a token and a head per program, and the strides of pages in their unit."""
    page_strides, page_constants = _page_units(page_itemsize, page_size, *page_strides)
    block_d = power_of_2(head_dim, 16)
    block_m = max(1, PAIRS_TILE // block_d)
    kernel = keep(
        form_heads_kernel,
        KEYS=_paged_rows(key_layout, num_heads, key_kind),
        VALUES=_paged_rows(value_layout, num_heads, value_kind),
        KEY_STRIDE=key_stride,
        VALUE_STRIDE=value_stride,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=PAIRS_TILE // (32 * PAIRS_NUMBERS),
        **page_constants,
        **LAUNCH_OPTIONS,
    )
    return kernel, block_m, page_strides
