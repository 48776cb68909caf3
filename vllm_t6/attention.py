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
"""Attention of one step: stores rows in pages; requests that decode attend to factors, prompts to K and V formed from them"""

import functools
import itertools

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from modeling_t6.configuration_t6 import T6Config
from modeling_t6.factor_pages_t6 import (
    FactorColumns,
    FactorTransform,
    SelectedRanks,
    form_heads_from_pages,
    has_kernels,
    select_ranks,
    store_projections,
)
from modeling_t6.flash_tpa_pages_t6 import Pieces, paged_flash_tpa

from .decoding import paged_factor_space_attention
from .metadata import FactorMetadata
from .prefill import attend_to_piece, flash_attention_version, workspace_rows


class FactorImpl(AttentionImpl):
    """
    The implementation of [`FactorAttention`], which vLLM's attention operator calls.

    Args:
        owner: the module that has the norms of queries and keys, and constant A factors.
        layer: the [`FactorAttention`].
        config: of the model.
        layer_idx: the index of the layer.
    """

    supports_dcp = False

    def __init__(self, owner: nn.Module, layer: nn.Module, config: T6Config, layer_idx: int):
        self.owner, self.config = owner, config
        # Copies, since each layer reads them in each step, and fields of a configuration are slow to read.
        self.q_rank, self.constant_a = config.q_rank, config.noncontextual_a
        self.num_heads, self.num_kv_heads = layer.num_heads, layer.num_kv_heads
        self.groups = config.num_key_value_groups
        self.head_size, self.scale = config.head_dim, config.head_dim**-0.5
        self.key_layout, self.value_layout = layer.key_layout, layer.value_layout
        self.k_rank, self.v_rank = config.ranks(layer_idx)
        self.sliding_window = layer.sliding_window
        self.kv_cache_dtype = layer.kv_cache_dtype
        self.projection_sizes = layer.projection_sizes
        parts = {"q_proj": self.num_heads, "q_a_proj": self.num_heads, "q_b_proj": self.q_rank}
        parts |= {"k_a_proj": self.num_kv_heads, "k_b_proj": self.k_rank}
        parts |= {"v_a_proj": self.num_kv_heads, "v_b_proj": self.v_rank}
        starts = itertools.accumulate(self.projection_sizes.values(), initial=0)
        columns = {  # by name the first column, n and m, as in `FactorColumns`
            name: (start, parts[name], size // parts[name])
            for start, (name, size) in zip(starts, self.projection_sizes.items())
        }
        b_q = columns["q_proj" if self.q_rank is None else "q_b_proj"]
        a_q, a_k, a_v = (columns.get(f"{name}_a_proj") for name in "qkv")
        self.columns = FactorColumns(a_q, b_q, a_k, columns["k_b_proj"], a_v, columns["v_b_proj"])
        self._pages: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None
        self.stored_dtype = layer.stored_dtype
        vllm_config = get_current_vllm_config()
        self.dtype, self.room = vllm_config.model_config.dtype, workspace_rows(vllm_config)
        device = torch.device(vllm_config.device_config.device_type)
        self.fa_version = flash_attention_version(device, self.dtype, self.head_size)

    def forward(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FactorMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Writes the output of the step's tokens, [tokens, h * d].

        Args:
            query: the projections [tokens, columns]. vLLM's operator passes three tensors, under these names.
            key, value: cos and sin [tokens, rotary_dim / 2].
            attn_metadata: `None` while vLLM measures how much memory a step takes.
        """
        projections, cos, sin = query, key, value
        heads = output.view(-1, self.num_heads, self.head_size)
        if attn_metadata is None:
            self._workspace(heads.dtype, heads.device)
            heads.new_empty(
                4, *heads.shape
            )  # as much as queries, and the partial outputs of prompts in several pieces
            return output.zero_()
        key_pages, value_pages = self.pages(kv_cache)
        query = attn_metadata.query
        if query is None or attn_metadata.first is self or len(query) != len(heads):
            query = attn_metadata.start_pass(self, torch.empty_like(heads))
        formed = self.states_of_new_prompts(query, attn_metadata)
        self.store(projections, cos, sin, attn_metadata.slots, key_pages, value_pages, query, formed)
        if attn_metadata.num_decodes:
            self.decode(query, key_pages, value_pages, attn_metadata, heads)
        if attn_metadata.prompt_pieces:
            self.attend_to_prompts(query, key_pages, value_pages, attn_metadata, heads, are_formed=bool(formed))
        return output

    def pages(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of key rows [blocks, block_size, key width] and of value rows, as float8 where vLLM has bytes."""
        if self._pages is None or self._pages[0] is not kv_cache:  # vLLM passes the same tensor at each step
            pages = kv_cache.squeeze(1)
            pages = pages.view(torch.float8_e4m3fn) if pages.dtype == torch.uint8 else pages
            self._pages = kv_cache, pages.split([self.key_layout.width, self.value_layout.width], dim=-1)
        return self._pages[1]

    def store(
        self,
        projections: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        query: torch.Tensor,
        formed: tuple[torch.Tensor, torch.Tensor, int] | tuple[()] = (),
        kernels: bool | None = None,
    ) -> None:
        """
        Writes the rows of a step's tokens into pages, and their queries into `query` [tokens, h, d]. `formed`, as
        [`states_of_new_prompts`] returns it, are outputs for K and V; `kernels` as in `store_factors`.
        """
        store_projections(
            projections, self.columns, self.constants[0], cos, sin, slots, key_pages, value_pages, query,
            self._transform, kernels, *formed,
        )  # fmt: skip

    def decode(
        self,
        query: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        metadata: FactorMetadata,
        heads: torch.Tensor,
    ) -> None:
        """Attention of the requests that decode, whose tokens are the first of `heads` [tokens, h, d]."""
        batch = query, key_pages, value_pages, metadata.block_table, metadata.lengths
        pieces, (_, key_a, value_a) = metadata.decode_pieces, self.constants
        if pieces is None:
            layouts, constants = (self.key_layout, self.value_layout), (key_a, value_a)
            paged_factor_space_attention(
                *batch, metadata.query_starts, layouts, constants, self.scale, self.sliding_window, heads
            )
            return
        if metadata.partials is None:
            metadata.partials = pieces.new_partials(query, metadata.max_decode_queries)
        paged_flash_tpa(
            *batch,
            pieces,
            self.k_rank,
            self.v_rank,
            self.scale,
            metadata.max_decode_queries,
            key_a=key_a,
            value_a=value_a,
            sliding_window=self.sliding_window,
            output=heads,
            groups=self.groups,
            partials=metadata.partials,
        )

    def empty_pieces(self, num_requests: int, max_queries: int, device: torch.device) -> Pieces | None:
        """An unfilled schedule of FlashTPA for as many requests; `None` if its kernels do not run here."""
        if not has_kernels(device, self.stored_dtype):
            return None
        return Pieces.empty(
            num_requests,
            max_queries,
            self.num_heads,
            self.head_size,
            self.k_rank,
            self.v_rank,
            self.stored_dtype,
            device,
            constant_a=self.config.noncontextual_a,
            sliding_window=self.sliding_window,
            groups=self.groups,
        )

    def attend_to_prompts(
        self,
        query: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        metadata: FactorMetadata,
        heads: torch.Tensor,
        are_formed: bool = False,
    ) -> None:
        """
        Attention of the prompts of a step, whose tokens are the last of `heads` [tokens, h, d]. `are_formed`: whether [`store`]
        has formed their K and V.
        """
        constants = self._selected_ranks or self.constants[1:]
        earlier = None  # the result of the previous piece, of a prompt in several
        for piece, (piece_query, key, value) in zip(metadata.prompt_pieces, self._prompt_states(query, metadata)):
            if not are_formed:
                form_heads_from_pages(
                    key_pages, value_pages, piece.slots, key, value, self.k_rank, self.v_rank, *constants
                )
            output = heads if piece_query is query else heads[piece.queries]
            earlier = attend_to_piece(
                piece_query, key, value, piece, self.scale, self.sliding_window, self.fa_version, earlier, output
            )

    def states_of_new_prompts(
        self, query: torch.Tensor, metadata: FactorMetadata
    ) -> tuple[torch.Tensor, torch.Tensor, int] | tuple[()]:
        """
        If all prompts of the step are new, so that their K and V can be formed as their rows are written: the workspace for K
        and V, and the index of the first of their tokens; else an empty tuple.
        """
        pieces = metadata.prompt_pieces
        if self.constant_a or len(pieces) != 1 or not pieces[0].is_new:
            return ()
        return *self._prompt_states(query, metadata)[0][1:], pieces[0].queries.start

    def _prompt_states(
        self, query: torch.Tensor, metadata: FactorMetadata
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each piece its query tokens, and the workspace for its K and V."""
        states = metadata.prompt_states.get(self.num_formed_heads)
        if states is None:
            pieces, (key, value) = metadata.prompt_pieces, self._workspace(query.dtype, query.device)
            # Padding after the tokens of all requests is ignored.
            is_whole = len(pieces) == 1 and pieces[0].queries.start == 0
            states = metadata.prompt_states[self.num_formed_heads] = [
                (query if is_whole else query[piece.queries], key[: len(piece.slots)], value[: len(piece.slots)])
                for piece in pieces
            ]
        return states

    @functools.cached_property
    def _selected_ranks(self) -> tuple[SelectedRanks, SelectedRanks] | None:
        """
        Constant A_K and A_V as `select_ranks` has them, for models converted from MHA, GQA or MQA, of which fewer heads have to be
        formed; `None` for other models.
        """
        _, key_a, value_a = self.constants
        selected = None if key_a is None else (select_ranks(key_a), select_ranks(value_a))
        if selected is None or None in selected or len(selected[0].ranks) != len(selected[1].ranks):
            return None
        return selected

    @functools.cached_property
    def num_formed_heads(self) -> int:
        """The number of key/value heads that are formed for prompts."""
        return self.num_kv_heads if self._selected_ranks is None else len(self._selected_ranks[0].ranks)

    def weights_changed(self) -> None:
        for name in ("constants", "_transform", "_selected_ranks", "num_formed_heads"):
            self.__dict__.pop(name, None)

    def pages_changed(self) -> None:
        # Views would keep alive pages that vLLM frees, as after measuring CUDA graphs.
        self._pages = None

    # Cached, since parameters of a module are slow to read.

    @functools.cached_property
    def constants(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """A_Q [R, h], A_K and A_V [R, h_kv], each `None` unless it is a constant."""
        if not self.constant_a:
            return None, None, None
        return tuple(getattr(self.owner, f"{name}_a", None) for name in "qkv")

    @functools.cached_property
    def _transform(self) -> FactorTransform:
        config, qk_norm = self.config, self.config.qk_norm
        norms = (self.owner.q_norm.weight, self.owner.k_norm.weight) if qk_norm else (None, None)
        return FactorTransform(*norms, config.rms_norm_eps, config.head_factor_act, qk_norm == "heads")

    def _workspace(self, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """Memory for K and V of `room` tokens, [room, num_formed_heads, d] each; all layers share it."""
        shape = (self.room, self.num_formed_heads, self.head_size)
        if is_workspace_manager_initialized():
            return current_workspace_manager().get_simultaneous((shape, dtype), (shape, dtype))
        return list(torch.empty(2, *shape, dtype=dtype, device=device))
