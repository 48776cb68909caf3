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
"""What a step's batch is to all layers with pages of one kind"""

from dataclasses import dataclass, field

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadata

from modeling_t6.flash_tpa_pages_t6 import Pieces

from .prefill import Piece


@dataclass
class FactorMetadata(AttentionMetadata):
    """
    One step's batch, as all layers with pages of one kind see it. Requests with few query tokens come first and decode
    from the factors; the others are prompts. What layers need of memory is made by the first of them: each layer's launches wait
    for the host, which a view or an allocation takes as long as a launch.

    Attributes:
        slots: int64 [tokens], where the rows of the step's tokens go: block * block_size + offset, or negative.
        block_table: int32 [requests that decode, most blocks of one].
        lengths: int32 [requests that decode], rows that a request has with those of this step.
        query_starts: int32 [requests that decode + 1], where its query tokens start.
        num_decodes: requests that decode.
        max_decode_queries: query tokens of one of these at most.
        decode_pieces: what FlashTPA has scheduled for them.
        prompt_pieces: K and V that the prompts look at, piece by piece.
        first: the first layer of a pass. vLLM may keep the metadata for another pass, over other tokens, or recorded as a CUDA
            graph, which must not write into memory of one that is not.
        query: [tokens, h, d], of one layer after another.
        partials: of FlashTPA.
        prompt_states: by number of heads of K and V, of each piece the query [query tokens, h, d], K and V.
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
        """From this layer on, all share `query`, and nothing of a pass before."""
        self.first, self.query, self.partials = first, query, None
        self.prompt_states.clear()
        return query
