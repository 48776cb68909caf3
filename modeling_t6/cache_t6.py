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
"""The cache of a T6 model: rows of low-rank factors in place of keys and values (paper, section 3.2)"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from .quantized_rows_t6 import QuantizedLayout, rotate_features


# Transformers 5.24 renamed `past_key_values` to `cache` everywhere. The code here says `cache`; this is the name in the
# installed Transformers.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def rename_past_key_values(function: Callable) -> Callable:
    """A decorator that accepts `past_key_values` for `cache`, with a warning where Transformers has renamed it."""
    if CACHE_NAME == "cache":
        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(function)

    @functools.wraps(function)
    def renamed(*args, kwargs: dict | None = None, **others):
        # Pipeline parallelism fills in defaults, and passes what the signature does not name as one argument, `kwargs`.
        others |= kwargs or {}
        cache = others.pop("past_key_values", None)
        if cache is not None and others.get("cache") is None:
            others["cache"] = cache
        return function(*args, **others)

    return renamed


# The storage formats of rows other than the dtype of the model, and the dtypes of their tensors: `QuantizedLayout` packs rows
# of 4 bits into bytes.
CACHE_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "int4": torch.uint8}


def stored_dtype_of(dtype: torch.dtype | str | None, config: PreTrainedConfig, argument: str) -> torch.dtype | None:
    """
    The dtype of the tensors that hold rows stored as `dtype`, one of `CACHE_DTYPES`; `None` for the dtype of the model.

    Raises:
        ValueError: if `argument`, which has this value, is not one of them, or a field of the configuration excludes 4 bits.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in CACHE_DTYPES:
        raise ValueError(f"`{argument}` must be None, for that of the model, int4 or float8_e4m3fn, got {dtype}.")
    if name == "int4":
        fields = {field: getattr(config, field) for field in ("noncontextual_b", "shared_b", "c_factor_dim")}
        for field, value in fields.items():
            if value:
                raise ValueError(
                    f"`{argument}`='int4' is for models whose cached B factors are those that K and V are made of: not with "
                    f"`{field}`={value}."
                )
        if config.head_dim % 2:
            raise ValueError(f"`{argument}`='int4' needs an even `head_dim`, got {config.head_dim}.")
    return CACHE_DTYPES[name]


def dtype_name(cache: Cache) -> str | None:
    """The name in `CACHE_DTYPES` of the format of a cache's rows; `None` for the dtype of the model."""
    stored = [getattr(layer, "stored_dtype", None) for layer in getattr(cache, "layers", ())]
    return next((name for name, dtype in CACHE_DTYPES.items() if dtype in stored), None)


class FactorLayout:
    """
    The layout of one token's factors, A [rank, num_heads] and B [rank, head_dim], in one cache row of `width` elements: the
    `rank` rows of B, then the `rank` rows of A.

    Each row of A is padded to a multiple of 8 elements, so that in half precision it starts on 16 bytes: kernels lose a
    quarter to half of their speed otherwise. If that is an odd multiple (24, 40, ...), every other row of A would start in
    the middle of a 32-byte sector: these rows are rotated, and begin with their last 8 elements.

    Factors that are not cached have size 0: with constant A factors `num_heads` is 0 and a row holds B alone, with constant
    or shared B factors `head_dim` is 0 and it holds A alone. Without padding, `width` is `rank * (num_heads + head_dim)`.
    """

    def __init__(self, rank: int, num_heads: int, head_dim: int):
        self.rank, self.num_heads, self.head_dim = rank, num_heads, head_dim
        # The kernels do not read rows without B, or with a B of 12 features, say: only the whole row is aligned.
        unit = 8 if head_dim > 0 and head_dim % 8 == 0 else 1
        self.padded_heads = next(
            n for n in range(num_heads, num_heads + 8) if n % unit == 0 and rank * (n + head_dim) % 8 == 0
        )
        self.width = rank * (self.padded_heads + head_dim)
        self.rotates = unit == 8 and rank > 1 and self.padded_heads % 16 == 8 and self.padded_heads > 8
        self.quantized = None  # the layout of the same factors in 4 bits
        if head_dim > 0 and head_dim % 2 == 0:
            self.quantized = QuantizedLayout(rank, num_heads, self.padded_heads, head_dim)

    def pack(self, a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
        """
        Packs A [batch, seq, rank, num_heads] and B [batch, seq, rank, head_dim] into rows [batch, 1, seq, width]. A factor of
        size 0 is ignored.
        """
        if self.num_heads == 0:
            a = b[..., :0]
        if self.head_dim == 0:
            b = a[..., :0]
        if self.padded_heads > self.num_heads:  # `pad` copies even if there is nothing to pad
            a = torch.nn.functional.pad(a, (0, self.padded_heads - self.num_heads))
        parts = [b.flatten(-2)]
        for r, row in enumerate(a.unbind(-2) if self.rotates else [a.flatten(-2)]):
            parts += [row[..., -8:], row[..., :-8]] if r % 2 else [row]
        return torch.cat(parts, dim=-1).unsqueeze(1)

    def unpack(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Unpacks rows [batch, 1, seq, width] into A [batch, seq, rank, num_heads] and B [batch, seq, rank, head_dim]: views,
        except for A in rotated rows.
        """
        sizes = [self.rank * self.head_dim, self.rank * self.padded_heads]
        b, a = rows.split_with_sizes(sizes, dim=-1)
        shape = rows.shape[0], rows.shape[2], self.rank
        a, b = a.view(*shape, self.padded_heads), b.view(*shape, self.head_dim)
        if self.rotates:
            a = torch.stack([row.roll(-8, -1) if r % 2 else row for r, row in enumerate(a.unbind(-2))], dim=-2)
        if self.padded_heads > self.num_heads:
            a = a[..., : self.num_heads]
        return a, b

    def read(self, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """[`unpack`] of rows as a cache stores them, in any dtype or 4 bits, to A and B in `dtype`."""
        if rows.dtype != torch.uint8:
            return self.unpack(rows.to(dtype))
        a, b = self.quantized.unpack(rows, dtype)
        return a, rotate_features(b)


def factor_layouts(config: PreTrainedConfig, layer_idx: int) -> tuple[FactorLayout, FactorLayout]:
    """The layouts of the key rows and of the value rows of one layer; with tensor parallelism, for the heads of this process."""
    k_rank, v_rank = config.ranks(layer_idx)
    num_heads = config.num_local_key_value_heads
    if config.noncontextual_a:
        num_heads = 0
    k_dim = 0 if config.noncontextual_b else config.b_dim + (config.c_factor_dim or 0)
    v_dim = 0 if config.shared_b else k_dim
    return FactorLayout(k_rank, num_heads, k_dim), FactorLayout(v_rank, num_heads, v_dim)


def quantization_group_size(config: PreTrainedConfig) -> int:
    """
    The `q_group_size` for a `QuantizedCache` of this model: the multiple of 8 nearest to Transformers' default of 64 that
    divides the width of every row. Quantisation fails where it does not, as 64 would for most models.
    """
    layouts = (layout for layer_idx in range(config.num_hidden_layers) for layout in factor_layouts(config, layer_idx))
    common_width = math.gcd(*(layout.width for layout in layouts))
    divisors = [size for size in range(8, common_width + 1, 8) if common_width % size == 0]
    return min(divisors, key=lambda size: abs(size - 64))


def validate_rows(
    rows: tuple[torch.Tensor, torch.Tensor], layouts: tuple[FactorLayout, FactorLayout], layer_idx: int | None = None
) -> None:
    """
    Refuses keys and values of a cache layer that are not rows of factors of these layouts, such as the heads
    [batch, num_heads, seq, head_dim] that tools for other models put into a cache.

    Raises:
        RuntimeError: with the expected and the actual sizes.
    """
    (keys, values), (key_layout, value_layout) = rows, layouts  # without a loop: called in each layer of each step
    if keys.dtype == torch.uint8:
        layouts = key_layout, value_layout = key_layout.quantized or key_layout, value_layout.quantized or value_layout
    if keys.shape[1] == values.shape[1] == 1:
        if keys.shape[-1] == key_layout.width and values.shape[-1] == value_layout.width:
            return
    widths, sizes = [layout.width for layout in layouts], [list(x.shape) for x in rows]
    raise RuntimeError(
        "The cache of a T6 model holds factors, not heads: use prompt tuning or LoRA in place of prefix tuning, and a cache "
        "that this model has filled, from `T6Cache(config=model.config)` on. Keys and values must be rows "
        f"[batch, 1, seq, {widths[0]}] and [batch, 1, seq, {widths[1]}]"
        f"{'' if layer_idx is None else f' in layer {layer_idx}'}, got sizes {sizes[0]} and {sizes[1]}."
    )


class FactorViewsMixin:
    """
    A cache layer that stores rows of `layouts`, in `stored_dtype` (`None`: as they are given), and shows their factors as
    `a_k`, `b_k`, `a_v` and `b_v`: views, or copies in float32 if rows have 4 bits.
    """

    layouts: tuple[FactorLayout, FactorLayout] | None = None
    stored_dtype: torch.dtype | None = None

    def as_stored(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        """Converts rows of keys (`index` 0) or values (1) to `stored_dtype`; float8 saturates instead of becoming NaN."""
        if self.stored_dtype is None or rows.dtype == self.stored_dtype:
            return rows
        if self.stored_dtype == torch.uint8:
            if torch.is_grad_enabled() and rows.requires_grad:
                raise RuntimeError(
                    "Rows of 4 bits have no gradient: call the model under `torch.no_grad()`, or with a cache of another dtype."
                )
            layout = self.layouts[index]
            return layout.quantized.pack(*layout.unpack(rows))
        limits = torch.finfo(self.stored_dtype)
        return rows.clamp(limits.min, limits.max).to(self.stored_dtype)

    def _rows_to_store(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.layouts is not None:
            validate_rows((key_states, value_states), self.layouts)
        return self.as_stored(key_states, 0), self.as_stored(value_states, 1)

    def stored_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`keys` and `values` in `stored_dtype`: rows that were assigned to them from outside may have another."""
        return self.as_stored(self.keys, 0), self.as_stored(self.values, 1)

    def _map_storage(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces the tensors that hold the rows by what `function` returns for them."""
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)

    def offload(self):
        # Waits for the copy, unlike Transformers' layers: the next prefetch reads it from another stream.
        self._map_storage(lambda tensor: tensor.to("cpu"))

    def prefetch(self):
        if self.is_initialized and self.keys.device != self.device:
            self._map_storage(self._to_device)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.device, non_blocking=True)
        if tensor.is_cuda:  # allocated on the prefetch stream: not to be freed before the default stream has used it
            tensor.record_stream(torch.cuda.default_stream(tensor.device))
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the factors held: (R_K + R_V)(h_kv + d) elements per token, less what a variant does not cache, plus padding."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def _factors(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.layouts is None or not self.is_initialized:
            raise ValueError("Factor views need a cache built as `T6Cache(config=...)` that holds at least one token.")
        layout, rows = self.layouts[index], self.stored_rows()[index]
        return layout.read(rows, torch.float32) if rows.dtype == torch.uint8 else layout.unpack(rows)

    def _head_factors(self, index: int) -> torch.Tensor:
        a = self._factors(index)[0]
        if a.shape[-1] == 0:
            raise ValueError("The A factors of this model are constants, parameters of its layers: none are cached.")
        return a

    def _feature_factors(self, index: int) -> torch.Tensor:
        b = self._factors(index)[1]
        if b.shape[-1] == 0:
            raise ValueError("The B factors of this model are constants, parameters of its layers: none are cached.")
        return b

    @property
    def a_k(self) -> torch.Tensor:
        """View [batch, seq, R_K, h] of the keys' head factors."""
        return self._head_factors(0)

    @property
    def b_k(self) -> torch.Tensor:
        """
        View [batch, seq, R_K, d] of the keys' feature factors, already rotated unless they are shared with the values.
        Third-order factors are b and c concatenated, [batch, seq, R_K, d_b + d_c].
        """
        return self._feature_factors(0)

    @property
    def a_v(self) -> torch.Tensor:
        """View [batch, seq, R_V, h] of the values' head factors."""
        return self._head_factors(1)

    @property
    def b_v(self) -> torch.Tensor:
        """View [batch, seq, R_V, d] of the values' feature factors, or [batch, seq, R_V, d_b + d_c]."""
        is_shared = self.layouts is not None and self.layouts[1].head_dim == 0
        return self._feature_factors(0 if is_shared else 1)


class ReservedRows(NamedTuple):
    """
    Rows that a cache layer has appended uninitialised, for the caller to write.

    Attributes:
        key_storage, value_storage: [batch, 1, capacity, R_K (h + d)] and [batch, 1, capacity, R_V (h + d)].
        keys, values: what `update` returns.
        first: the index of the first of them in the storage of each sequence, relative to `length` if that is given.
        length: int64 [1] on the device, or `None`.
    """

    key_storage: torch.Tensor
    value_storage: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    first: int
    length: torch.Tensor | None = None


class T6DynamicLayer(FactorViewsMixin, DynamicLayer):
    """
    Factors of one layer: `keys` [batch, 1, seq, R_K (h + d)] and `values` [batch, 1, seq, R_V (h + d)] are views of
    storage that doubles when it is full, so that appending a token copies no earlier row. Other tensors may be assigned to
    them, as packages that prune caches do: the storage is then allocated anew, with these rows.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._storage: tuple[torch.Tensor, torch.Tensor] | None = None
        # What `keys` and `values` are unless other tensors have been assigned to them.
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None

    def __copy__(self) -> "T6DynamicLayer":
        """The copy shares the rows but not the storage: only one of the two may write behind the rows."""
        other = type(self).__new__(type(self))
        other.__dict__ |= self.__dict__ | {"_storage": None, "_views": None}
        return other

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def _set_storage(self, storage: tuple[torch.Tensor, torch.Tensor], lengths: tuple[int, int]) -> None:
        self._storage = storage
        self._views = storage[0][:, :, : lengths[0]], storage[1][:, :, : lengths[1]]
        self.keys, self.values = self._views

    def _storage_of_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The storage of which `keys` and `values` are views; `keys` and `values` themselves, which have no spare capacity, if they
        were assigned from outside, or were made in `torch.inference_mode` and cannot be written to outside it.
        """
        rows = self.keys, self.values
        if self._storage is None or rows[0].is_inference() and not torch.is_inference_mode_enabled():
            return rows
        for tensor, view, storage in zip(rows, self._views, self._storage):
            if tensor is not view or tensor.data_ptr() != storage.data_ptr():  # `keys.data` may be assigned, too
                return rows
        return self._storage

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Appends rows `key_states` [batch, 1, new, R_K (h + d)] and `value_states` [batch, 1, new, R_V (h + d)].

        Returns:
            The rows of all the tokens seen, as views of the storage.
        """
        new = self._rows_to_store(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*new)

        needs_grad = torch.is_grad_enabled() and (new[0].requires_grad or self.keys.requires_grad)
        if needs_grad or torch.compiler.is_compiling():
            # Autograd may need the rows that earlier steps used: nothing is written in place. Nor under torch.compile, which
            # would compile a graph for each size of the storage.
            self.keys, self.values = (torch.cat(both, dim=-2) for both in zip(self.stored_rows(), new))
            self._storage = self._views = None
            return self.keys, self.values

        key_start, value_start = self.keys.shape[-2], self.values.shape[-2]
        self._extend([(rows.shape[0], rows.shape[-2], rows.dtype, rows.device) for rows in new])
        self.keys[:, :, key_start:], self.values[:, :, value_start:] = new
        return self.keys, self.values

    def reserve(self, batch_size: int, count: int, dtype: torch.dtype) -> ReservedRows | None:
        """
        Like `update` with `count` rows of `dtype` per sequence, except that the caller writes them. Changes nothing and returns
        `None` where rows cannot be written in place.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        first = self.keys.shape[-2]
        if self.values.shape[-2] != first:
            return None
        dtype = dtype if self.stored_dtype is None else self.stored_dtype
        self._extend([(batch_size, count, dtype, self.keys.device)] * 2)
        return ReservedRows(*self._storage, self.keys, self.values, first)

    def _extend(self, sizes: Sequence[tuple[int, int, torch.dtype, torch.device]]) -> None:
        """
        Lengthens `keys` and `values` by uninitialised rows, and reallocates the storage if it is full. `sizes` are the batch
        size, number, dtype and device of the new rows of keys, and of those of values.
        """
        rows = self.stored_rows()
        storage = [self._with_capacity(*x, *size) for *x, size in zip(self._storage_of_rows(), rows, sizes)]
        self._set_storage(tuple(storage), tuple(tensor.shape[-2] + size[1] for tensor, size in zip(rows, sizes)))

    def _with_capacity(
        self,
        storage: torch.Tensor,
        rows: torch.Tensor,
        batch_size: int,
        count: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """`storage`, which begins with `rows`, or a copy of them in larger storage if `count` more do not fit."""
        if batch_size != rows.shape[0]:  # rows of one sequence would be broadcast to all
            raise RuntimeError(f"The cache holds a batch of {rows.shape[0]} sequences, got rows of size {batch_size}.")
        start, end = rows.shape[-2], rows.shape[-2] + count
        if self.stored_dtype is None and rows.dtype != dtype:
            dtype = torch.promote_types(rows.dtype, dtype)
        if end > storage.shape[-2] or storage.dtype != dtype:
            # A prompt gets exactly the storage it needs; from then on the storage doubles.
            capacity = end if start == 0 else max(end, 2 * start)
            storage = rows.new_empty((*rows.shape[:2], capacity, rows.shape[-1]), dtype=dtype, device=device)
            storage[:, :, :start] = rows
        return storage

    def reset(self) -> None:
        """Drops the factors; the next `update` starts an empty cache."""
        self.keys = self.values = self._storage = self._views = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """As in `DynamicLayer`. The rows that are removed are overwritten by the next ones."""
        if self.is_initialized:
            storage = self._storage_of_rows()
            super().crop(tokens_to_remove)
            if storage is self._storage:
                self._set_storage(storage, (self.keys.shape[-2], self.values.shape[-2]))

    def _map_storage(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            storage, lengths = self._storage_of_rows(), (self.keys.shape[-2], self.values.shape[-2])
            mapped = tuple(function(tensor) for tensor in storage)
            if storage is self._storage:
                self._set_storage(mapped, lengths)
            else:
                self.keys, self.values = mapped

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_storage(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_storage(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_storage(lambda tensor: tensor[indices, ...])


class T6DynamicSlidingWindowLayer(FactorViewsMixin, DynamicSlidingWindowLayer):
    """
    Factors of one layer with a sliding window: of the last `sliding_window - 1` tokens, or, with `record_past`, of all tokens
    until the next crop. Pruning, by assigning other tensors to `keys` and `values`, may leave fewer.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Appends rows `key_states` [batch, 1, new, R_K (h + d)] and `value_states` [batch, 1, new, R_V (h + d)].

        Returns:
            The rows that the new tokens see, at most `sliding_window - 1 + new`.
        """
        new = self._rows_to_store(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*new)
        self.cumulative_length += new[0].shape[-2]
        rows = [torch.cat(both, dim=-2) for both in zip(self.stored_rows(), new)]
        past = self.sliding_window - 1
        self.keys, self.values = rows if self.record_past else (_last_rows(tensor, past) for tensor in rows)
        return tuple(_last_rows(tensor, past + new[0].shape[-2]) for tensor in rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of rows that `update` will return, and the position of the first."""
        held = self.keys.shape[-2] if self.is_initialized else 0
        past = min(held, self.sliding_window - 1)
        return past + query_length, self.cumulative_length - past

    def crop(self, tokens_to_remove: int) -> None:
        """As in `DynamicSlidingWindowLayer`; an empty layer, as those after an early exit are, stays empty."""
        if self.is_initialized:
            super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Drops the factors; the next `update` starts an empty cache."""
        self.keys = self.values = None
        self.is_initialized, self.cumulative_length = False, 0


class StaticRowsMixin(FactorViewsMixin):
    """A static layer whose rows are not stored in the model's dtype: `keys` and `values` are their bytes, uint8."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(*self._bytes(key_states, value_states))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in Transformers' layers: writes rows in place, and returns the whole storage, in `stored_dtype`."""
        rows = super().update(*self._bytes(key_states, value_states), *args, **kwargs)
        return tuple(tensor.view(self.stored_dtype) for tensor in rows)

    def _bytes(self, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Not every version of PyTorch implements `index_copy_` for float8.
        is_stored = rows[0].dtype == torch.uint8
        return rows if is_stored else tuple(tensor.view(torch.uint8) for tensor in self._rows_to_store(*rows))

    def stored_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole storage, in `stored_dtype`."""
        return self.keys.view(self.stored_dtype), self.values.view(self.stored_dtype)


class T6StaticLayer(StaticRowsMixin, StaticLayer):
    """A `StaticLayer` of rows in `stored_dtype`."""


class T6StaticSlidingWindowLayer(StaticRowsMixin, StaticSlidingWindowLayer):
    """A `StaticSlidingWindowLayer` of rows in `stored_dtype`."""


def _last_rows(rows: torch.Tensor, number: int) -> torch.Tensor:
    return rows[:, :, max(rows.shape[-2] - number, 0) :]


class T6Cache(DynamicCache):
    """
    The default cache of a T6 model: a `DynamicCache` of [`T6DynamicLayer`]s and, where the model has a window,
    [`T6DynamicSlidingWindowLayer`]s. It takes the arguments of `DynamicCache`; with `config`, its layers show their factors as
    `cache.layers[i].a_k`, `.b_k`, `.a_v` and `.b_v`.

    With `dtype="float8_e4m3fn"` (or `torch.float8_e4m3fn`) it takes half the memory: factors have 3 mantissa bits, and saturate
    at 448. With `dtype="int4"` it takes 31% to 42%: B in 4 bits, with a scale and a zero point for each 32 features, and A in 8
    (see `QuantizedLayout`). Both need `config`, whose `cache_dtype` is the default. On random factors they change the output
    of attention by 6% to 8% and by 12% to 19% of its norm. FlashTPA reads both without a conversion. Rows of 4 bits have no
    gradient.

    Transformers' own `DynamicCache`, `StaticCache` and `QuantizedCache` hold the same rows for a T6 model.
    """

    def __init__(
        self,
        ddp_cache_data=None,
        config: PreTrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        **kwargs,
    ):
        if config is not None and "sliding_attention" in (config.layer_types or ()) and config.sliding_window is None:
            raise ValueError("`layer_types` has 'sliding_attention', which needs a `sliding_window`, got None.")
        super().__init__(config=config, **kwargs)
        if dtype is not None and config is None:
            raise ValueError("`T6Cache(dtype=...)` needs `config`.")
        text_config = None if config is None else config.get_text_config(decoder=True)
        argument = "dtype"
        if dtype is None:
            dtype, argument = getattr(text_config, "cache_dtype", None), "cache_dtype"
        stored_dtype = None if dtype is None else stored_dtype_of(dtype, text_config, argument)
        self.layers = [
            T6DynamicSlidingWindowLayer(layer.sliding_window) if layer.is_sliding else T6DynamicLayer()
            for layer in self.layers
        ]
        for layer_idx, layer in enumerate(self.layers):
            layer.layouts = factor_layouts(text_config, layer_idx)
            layer.stored_dtype = stored_dtype
        if self.layer_class_to_replicate is not None:
            self.layer_class_to_replicate = T6DynamicLayer
        for layer_idx, rows in enumerate(ddp_cache_data or ()):
            self.update(rows[0], rows[1], layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """
        Tokens held by a layer, or by the first non-empty one after it: with pipeline parallelism, a process fills only the
        layers of its stage.
        """
        lengths = (layer.get_seq_length() for layer in self.layers[layer_idx:])
        return next((length for length in lengths if length > 0), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors held by all layers."""
        return cache_nbytes(self)


def store_static_rows(cache: StaticCache, config: PreTrainedConfig, stored_dtype: torch.dtype) -> None:
    """Replaces the layers of an empty `StaticCache` by layers that store rows in `stored_dtype`."""
    for layer_idx, layer in enumerate(cache.layers):
        cls = T6StaticSlidingWindowLayer if layer.is_sliding else T6StaticLayer
        cache.layers[layer_idx] = stored = cls.__new__(cls)
        stored.__dict__ |= layer.__dict__
        stored.layouts, stored.stored_dtype = factor_layouts(config, layer_idx), stored_dtype


def allocate_static_cache(
    cache: StaticCache,
    config: PreTrainedConfig,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    layers: Sequence[int],
) -> None:
    """
    Allocates those `layers` of a T6 model's `StaticCache` that are not yet allocated, as their first `update` would. It
    replaces Transformers' `early_initialization`, which would allocate heads, of one shape for keys and values.
    """
    with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside it
        for layer_idx in layers:
            layer = cache.layers[layer_idx]
            if not layer.is_initialized:
                layer.cumulative_length = layer.cumulative_length.clone()
                shapes = [(batch_size, 1, 0, layout.width) for layout in factor_layouts(config, layer_idx)]
                layer.lazy_initialization(*(torch.empty(shape, dtype=dtype, device=device) for shape in shapes))


def reserve_rows(
    cache: Cache, layer_idx: int, batch_size: int, count: int, dtype: torch.dtype, device: torch.device
) -> ReservedRows | None:
    """
    Like `cache.update` with `count` rows of `dtype` on `device` per sequence, except that the caller writes them in place.
    Changes nothing and returns `None` for caches and layers with an `update` of their own, among them all sliding, quantised
    and offloaded ones.
    """
    if type(cache).update is not Cache.update or cache.offloading or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    if not layer.is_initialized or layer.keys.device != device:
        return None
    stored_dtype = getattr(layer, "stored_dtype", None)
    if stored_dtype == torch.uint8:  # the kernel writes no rows of 4 bits
        return None
    if type(layer).update is T6DynamicLayer.update:
        return layer.reserve(batch_size, count, dtype)
    if type(layer) is T6StaticLayer:
        rows, dtype = layer.stored_rows(), stored_dtype
    elif type(layer).update is StaticLayer.update:
        rows = layer.keys, layer.values
    else:
        return None
    if (len(rows[0]), rows[0].dtype) != (batch_size, dtype):
        return None
    layer.cumulative_length.add_(count)
    return ReservedRows(layer.keys, layer.values, *rows, -count, layer.cumulative_length.view(1))


def cached_lengths(cache: Cache, layer_idx: int) -> torch.Tensor | None:
    """The number of valid rows of a static layer, int [1] on the device; `None` for other layers, whose rows are all valid."""
    layer = cache.layers[layer_idx] if isinstance(cache, Cache) else None
    is_static = isinstance(layer, StaticLayer) and not layer.is_sliding
    return layer.cumulative_length.view(1) if is_static else None


def cache_nbytes(cache: Cache) -> int:
    """Bytes that the layers of any `Cache` hold; for a static cache, those allocated."""
    total = 0
    for layer in cache.layers:
        for name in ("keys", "values", "_quantized_keys", "_quantized_values"):
            total += _nbytes(getattr(layer, name, None))
    return total


def _nbytes(value) -> int:
    if value is None:
        return 0
    if isinstance(value, (tuple, list)):  # HQQ: (quantised, {scale, zero, ...})
        return sum(_nbytes(item) for item in value)
    if isinstance(value, dict):
        return sum(_nbytes(item) for item in value.values())
    if not isinstance(value, torch.Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):  # quanto: a tensor of packed integers, scales and shifts
        return sum(_nbytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes


__all__ = ["T6Cache"]
