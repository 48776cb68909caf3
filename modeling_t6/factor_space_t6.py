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
"""Attention in factor space, in PyTorch: decoding from a cache of factors without forming K and V (paper, section 3.3)"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .cache_t6 import FactorLayout
from .factors_t6 import Factors, without_autocast
from .quantized_rows_t6 import QuantizedFactors


# Up to this many query tokens, attention over the cache costs less in factor space than forming K and V.
MAX_FACTOR_SPACE_QUERIES = 8
# Cached tokens in one iteration of the online softmax: enough to amortise a dozen operators, few enough for a core's cache.
FACTOR_SPACE_CHUNK = 4096
# On a GPU, which has no such cache and whose iterations cost the host as much, chunks are longer by this factor.
GPU_CHUNK_FACTOR = 2
# From this length of the cache on, sums over tokens are divided into blocks, and rows are copied to a buffer first: shorter caches
# fit a core's cache as they are.
MIN_TOKENS_IN_BLOCKS = 1024
# Blocks of tokens that are summed in parallel. The sum over a long cache is a small matrix, whose product leaves cores idle.
BLOCKS = 8
LOG2_E = 1 / math.log(2)


class FactorChunks(NamedTuple):
    """
    The factors of keys, or of values, of all tokens, to be read chunk by chunk.

    Attributes:
        length: number of tokens.
        rank: R.
        read: returns A [batch, rows, R, h_kv] and B [batch or 1, rows, R, d] of a slice of rows, B_K rotated, in any dtype; a
            factor that is constant is ignored. They are valid until the next call of `read`, for keys or for values.
        constant_a, constant_b: [R, h_kv] and [R, d], or `None`. A constant B_K, which is rotated for each token, is read like one
            that is not constant.
    """

    length: int
    rank: int
    read: Callable[[slice], tuple[torch.Tensor, torch.Tensor]]
    constant_a: torch.Tensor | None = None
    constant_b: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        a: torch.Tensor,
        b: torch.Tensor,
        features: Callable[[torch.Tensor, slice], torch.Tensor] = lambda b, rows: b,
    ) -> "FactorChunks":
        """
        Chunks of tensors.

        Args:
            a: [batch, length, R, h_kv], or constant [R, h_kv].
            b: [batch, length, R, d], or constant [R, d].
            features: turns B as it is cached, of a slice of rows, into the B that heads are formed from. Called for one chunk
                at a time, so that the result is not formed for the whole cache.
        """
        constant_a, constant_b = a.dim() == 2, b.dim() == 2

        def read(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            return a if constant_a else a[:, rows], features(b if constant_b else b[:, rows], rows)

        length = (b if constant_a else a).shape[1]
        return cls(length, a.shape[-2], read, a if constant_a else None, b if constant_b else None)


def chunks_of_rows(
    layouts: tuple[FactorLayout, FactorLayout],
    rows: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    as_one_chunk: bool = False,
) -> tuple[FactorChunks, FactorChunks]:
    """
    The factors, in `dtype`, of key rows and value rows [batch, 1, length, width] that hold both A and B as heads are formed from
    them. `as_one_chunk`: whether all rows will be read together.
    """
    buffer, length = None, rows[0].shape[2]
    if rows[0].is_cpu and length >= MIN_TOKENS_IN_BLOCKS and not torch.compiler.is_compiling():
        # Products read one rank after the other, which is slow from memory. A sequential copy brings whole rows into a core's
        # cache first, always to the same buffer.
        count = length if as_one_chunk else min(FACTOR_SPACE_CHUNK, length)
        buffer = rows[0].new_empty(len(rows[0]) * count * max(x.shape[-1] for x in rows), dtype=dtype)

    def chunks(layout: FactorLayout, rows: torch.Tensor) -> FactorChunks:
        def read(at: slice) -> tuple[torch.Tensor, torch.Tensor]:
            chunk = rows if at.start == 0 and at.stop >= length else rows[:, :, at]
            if buffer is None:
                return layout.unpack(_cast(chunk, dtype))
            return layout.unpack(buffer[: chunk.numel()].view(chunk.shape).copy_(chunk))

        return FactorChunks(length, layout.rank, read)

    return chunks(layouts[0], rows[0]), chunks(layouts[1], rows[1])


def attend_in_factor_space(query_length: int, cache: Cache | None) -> bool:
    """
    Whether attention is computed in factor space: for few query tokens over a cache, without gradients. Otherwise (training,
    prefill, no cache) K and V are formed for Transformers' attention interface.
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
    """[`factor_space_attention`] over the factors of a cache, with probabilities if `implementation` is "eager"."""
    query = _cast(module.queries(factors), factors.dtype)
    output_attentions = implementation == "eager"
    with without_autocast(query.device):
        if factors.key_rows.dtype == torch.uint8:
            return _attend_to_quantized_rows(module, factors, query, attention_mask, scaling, output_attentions)
        if module.caches_both_factors and _is_short(factors.key_rows.shape[2]) and not output_attentions:
            keys, values = module.key_layout.unpack(factors.key_rows), module.value_layout.unpack(factors.value_rows)
            return _attend_to_few_tokens(query, keys, values, attention_mask, scaling), None
        chunks = _chunks_of_cache(module, factors, matmul_dtype(query), output_attentions)
        return factor_space_attention(query, *chunks, attention_mask, scaling, output_attentions)


def matmul_dtype(query: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products: float32 instead of half precision on a CPU."""
    # Some CPUs have no instructions for half precision; for others oneDNN generates code for each length of the cache, which takes
    # longer than the products.
    return torch.promote_types(query.dtype, torch.float32) if query.is_cpu else query.dtype


def _chunks_of_cache(
    module: nn.Module, factors: Factors, dtype: torch.dtype, as_one_chunk: bool
) -> tuple[FactorChunks, FactorChunks]:
    """Chunks of keys and of values."""
    rows, layouts = (factors.key_rows, factors.value_rows), (module.key_layout, module.value_layout)
    if module.caches_both_factors:
        return chunks_of_rows(layouts, rows, dtype, as_one_chunk)
    a_k, b_k, a_v, b_v = module.unpack(factors, *rows)
    key_features = functools.partial(module.features, rotation=factors.key_rotation)
    return FactorChunks.of(a_k, b_k, key_features), FactorChunks.of(a_v, b_v, module.features)


def _attend_to_quantized_rows(
    module: nn.Module,
    factors: Factors,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    output_attentions: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    [`factor_space_attention`] over rows of 4 bits. One chunk is dequantised at a time. B stays in the rotated basis of
    `QuantizedLayout`: the query is rotated into it, and the output back.
    """

    def in_chunks(layout: FactorLayout, rows: torch.Tensor, a: torch.Tensor) -> FactorChunks:
        packed, constant_a = QuantizedFactors(layout.quantized, rows, factors.dtype), module.config.noncontextual_a

        def read(at: slice) -> tuple[torch.Tensor, torch.Tensor]:
            chunk_a = a if constant_a else packed.heads(packed.a[:, at])
            return chunk_a, packed.features(packed.b[:, at], at)

        return FactorChunks(rows.shape[2], layout.rank, read, a if constant_a else None)

    output, probabilities = factor_space_attention(
        module.key_layout.quantized.rotate(query),
        in_chunks(module.key_layout, factors.key_rows, factors.a_k),
        in_chunks(module.value_layout, factors.value_rows, factors.a_v),
        attention_mask,
        scaling,
        output_attentions,
    )
    return module.value_layout.quantized.rotate_back(output), probabilities


def factor_space_attention(
    query: torch.Tensor,
    keys: FactorChunks | tuple[torch.Tensor, torch.Tensor],
    values: FactorChunks | tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    scaling: float,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    softmax(Q K^T * scaling) V without forming K and V. For head i, cached token m and ranks R_K and R_V:

        score[i, m] = scaling / R_K * sum_s A_K[m, s, i] (Q_i . B_K[m, s])
        output_i = 1 / R_V * sum_m sum_u softmax(score)[i, m] A_V[m, u, i] B_V[m, u]

    An online softmax goes through the cache in chunks: no intermediate is larger than [R, batch, FACTOR_SPACE_CHUNK,
    query_length, h] or the rows of a chunk. Products with B are plain matrix products. It works in place, and has no gradient.

    Args:
        query: [batch, query_length, h, d], rotated.
        keys, values: as [`FactorChunks`], or as tensors A and B that `FactorChunks.of` takes. Groups of h / h_kv heads share
            a column of A. Constant A_K is multiplied into the query once for all tokens, constant A_V and B_V into the output.
        attention_mask: boolean (True: attend) or additive, broadcastable to [batch, h, query_length, key_length].
            `None` is causal, the last query being aligned with the last key.
        scaling: of the scores, usually 1 / sqrt(d).
        output_attentions: whether to return the probabilities. The whole cache is then one chunk.

    Returns:
        Output [batch, query_length, h, d], and probabilities [batch, h, query_length, key_length] or `None`.
    """
    batch_size, query_length, num_heads, head_dim = query.shape
    keys, values = (x if isinstance(x, FactorChunks) else FactorChunks.of(*x) for x in (keys, values))
    key_length = keys.length
    constant_a, constant_b = keys.constant_a is not None, values.constant_b is not None
    if _is_short(key_length) and not (constant_a or constant_b or output_attentions):
        factors = (x.read(slice(0, key_length)) for x in (keys, values))
        return _attend_to_few_tokens(query, *factors, attention_mask, scaling), None

    if attention_mask is None and query_length > 1:
        attention_mask = _causal_mask(query_length, key_length, query.device)
    is_eager = not torch.compiler.is_compiling()
    chunk_length = FACTOR_SPACE_CHUNK if query.is_cpu else FACTOR_SPACE_CHUNK * GPU_CHUNK_FACTOR
    chunk_length = key_length if output_attentions else min(chunk_length, key_length)

    constant_a_k, constant_a_v = (_of_each_head(x.constant_a, num_heads) for x in (keys, values))
    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    dtype = matmul_dtype(query)
    # Scores and weights are [batch, chunk, query_length, h], with heads last, as A is cached. exp(x) is computed as 2^(x log2(e)).
    flat_query = query.to(dtype) * (LOG2_E * scaling / keys.rank)
    if constant_a:
        flat_query = torch.einsum("bqhd,rh->bqhrd", flat_query, constant_a_k.to(dtype)).flatten(3)
    flat_query = flat_query.flatten(1, 2).transpose(1, 2)  # [batch, d or R_K * d, query_length * h]
    # In long caches it pays that all chunks use one buffer, as fresh memory comes from the system page by page, and that the sum over
    # the tokens of a single sequence is divided into blocks.
    is_long = is_eager and key_length >= MIN_TOKENS_IN_BLOCKS
    buffer, in_blocks = None, is_long and batch_size == 1
    if is_long and not constant_a:
        shape = (max(keys.rank, values.rank), batch_size, chunk_length, query_length * num_heads)
        buffer = query.new_empty(shape, dtype=dtype)
    maximum = output = normalizer = probabilities = None
    start = 0
    while start < key_length:  # torch.compile would compile a graph for each length of a `range`
        chunk = slice(start, start + chunk_length)
        products = None if buffer is None else buffer[:, :, : key_length - start]
        scores = _chunk_scores(keys, chunk, flat_query, num_heads, products)
        if attention_mask is not None:
            _mask_scores(scores, attention_mask[..., start : start + chunk_length], LOG2_E)

        weights = _cast(scores, softmax_dtype)
        previous, maximum = maximum, weights.amax(dim=1, keepdim=True)
        if previous is not None:
            maximum = torch.maximum(previous, maximum)
        weights = weights.sub_(maximum).exp2_()
        chunk_normalizer = weights.sum(dim=1, keepdim=True)
        if output_attentions:  # before `_chunk_output` overwrites the weights
            probabilities = (weights / chunk_normalizer).permute(0, 3, 2, 1).to(query.dtype)
        chunk_output = _chunk_output(values, chunk, weights, dtype, products, in_blocks)
        if previous is None:
            normalizer, output = chunk_normalizer, _cast(chunk_output, softmax_dtype)
        else:
            decay = (previous - maximum).exp2_()
            normalizer = normalizer.mul_(decay).add_(chunk_normalizer)
            output = output.mul_(decay.view(batch_size, -1, 1)).add_(chunk_output)
        start += chunk_length

    if in_blocks:
        output = output.sum(dim=0, keepdim=True)
    output = output.div_(normalizer.view(batch_size, -1, 1))
    output = (output / values.rank).to(query.dtype)
    if constant_a:
        output = output.view(batch_size, query_length, num_heads, values.rank, -1)
        output = torch.einsum("bqhrd,rh->bqhd", output, constant_a_v).flatten(1, 2)
    elif constant_b:
        output = torch.matmul(output, values.constant_b)
    return output.unflatten(1, (query_length, num_heads)), probabilities


def _chunk_scores(
    keys: FactorChunks, chunk: slice, flat_query: torch.Tensor, num_heads: int, buffer: torch.Tensor | None
) -> torch.Tensor:
    """
    Scores [batch, seq, query_length, h] of a chunk of tokens with `flat_query` [batch, d, query_length * h], or
    [batch, R_K * d, query_length * h] into which a constant A_K has been multiplied.
    """
    a, b = keys.read(chunk)
    b = _cast(b, flat_query.dtype).expand(flat_query.shape[0], -1, -1, -1)
    if keys.constant_a is not None:
        return torch.bmm(b.flatten(2), flat_query).view(*b.shape[:2], -1, num_heads)
    return _weighted_scores(b, flat_query, _of_each_head(_cast(a, flat_query.dtype), num_heads), buffer)


def _chunk_output(
    values: FactorChunks,
    chunk: slice,
    weights: torch.Tensor,
    dtype: torch.dtype,
    buffer: torch.Tensor | None,
    in_blocks: bool,
) -> torch.Tensor:
    """
    The sum over a chunk of tokens of weights [batch, seq, query_length, h] times V, without the constant factors of values:
    [batch, query_length * h, d], with a constant A_V [..., R_V * d], with a constant B_V [..., R_V].
    """
    num_heads = weights.shape[3]
    a, b = values.read(chunk)
    if values.constant_a is not None:
        weights, b = weights.flatten(2).to(dtype).unsqueeze(0), b.to(dtype).flatten(2).unsqueeze(2)
        return _sums_over_tokens(weights, b, in_blocks)
    if values.constant_b is not None:
        a = _of_each_head(a, num_heads).unsqueeze(3)
        sums = [weights.mul(a.select(2, rank)).sum(dim=1).flatten(1) for rank in range(values.rank)]
        return torch.stack(sums, dim=-1)
    weighted = _weighted(weights, _of_each_head(_cast(a, dtype), num_heads), buffer)
    return _sums_over_tokens(weighted, _cast(b, dtype), in_blocks)


def _is_short(key_length: int) -> bool:
    """Whether [`_attend_to_few_tokens`] attends to a cache of this length."""
    # Under torch.compile the length must not decide what is computed: each case would be a graph of its own.
    return key_length < MIN_TOKENS_IN_BLOCKS and key_length <= FACTOR_SPACE_CHUNK and not torch.compiler.is_compiling()


def _causal_mask(query_length: int, key_length: int, device: torch.device) -> torch.Tensor:
    """[1, 1, query_length, key_length], the last query being aligned with the last key."""
    mask = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return mask.tril(key_length - query_length)[None, None]


def _attend_to_few_tokens(
    query: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    values: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """
    [`factor_space_attention`] over a short cache, where the overhead of operators dominates: one product with B serves all ranks,
    and the softmax is one operator. `keys` and `values` are A [batch, seq, R, h_kv] and B [batch or 1, seq, R, d] in any dtype.
    """
    batch_size, query_length, num_heads, _ = query.shape
    key_length, k_rank, v_rank, dtype = keys[0].shape[1], keys[0].shape[2], values[0].shape[2], matmul_dtype(query)
    if attention_mask is None and query_length > 1:
        attention_mask = _causal_mask(query_length, key_length, query.device)
    # [batch, d, query_length * h]
    flat_query = (_cast(query, dtype) * (scaling / k_rank)).flatten(1, 2).transpose(1, 2)
    a, b = _ranks_with_tokens(*keys, query, dtype)
    scores = torch.bmm(b, flat_query).view(batch_size, key_length, k_rank, query_length, num_heads).mul_(a)
    scores = _sum_over_ranks(scores, 2)
    if attention_mask is not None:
        _mask_scores(scores, attention_mask[..., :key_length], 1.0)
    weights = torch.softmax(_cast(scores, torch.promote_types(dtype, torch.float32)), dim=1)
    a, b = _ranks_with_tokens(*values, query, dtype)
    weights = (a * _cast(weights, dtype).unsqueeze(2)).reshape(batch_size, key_length * v_rank, -1)
    output = torch.bmm(weights.transpose(1, 2), b).mul_(1 / v_rank)
    return _cast(output, query.dtype).view(query.shape)


def _ranks_with_tokens(
    a: torch.Tensor, b: torch.Tensor, query: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [batch, seq, R, 1, h] and B [batch, seq * R, d]."""
    a = _of_each_head(_cast(a, dtype), query.shape[2]).unsqueeze(3)
    # Cast apart from A, B is contiguous.
    b = _cast(b, dtype).flatten(1, 2)
    return a, b if len(b) == len(query) else b.expand(len(query), -1, -1)


def _mask_scores(scores: torch.Tensor, attention_mask: torch.Tensor, base: float) -> None:
    """Scores [batch, seq, query_length, h] times `base`, in place; a mask as [`factor_space_attention`] takes it."""
    mask = attention_mask.permute(0, 3, 2, 1)
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    else:
        scores.add_((mask.to(scores.dtype) * base).clamp(min=torch.finfo(scores.dtype).min))


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # `to` costs the overhead of an operator even where there is nothing to do.
    return x if x.dtype == dtype else x.to(dtype)


def _of_each_head(a: torch.Tensor | None, num_heads: int) -> torch.Tensor | None:
    """A [..., R, h_kv] as [..., R, h]."""
    groups = 1 if a is None else num_heads // a.shape[-1]
    return a if groups == 1 else a.repeat_interleave(groups, dim=-1)


def _ranks_first(a: torch.Tensor) -> torch.Tensor:
    """A [batch, seq, R, h] as [R, batch, seq, 1, h]."""
    return a.permute(2, 0, 1, 3).unsqueeze(3)


def _sum_over_ranks(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum over a dimension, in place of its first part: for few ranks faster than `sum`."""
    total, *others = x.unbind(dim)
    for other in others:
        total.add_(other)
    return total


def _weighted_scores(
    b: torch.Tensor, query: torch.Tensor, a: torch.Tensor, buffer: torch.Tensor | None
) -> torch.Tensor:
    """
    The sum over ranks of A times B Q, [batch, seq, query_length, h], from B [batch, seq, R, d], Q [batch, d, query_length * h]
    and A [batch, seq, R, h]; computed in `buffer` [R or more, batch, seq, query_length * h] if that is given.
    """
    rank, out = b.shape[2], None if buffer is None else buffer[: b.shape[2]]
    if len(b) == 1:
        out = torch.bmm(b[0].transpose(0, 1), query.expand(rank, -1, -1), out=None if out is None else out[:, 0])
        out = out.unsqueeze(1)
    else:
        out = query.new_empty(rank, *b.shape[:2], query.shape[2]) if out is None else out
        for r in range(rank):
            out[r].baddbmm_(b.select(2, r), query, beta=0)
    return _sum_over_ranks(out.unflatten(3, (-1, a.shape[3])).mul_(_ranks_first(a)), 0)


def _weighted(weights: torch.Tensor, a: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """
    Weights [batch, seq, query_length, h] times A [batch, seq, R, h], as [R, batch, seq, query_length * h]; in `buffer` if that is
    given, whose first rank may be the memory of the weights.
    """
    if buffer is None:
        return (weights * _ranks_first(a)).to(a.dtype).flatten(3)
    buffer = buffer[: a.shape[2]]
    for r in reversed(range(len(buffer))):  # the first rank last
        torch.mul(weights, a.select(2, r).unsqueeze(2), out=buffer[r].view(weights.shape))
    return buffer


def _sums_over_tokens(weights: torch.Tensor, features: torch.Tensor, in_blocks: bool) -> torch.Tensor:
    """
    The sum over ranks and tokens of weights^T features [batch, n, d], from weights [R, batch, seq, n] and features
    [batch, seq, R, d]. `in_blocks`, for a single sequence: the sums of `BLOCKS` blocks of its tokens [BLOCKS, n, d].
    """
    rank, batch_size, length, _ = weights.shape
    if batch_size == 1 and not in_blocks:
        return torch.bmm(weights[:, 0].transpose(1, 2), features[0].transpose(0, 1)).sum(dim=0, keepdim=True)
    total = weights.new_zeros(BLOCKS if in_blocks else batch_size, weights.shape[3], features.shape[3])
    whole = length // BLOCKS * BLOCKS if in_blocks else 0
    for r in range(rank):
        rank_weights, rank_features = weights[r], features.select(2, r)
        if whole:
            blocks, block_features = (x[0, :whole].unflatten(0, (BLOCKS, -1)) for x in (rank_weights, rank_features))
            total.baddbmm_(blocks.transpose(1, 2), block_features)
        if whole < length:
            rest = rank_weights[:, whole:].transpose(1, 2), rank_features[:, whole:]
            total[:batch_size].baddbmm_(*rest)
    return total
