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
"""Attention in factor space, in PyTorch: decoding from a cache of factors without K and V (paper, section 3.3)"""

import functools
import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .factors_t6 import Factors, without_autocast
from .quantized_rows_t6 import QuantizedFactors


# With this many query tokens or fewer, attention over the cache costs less in factor space than forming K and V.
MAX_FACTOR_SPACE_QUERIES = 8
# Cached tokens in one step of the online softmax: enough to amortise a dozen operations, few enough to stay in cache.
FACTOR_SPACE_CHUNK = 8192
# Sums over fewer tokens are one product.
MIN_TOKENS_IN_BLOCKS = 1024
LOG2_E = 1 / math.log(2)


def attend_in_factor_space(query_length: int, cache: Cache | None) -> bool:
    """
    Whether this way is taken: few query tokens over a cache, and no gradient wanted. K and V are then never
    formed. Otherwise (training, prefill, no cache) they are, once, for Transformers' attention interface.
    """
    return cache is not None and query_length <= MAX_FACTOR_SPACE_QUERIES and not torch.is_grad_enabled()


def factor_space_attention_forward(
    module: nn.Module,
    factors: Factors,
    attention_mask: torch.Tensor | None,
    scaling: float,
    implementation: str,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[`factor_space_attention`] over the factors of a cache; probabilities where the eager implementation is asked for."""
    query = module.queries(factors).to(factors.dtype)
    output_attentions = implementation == "eager"
    if factors.key_rows.dtype == torch.uint8:
        with without_autocast(query.device):
            return _attend_to_quantized_rows(module, factors, query, attention_mask, scaling, output_attentions)
    a_k, b_k, a_v, b_v = module.unpack(factors, factors.key_rows, factors.value_rows)
    with without_autocast(query.device):
        return factor_space_attention(
            query,
            (a_k, b_k),
            (a_v, b_v),
            attention_mask,
            scaling=scaling,
            output_attentions=output_attentions,
            key_features=functools.partial(module.features, rotation=factors.key_rotation),
            value_features=module.features,
        )


def _attend_to_quantized_rows(
    module: nn.Module,
    factors: Factors,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    output_attentions: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """B stays rotated: the query is rotated before, the output after, and a chunk of rows at a time becomes numbers."""
    layouts = module.key_layout.quantized, module.value_layout.quantized
    keys, values = (
        QuantizedFactors(layout, rows, factors.dtype)
        for layout, rows in zip(layouts, (factors.key_rows, factors.value_rows))
    )
    constant_a = module.config.noncontextual_a
    output, probabilities = factor_space_attention(
        layouts[0].rotate(query),
        (factors.a_k if constant_a else keys.a, keys.b),
        (factors.a_v if constant_a else values.a, values.b),
        attention_mask,
        scaling,
        output_attentions,
        keys.features,
        values.features,
        keys.heads,
        values.heads,
    )
    return layouts[1].rotate_back(output), probabilities


def factor_space_attention(
    query: torch.Tensor,
    key_factors: tuple[torch.Tensor, torch.Tensor],
    value_factors: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    scaling: float,
    output_attentions: bool = False,
    key_features: Callable[[torch.Tensor, slice], torch.Tensor] = lambda b, rows: b,
    value_features: Callable[[torch.Tensor, slice], torch.Tensor] = lambda b, rows: b,
    key_heads: Callable[[torch.Tensor, slice], torch.Tensor] = lambda a, rows: a,
    value_heads: Callable[[torch.Tensor, slice], torch.Tensor] = lambda a, rows: a,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    softmax(Q K^T * scaling) V without K and V: a head's score with a token is Q_i . B_K[s] weighted by A_K[s, i],
    summed over the rank; its output is the sum of B_V[u] weighted by p_i A_V[u, i]. No gradient: works in place.

    Goes through the cache in chunks with an online softmax: nothing larger than [batch, FACTOR_SPACE_CHUNK,
    query_length, h], or than a chunk's B, is formed, and the products with B are plain matrix products over the rows as
    they lie.

    Args:
        query: [batch, query_length, h, d], rotated.
        key_factors: A_K [batch, key_length, R_K, h_kv] and B_K [batch, key_length, R_K, d], rotated. h_kv divides h: the
            heads of a group have one A.
        value_factors: A_V [batch, key_length, R_V, h_kv] and B_V [batch, key_length, R_V, d]. Constant A factors are
            [R, h_kv]: those of the keys then act on the query, those of the values on the output, once for all tokens.
            Constant B factors are [R, d]: those of the values then act on the output, too.
        attention_mask: boolean (True: attend) or additive, broadcastable to [batch, h, query_length, key_length].
            `None` is causal, the last query being aligned with the last key.
        scaling: the factor of Q K^T, usually 1 / sqrt(d).
        output_attentions: whether to return the probabilities, which takes one chunk as long as the cache.
        key_features, value_features: what makes B_K and B_V [batch or 1, rows, R, d] of the given B factors of these
            rows, where they are not yet those (constants get all of themselves). By default nothing. Called for one
            chunk at a time, so that no B is formed for the whole cache.
        key_heads, value_heads: likewise what makes A_K and A_V of the given A factors of these rows; not called for constants.

    Returns:
        Output [batch, query_length, h, d], and probabilities [batch, h, query_length, key_length] or `None`.
    """
    batch_size, query_length, num_heads, head_dim = query.shape
    (all_a_k, all_b_k), (all_a_v, all_b_v) = key_factors, value_factors
    constant_a, constant_b = all_a_k.dim() == 2, all_b_k.dim() == 2
    key_length = (all_b_k if constant_a else all_a_k).shape[1]
    k_rank, v_rank = all_a_k.shape[-2], all_a_v.shape[-2]
    groups = num_heads // all_a_k.shape[-1]
    if constant_a and groups > 1:
        all_a_k, all_a_v = (a.repeat_interleave(groups, dim=-1) for a in (all_a_k, all_a_v))
    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    # A CPU's products in half precision are slow where it has no instructions for them, and where it has, code is made for each
    # length of a cache anew, which takes longer than the products.
    dtype = softmax_dtype if query.device.type == "cpu" else query.dtype

    if attention_mask is None and query_length > 1:
        attention_mask = torch.ones(query_length, key_length, dtype=torch.bool, device=query.device)
        attention_mask = attention_mask.tril(key_length - query_length)[None, None]

    # Keys come first, heads last: the layout of A in the cache. The softmax is one of powers of 2, which are faster.
    flat_query = query.to(dtype) * (LOG2_E * scaling / k_rank)
    if constant_a:
        flat_query = torch.einsum("bqhd,rh->bqhrd", flat_query, all_a_k.to(dtype)).flatten(3)
    flat_query = flat_query.flatten(1, 2).transpose(1, 2)  # [batch, d or R_K * d, query_length * h]
    chunk_length = key_length if output_attentions else min(FACTOR_SPACE_CHUNK, key_length)
    maximum = output = normalizer = None
    start = 0
    while start < key_length:  # `range` would have torch.compile make a graph for each length
        chunk = slice(start, start + chunk_length)
        b_k = key_features(all_b_k if constant_b else all_b_k[:, chunk], chunk).to(dtype)
        if constant_b:
            b_k = b_k.expand(batch_size, -1, -1, -1)
        else:
            b_v = value_features(all_b_v[:, chunk], chunk).to(dtype)
        shape = (batch_size, b_k.shape[1], query_length, num_heads)
        if constant_a:
            scores = torch.bmm(b_k.flatten(2), flat_query).view(shape)
        else:
            a_k, a_v = key_heads(all_a_k[:, chunk], chunk).to(dtype), value_heads(all_a_v[:, chunk], chunk).to(dtype)
            if groups > 1:
                a_k, a_v = a_k.repeat_interleave(groups, dim=-1), a_v.repeat_interleave(groups, dim=-1)
            a_k, a_v = a_k.unsqueeze(3), a_v.unsqueeze(3)
            scores = torch.bmm(b_k.select(2, 0), flat_query).view(shape).mul_(a_k.select(2, 0))
            for rank in range(1, k_rank):  # `addcmul_` takes twice as long over strides
                products = torch.bmm(b_k.select(2, rank), flat_query).view(shape)
                scores.add_(products.mul_(a_k.select(2, rank)))
        if attention_mask is not None:
            mask = attention_mask[..., start : start + chunk_length].permute(0, 3, 2, 1)
            if mask.dtype == torch.bool:
                scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
            else:
                scores.add_((mask.to(dtype) * LOG2_E).clamp(min=torch.finfo(dtype).min))

        weights = scores.to(softmax_dtype)
        previous, maximum = maximum, weights.amax(dim=1, keepdim=True)
        if previous is not None:
            maximum = torch.maximum(previous, maximum)
        weights = weights.sub_(maximum).exp2_()
        chunk_normalizer = weights.sum(dim=1, keepdim=True)
        if constant_a:
            chunk_output = _sum_over_tokens(weights.flatten(2).to(dtype), b_v.flatten(2))
        elif constant_b:
            sums = [weights.mul(a_v.select(2, rank)).sum(dim=1).flatten(1) for rank in range(v_rank)]
            chunk_output = torch.stack(sums, dim=-1)  # [batch, query_length * h, R_V]
        else:
            chunk_output = _sum_over_tokens((weights * a_v.select(2, 0)).flatten(2).to(dtype), b_v.select(2, 0))
            for rank in range(1, v_rank):
                weighted = (weights * a_v.select(2, rank)).flatten(2).to(dtype)
                chunk_output = chunk_output.add_(_sum_over_tokens(weighted, b_v.select(2, rank)))
        if previous is None:
            normalizer, output = chunk_normalizer, chunk_output.to(softmax_dtype)
        else:
            decay = (previous - maximum).exp2()
            normalizer = normalizer * decay + chunk_normalizer
            output = output * decay.view(batch_size, -1, 1) + chunk_output
        start += chunk_length

    output = (output / (normalizer.view(batch_size, -1, 1) * v_rank)).to(query.dtype)
    if constant_a:
        output = torch.einsum("bqhrd,rh->bqhd", output.view(batch_size, query_length, num_heads, v_rank, -1), all_a_v)
        output = output.flatten(1, 2)
    elif constant_b:
        output = torch.matmul(output, all_b_v)
    probabilities = None
    if output_attentions:
        probabilities = (weights / normalizer).permute(0, 3, 2, 1).to(query.dtype)
    return output.unflatten(1, (query_length, num_heads)), probabilities


def _sum_over_tokens(weights: torch.Tensor, features: torch.Tensor, blocks: int = 8) -> torch.Tensor:
    """weights^T features: [batch, seq, n] and [batch, seq, d] to [batch, n, d]."""
    if features.shape[0] > 1 or features.shape[1] < MIN_TOKENS_IN_BLOCKS or torch.compiler.is_compiling():
        return torch.bmm(weights.transpose(1, 2), features)
    # A long sum of a small matrix leaves cores idle: sum blocks of tokens side by side, then the blocks. Under
    # torch.compile lengths below 8, below 16 and above would each take a graph.
    whole = features.shape[1] // blocks * blocks
    block_weights, block_features = (x[0, :whole].unflatten(0, (blocks, -1)) for x in (weights, features))
    total = torch.bmm(block_weights.transpose(1, 2), block_features).sum(dim=0, keepdim=True)
    return total.baddbmm_(weights[:, whole:].transpose(1, 2), features[:, whole:])
