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
"""The two ways to compute T6's attention, and the choice between them (paper, sections 3.1 and 3.3)"""

import torch
from torch import nn
from transformers.cache_utils import Cache


# With this many query tokens or fewer, attention over the cache costs less in factor space than forming K and V.
MAX_FACTOR_SPACE_QUERIES = 8


def attend_in_factor_space(query_length: int, past_key_values: Cache | None, training: bool) -> bool:
    """
    Which path runs. Few query tokens over a cache: in factor space, K and V are never formed. Otherwise (training,
    prefill, no cache): K and V are formed once and go through Transformers' attention interface. Depends on nothing
    that changes from one decoded token to the next, so that a compiled decoding step stays one graph.
    """
    return past_key_values is not None and query_length <= MAX_FACTOR_SPACE_QUERIES and not training


def form_heads(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(1 / R) A^T B: A [batch, seq, R, h] and B [batch, seq, R, d] to heads [batch, seq, h, d]."""
    return torch.matmul(a.transpose(-1, -2), b) / a.shape[-2]


def factor_space_attention(
    query: torch.Tensor,
    key_factors: tuple[torch.Tensor, torch.Tensor],
    value_factors: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    softmax(Q K^T * scaling) V without K and V: a head's score with a token is Q_i . B_K[s] weighted by A_K[s, i],
    summed over the rank; its output is the sum of B_V[u] weighted by p_i A_V[u, i].

    Nothing larger than [batch, key_length, query_length, h] is formed, and the products with B are plain matrix
    products over the rows as they lie in the cache.

    Args:
        query: [batch, query_length, h, d], rotated.
        key_factors: A_K [batch, key_length, R_K, h] and B_K [batch, key_length, R_K, d], rotated.
        value_factors: A_V [batch, key_length, R_V, h] and B_V [batch, key_length, R_V, d].
        attention_mask: boolean (True: attend) or additive, broadcastable to [batch, h, query_length, key_length].
            `None` is causal, the last query being aligned with the last key.
        scaling: the factor of Q K^T, usually 1 / sqrt(d).

    Returns:
        Output [batch, query_length, h, d] and probabilities [batch, h, query_length, key_length].
    """
    (a_k, b_k), (a_v, b_v) = key_factors, value_factors
    batch_size, query_length, num_heads, head_dim = query.shape
    key_length, k_rank, v_rank = a_k.shape[1], a_k.shape[2], a_v.shape[2]

    # Keys come first, heads last: the layout of A in the cache.
    flat_query = (query * (scaling / k_rank)).flatten(1, 2).transpose(1, 2)  # [batch, d, query_length * h]
    scores = 0
    for rank in range(k_rank):
        products = torch.matmul(b_k[:, :, rank], flat_query).unflatten(-1, (query_length, num_heads))
        scores = scores + products * a_k[:, :, rank, None]  # [batch, key_length, query_length, h]

    if attention_mask is None and query_length > 1:
        attention_mask = torch.ones(query_length, key_length, dtype=torch.bool, device=query.device)
        attention_mask = attention_mask.tril(key_length - query_length)[None, None]
    if attention_mask is not None:
        attention_mask = attention_mask.permute(0, 3, 2, 1)
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=1, dtype=torch.promote_types(scores.dtype, torch.float32))
    probabilities = probabilities.to(query.dtype)

    output = 0
    for rank in range(v_rank):
        weights = (probabilities * a_v[:, :, rank, None]).flatten(2)  # [batch, key_length, query_length * h]
        output = output + torch.matmul(weights.transpose(1, 2), b_v[:, :, rank])
    output = (output / v_rank).unflatten(1, (query_length, num_heads))
    return output, probabilities.permute(0, 3, 2, 1)
