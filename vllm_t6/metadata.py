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
"""The metadata of a step's batch for the attention layers"""

from dataclasses import dataclass, field

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadata

from modeling_t6.flash_tpa_pages_t6 import Pieces

from .prefill import Piece


@dataclass
class FactorMetadata(AttentionMetadata):
    """
    One step's batch, shared by all layers of one kind. Requests with few query tokens come first and decode; the others are
    prompts. The first layer of a pass allocates memory, which the following layers use: launches wait for the host, which takes
    as long for a view or an allocation as for a launch.

    Attributes:
        slots: int64 [tokens], the slots of the rows of the step's tokens, block * block_size + offset, or negative.
        block_table: int32 [decoding requests, blocks].
        lengths: int32 [decoding requests], the number of rows of each, including those of this step.
        query_starts: int32 [decoding requests + 1], cumulative numbers of their query tokens.
        num_decodes: the number of decoding requests.
        max_decode_queries: the most query tokens of one of them.
        decode_pieces: FlashTPA's schedule for them.
        prompt_pieces: the pieces in which prompts attend to K and V.
        first: the first layer of the current pass. vLLM may reuse the metadata for another pass, over other tokens, or captured as a
            CUDA graph; a graph must not write into the memory of a pass outside of it.
        query: [tokens, h, d], overwritten by each layer.
        partials: memory for FlashTPA's partial results.
        prompt_states: by number of heads of K and V, for each piece the query [query tokens, h, d], K and V.
    """

    slots: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor
    query_starts: torch.Tensor
    num_decodes: int
    max_decode_queries: int
    decode_pieces: Pieces | None = None
    prompt_pieces: list[Piece] = field(default_factory=list)
    first: AttentionImpl | None = None
    query: torch.Tensor | None = None
    partials: tuple[torch.Tensor, torch.Tensor] | None = None
    prompt_states: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def start_pass(self, first: AttentionImpl, query: torch.Tensor) -> torch.Tensor:
        """Starts a pass with the layer `first`, whose layers share `query`, and nothing of an earlier pass."""
        self.first, self.query, self.partials = first, query, None
        self.prompt_states.clear()
        return query
