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
"""Factors of queries, keys and values: projected from hidden states, and read from the rows of a cache (paper, section 3.1)"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache_t6 import cached_lengths, factor_layouts
from .configuration_t6 import T6Config
from .factor_product_t6 import (
    FactorProduct,
    FactorProjections,
    RowProduct,
    is_extended,
    is_overhead_bound,
    without_autocast,
)
from .tensor_parallel_t6 import softmax_over_heads


# Up to this rank, [`norm_key_heads`] is written as sums, which torch.compile fuses. Matrix products it would not fuse.
MAX_FUSED_RANK = 8


class T6RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        """T6RMSNorm is equivalent to LlamaRMSNorm, but keeps float64 inputs in float64."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        if (
            hidden_states.is_cuda
            and type(hidden_states) is torch.Tensor
            and input_dtype == self.weight.dtype
            # torch.compile fuses the operators below, and `torch.func` has rules for them.
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
        ):  # one kernel instead of eight, and two instead of a dozen in the backward pass
            with without_autocast(hidden_states.device):
                return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        hidden_states = hidden_states.to(torch.promote_types(input_dtype, torch.float32))
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def inverse_rms_of_heads(a: torch.Tensor, b: torch.Tensor, eps: float) -> torch.Tensor:
    """
    1 / sqrt(mean square + eps) of each head (1 / R) A^T B, [batch, seq, 1, h], in float32 or float64. No head is formed: its mean square
    is A^T (B B^T) A / (R^2 d), where B B^T is only R x R.

    Args:
        a: [batch, seq, R, h].
        b: [batch, seq, R, d], or constant [R, d].
    """
    rank, head_dim = b.shape[-2:]
    with without_autocast(a.device):
        wide_a, wide_b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        if torch.compiler.is_compiling() and rank <= MAX_FUSED_RANK:
            products = (wide_b[..., :, None, :] * wide_b[..., None, :, :]).sum(-1)
            mixed_a = (products[..., None] * wide_a[..., None, :, :]).sum(-2)
        else:
            products = torch.matmul(wide_b, wide_b.transpose(-1, -2))
            mixed_a = torch.matmul(products, wide_a)
        variance = (wide_a * mixed_a).sum(-2, keepdim=True) / (rank**2 * head_dim)
        # Where the terms of a head cancel, rounding may leave a negative number.
        return torch.rsqrt(variance.clamp(min=0) + eps)


def norm_key_heads(
    a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Applies the RMS norm of the key heads K = (1 / R) A^T B, before RoPE, to their factors: the root mean square of a head is
    one scalar per token and head, by which A is divided, and the weight [d] multiplies B. The normalised factors form the
    normalised keys exactly, and RoPE may still rotate B.

    Returns:
        A and B, in the shapes of `a` and of `b`: see [`inverse_rms_of_heads`].
    """
    return (a * inverse_rms_of_heads(a, b, eps)).to(a.dtype), weight * b


class T6KeyHeadRMSNorm(T6RMSNorm):
    """[`norm_key_heads`] as a layer."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return norm_key_heads(a, b, self.weight, self.variance_epsilon)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Rotates half the hidden dims of the input."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Applies RoPE to the first `rotary_dim` features. Rotating the B factors rotates the heads that they form (Theorem 3.1).

    Args:
        x: [batch, seq, n, head_dim], n factors or heads, or constant factors [n, head_dim].
        cos, sin: [batch or 1, seq, rotary_dim].

    Returns:
        [batch or 1, seq, n, head_dim].
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    rotary_dim, x_rot = cos.shape[-1], x
    is_partial = rotary_dim < x.shape[-1]
    if is_partial:
        x_rot = x[..., :rotary_dim]
    with without_autocast(x.device):
        x_rot = (x_rot * cos) + (rotate_half(x_rot) * sin)
        return torch.cat((x_rot, x[..., rotary_dim:].expand(*x_rot.shape[:-1], -1)), dim=-1) if is_partial else x_rot


def rotate_in_place(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """[`apply_rotary_pos_emb`] in place, which takes fewer operators; not for constant factors."""
    rotary_dim, cos, sin = cos.shape[-1], cos.unsqueeze(2), sin.unsqueeze(2)
    x_rot = x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]
    with without_autocast(x.device):
        rotated = rotate_half(x_rot)
        x_rot.mul_(cos).addcmul_(rotated, sin)


def form_heads(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """
    (1 / R) A^T B: heads [batch, seq, h, d] of A [batch, seq, R, h] and B [batch, seq, R, d]. One of them may be constant,
    [R, h] or [R, d].
    """
    return torch.matmul(a.transpose(-1, -2), b) / a.shape[-2]


def activate_head_factors(a: torch.Tensor, activation: str | None, head_mesh=None) -> torch.Tensor:
    """
    Sigmoid of A [batch, seq, R, h], or its softmax over the heads ("nonlinear head factors", appendix G; the research
    code uses the sigmoid). The cache holds the activated A. `head_mesh` is the device mesh over which tensor parallelism
    splits the heads, if it does.
    """
    if activation is None:
        return a
    if activation == "sigmoid":
        return torch.sigmoid(a)
    softmax_dtype = torch.promote_types(a.dtype, torch.float32)
    if head_mesh is not None:
        return softmax_over_heads(a.to(softmax_dtype), head_mesh).to(a.dtype)
    return torch.softmax(a, dim=-1, dtype=softmax_dtype).to(a.dtype)


def third_order_features(bc: torch.Tensor, b_dim: int) -> torch.Tensor:
    """
    vec(b (x) c) of appendix C: from b and c concatenated, [..., d_b + d_c], the columns of the matrix b c^T concatenated,
    [..., d_c * d_b].
    """
    b, c = bc[..., :b_dim], bc[..., b_dim:]
    return (c[..., :, None] * b[..., None, :]).flatten(-2)


@dataclass
class Factors:
    """
    The factors of one layer in one forward pass. Without a cache they are those of the `seq` new tokens. With a cache, keys
    and values are `key_rows` and `value_rows`, which `TensorProductFactors.unpack` reads; `a_k`, `b_k`, `a_v` and `b_v` are
    then those of the new tokens, or `None`, unless they are constants.

    Attributes:
        dtype: the dtype of the embeddings, in which rows are stored and queries attend to them. Under autocast the factors
            themselves may have another.
        a_q: A_Q [batch, seq, R_Q, h]; `None` for queries without factors (TPA-KVonly).
        b_q: B_Q [batch, seq, R_Q, d]; for TPA-KVonly the queries before normalisation and RoPE [batch, seq, h, d].
        a_k, a_v: A_K and A_V [batch, seq, R, h_kv], or constant [R, h_kv].
        b_k, b_v: B_K and B_V [batch, seq, R, d] as they are cached, or constant [R, d]; third-order factors are b and c
            concatenated, [..., d_b + d_c]. `TensorProductFactors.features` turns them into the B that K and V are made of.
        query: Q [batch, seq, h, d], normalised and rotated, where a kernel has formed it: `a_q` and `b_q` are then `None`.
        query_rotation: cos and sin [batch or 1, seq, rotary_dim] of the new tokens; `None` if `b_q` is already rotated.
        key_rotation: cos and sin [batch or 1, key_length, rotary_dim] if `b_k` is cached before RoPE, else `None`.
        key_rows, value_rows: [batch, 1, key_length, width] as the cache stores them.
        lengths: int [1] on the device, the number of valid rows of a static cache; `None` if all are valid.
    """

    dtype: torch.dtype
    a_q: torch.Tensor | None = None
    b_q: torch.Tensor | None = None
    a_k: torch.Tensor | None = None
    b_k: torch.Tensor | None = None
    a_v: torch.Tensor | None = None
    b_v: torch.Tensor | None = None
    query: torch.Tensor | None = None
    query_rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    key_rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    key_rows: torch.Tensor | None = None
    value_rows: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


class TensorProductFactors(FactorProjections):
    """
    The part of an attention layer that computes factors: from hidden states to A and B, their rows in a cache, and back.
    [`T6Attention`] adds attention and the output projection.
    """

    def __init__(self, config: T6Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        # Copies, since each decoded token reads them, and reading a field of a configuration costs as much as a small operator.
        self.head_dim, self.b_dim, self.c_factor_dim = config.head_dim, config.b_dim, config.c_factor_dim
        self.noncontextual_a, self.noncontextual_b = config.noncontextual_a, config.noncontextual_b
        self.shared_b, self.rotates_on_read = config.shared_b, config.rotates_on_read
        self.head_factor_act, self.qk_norm = config.head_factor_act, config.qk_norm
        # Whether every cached row holds both A and B, as K and V are formed from them.
        self.caches_both_factors = not (
            config.noncontextual_a or config.noncontextual_b or config.shared_b or config.c_factor_dim
        )
        self.q_rank = config.q_rank
        self.k_rank, self.v_rank = config.ranks(layer_idx)
        # Whether the outputs of the projections are the factors, or queries, but for RoPE, or for norms of heads and RoPE.
        is_plain = self.caches_both_factors and config.head_factor_act is None
        self.has_plain_factors = is_plain and not config.qk_norm
        self.has_normed_heads = is_plain and config.qk_norm == "heads"
        self.key_layout, self.value_layout = factor_layouts(config, layer_idx)
        self.head_mesh = None  # the device mesh over which tensor parallelism splits the heads

        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        # The outputs of an A projection are head-major, [h, R]; those of a B projection rank-major, [R, d].
        if self.q_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, num_heads * self.head_dim, bias=config.attention_bias)
        for name, rank, heads in (
            ("q", self.q_rank, num_heads), ("k", self.k_rank, num_kv_heads), ("v", self.v_rank, num_kv_heads)
        ):  # fmt: skip
            if rank is not None and config.noncontextual_a:
                setattr(self, f"{name}_a", nn.Parameter(torch.empty(rank, heads)))
            elif rank is not None:
                setattr(self, f"{name}_a_proj", self._factor_proj(heads, rank))
            if rank is None or (name == "v" and config.shared_b):
                continue
            if config.noncontextual_b:
                setattr(self, f"{name}_b", nn.Parameter(torch.empty(rank, self.head_dim)))
            else:
                setattr(self, f"{name}_b_proj", self._factor_proj(rank, config.b_dim))
            if config.c_factor_dim is not None:
                setattr(self, f"{name}_c_proj", self._factor_proj(rank, config.c_factor_dim))

    def _add_qk_norms(self) -> None:
        """Called by [`T6Attention`] after `o_proj`: saved optimizer states depend on the order of the parameters."""
        if self.config.qk_norm:
            self.q_norm = T6RMSNorm(self.head_dim, eps=self.config.rms_norm_eps)
            key_norm = T6KeyHeadRMSNorm if self.config.qk_norm == "heads" else T6RMSNorm
            self.k_norm = key_norm(self.head_dim, eps=self.config.rms_norm_eps)

    def has_plain_norms(self) -> bool:
        """Whether norms of heads, if any, are what their weights say: without hooks, adapters, and weights that come when called."""
        norms = ((self.q_norm, T6RMSNorm), (self.k_norm, T6KeyHeadRMSNorm)) if self.has_normed_heads else ()
        return all(
            type(norm) is cls and not is_extended(norm) and type(norm.weight) in (nn.Parameter, torch.Tensor)
            for norm, cls in norms
        )

    def _factor_proj(self, n1: int, n2: int) -> nn.Linear:
        """A projection to a factor [n1, n2], with the bound of Xavier's initialisation of its weight [hidden, n1, n2]."""
        hidden_size = self.config.hidden_size
        proj = nn.Linear(hidden_size, n1 * n2, bias=self.config.attention_bias)
        proj.initializer_bound = (6 / ((hidden_size + n1) * n2)) ** 0.5  # fans: hidden * n2 and n1 * n2
        return proj

    def _head_factors(self, name: str, projected: dict[str, torch.Tensor]) -> torch.Tensor:
        """A_Q [batch, seq, R, h], A_K or A_V [batch, seq, R, h_kv], activated; or the constant [R, h or h_kv]."""
        if self.noncontextual_a:
            return getattr(self, f"{name}_a")
        a = projected[f"{name}_a_proj"]
        a = a.unflatten(-1, (-1, getattr(self, f"{name}_rank"))).transpose(-1, -2)
        return activate_head_factors(a, self.head_factor_act, self.head_mesh)

    def _feature_factors(self, name: str, projected: dict[str, torch.Tensor]) -> torch.Tensor:
        """B_Q, B_K or B_V before RoPE, [batch, seq, R, d] or constant [R, d]; b and c concatenated if there is a third factor."""
        if self.noncontextual_b:
            return getattr(self, f"{name}_b")
        b = projected[f"{name}_b_proj"].unflatten(-1, (-1, self.b_dim))
        if self.c_factor_dim is None:
            return b
        c = projected[f"{name}_c_proj"].unflatten(-1, (-1, self.c_factor_dim))
        return torch.cat([b, c], dim=-1)

    def project(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        key_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Factors:
        """
        Computes the factors of new tokens.

        Args:
            hidden_states: [batch, seq, hidden_size].
            position_embeddings: cos and sin [batch or 1, seq, rotary_dim] of these tokens.
            key_position_embeddings: cos and sin [batch or 1, key_length, rotary_dim] of all rows of a cache that holds B_K
                before RoPE.
        """
        projected = self.project_factors(hidden_states)
        if self.q_rank is None:
            a_q, b_q = None, self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        else:
            a_q, b_q = self._head_factors("q", projected), self._feature_factors("q", projected)
        a_k, a_v = self._head_factors("k", projected), self._head_factors("v", projected)
        b_k = self._feature_factors("k", projected)
        if self.qk_norm == "heads":
            a_k, b_k = self.k_norm(a_k, b_k)
        elif self.qk_norm:
            b_k = self.k_norm(b_k)
        b_v = b_k if self.shared_b else self._feature_factors("v", projected)
        query_rotation, key_rotation = position_embeddings, None
        if self.rotates_on_read:
            key_rotation = position_embeddings if key_position_embeddings is None else key_position_embeddings
        elif a_q is None or self.qk_norm or not is_overhead_bound(hidden_states):
            b_k = apply_rotary_pos_emb(b_k, *position_embeddings)
        else:  # B_Q and B_K rotated together take fewer operators
            both = apply_rotary_pos_emb(torch.cat([b_q, b_k], dim=2), *position_embeddings)
            b_q, b_k = both.split_with_sizes([self.q_rank, self.k_rank], dim=2)
            query_rotation = None
        return Factors(
            position_embeddings[0].dtype, a_q, b_q, a_k, b_k, a_v, b_v,
            query_rotation=query_rotation, key_rotation=key_rotation,
        )  # fmt: skip

    def project_and_cache(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache,
        key_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Factors:
        """[`project`], and appends the rows of the new tokens to the cache: the factors then have the rows of all tokens."""
        factors = self.project_to_rows(hidden_states, position_embeddings)
        if factors is None:
            factors = self.project(hidden_states, position_embeddings, key_position_embeddings)
        self.update_cache(factors, cache)
        return factors

    def project_to_rows(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> Factors | None:
        """
        [`project`] straight to rows of the cache: `key_rows` and `value_rows` of the new tokens in place of A_K, B_K, A_V and
        B_V. `None` unless [`packed_factors`] has packed a [`RowProduct`].
        """
        product, dtype = self.packed.product, position_embeddings[0].dtype
        if not (self.packed.is_valid and isinstance(product, RowProduct)) or torch.is_grad_enabled():
            return None
        outputs, tokens = product(hidden_states), hidden_states.shape[:2]
        if outputs.dtype != dtype:
            outputs = outputs.to(dtype)
        _, key_rows, value_rows, a_q = outputs.unsqueeze(1).split_with_sizes(product.sizes, dim=-1)
        # B_Q, and B_K, with which the key row begins: one RoPE for both, unless queries are normalised before it.
        b = outputs[..., : (self.q_rank + self.k_rank) * self.head_dim].view(*tokens, -1, self.head_dim)
        a_q, b_q, query_rotation = a_q.view(*tokens, self.q_rank, -1), b[:, :, : self.q_rank], None
        if self.has_normed_heads:
            a_k, b = self.key_layout.unpack(key_rows)
            a_k.mul_(inverse_rms_of_heads(a_k, b, self.k_norm.variance_epsilon))
            b.mul_(self.k_norm.weight)
            query_rotation = position_embeddings
        rotate_in_place(b, *position_embeddings)
        return Factors(dtype, a_q, b_q, key_rows=key_rows, value_rows=value_rows, query_rotation=query_rotation)

    def _product_of(self, projections: dict[str, nn.Linear], other: FactorProduct | None) -> FactorProduct:
        # On a GPU kernels take the outputs of a `FactorProduct`. Norms are applied to rows in place, which rotated ones do not allow.
        can_norm = self.has_normed_heads and not self.key_layout.rotates and self.has_plain_norms()
        if self.q_rank is not None and (self.has_plain_factors or can_norm) and self.k_b_proj.weight.is_cpu:
            return RowProduct(self, projections, other)
        return super()._product_of(projections, other)

    def project_tokens(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """
        The outputs of the projections as [`store_factors`] takes them, before activation, norms and RoPE.

        Args:
            hidden_states: [tokens, hidden_size].

        Returns:
            A_Q, B_Q, A_K, B_K, A_V and B_V: A [tokens, h, R] and B [tokens, R, d]. With constant A factors A_Q is [R_Q, h], and
            A_K and A_V are `None`. For TPA-KVonly A_Q is `None`, and B_Q is the queries [tokens, h, d].
        """
        projected, factors = self.project_factors(hidden_states), []
        for name, rank in (("q", self.q_rank), ("k", self.k_rank), ("v", self.v_rank)):
            if rank is None:
                factors += [None, self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))]
                continue
            if self.noncontextual_a:
                factors.append(self.q_a if name == "q" else None)
            else:
                factors.append(projected[f"{name}_a_proj"].unflatten(-1, (-1, rank)))
            factors.append(projected[f"{name}_b_proj"].unflatten(-1, (rank, -1)))
        return tuple(factors)

    def update_cache(self, factors: Factors, cache: Cache) -> None:
        """Appends the rows of the new tokens to the cache, and sets `key_rows` and `value_rows` to those of all tokens."""
        with without_autocast(factors.b_q.device):
            key_rows, value_rows = factors.key_rows, factors.value_rows
            if key_rows is None:
                key_rows = self.key_layout.pack(factors.a_k, factors.b_k).to(factors.dtype)
                value_rows = self.value_layout.pack(factors.a_v, factors.b_v).to(factors.dtype)
            factors.key_rows, factors.value_rows = cache.update(key_rows, value_rows, self.layer_idx)
        factors.lengths = cached_lengths(cache, self.layer_idx)

    def unpack(
        self, factors: Factors, key_rows: torch.Tensor | None, value_rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        A_K, B_K, A_V and B_V of rows [batch, 1, key_length, width], or, if there are none, of `factors`, from which
        constants are taken in any case.
        """
        a_k, b_k, a_v, b_v = factors.a_k, factors.b_k, factors.a_v, factors.b_v
        if key_rows is None:
            return a_k, b_k, a_v, b_v
        cached_a_k, cached_b_k = self.key_layout.read(key_rows, factors.dtype)
        cached_a_v, cached_b_v = self.value_layout.read(value_rows, factors.dtype)
        if not self.noncontextual_a:
            a_k, a_v = cached_a_k, cached_a_v
        if not self.noncontextual_b:
            b_k, b_v = cached_b_k, cached_b_k if self.shared_b else cached_b_v
        return a_k, b_k, a_v, b_v

    def features(
        self,
        b: torch.Tensor,
        rows: slice = slice(None),
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        The B that heads are formed from, [batch, seq, R, d], from the B that is cached: for most models the same.

        Args:
            b: as it is cached, [batch, rows, R, d], or constant [R, d].
            rows: which rows of the cache these are.
            rotation: cos and sin of all rows of a cache that holds B_K before RoPE.
        """
        if rotation is not None:
            cos, sin = rotation
            b = apply_rotary_pos_emb(b, cos[:, rows], sin[:, rows])
        return b if self.c_factor_dim is None else third_order_features(b, self.b_dim)

    def queries(self, factors: Factors, form: Callable = form_heads) -> torch.Tensor:
        """Q [batch, seq, h, d], normalised and rotated; `form` is [`form_heads`] or another function that computes the same."""
        if factors.query is not None:
            return factors.query
        a_q, b_q = factors.a_q, factors.b_q
        query_states = b_q
        if a_q is not None:
            if not self.qk_norm and factors.query_rotation is not None:
                b_q = apply_rotary_pos_emb(b_q, *factors.query_rotation)
            query_states = form(a_q, self.features(b_q))
        if self.qk_norm:
            query_states = self.q_norm(query_states)
        if self.qk_norm or a_q is None:
            # RoPE rotates blocks of d_b features: a head has d_c of them (theorem C.1), or one without a third factor.
            blocks = query_states.unflatten(-1, (-1, self.b_dim)).flatten(2, 3)
            query_states = apply_rotary_pos_emb(blocks, *factors.query_rotation).view_as(query_states)
        return query_states
