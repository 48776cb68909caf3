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
# Cached tokens in one step of the online softmax: enough to amortise a dozen operations, few enough to stay in cache.
FACTOR_SPACE_CHUNK = 8192


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
    output_attentions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    softmax(Q K^T * scaling) V without K and V: a head's score with a token is Q_i . B_K[s] weighted by A_K[s, i],
    summed over the rank; its output is the sum of B_V[u] weighted by p_i A_V[u, i].

    Goes through the cache in chunks with an online softmax: nothing larger than [batch, FACTOR_SPACE_CHUNK,
    query_length, h] is formed, and the products with B are plain matrix products over the rows as they lie.

    Args:
        query: [batch, query_length, h, d], rotated.
        key_factors: A_K [batch, key_length, R_K, h] and B_K [batch, key_length, R_K, d], rotated.
        value_factors: A_V [batch, key_length, R_V, h] and B_V [batch, key_length, R_V, d].
        attention_mask: boolean (True: attend) or additive, broadcastable to [batch, h, query_length, key_length].
            `None` is causal, the last query being aligned with the last key.
        scaling: the factor of Q K^T, usually 1 / sqrt(d).
        output_attentions: whether to return the probabilities, which takes one chunk as long as the cache.

    Returns:
        Output [batch, query_length, h, d], and probabilities [batch, h, query_length, key_length] or `None`.
    """
    batch_size, query_length, num_heads, head_dim = query.shape
    key_length, k_rank = key_factors[0].shape[1:3]
    v_rank = value_factors[0].shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)  # of the softmax

    if attention_mask is None and query_length > 1:
        attention_mask = torch.ones(query_length, key_length, dtype=torch.bool, device=query.device)
        attention_mask = attention_mask.tril(key_length - query_length)[None, None]

    # Keys come first, heads last: the layout of A in the cache.
    flat_query = (query * (scaling / k_rank)).flatten(1, 2).transpose(1, 2)  # [batch, d, query_length * h]
    maximum = output = normalizer = None
    chunk_length = key_length if output_attentions else FACTOR_SPACE_CHUNK
    for start in range(0, key_length, chunk_length):
        a_k, b_k, a_v, b_v = (factor[:, start : start + chunk_length] for factor in (*key_factors, *value_factors))

        scores = _mix_heads(torch.matmul(b_k[:, :, 0], flat_query), a_k[:, :, 0])
        for rank in range(1, k_rank):
            scores = scores + _mix_heads(torch.matmul(b_k[:, :, rank], flat_query), a_k[:, :, rank])
        if attention_mask is not None:
            mask = attention_mask[..., start : start + chunk_length].permute(0, 3, 2, 1)
            scores = scores.unflatten(-1, (query_length, num_heads))
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            else:
                scores = scores + mask
            scores = scores.flatten(2)
        scores = scores.to(dtype)  # [batch, chunk, query_length * h]

        previous, maximum = maximum, scores.amax(dim=1, keepdim=True)
        if previous is not None:
            maximum = torch.maximum(previous, maximum)
        weights = (scores - maximum).exp()
        chunk_sum = weights.sum(dim=1, keepdim=True)
        weights = weights.to(query.dtype)
        chunk_output = 0
        for rank in range(v_rank):
            mixed = _mix_heads(weights, a_v[:, :, rank])
            chunk_output = chunk_output + torch.matmul(mixed.transpose(1, 2), b_v[:, :, rank]).to(dtype)
        if previous is None:
            normalizer, output = chunk_sum, chunk_output
        else:
            decay = (previous - maximum).exp()
            normalizer = normalizer * decay + chunk_sum
            output = output * decay.transpose(1, 2) + chunk_output

    output = (output / (normalizer.transpose(1, 2) * v_rank)).to(query.dtype)
    probabilities = None
    if output_attentions:
        probabilities = (weights / normalizer).unflatten(-1, (query_length, num_heads)).permute(0, 3, 2, 1)
        probabilities = probabilities.to(query.dtype)
    return output.unflatten(1, (query_length, num_heads)), probabilities


def _mix_heads(products: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Weights `products` [batch, seq, query_length * h] by the head factors `a` [batch, seq, h]."""
    if products.shape[-1] == a.shape[-1]:  # one query
        return products * a
    return (products.unflatten(-1, (-1, a.shape[-1])) * a.unsqueeze(2)).flatten(2)
