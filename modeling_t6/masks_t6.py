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
"""Attention masks and positions of keys, and checks of the model's inputs"""

import copy
from collections.abc import Callable

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .attention_t6 import heads_attention_forward
from .cache_t6 import CACHE_NAME, FactorLayout, StaticRowsMixin, validate_rows
from .configuration_t6 import ConfigView, T6Config
from .flash_tpa_t6 import flash_tpa_attention_forward
from .paged_t6 import PagedFactors


def validate_inputs(inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None) -> None:
    """
    Refuses an empty prompt, and attention masks that would be misread silently.

    Args:
        inputs_embeds: [batch, query_length, hidden_size].
        attention_mask: [batch or 1, key_length] or [batch or 1, 1, query_length, key_length].

    Raises:
        ValueError: with the expected and the actual size, dtype or values.
    """
    batch_size, query_length = inputs_embeds.shape[:2]
    if query_length == 0:
        raise ValueError("The prompt is empty: `input_ids` (or `inputs_embeds`) must hold at least one token.")
    if not isinstance(attention_mask, torch.Tensor) or torch.compiler.is_compiling():
        return
    mask_shape, dtype = list(attention_mask.shape), attention_mask.dtype
    if attention_mask.dim() == 4:
        if mask_shape[0] not in (1, batch_size) or mask_shape[2] != query_length:
            raise ValueError(
                f"A 4D `attention_mask` must be [{batch_size}, 1, {query_length}, key_length], got {mask_shape}."
            )
        if dtype != torch.bool and not dtype.is_floating_point:
            raise ValueError(
                f"A 4D `attention_mask` must be boolean (True: attend) or additive floating point, got {dtype}."
            )
    elif attention_mask.dim() == 2:
        # A static cache counts its tokens in a tensor. Reading it once per step is worth a check of the mask.
        past_length = int(cache.get_seq_length()) if cache is not None else 0
        if mask_shape[0] not in (1, batch_size) or mask_shape[1] < past_length + query_length:
            raise ValueError(
                f"`attention_mask` must cover {past_length} cached and {query_length} new tokens of {batch_size} "
                f"sequences, [{batch_size}, {past_length + query_length}], got {mask_shape}."
            )
        if dtype.is_floating_point and not ((attention_mask == 0) | (attention_mask == 1)).all():
            raise ValueError(
                "A 2D `attention_mask` holds 1 for tokens and 0 for padding, got other values in "
                f"{dtype}: pass an additive mask as [batch, 1, query_length, key_length]."
            )
    else:
        raise ValueError(
            f"`attention_mask` must be [batch, key_length] or [batch, 1, query_length, key_length], got {mask_shape}."
        )


def validate_cache(
    cache: Cache,
    config: T6Config,
    layouts: list[tuple[FactorLayout, FactorLayout]],
    layers: list[int],
    query_length: int,
) -> None:
    """
    Refuses caches that a T6 model would misread, or fail on later with an obscure error: tuples of tensors, rows of another
    layout, and sliding layers that hold fewer tokens than the model's window.

    Args:
        layouts: of the key and value rows of each layer of the model.
        layers: the indices of the layers in `cache`.
        query_length: the number of new tokens.

    Raises:
        ValueError: if it is no cache, or a window is too short.
        RuntimeError: if rows have another layout.
    """
    if not hasattr(cache, "get_seq_length"):
        raise ValueError(
            f"`{CACHE_NAME}` must be a cache of factors, `T6Cache(config=model.config)` or one of Transformers' caches "
            f"that this model has filled, got a {type(cache).__name__}."
        )
    for layer_idx, layer in zip(layers, getattr(cache, "layers", ())):
        rows = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(layer, StaticRowsMixin) and layer.is_initialized:
            rows = layer.stored_rows()
        if all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in rows):
            validate_rows(rows, layouts[layer_idx], layer_idx)
        window = getattr(layer, "sliding_window", None)
        if window is None and getattr(layer, "is_sliding", False):
            # A static layer does not store its window: its capacity is the window, or all the tokens that there will be.
            drops_rows = layer.cumulative_length_int + query_length > layer.max_cache_len
            window = layer.max_cache_len if drops_rows else None
        if window is None:
            continue
        is_full = config.layer_type(layer_idx) == "full_attention"
        if is_full or window < config.sliding_window:
            raise ValueError(
                f"Layer {layer_idx} of the cache holds the last {window} tokens alone, and `sliding_window` of the model "
                f"is {None if is_full else config.sliding_window} there: make the cache anew, `T6Cache(config=model.config)`."
            )


class TensorMaskConfig(ConfigView):
    """A `T6Config` for which Transformers' mask functions return tensors."""

    _attn_implementation = "eager"


def create_attention_masks(
    config: T6Config,
    attend: Callable,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict | None,
    cache: Cache | PagedFactors | None,
    position_ids: torch.LongTensor | None,
) -> dict:
    """
    The masks for the attention function `attend`, by layer type: what Transformers' attention interface takes, or a tensor.

    Args:
        attend: as [`choose_attention`] returns it.
        cache: with pipeline parallelism, that of this stage.
    """
    if isinstance(attention_mask, dict):  # created in advance by `generate()`
        return attention_mask
    if isinstance(cache, PagedFactors):  # it knows the lengths of the requests, which take the place of masks
        return dict.fromkeys(cache.key_ends, cache)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:  # may be [1, key_length]
        attention_mask = attention_mask.expand(inputs_embeds.shape[0], -1)
    if config.rotates_on_read and cache is not None and position_ids is not None:
        if not torch.compiler.is_compiling():
            validate_positions(position_ids, attention_mask, cache)
    implementation = config._attn_implementation
    is_static = cache is not None and cache.is_compileable
    if attend is flash_tpa_attention_forward and config.sliding_window is None:
        return {"full_attention": padding_mask(attention_mask, cache, inputs_embeds.shape[1])}
    if attend is not heads_attention_forward:
        # These functions read tensors. Over a static or sliding cache they need one, which says which rows are valid.
        if implementation != "sdpa" or is_static or config.sliding_window is not None:
            config = TensorMaskConfig(config)
    elif implementation == "flex_attention" and is_static:
        # flex_attention evaluates the mask after the cache has advanced its length in place: give it a copy of the length.
        cache = copy.copy(cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in cache.layers:
            layer.cumulative_length = layer.cumulative_length.clone()
    functions = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    return {
        layer_type: functions[layer_type](
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
        )
        for layer_type in set(config.layer_types or ["full_attention"])
    }


def padding_mask(attention_mask: torch.Tensor | None, cache: Cache, query_length: int) -> torch.Tensor | None:
    """
    The mask that `flash_tpa` takes in addition to causality: of padding, [batch, 1, 1, key_length], or `None`. Over a static
    cache it is as long as the cache, so that its shape does not change from token to token. A mask of four dimensions is
    returned unchanged.
    """
    if attention_mask is None or attention_mask.dim() == 4:
        return attention_mask
    key_length = cache.get_mask_sizes(query_length, 0)[0]
    mask = attention_mask[:, :key_length].to(torch.bool)
    return torch.nn.functional.pad(mask, (0, key_length - mask.shape[1]))[:, None, None]


def key_positions(
    config: T6Config,
    position_ids: torch.LongTensor,
    cache: Cache | PagedFactors | None,
    layers: list[int],
) -> tuple[torch.LongTensor, dict[str, torch.LongTensor]]:
    """
    Positions of the new tokens, and, for models whose cache holds B_K before RoPE, those of all its rows by layer type.
    `layers` are the indices of the layers in `cache`.
    """
    if not config.rotates_on_read or cache is None:
        return position_ids, {}
    if isinstance(cache, PagedFactors):
        return position_ids, cache.row_positions
    layer_types = [config.layer_type(layer_idx) for layer_idx in layers]
    return row_positions(layer_types, cache, position_ids.shape[-1], position_ids.device)


def row_positions(
    layer_types: list[str], cache: Cache, query_length: int, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Positions for models that rotate B_K when it is read. Their cache holds no positions, but RoPE depends only on differences
    of positions: a token's position is the number of rows before its own, padding included. `layer_types` are those of the
    layers in the cache.

    Returns:
        Positions of the new tokens [1, query_length], and by layer type those of all rows that the next update of the cache
        will return [1, key_length].
    """
    new = torch.arange(query_length, device=device) + cache.get_seq_length()
    rows = {}
    for layer_type in set(layer_types):
        length, offset = cache.get_mask_sizes(query_length, layer_types.index(layer_type))
        # Unfilled rows of a static cache are masked. Their positions are capped, as dynamic RoPE depends on the largest.
        rows[layer_type] = torch.minimum(torch.arange(length, device=device) + offset, new[-1])[None]
    return new[None], rows


def validate_positions(position_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache) -> None:
    """
    Refuses `position_ids` [1 or batch, query_length] whose differences are not those of [`row_positions`]: they must count
    the rows of the cache, or the tokens after left padding, as `generate()` does. Positions of padding are ignored.

    Raises:
        ValueError: with the expected and the actual positions.
    """
    past, query_length = int(cache.get_seq_length()), position_ids.shape[1]
    rows = torch.arange(past, past + query_length, device=position_ids.device)
    is_padding, left_padding = torch.zeros_like(position_ids, dtype=torch.bool), 0
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        mask = attention_mask.to(position_ids.device) != 0
        is_padding = ~mask[:, past : past + query_length]
        left_padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    count_rows = ((position_ids == rows) | is_padding).all(-1)
    count_tokens = ((position_ids == rows - left_padding) | is_padding).all(-1)
    if not (count_rows | count_tokens).all():
        raise ValueError(
            "With `noncontextual_b` or `shared_b` the cache holds no positions: `position_ids` must go up by one from "
            f"row to row, starting at 0 or after left padding, here {rows.tolist()} or that less the padding, got "
            f"{position_ids.tolist()}. Padding between or after the tokens, packed sequences and trees of tokens need "
            "`use_cache=False`."
        )
