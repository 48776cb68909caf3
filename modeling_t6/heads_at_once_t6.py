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
"""Queries, keys and values out of the one product of a layer's factors, and its gradient, without a pass between them"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .factor_product_t6 import is_exporting
from .factors_t6 import Factors, apply_rotary_pos_emb, form_heads, norm_key_heads
from .flash_tpa_t6 import DTYPES, LAUNCH_OPTIONS, MAX_HEAD_DIM, is_supported, operator_name, power_of_2


try:
    import triton

    from .heads_kernels_t6 import form_at_once_kernel, gradients_at_once_kernel
except ImportError:
    triton = None


# Whether kernels do it on GPUs that have them; a benchmark may switch it off.
AT_ONCE = True
# The kernel that forms heads keeps all rows of B in registers; that of gradients fills tiles up to this.
MAX_RANK = 16
# Sizes with which they are started, one warp each: numbers of a tile of heads, half as many for norms of heads of more than so many
# rows of B, whose products are kept in registers, too; for gradients, the tokens of a program, one after another, stages (one less is
# read ahead, of so many bytes of shared memory at most), and heads of a tile.
TILE = 256
MAX_RANK_OF_TILE = 8
TOKENS = 8
STAGES = 3
AHEAD_BYTES = 48 * 1024
HEADS = 16


@dataclass
class UnsplitFactors:
    """
    The factors of one layer that are still as their product left them.

    Attributes:
        product: [batch, seq, width], B_Q, B_K and B_V before RoPE, A_Q, A_K and A_V, and up to 7 columns of zeros, as
            `FactorProduct` has them, without gaps.
        b_q: `None`; or, for TPA-KVonly, whose product has no B_Q and A_Q, as in [`Factors`].
        rotation: cos and sin [batch or 1, seq, rotary_dim] of the tokens.
        key_rows: `None`; there is no cache.
    """

    product: torch.Tensor
    b_q: torch.Tensor | None
    rotation: tuple[torch.Tensor, torch.Tensor]
    key_rows: None = None


def project_at_once(
    module: nn.Module, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> UnsplitFactors | None:
    """
    The factors of tokens that attend over heads, without a cache, if kernels take them from there to heads at once; else `None`, and
    `TensorProductFactors.project` goes by way of [`Factors`], which every variant has.
    """
    if not (
        _has_fitting_factors(module) and _has_kernels(hidden_states) and _has_fitting_norms(module, hidden_states)
    ):
        return None
    product = module.project_together(hidden_states)
    if product is None:
        return None
    b_q = None
    if module.q_rank is None:
        b_q = module.q_proj(hidden_states).unflatten(-1, (-1, module.head_dim))
    return UnsplitFactors(product, b_q, position_embeddings)


def _has_fitting_factors(module: nn.Module) -> bool:
    """Whether nothing but RoPE, and norms of heads, stands between a layer's projections and its heads, and the kernels have room."""
    return (
        (module.has_plain_factors or module.has_normed_heads)
        and max(module.q_rank or 0, module.k_rank, module.v_rank) <= MAX_RANK
        and module.head_dim <= MAX_HEAD_DIM
    )


def _has_fitting_norms(module: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether kernels can take the weights of a layer's norms, if it has any, in place of the norms."""
    norms = (module.q_norm, module.k_norm) if module.has_normed_heads else ()
    return (
        module.has_plain_norms()
        and all(
            norm.weight.device == hidden_states.device and norm.weight.dtype in DTYPES and norm.weight.is_contiguous()
            for norm in norms
        )
        and len({norm.variance_epsilon for norm in norms}) < 2  # the kernels take one for both
    )


def _has_kernels(hidden_states: torch.Tensor) -> bool:
    """Whether kernels take the product of `hidden_states`: under autocast it is in the half precision of that."""
    return (
        AT_ONCE
        and triton is not None
        and hidden_states.is_cuda
        and hidden_states.dtype in DTYPES
        and hidden_states.numel() > 0
        and type(hidden_states) is torch.Tensor
        # `torch.func` gives no memory to read; torch.compile, which does, cannot ask.
        and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())
        and not is_exporting()
        and is_supported(hidden_states.device, False)
    )


def heads_at_once(module: nn.Module, factors: UnsplitFactors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q [batch, seq, h, d], rotated, K, rotated, and V [batch, seq, h_kv, d]."""
    ranks = module.q_rank or 0, module.k_rank, module.v_rank
    num_heads = tuple(
        getattr(module, f"{name}_a_proj").out_features // rank if rank else 0 for name, rank in zip("qkv", ranks)
    )
    q_weight, k_weight, eps = None, None, 0.0
    if module.has_normed_heads:
        q_weight = module.q_norm.weight if factors.b_q is None else None
        k_weight, eps = module.k_norm.weight, module.k_norm.variance_epsilon
    query, key, value = HeadsAtOnce.apply(
        factors.product, q_weight, k_weight, *factors.rotation, ranks, num_heads, module.head_dim, eps
    )
    if factors.b_q is not None:
        query = module.queries(Factors(value.dtype, b_q=factors.b_q, query_rotation=factors.rotation)).to(value.dtype)
    return query, key, value


class HeadsAtOnce(torch.autograd.Function):
    """
    The heads of a product [batch, seq, width] of factors, of `ranks` and `num_heads` for queries, keys and values; of queries there may
    be none, with a rank of 0 and no norm. With weights [d], queries and keys have RMS norms before RoPE.
    """

    @staticmethod
    def forward(
        ctx, product, q_weight, k_weight, cos, sin, ranks: tuple[int, ...], num_heads: tuple[int, ...], head_dim: int, eps: float
    ):  # fmt: skip
        ctx.save_for_backward(product, q_weight, k_weight, cos, sin)
        ctx.sizes = ranks, num_heads, head_dim, eps
        form = _form_op if torch.compiler.is_compiling() else _form
        return tuple(form(product, q_weight, k_weight, cos, sin, *ctx.sizes))

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # with `create_graph` it is differentiated again
            heads = form_in_pytorch(*inputs, *ctx.sizes)
            wanted = [x for x, is_wanted in zip(inputs[:3], ctx.needs_input_grad) if is_wanted]
            heads, gradients = zip(*(pair for pair in zip(heads, gradients) if pair[0].requires_grad))
            results = iter(torch.autograd.grad(heads, wanted, gradients, create_graph=True))
            results = [next(results) if is_wanted else None for is_wanted in ctx.needs_input_grad[:3]]
        else:
            gradients_of = _gradient_op if torch.compiler.is_compiling() else _gradient
            product, *sums = gradients_of(*gradients, *inputs, *ctx.sizes)
            weights = (None, None)
            if sums:
                weights = [w if w is None else x.to(w.dtype) for x, w in zip(sums[0].unbind(), inputs[1:3])]
            results = [product, *weights]
        return *results, None, None, None, None, None, None


def split_factors(
    product: torch.Tensor, ranks: tuple[int, ...], num_heads: tuple[int, ...], head_dim: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of a product [batch, seq, width], A [batch, seq, R, h] and B [batch, seq, R, d] of queries, keys and values: views."""
    b_sizes, a_sizes = [rank * head_dim for rank in ranks], [rank * heads for rank, heads in zip(ranks, num_heads)]
    *factors, _ = product.split([*b_sizes, *a_sizes, product.shape[-1] - sum(b_sizes + a_sizes)], dim=-1)
    a = [x.unflatten(-1, sizes).transpose(-1, -2) for x, *sizes in zip(factors[3:], num_heads, ranks)]
    return a, [x.unflatten(-1, (rank, head_dim)) for x, rank in zip(factors[:3], ranks)]


def form_in_pytorch(
    product: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    ranks: tuple[int, ...],
    num_heads: tuple[int, ...],
    head_dim: int,
    eps: float,
) -> list[torch.Tensor]:
    """What the kernels compute."""
    a, b = split_factors(product, ranks, num_heads, head_dim)
    for index, weight in enumerate((q_weight, k_weight)):
        if weight is not None:
            a[index], b[index] = norm_key_heads(a[index], b[index], weight, eps)
        b[index] = apply_rotary_pos_emb(b[index], cos, sin).to(product.dtype)  # angles are wider under autocast
    return [form_heads(*pair) for pair in zip(a, b)]


def _launch(
    kernel,
    num_programs: int,
    tensors: tuple[torch.Tensor | None, ...],
    numbers: list[int | float],
    sizes: tuple[list[int], list[int], int],
    **constants: int,
) -> None:
    """Starts a kernel with so many programs for each of queries, if there are any, keys and values."""
    ranks, num_heads, head_dim = sizes
    with torch.cuda.device_of(tensors[0]):
        kernel[(num_programs, 3 if ranks[0] else 2)](
            *tensors, *numbers, Q_RANK=ranks[0], K_RANK=ranks[1], V_RANK=ranks[2],
            NUM_HEADS=num_heads[0], NUM_KV_HEADS=num_heads[1], HEAD_DIM=head_dim, num_warps=1, **LAUNCH_OPTIONS, **constants,
        )  # fmt: skip


def _angles(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Without gaps, and by how many numbers those of a sequence lie behind those of the one before."""
    return cos.contiguous(), sin.contiguous(), cos[0].numel() if len(cos) > 1 else 0


def _form(
    product: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    ranks: list[int],
    num_heads: list[int],
    head_dim: int,
    eps: float,
) -> list[torch.Tensor]:
    product, (cos, sin, angles_stride) = product.contiguous(), _angles(cos, sin)
    heads = [product.new_empty(*product.shape[:2], number, head_dim) for number in num_heads]
    (batch_size, length, width), block_d = product.shape, power_of_2(head_dim, 16)
    tile = TILE // 2 if k_weight is not None and max(ranks[:2]) > MAX_RANK_OF_TILE else TILE
    block_t = max(1, tile // block_d)
    _launch(
        form_at_once_kernel, -(-batch_size * length // block_t), (product, cos, sin, q_weight, k_weight, *heads),
        [batch_size * length, length, angles_stride, None if k_weight is None else eps], (ranks, num_heads, head_dim),
        WIDTH=width, ROTARY_DIM=cos.shape[-1], BLOCK_T=block_t, BLOCK_D=block_d,
    )  # fmt: skip
    return heads


def _gradient(
    q_gradient: torch.Tensor,
    k_gradient: torch.Tensor,
    v_gradient: torch.Tensor,
    product: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    ranks: list[int],
    num_heads: list[int],
    head_dim: int,
    eps: float,
) -> list[torch.Tensor]:
    """
    That of the product and, with norms, of both weights, float32 [2, d]: sums over programs, in the same order each time. Without
    queries, the first is undefined.
    """
    product, (cos, sin, angles_stride) = product.contiguous(), _angles(cos, sin)
    gradients = [x if x.stride(-1) == 1 else x.contiguous() for x in (q_gradient, k_gradient, v_gradient)]
    strides = [stride for gradient in gradients for stride in gradient.stride()[:3]]
    result, rotary_dim = product.new_empty(product.shape), cos.shape[-1]
    batch_size, length, width = product.shape
    num_programs, sums = batch_size * -(-length // TOKENS), None
    if k_weight is not None:
        sums = product.new_empty(2, num_programs, head_dim, dtype=torch.float32)
    block_half, block_rest = power_of_2(rotary_dim // 2, 16), power_of_2(max(1, head_dim - rotary_dim), 16)
    # Of each head its gradient and A. In float32 Triton reads nothing ahead for products.
    token_bytes = -(-max(num_heads) // HEADS) * HEADS * (2 * block_half + block_rest + 16) * product.element_size()
    _launch(
        gradients_at_once_kernel, num_programs, (*gradients, product, cos, sin, q_weight, k_weight, result, sums),
        [length, angles_stride, None if sums is None else eps, *strides], (ranks, num_heads, head_dim),
        WIDTH=width, ROTARY_DIM=rotary_dim, TOKENS=TOKENS, BLOCK_H=HEADS,
        STAGES=min(STAGES, 1 + AHEAD_BYTES // token_bytes) if product.element_size() == 2 else 1,
        BLOCK_HALF=block_half, BLOCK_REST=block_rest,
    )  # fmt: skip
    return [result] if sums is None else [result, sums.sum(1)]


def _operator(function: Callable, fake: Callable) -> Callable:
    """
    `function` as an operator that torch.compile takes whole, with the shapes that `fake` returns. A call of one that
    `torch.library.custom_op` makes takes the host as long again as all that the function does.
    """
    name = operator_name(fake.__name__.removeprefix("_"))
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, fake)
    return getattr(torch.ops.t6, name.removeprefix("t6::")).default


def _heads_at_once(product, q_weight, k_weight, cos, sin, ranks, num_heads, head_dim, eps):
    return [product.new_empty(*product.shape[:2], heads, head_dim) for heads in num_heads]


def _heads_at_once_gradient(
    q_gradient, k_gradient, v_gradient, product, q_weight, k_weight, cos, sin, ranks, num_heads, head_dim, eps
):
    result = product.new_empty(product.shape)
    return [result] if k_weight is None else [result, product.new_empty(2, head_dim, dtype=torch.float32)]


# Without torch.compile the functions are called as they are.
_form_op = _operator(_form, _heads_at_once)
_gradient_op = _operator(_gradient, _heads_at_once_gradient)
