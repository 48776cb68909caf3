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
"""Continuous batching: pages of factors in the cache of Transformers' engine, and attention over them"""

import functools
import itertools
import math
from collections import defaultdict

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging

from .cache_t6 import factor_layouts
from .configuration_t6 import ConfigView
from .factor_space_t6 import factor_space_attention
from .factors_t6 import Factors, form_heads, without_autocast


logger = logging.get_logger(__name__)


def paged_width(config: PreTrainedConfig) -> int:
    """
    The `head_dim` of a paged cache, with one key/value head, for a T6 model. A paged cache holds two rows of one width
    for a token and layer. They are the two halves of the key row and the value row laid end to end, so no number is
    lost where those differ in width. Layers of lower ranks than others are as wide as the widest.
    """
    layouts = (factor_layouts(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
    return max((key_layout.width + value_layout.width + 1) // 2 for key_layout, value_layout in layouts)


class PagedConfig(ConfigView):
    """
    A `T6Config` as the engine is to read it: with one key/value head of `paged_width`, and without masks, which take
    more memory than the factors of a long cache do. The engine makes none if the name of the attention has "flash" in it.
    """

    num_key_value_heads = 1
    _attn_implementation = "flash_tpa"

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.head_dim = paged_width(config)


class PagedModel:
    """A T6 model as the engine is to see it: the model, but for its `config`, a [`PagedConfig`]."""

    def __init__(self, model: nn.Module):
        self.__dict__.update(_model=model, config=PagedConfig(model.config))

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self._model, name, value)

    def __call__(self, *args, **kwargs):
        return self._model(*args, **kwargs)


def page_factors(manager: ContinuousBatchingManager) -> ContinuousBatchingManager:
    """Has a manager, before it makes its cache, make one of factors."""
    if isinstance(manager.model, PagedModel):  # kept from an earlier batch
        return manager
    config = manager.continuous_batching_config
    if any(config.cuda_graph_booleans) or config.varlen_compile_config or config.decode_compile_config:
        logger.warning("Paged attention over factors runs without CUDA graphs and torch.compile: both are off.")
    config.use_cuda_graph, config.varlen_compile_config, config.decode_compile_config = (False, False), None, None
    config.use_async_batching = False  # which is there to hide the launches that graphs save
    if config.num_blocks is None:
        # Beside the cache, the engine leaves room for one layer's rows; attention copies up to five layers' worth.
        num_layers = manager.model.config.num_hidden_layers
        config.max_memory_percent = (config.max_memory_percent or 0.8) * (num_layers + 1) / (num_layers + 5)
    config.max_blocks_per_request = 0  # block tables are for kernels that read keys and values
    manager.model = PagedModel(manager.model)
    return manager


class PagedFactors:
    """
    What one step of the engine reads and writes. Its tokens, of many requests, lie one after the other in one row, and
    so do the rows of factors that these requests attend to.

    Args:
        config: of the model.
        cache: the engine's, with one key/value head of `paged_width(config)`.
        position_ids: those of the tokens, [1, tokens].
        kwargs: the other arguments that the engine calls the model with.
    """

    def __init__(self, config: PreTrainedConfig, cache: PagedAttentionCache, position_ids: torch.Tensor, kwargs: dict):
        self.cache, self.kwargs = cache, kwargs
        self.width = paged_width(config)
        lengths = kwargs["cu_seq_lens_k"]
        if not isinstance(lengths, dict):  # one layer type in older versions
            lengths = dict.fromkeys(set(config.layer_types or ["full_attention"]), lengths)
        query_ends = kwargs["cu_seq_lens_q"]
        last_positions = position_ids[0, query_ends[1:].long() - 1]
        self.groups, self.row_positions = {}, {}
        for layer_type, key_ends in lengths.items():
            window = config.sliding_window if layer_type == "sliding_attention" else math.inf
            self.groups[layer_type] = _group_requests(query_ends.tolist(), key_ends.tolist(), window, key_ends.device)
            # A request's rows are its last ones: their positions go up to that of its last token.
            shifts = (last_positions + 1 - key_ends[1:]).repeat_interleave(key_ends.diff())
            self.row_positions[layer_type] = (torch.arange(len(shifts), device=shifts.device) + shifts)[None]

    def update(
        self, key_rows: torch.Tensor, value_rows: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Stores the rows of the step's tokens, [1, 1, tokens, R_K (h + d)] and [1, 1, tokens, R_V (h + d)].

        Returns:
            All rows that its requests attend to, [1, 1, rows, R_K (h + d)] and [1, 1, rows, R_V (h + d)].
        """
        key_width, value_width = key_rows.shape[-1], value_rows.shape[-1]
        rows = torch.cat([key_rows, value_rows], dim=-1)
        rows = nn.functional.pad(rows, (0, 2 * self.width - rows.shape[-1]))
        if "max_length_q" in self.kwargs:  # from Transformers 5.19 on
            indices = {"kwargs": dict(self.kwargs)}  # a copy: the engine's cache changes it
        else:
            indices = {name: self.kwargs[name] for name in ("read_index", "write_index")}
        halves = self.cache.update(*rows.split(self.width, dim=-1), layer_idx, **indices)
        rows = torch.cat([half.reshape(1, 1, -1, self.width) for half in halves], dim=-1)
        return rows[..., :key_width], rows[..., key_width : key_width + value_width]


def _group_requests(
    query_ends: list[int], key_ends: list[int], window: float, device: torch.device
) -> list[tuple[tuple, tuple, torch.Tensor | None]]:
    """
    The requests of a step in groups that attend at once: those that decode one token together where their lengths are
    within a factor of two, as a padded batch, and each of the others alone.

    Returns:
        For each group the index of its queries into [1, tokens], that of its keys into [1, rows], and its mask, boolean
        [batch, 1, query_length, key_length], or `None` if it is causal over as many rows as queries, or of one query.
    """
    by_length = defaultdict(list)
    for query, key in zip(itertools.pairwise(query_ends), itertools.pairwise(key_ends)):
        decodes = query[1] - query[0] == 1
        by_length[(key[1] - key[0]).bit_length() if decodes else query].append((query, key))
    groups = []
    for requests in by_length.values():
        (query_start, query_end), (key_start, key_end) = requests[0]
        query_length, key_length = query_end - query_start, key_end - key_start
        queries, keys = (slice(None), slice(query_start, query_end)), (slice(None), slice(key_start, key_end))
        mask = None
        if len(requests) > 1:
            queries = torch.tensor([[query[0]] for query, _ in requests], device=device)
            starts, ends = torch.tensor([key for _, key in requests], device=device)[..., None].unbind(1)
            rows = starts + torch.arange(max(key[1] - key[0] for _, key in requests), device=device)
            mask = (rows < ends)[:, None, None]
            queries, keys = (0, queries), (0, torch.minimum(rows, ends - 1))
        elif query_length > 1 and key_length > min(query_length, window):
            rows = torch.arange(key_length, device=device)
            own_rows = rows[key_length - query_length :, None]
            mask = ((rows <= own_rows) & (rows > own_rows - window))[None, None]
        groups.append((queries, keys, mask))
    return groups


def paged_attention_forward(
    module: nn.Module,
    factors: Factors,
    attention_mask: list[tuple[tuple, tuple, torch.Tensor | None]],
    scaling: float,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """
    Attention of one layer in one step of the engine: requests that decode attend in factor space, a prompt or a piece of
    one forms K and V of its own request, for this layer and step. `attention_mask` is one of [`PagedFactors`]' groups.
    """
    query = module.queries(factors).to(factors.dtype)
    output = torch.empty_like(query)
    for queries, keys, mask in attention_mask:
        key_rows, value_rows = (rows[:, 0][keys].unsqueeze(1) for rows in (factors.key_rows, factors.value_rows))
        a_k, b_k, a_v, b_v = module.unpack(factors, key_rows, value_rows)
        rotation = None if factors.key_rotation is None else tuple(angles[keys] for angles in factors.key_rotation)
        key_features = functools.partial(module.features, rotation=rotation)

        group = query[queries]
        if group.shape[1] == 1:
            with without_autocast(group.device):
                output[queries], _ = factor_space_attention(
                    group, (a_k, b_k), (a_v, b_v), mask, scaling, False, key_features, module.features
                )
            continue
        key = form_heads(a_k, key_features(b_k)).transpose(1, 2)
        value = form_heads(a_v, module.features(b_v)).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(
            group.transpose(1, 2), key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        output[queries] = attended.transpose(1, 2)
    return output, None
