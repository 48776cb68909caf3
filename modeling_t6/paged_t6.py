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
"""Transformers' continuous batching: its paged cache holds rows of factors, over which requests attend"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import ContinuousBatchingConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging

from .cache_t6 import factor_layouts
from .configuration_t6 import ConfigView
from .engine_pages_t6 import EnginePages, PageGroup, join_halves
from .factor_space_t6 import FactorChunks, factor_space_attention
from .factors_t6 import Factors, form_heads, without_autocast
from .flash_tpa_pages_t6 import Pieces, paged_flash_tpa, schedule_pieces
from .flash_tpa_t6 import DTYPES, IS_INTERPRETED, MAX_HEAD_DIM, is_supported, triton
from .stored_factors_t6 import activates_heads, store_projected


logger = logging.get_logger(__name__)


def paged_width(config: PreTrainedConfig) -> int:
    """
    The `head_dim` of a paged cache for a T6 model, with one key/value head. The cache has two rows of this width per token and
    layer, which together hold the key row followed by the value row, even where those differ in width. All layers are as wide
    as the widest.
    """
    layouts = (factor_layouts(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
    return max((key_layout.width + value_layout.width + 1) // 2 for key_layout, value_layout in layouts)


class PagedConfig(ConfigView):
    """
    A `T6Config` for the engine: with one key/value head of `paged_width`, and without attention masks, which for a long cache
    would take more memory than the factors. The engine makes none if the attention implementation has "flash" in its name.
    """

    num_key_value_heads = 1
    _attn_implementation = "flash_tpa"

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.head_dim = paged_width(config)


class PagedModel:
    """A T6 model for the engine: a proxy whose `config` is a [`PagedConfig`]."""

    def __init__(self, model: nn.Module):
        self.__dict__.update(_model=model, config=PagedConfig(model.config))

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self._model, name, value)

    def __call__(self, *args, **kwargs):
        return self._model(*args, **kwargs)


def page_factors(manager: ContinuousBatchingManager, asked: ContinuousBatchingConfig) -> ContinuousBatchingManager:
    """
    Makes a manager, which has not created its cache yet, create a cache of factors. `asked` is the user's configuration; in
    that of the manager the engine has already filled in defaults, which are for attention with masks.
    """
    if isinstance(manager.model, PagedModel):  # kept from an earlier batch
        return manager
    model = manager.model
    if model.config.cache_dtype is not None:
        logger.warning(
            f"Continuous batching keeps rows of the model's dtype, in more bytes than caches of `cache_dtype`="
            f"{model.config.cache_dtype!r}, which the model's configuration asks for."
        )
    has_kernel = attends_on_pages(model.config, model.device, model.dtype)
    _configure_engine(manager.continuous_batching_config, asked, model, has_kernel)
    manager.model = PagedModel(model)
    create_batch_processor = manager._create_batch_processor

    def create_processor_of_pages():
        processor = create_batch_processor()
        if not hasattr(processor.cache, "factors"):
            _use_pages_of_factors(processor, model.config, has_kernel)
        return processor

    manager._create_batch_processor = create_processor_of_pages
    return manager


def _configure_engine(
    config: ContinuousBatchingConfig, asked: ContinuousBatchingConfig, model: nn.Module, has_kernel: bool
) -> None:
    """Sets graphs, overlapped steps, block tables and memory in `config` for attention over factors."""
    # The engine has block tables only for models without windows, and captures CUDA graphs only of steps that read them.
    has_block_tables = has_kernel and not _has_windows(model.config) and asked.max_blocks_per_request != 0
    has_graphs = has_block_tables and model.device.type == "cuda" and not _reads_positions_on_host(model.config)
    asked_graphs = asked.cuda_graph_booleans
    if config.varlen_compile_config or config.decode_compile_config or any(asked_graphs) and not has_graphs:
        logger.warning(
            "Attention over pages of factors runs without torch.compile, and without CUDA graphs "
            f"{'of prompts' if has_graphs else 'for this model on this device'}."
        )
    config.varlen_compile_config = config.decode_compile_config = None
    config.use_cuda_graph = (False, has_graphs and (asked.use_cuda_graph is None or asked_graphs[1]))
    config.use_async_batching = model.device.type == "cuda" and (
        config.use_cuda_graph[1] if asked.use_async_batching is None else asked.use_async_batching and has_kernel
    )
    config.max_blocks_per_request = 0
    if has_block_tables:
        page_size = config.page_size if hasattr(config, "page_size") else config.block_size
        longest = -(-model.config.max_position_embeddings // page_size)
        config.max_blocks_per_request = asked.max_blocks_per_request or max(longest, 2)  # the engine's warm-up takes 2
    if config.num_blocks is None:
        # Beside the cache, the engine leaves memory for the rows of one layer, but attention copies up to five layers' worth.
        num_layers = model.config.num_hidden_layers
        config.max_memory_percent = (config.max_memory_percent or 0.8) * (num_layers + 1) / (num_layers + 5)


def _use_pages_of_factors(processor, config: PreTrainedConfig, has_kernel: bool) -> None:
    """Gives the cache of a batch processor its [`EnginePages`], and its warm-up no prompts."""
    if hasattr(processor.cache, "key_cache"):
        join_halves(processor)
    processor.cache.factors = EnginePages(processor.cache, config, has_kernel)
    run_one_warmup = processor.model_runner.run_one_warmup
    # No graph is captured of prompts, so the warm-up need not run one as long as the whole cache.
    processor.model_runner.run_one_warmup = lambda model, num_q_tokens, max_kv_read: (
        run_one_warmup(model=model, num_q_tokens=num_q_tokens, max_kv_read=None) if max_kv_read is None else 0.0
    )


def attends_on_pages(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """
    Whether FlashTPA's kernel reads the pages of requests that decode: on GPUs and for variants as in `decode_with_flash_tpa`, but
    not if the attention implementation is `"eager"`; in Triton's interpreter if it is `"flash_tpa"`.
    """
    implementation = config._attn_implementation.removeprefix("paged|")
    if triton is None or config.rotates_on_read or config.c_factor_dim is not None:
        return False
    if not activates_heads(config):
        return False
    if device.type == "cuda":
        runs = implementation != "eager" and is_supported(device, False)
    else:
        runs = implementation == "flash_tpa" and IS_INTERPRETED
    return runs and config.head_dim <= MAX_HEAD_DIM and dtype in DTYPES


def _has_windows(config: PreTrainedConfig) -> bool:
    return any(config.layer_type(layer_idx) != "full_attention" for layer_idx in range(config.num_hidden_layers))


def _reads_positions_on_host(config: PreTrainedConfig) -> bool:
    """Whether RoPE waits for the largest position of a step on the host, as `dynamic_rope_update` does for these types."""
    return "dynamic" in config.rope_parameters["rope_type"] or config.rope_parameters["rope_type"] == "longrope"


@dataclass(frozen=True)
class DecodingRequests:
    """
    The requests of a step that decode one token each, and whose pages the kernel reads.

    Attributes:
        queries: indices of their tokens in the step.
        block_table: int32 [requests, pages].
        lengths: int32 [requests], the number of rows that each attends to, including that of its token.
        pieces: the schedule of the kernel.
    """

    queries: slice | torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor
    pieces: Pieces


@dataclass(frozen=True)
class GroupStep:
    """
    A step of the engine in the layers that share pages.

    Attributes:
        write_slots: int64 [tokens], the slots of the rows of the step's tokens. -1, for a row that is not written, only if there
            are no `others`: the kernel then does all the writing.
        decoding: the requests that attend by the kernel, or `None`.
        read_slots: int64 [rows], the slots of the rows that the other requests attend to; `None` if those are all of this step.
        new_rows: indices into `read_slots` of the rows of this step, and the tokens whose rows they are.
        others: the other requests, as [`_group_requests`] returns them.
    """

    write_slots: torch.Tensor
    decoding: DecodingRequests | None = None
    read_slots: torch.Tensor | None = None
    new_rows: tuple[torch.Tensor, torch.Tensor] | None = None
    others: tuple[tuple[tuple, tuple, torch.Tensor | None], ...] = ()


class PagedFactors:
    """
    What one step of the engine reads and writes; to the model it is both the cache and the mask. The tokens of all requests are
    concatenated, [1, tokens], and so are rows of factors that are copied out of pages: those of requests with a prompt, or a
    chunk of one, and of all requests if there is no kernel. The kernel reads the pages of the others in place.

    In a step with a block table every request decodes, and it may be captured as a CUDA graph. Everything is then computed on
    the device, including for requests of length 0, with which the engine pads a graph.

    Args:
        config: of the model.
        cache: the engine's, whose `factors` are [`EnginePages`].
        position_ids: of the tokens, [1, tokens].
        kwargs: the other arguments with which the engine calls the model.
    """

    def __init__(self, config: PreTrainedConfig, cache: PagedAttentionCache, position_ids: torch.Tensor, kwargs: dict):
        self.config, self.pages, self.kwargs, self.position_ids = config, cache.factors, kwargs, position_ids
        self.key_ends = kwargs["cu_seq_lens_k"]
        if not isinstance(self.key_ends, dict):  # one layer type in older versions
            self.key_ends = {self.pages.groups[0].layer_type: self.key_ends}
        groups = dict.fromkeys(self.pages.groups)  # each once
        if kwargs.get("block_table") is not None:
            self.steps = {group: self._decode(group) for group in groups}
        else:
            self.steps = self._read_and_decode(groups)

    @property
    def row_positions(self) -> dict[str, torch.Tensor]:
        """By layer type, the positions of the copied rows, [1, rows], for models that rotate B_K when it is read."""
        query_ends = self.kwargs["cu_seq_lens_q"]
        last_positions = self.position_ids[0, query_ends[1:].long() - 1]
        positions = {}
        for layer_type, key_ends in self.key_ends.items():
            # The rows of a request are consecutive, and the last one is that of its last token.
            shifts = (last_positions + 1 - key_ends[1:]).repeat_interleave(key_ends.diff())
            positions[layer_type] = (torch.arange(len(shifts), device=shifts.device) + shifts)[None]
        return positions

    def _decode(self, group: PageGroup) -> GroupStep:
        block_table = group.pages_of_table(self.kwargs["block_table"][group.index])
        lengths = self.key_ends[group.layer_type].diff()
        positions = (lengths - 1).clamp(min=0)
        last_pages = block_table.gather(1, (positions // group.page_size).long()[:, None])[:, 0]
        slots = last_pages.long() * group.page_size + positions % group.page_size
        slots = slots.masked_fill(lengths == 0, -1)  # `where` would copy the number from the host
        return GroupStep(slots, self._over_pages(slice(None), block_table, lengths))

    def _read_and_decode(self, groups: Iterable[PageGroup]) -> dict[PageGroup, GroupStep]:
        """Reads the lengths of requests on the host: a step with prompts is no graph, and long enough to hide that."""
        if self.position_ids.device.type == "cuda":
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())  # on which the engine writes them
        queries = list(itertools.pairwise(self.kwargs["cu_seq_lens_q"].tolist()))
        keys = {layer_type: list(itertools.pairwise(ends.tolist())) for layer_type, ends in self.key_ends.items()}
        positions = self.position_ids[0].tolist()
        # Requests without tokens are padding.
        requests = {
            layer_type: [(query, key) for query, key in zip(queries, spans) if query[0] < query[1]]
            for layer_type, spans in keys.items()
        }
        return {group: self._read_and_decode_group(group, requests[group.layer_type], positions) for group in groups}

    def _read_and_decode_group(
        self, group: PageGroup, requests: list[tuple[tuple, tuple]], positions: list[int]
    ) -> GroupStep:
        """`requests` are spans of tokens and of rows; `positions` are those of all tokens of the step."""
        device = self.position_ids.device
        window = self.config.sliding_window if group.layer_type == "sliding_attention" else None
        read_index, write_index = (self.kwargs[name][group.index] for name in ("read_index", "write_index"))
        reads_pages = read_index.numel() > 0
        decoding, others = [], []
        for query, key in requests:
            decodes = self.pages.has_kernel and query[1] - query[0] == 1 and reads_pages
            (decoding if decodes else others).append((query, key))
        decoding_requests = read_slots = new_rows = None
        if decoding:
            tokens = [query[0] for query, _ in decoding]
            table = _find_pages(
                decoding, [positions[token] for token in tokens], group, window, read_index, write_index
            )
            lengths = torch.tensor([end - start for _, (start, end) in decoding], dtype=torch.int32, device=device)
            is_span = tokens == list(range(tokens[0], tokens[-1] + 1))
            indices = slice(tokens[0], tokens[-1] + 1) if is_span else torch.tensor(tokens, device=device)
            decoding_requests = self._over_pages(indices, table, lengths)
        if others and reads_pages:
            others, read_slots, new_rows = _gather(others, group.slots(read_index))
        elif others:  # prompts that begin in this step: their rows are those of their tokens
            others = [(query, query) for query, _ in others]
        others = _group_requests(others, math.inf if window is None else window, device)
        write_slots = group.slots(write_index)
        if self.pages.has_kernel and not others:
            write_slots = torch.where(write_slots == group.spare_slot, -1, write_slots)
        return GroupStep(write_slots, decoding_requests, read_slots, new_rows, others)

    def _over_pages(
        self, queries: slice | torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor
    ) -> DecodingRequests:
        config, device = self.config, lengths.device
        query_starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
        pieces = Pieces.empty(
            len(lengths),
            1,
            config.num_local_heads,
            config.head_dim,
            *config.ranks(0),
            self.pages.rows[0].dtype,
            device,
            config.noncontextual_a,
            groups=config.num_key_value_groups,
        )
        pieces = schedule_pieces(lengths, query_starts, pieces)
        return DecodingRequests(queries, block_table, lengths, pieces)

    def of_layer(self, layer_idx: int) -> GroupStep:
        return self.steps[self.pages.groups[layer_idx]]

    def pages_of_layer(self, layer_idx: int, key_width: int, value_width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The key rows and the value rows of a layer, views [pages, page_size, width]."""
        rows = self.pages.rows[layer_idx]
        return rows[..., :key_width], rows[..., key_width : key_width + value_width]

    def store(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        key_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> Factors:
        """
        Computes a layer's factors of the step's tokens, and stores their rows in its pages. Position embeddings are those of
        `TensorProductFactors.project`.

        Returns:
            Factors with the `key_rows` and `value_rows` that `others` of the step attend to, [1, 1, rows, R_K (h + d)] and
            [1, 1, rows, R_V (h + d)]; if there is a kernel, with `query` instead of A and B.
        """
        if not self.pages.has_kernel:
            return module.project_and_cache(hidden_states, position_embeddings, self, key_position_embeddings)
        step = self.of_layer(module.layer_idx)
        widths = module.key_layout.width, module.value_layout.width
        pages, slots = self.pages_of_layer(module.layer_idx, *widths), step.write_slots
        if step.others:  # they may attend to rows that are not stored, as the window has moved past them
            rows = self.pages.rows[module.layer_idx].new_empty((1, hidden_states.shape[1], sum(widths)))
            pages, slots = rows.split(widths, dim=-1), torch.arange(rows.shape[1], device=rows.device)
        factors = store_projected(module, hidden_states, position_embeddings, slots, *pages)
        if step.others:
            key_rows, value_rows = (part[:, None] for part in pages)
            factors.key_rows, factors.value_rows = self.update(key_rows, value_rows, module.layer_idx)
        return factors

    def update(
        self, key_rows: torch.Tensor, value_rows: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Stores the rows of the step's tokens, [1, 1, tokens, R_K (h + d)] and [1, 1, tokens, R_V (h + d)].

        Returns:
            All rows that `others` of the step attend to, [1, 1, rows, R_K (h + d)] and [1, 1, rows, R_V (h + d)].
        """
        step, new = self.of_layer(layer_idx), torch.cat([key_rows, value_rows], dim=-1)[0, 0]
        stored = self.pages.rows[layer_idx].flatten(0, 1)[:, : new.shape[-1]]
        rows = new
        if step.read_slots is not None:
            # Read before the new rows are stored, which in a layer with a window overwrite old ones.
            rows = stored[step.read_slots]
            indices, tokens = step.new_rows
            rows[indices] = new[tokens]
        stored.index_copy_(0, step.write_slots, new.to(stored.dtype))
        return tuple(part[None, None] for part in rows.split([key_rows.shape[-1], value_rows.shape[-1]], dim=-1))


def _find_pages(
    requests: list[tuple[tuple, tuple]],
    positions: list[int],
    group: PageGroup,
    window: int | None,
    read_index: torch.Tensor,
    write_index: torch.Tensor,
) -> torch.Tensor:
    """
    The block table, int32 [requests, pages], of requests that decode in a step without a block table of the engine. It is
    derived from the indices at which the engine reads and writes their rows: those of the first row of each page. In a layer
    with a window, a row is stored at its position modulo the window, so that the row of the new token overwrites the oldest.
    """
    window = window or 2**62
    table = []
    for (query, (start, end)), position in zip(requests, positions):
        oldest = position + 1 - (end - start)
        firsts = range(0, end - start, group.page_size)
        table.append(
            [
                len(read_index) + query[0] if place == position % window else start + (place - oldest) % window
                for place in firsts
            ]
        )
    most = max(map(len, table))
    table = torch.tensor([row + row[:1] * (most - len(row)) for row in table], device=read_index.device)
    return group.pages(torch.cat([read_index, write_index])[table]).int()


def _gather(
    requests: list[tuple[tuple, tuple]], slots: torch.Tensor
) -> tuple[list[tuple[tuple, tuple]], torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """
    Concatenates the rows of some requests of a step.

    Returns:
        The requests with the new spans of their rows, the slots of all rows, and for the rows of this step's tokens their
        indices and their tokens.
    """
    moved, length = [], 0
    for query, (start, end) in requests:
        moved.append((query, (length, length + end - start)))
        length += end - start
    indices = torch.cat([torch.arange(end - (query[1] - query[0]), end) for query, (_, end) in moved])
    tokens = torch.cat([torch.arange(*query) for query, _ in moved])
    read_slots = torch.cat([slots[start:end] for _, (start, end) in requests])
    return moved, read_slots, (indices.to(slots.device), tokens.to(slots.device))


def _group_requests(
    requests: list[tuple[tuple, tuple]], window: float, device: torch.device
) -> list[tuple[tuple, tuple, torch.Tensor | None]]:
    """
    Groups requests, given as spans of tokens and of rows, for attention: those that decode one token, with lengths within a
    factor of two, are one padded batch; each of the others is a group of its own.

    Returns:
        For each group the index of its queries into [1, tokens], that of its keys into [1, rows], and its mask, boolean
        [batch, 1, query_length, key_length], or `None` if it is causal over as many rows as queries, or of one query.
    """
    by_length = defaultdict(list)
    for query, key in requests:
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
    attention_mask: PagedFactors,
    scaling: float,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """
    Attention of one layer in one step of the engine, which is `attention_mask`. Requests that decode attend by the kernel over
    pages, or without a kernel in factor space. Prompts, or chunks of them, form K and V of their own request.
    """
    step = attention_mask.of_layer(module.layer_idx)
    query = module.queries(factors).to(factors.dtype)
    output = torch.empty_like(query)
    if step.decoding is not None:
        key_a, value_a = (a if a is not None and a.dim() == 2 else None for a in (factors.a_k, factors.a_v))
        widths = module.key_layout.width, module.value_layout.width
        indices = step.decoding.queries
        attended = paged_flash_tpa(
            query[0, indices],
            *attention_mask.pages_of_layer(module.layer_idx, *widths),
            step.decoding.block_table,
            step.decoding.lengths,
            step.decoding.pieces,
            module.k_rank,
            module.v_rank,
            scaling,
            max_query_length=1,
            key_a=key_a,
            value_a=value_a,
            output=output[0, indices] if isinstance(indices, slice) else None,
            groups=module.num_key_value_groups,
        )
        if not isinstance(indices, slice):
            output[0, indices] = attended
    for queries, keys, mask in step.others:
        key_rows, value_rows = (rows[:, 0][keys].unsqueeze(1) for rows in (factors.key_rows, factors.value_rows))
        a_k, b_k, a_v, b_v = module.unpack(factors, key_rows, value_rows)
        rotation = None if factors.key_rotation is None else tuple(angles[keys] for angles in factors.key_rotation)
        key_features = functools.partial(module.features, rotation=rotation)

        group = query[queries]
        if group.shape[1] == 1:
            chunks = FactorChunks.of(a_k, b_k, key_features), FactorChunks.of(a_v, b_v, module.features)
            with without_autocast(group.device):
                output[queries], _ = factor_space_attention(group, *chunks, mask, scaling)
            continue
        key = form_heads(a_k, key_features(b_k)).transpose(1, 2)
        value = form_heads(a_v, module.features(b_v)).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(
            group.transpose(1, 2), key, value, attn_mask=mask, is_causal=mask is None, scale=scaling,
            enable_gqa=module.num_key_value_groups > 1,
        )  # fmt: skip
        output[queries] = attended.transpose(1, 2)
    return output, None
