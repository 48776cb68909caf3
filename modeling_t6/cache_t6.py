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


# Transformers 5.24 renamed `past_key_values` to `cache` everywhere. The code here says `cache`; this is what the
# installed Transformers says.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def rename_past_key_values(function: Callable) -> Callable:
    """Takes the older name of `cache` too: where it is the current one, without a warning."""
    if CACHE_NAME == "cache":
        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(function)

    @functools.wraps(function)
    def renamed(*args, kwargs: dict | None = None, **others):
        # A pipeline fills in defaults, and passes what the signature does not name as one argument, `kwargs`.
        others |= kwargs or {}
        cache = others.pop("past_key_values", None)
        if cache is not None and others.get("cache") is None:
            others["cache"] = cache
        return function(*args, **others)

    return renamed


# What rows may be stored in beside the dtype of the model, and the dtype of the tensors that hold them: rows of 4 bits, which
# `QuantizedLayout` packs, are bytes.
CACHE_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "int4": torch.uint8}


def stored_dtype_of(dtype: torch.dtype | str | None, config: PreTrainedConfig, argument: str) -> torch.dtype | None:
    """
    The dtype of the tensors that hold rows of `dtype`, one of `CACHE_DTYPES` or `None` for that of the model.

    Raises:
        ValueError: naming the `argument`, or the field of the configuration that rows of 4 bits do not go with.
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
    """Which of `CACHE_DTYPES` the rows of a cache have, or `None` for that of the model."""
    stored = [getattr(layer, "stored_dtype", None) for layer in getattr(cache, "layers", ())]
    return next((name for name, dtype in CACHE_DTYPES.items() if dtype in stored), None)


class FactorLayout:
    """
    How the factors of one token, A [rank, num_heads] and B [rank, head_dim], lie side by side in one row:
    the `rank` rows of B, then the `rank` rows of A.

    A's rows are padded by at most 7 numbers each, to a multiple of 8, so that in half precision each starts on 16 bytes:
    kernels lose a quarter to half of their speed on rows that do not. After an odd multiple (24, 40, ...) every other row
    would start in the middle of the 32 bytes that memory is read by: these rows begin with their last 8 numbers.
    A row has `width` numbers, `rank * (num_heads + head_dim)` where `num_heads` is such a multiple. Factors that need no
    caching have size 0: with constant A factors `num_heads` is 0 and a row holds B alone, with constant or shared B
    factors `head_dim` is 0 and it holds A alone.
    """

    def __init__(self, rank: int, num_heads: int, head_dim: int):
        self.rank, self.num_heads, self.head_dim = rank, num_heads, head_dim
        # Rows of A alone, or beside heads of 12 features, say, are aligned as a whole: the kernels do not read them.
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
        A [batch, seq, rank, num_heads] and B [batch, seq, rank, head_dim] as rows [batch, 1, seq, width]. The factor
        whose size is 0 is not looked at.
        """
        if self.num_heads == 0:
            a = b[..., :0]
        if self.head_dim == 0:
            b = a[..., :0]
        if self.padded_heads > self.num_heads:  # no padding would copy it
            a = torch.nn.functional.pad(a, (0, self.padded_heads - self.num_heads))
        parts = [b.flatten(-2)]
        for r, row in enumerate(a.unbind(-2) if self.rotates else [a.flatten(-2)]):
            parts += [row[..., -8:], row[..., :-8]] if r % 2 else [row]
        return torch.cat(parts, dim=-1).unsqueeze(1)

    def unpack(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        A [batch, seq, rank, num_heads] and B [batch, seq, rank, head_dim] of rows [batch, 1, seq, width]: views, but for
        an A of rotated rows.
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
        """A and B in `dtype` of rows as a cache stores them, in any dtype or 4 bits."""
        if rows.dtype != torch.uint8:
            return self.unpack(rows.to(dtype))
        a, b = self.quantized.unpack(rows, dtype)
        return a, rotate_features(b)


def factor_layouts(config: PreTrainedConfig, layer_idx: int) -> tuple[FactorLayout, FactorLayout]:
    """The layouts of the key rows and of the value rows of one layer: with tensor parallelism, of this process's heads."""
    k_rank, v_rank = config.ranks(layer_idx)
    num_heads = config.num_local_key_value_heads
    if config.noncontextual_a:
        num_heads = 0
    k_dim = 0 if config.noncontextual_b else config.b_dim + (config.c_factor_dim or 0)
    v_dim = 0 if config.shared_b else k_dim
    return FactorLayout(k_rank, num_heads, k_dim), FactorLayout(v_rank, num_heads, v_dim)


def quantization_group_size(config: PreTrainedConfig) -> int:
    """
    The `q_group_size` for a `QuantizedCache` of this model: the multiple of 8 nearest to Transformers' default of 64
    that divides every row of factors (64 itself divides the rows of few models, and then quantising fails).
    """
    layouts = (layout for layer_idx in range(config.num_hidden_layers) for layout in factor_layouts(config, layer_idx))
    common_width = math.gcd(*(layout.width for layout in layouts))
    divisors = [size for size in range(8, common_width + 1, 8) if common_width % size == 0]
    return min(divisors, key=lambda size: abs(size - 64))


def refuse_other_rows(
    rows: tuple[torch.Tensor, torch.Tensor], layouts: tuple[FactorLayout, FactorLayout], layer_idx: int | None = None
) -> None:
    """
    Raises `RuntimeError` if the keys and values of a cache layer are not rows of factors of these layouts: such as those
    of heads, [batch, num_heads, seq, head_dim], that tools for other models make.
    """
    (keys, values), (key_layout, value_layout) = rows, layouts  # each step comes by here for each layer: no loop
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
    What a cache layer shows of the factors that it holds: views, or of rows of 4 bits copies in float32. `layouts` are those of
    the rows that it is given, `stored_dtype` is the dtype of those that it holds, if it is not the same.
    """

    layouts: tuple[FactorLayout, FactorLayout] | None = None
    stored_dtype: torch.dtype | None = None

    def as_stored(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        """
        Rows of keys (`index` 0) or of values (1) as the cache stores them; what is beyond the range of float8 becomes its
        largest number, not NaN.
        """
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
            refuse_other_rows((key_states, value_states), self.layouts)
        return self.as_stored(key_states, 0), self.as_stored(value_states, 1)

    def stored_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`keys` and `values` as the cache stores them: others may have assigned rows of another dtype."""
        return self.as_stored(self.keys, 0), self.as_stored(self.values, 1)

    def _map_storage(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Puts what `function` makes of them in the place of the tensors that hold the rows."""
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)

    def offload(self):
        # Blocks, unlike that of Transformers' layers: the next prefetch reads the copy from another stream.
        self._map_storage(lambda tensor: tensor.to("cpu"))

    def prefetch(self):
        if self.is_initialized and self.keys.device != self.device:
            self._map_storage(self._to_device)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.device, non_blocking=True)
        if tensor.is_cuda:  # its memory belongs to the prefetch stream, and may only be used again after ours
            tensor.record_stream(torch.cuda.default_stream(tensor.device))
        return tensor

    @property
    def nbytes(self) -> int:
        """
        Bytes of the factors held: (R_K + R_V)(h_kv + d) numbers per token, less what a variant need not cache, plus the
        alignment of a row.
        """
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
        Of third-order factors, b and c side by side: [batch, seq, R_K, d_b + d_c].
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


class NewRoom(NamedTuple):
    """
    Rows that a cache layer has appended, to be written.

    Attributes:
        key_storage, value_storage: [batch, 1, room, R_K (h + d)] and [batch, 1, room, R_V (h + d)], where they are.
        keys, values: what `update` returns.
        first: the place of the first of them in each sequence, after `length` if there is one.
        length: int64 [1], a number of rows on the device, or `None`.
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
    storage that doubles when it is full, so that appending a token writes one row and copies nothing else. Other tensors
    may be assigned to them, as by packages that prune caches: the storage then begins anew, with these rows.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._storage: tuple[torch.Tensor, torch.Tensor] | None = None
        # `keys` and `values`, if nobody has assigned others.
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None

    def __copy__(self) -> "T6DynamicLayer":
        """Both go on from the same rows, so only one may write behind them."""
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
        What `keys` and `values` are views of, which may have room behind them. Rows that others assigned have none, nor
        have those of `torch.inference_mode` outside it, where nothing can be written to them.
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
        Append rows `key_states` [batch, 1, new, R_K (h + d)] and `value_states` [batch, 1, new, R_V (h + d)].

        Returns:
            The rows of all the tokens seen, as views of the storage.
        """
        new = self._rows_to_store(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*new)

        needs_grad = torch.is_grad_enabled() and (new[0].requires_grad or self.keys.requires_grad)
        if needs_grad or torch.compiler.is_compiling():
            # Autograd needs the rows that earlier steps used as they were: no writing in place. Nor in torch.compile,
            # where each time that the storage grows would take a graph of its own.
            self.keys, self.values = (torch.cat(both, dim=-2) for both in zip(self.stored_rows(), new))
            self._storage = self._views = None
            return self.keys, self.values

        key_start, value_start = self.keys.shape[-2], self.values.shape[-2]
        self._make_room([(rows.shape[0], rows.shape[-2], rows.dtype, rows.device) for rows in new])
        self.keys[:, :, key_start:], self.values[:, :, value_start:] = new
        return self.keys, self.values

    def reserve(self, batch_size: int, count: int, dtype: torch.dtype) -> NewRoom | None:
        """
        Appends `count` rows of each sequence whose numbers the caller then writes: `update` of rows of `dtype`, but for
        the rows. `None`, with all as it was, where rows cannot be written in place.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        first = self.keys.shape[-2]
        if self.values.shape[-2] != first:
            return None
        dtype = dtype if self.stored_dtype is None else self.stored_dtype
        self._make_room([(batch_size, count, dtype, self.keys.device)] * 2)
        return NewRoom(*self._storage, self.keys, self.values, first)

    def _make_room(self, sizes: Sequence[tuple[int, int, torch.dtype, torch.device]]) -> None:
        """Lengthens `keys` and `values` by rows that are not yet written: in place, or in storage that has room for them."""
        rows = self.stored_rows()
        key_storage, value_storage = self._storage_of_rows()
        storage = self._with_room(key_storage, rows[0], *sizes[0]), self._with_room(value_storage, rows[1], *sizes[1])
        self._set_storage(storage, tuple(tensor.shape[-2] + size[1] for tensor, size in zip(rows, sizes)))

    def _with_room(
        self,
        storage: torch.Tensor,
        rows: torch.Tensor,
        batch_size: int,
        count: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """`storage`, the first in which are `rows`, or another that holds them, with room for `count` more."""
        if batch_size != rows.shape[0]:  # one sequence would be written to all
            raise RuntimeError(f"The cache holds a batch of {rows.shape[0]} sequences, got rows of size {batch_size}.")
        start, end = rows.shape[-2], rows.shape[-2] + count
        is_alike = self.stored_dtype is not None or rows.dtype == dtype
        dtype = dtype if is_alike else torch.promote_types(rows.dtype, dtype)
        if end > storage.shape[-2] or storage.dtype != dtype:
            # A prompt gets just the room it needs; from then on the storage doubles.
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
    Factors of the last tokens of one layer: as many as its window shows, or with `record_past` all until the next crop.
    Fewer are held where some have been pruned, by assigning other tensors to `keys` and `values`.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Append rows `key_states` [batch, 1, new, R_K (h + d)] and `value_states` [batch, 1, new, R_V (h + d)].

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
        """As in `DynamicSlidingWindowLayer`. A layer that holds nothing, as behind an early exit, is left as it is."""
        if self.is_initialized:
            super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Drops the factors; the next `update` starts an empty cache."""
        self.keys = self.values = None
        self.is_initialized, self.cumulative_length = False, 0


class StaticRowsMixin(FactorViewsMixin):
    """What static layers do with rows that are not stored in the model's dtype: `keys` and `values` hold their bytes."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(*self._bytes(key_states, value_states))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in Transformers' layers: writes rows in place, and returns all that there is room for, in `stored_dtype`."""
        rows = super().update(*self._bytes(key_states, value_states), *args, **kwargs)
        return tuple(tensor.view(self.stored_dtype) for tensor in rows)

    def _bytes(self, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Not every PyTorch copies float8 by index.
        is_stored = rows[0].dtype == torch.uint8
        return rows if is_stored else tuple(tensor.view(torch.uint8) for tensor in self._rows_to_store(*rows))

    def stored_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows that there is room for, in `stored_dtype`."""
        return self.keys.view(self.stored_dtype), self.values.view(self.stored_dtype)


class T6StaticLayer(StaticRowsMixin, StaticLayer):
    """A `StaticLayer` of rows in `stored_dtype`."""


class T6StaticSlidingWindowLayer(StaticRowsMixin, StaticSlidingWindowLayer):
    """A `StaticSlidingWindowLayer` of rows in `stored_dtype`."""


def _last_rows(rows: torch.Tensor, number: int) -> torch.Tensor:
    return rows[:, :, max(rows.shape[-2] - number, 0) :]


class T6Cache(DynamicCache):
    """
    The default cache of a T6 model, a `DynamicCache` whose layers are [`T6DynamicLayer`]s, or
    [`T6DynamicSlidingWindowLayer`]s where the model has a window. It takes `DynamicCache`'s
    arguments; with `config` its layers show their factors as `cache.layers[i].a_k`, `.b_k`, `.a_v` and `.b_v`.

    `dtype="float8_e4m3fn"` (or torch's) halves it: factors are stored with 3 bits after the point, to at most 448.
    `dtype="int4"` takes 31% to 42%: B in 4 bits with a scale and a zero point for each 32 features, A in 8 (`QuantizedLayout`).
    Both need `config`, whose `cache_dtype` is the default. On random factors they change attention's output by 6% to 8% and by
    12% to 19% of its norm. FlashTPA reads both as they are; rows of 4 bits have no gradient.

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
        """Tokens held by a layer, or by the first after it that holds any: in a pipeline a stage fills only its own."""
        lengths = (layer.get_seq_length() for layer in self.layers[layer_idx:])
        return next((length for length in lengths if length > 0), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors held by all layers."""
        return cache_nbytes(self)


def store_static_rows(cache: StaticCache, config: PreTrainedConfig, stored_dtype: torch.dtype) -> None:
    """Makes the layers of a `StaticCache` that holds nothing yet such as store rows in another dtype than the model's."""
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
    Allocates those `layers` of a T6 model's `StaticCache` that are not yet allocated, for rows of factors; by itself it
    does so at the first `update`. Transformers' `early_initialization` allocates for heads of keys and values, and both
    alike.
    """
    with torch.inference_mode(False):  # what it makes could not be written to outside
        for layer_idx in layers:
            layer = cache.layers[layer_idx]
            if not layer.is_initialized:
                layer.cumulative_length = layer.cumulative_length.clone()
                shapes = [(batch_size, 1, 0, layout.width) for layout in factor_layouts(config, layer_idx)]
                layer.lazy_initialization(*(torch.empty(shape, dtype=dtype, device=device) for shape in shapes))


def reserve_rows(
    cache: Cache, layer_idx: int, batch_size: int, count: int, dtype: torch.dtype, device: torch.device
) -> NewRoom | None:
    """
    Appends `count` rows of each sequence to a layer, which the caller then writes where they are: what `cache.update` does
    with rows of `dtype` on `device`, but for the rows. `None`, with all as it was, for caches and layers that have a way of
    their own to store them, which includes all that are sliding, quantised or offloaded.
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
    return NewRoom(layer.keys, layer.values, *rows, -count, layer.cumulative_length.view(1))


def cached_lengths(cache: Cache, layer_idx: int) -> torch.Tensor | None:
    """The number of rows that count, on the device, of a layer that has room for more than it holds."""
    layer = cache.layers[layer_idx] if isinstance(cache, Cache) else None
    is_static = isinstance(layer, StaticLayer) and not layer.is_sliding
    return layer.cumulative_length.view(1) if is_static else None


def cache_nbytes(cache: Cache) -> int:
    """Bytes that the layers of any `Cache` hold now: of a static cache, those allocated."""
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
