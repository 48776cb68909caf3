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

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .factor_product_t6 import is_exporting
from .factors_t6 import apply_rotary_pos_emb, form_heads
from .flash_tpa_t6 import DTYPES, MAX_HEAD_DIM, is_supported, operator_name, power_of_2


try:
    import triton

    from .heads_kernels_t6 import form_at_once_kernel, gradients_at_once_kernel
except ImportError:
    triton = None


# Whether kernels do it on GPUs that have them; a benchmark may switch it off.
AT_ONCE = True
# The kernels keep the rows of B, and of its gradient, in registers.
MAX_RANK = 8
# Sizes with which they are started: numbers of a tile for each warp, warps, and heads that gradients are read ahead.
NUMBERS_OF_A_WARP = 256
WARPS = 1
AHEAD = 3


class Part(NamedTuple):
    """Where the product has the factors of queries, keys or values: B [R, d] and A [h, R], as columns of its rows."""

    rank: int
    num_heads: int
    b_start: int
    a_start: int


@dataclass
class UnsplitFactors:
    """
    The factors of one layer that are still as their product left them.

    Attributes:
        product: [batch, seq, width], B_Q, B_K and B_V before RoPE, A_Q, A_K and A_V, and up to 7 columns of zeros, as
            `FactorProduct` has them, without gaps.
        rotation: cos and sin [batch or 1, seq, rotary_dim] of the tokens.
        key_rows: `None`; there is no cache.
    """

    product: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor]
    key_rows: None = None


def project_at_once(
    module: nn.Module, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> UnsplitFactors | None:
    """
    The factors of tokens that attend over heads, without a cache, if kernels take them from there to heads at once; else `None`, and
    `TensorProductFactors.project` goes by way of [`Factors`], which every variant has.
    """
    if not (_has_plain_factors(module) and _has_kernels(hidden_states)):
        return None
    product = module.project_together(hidden_states)
    return None if product is None else UnsplitFactors(product, position_embeddings)


def _has_plain_factors(module: nn.Module) -> bool:
    """Whether nothing but RoPE stands between the projections of a layer and its heads, and the kernels have room."""
    return (
        module.q_rank is not None
        and not (module.noncontextual_a or module.noncontextual_b or module.shared_b)
        and module.c_factor_dim is None
        and module.head_factor_act is None
        and not module.qk_norm
        and max(module.q_rank, module.k_rank, module.v_rank) <= MAX_RANK
        and module.head_dim <= MAX_HEAD_DIM
    )


def _has_kernels(hidden_states: torch.Tensor) -> bool:
    """Whether kernels take what is computed of `hidden_states`."""
    device = hidden_states.device
    return (
        AT_ONCE
        and triton is not None
        and hidden_states.is_cuda
        and hidden_states.dtype in DTYPES
        and hidden_states.numel() > 0
        and type(hidden_states) is torch.Tensor
        and not torch.is_autocast_enabled(device.type)
        # `torch.func` gives no memory to read; torch.compile, which does, cannot ask.
        and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())
        and not is_exporting()
        and is_supported(device, False)
    )


def heads_at_once(module: nn.Module, factors: UnsplitFactors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q [batch, seq, h, d], rotated, K, rotated, and V [batch, seq, h_kv, d]."""
    ranks = module.q_rank, module.k_rank, module.v_rank
    outputs = (getattr(module, f"{name}_a_proj").out_features for name in "qkv")
    num_heads = tuple(size // rank for size, rank in zip(outputs, ranks))
    return HeadsAtOnce.apply(factors.product, *factors.rotation, ranks, num_heads, module.head_dim)


class HeadsAtOnce(torch.autograd.Function):
    """The heads of a product [batch, seq, width] of factors, of `ranks` and `num_heads` for queries, keys and values."""

    @staticmethod
    def forward(ctx, product, cos, sin, ranks: tuple[int, ...], num_heads: tuple[int, ...], head_dim: int):
        ctx.save_for_backward(product, cos, sin)
        ctx.sizes = ranks, num_heads, head_dim
        form = _form_op if torch.compiler.is_compiling() else _form
        return tuple(form(product, cos, sin, ranks, num_heads, head_dim))

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        product, cos, sin = ctx.saved_tensors
        if torch.compiler.is_compiling():
            gradient = _gradient_op(*gradients, product, cos, sin, *ctx.sizes)
        elif torch.is_grad_enabled():  # with `create_graph` it is differentiated again
            heads = form_in_pytorch(product, cos, sin, *ctx.sizes)
            (gradient,) = torch.autograd.grad(heads, product, gradients, create_graph=True)
        else:
            gradient = _gradient(*gradients, product, cos, sin, *ctx.sizes)
        return gradient, None, None, None, None, None


def parts_of(ranks: tuple[int, ...], num_heads: tuple[int, ...], head_dim: int) -> list[Part]:
    """Those of queries, keys and values."""
    starts = list(itertools.accumulate([rank * head_dim for rank in ranks], initial=0))
    a_starts = itertools.accumulate((rank * heads for rank, heads in zip(ranks, num_heads)), initial=starts[-1])
    return [Part(*sizes) for sizes in zip(ranks, num_heads, starts[:-1], a_starts)]


def form_in_pytorch(
    product: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, ranks: tuple, num_heads: tuple, head_dim: int
) -> list[torch.Tensor]:
    """What the kernels compute."""
    heads = []
    for part in parts_of(ranks, num_heads, head_dim):
        b = product.narrow(-1, part.b_start, part.rank * head_dim).unflatten(-1, (part.rank, head_dim))
        a = product.narrow(-1, part.a_start, part.rank * part.num_heads).unflatten(-1, (part.num_heads, part.rank))
        rotated = b if len(heads) == 2 else apply_rotary_pos_emb(b, cos, sin)
        heads.append(form_heads(a.transpose(-1, -2), rotated))
    return heads


def _constants(part: Part, index: int, width: int, rotary_dim: int, head_dim: int) -> dict[str, int | bool]:
    """What the kernels are compiled for, of queries (`index` 0), keys (1) or values (2), which are not rotated."""
    block_d = power_of_2(head_dim, 16)
    return {
        "A_START": part.a_start,
        "B_START": part.b_start,
        "WIDTH": width,
        "RANK": part.rank,
        "NUM_HEADS": part.num_heads,
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": rotary_dim,
        "ROTATES": index < 2,
        "BLOCK_T": max(1, NUMBERS_OF_A_WARP * WARPS // block_d),
        "BLOCK_D": block_d,
        "num_warps": WARPS,
    }


def _angles(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Without gaps, and by how many numbers those of a sequence lie behind those of the one before."""
    return cos.contiguous(), sin.contiguous(), cos[0].numel() if len(cos) > 1 else 0


def _form(
    product: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    ranks: list[int],
    num_heads: list[int],
    head_dim: int,
) -> list[torch.Tensor]:
    (batch_size, length, width), rotary_dim = product.shape, cos.shape[-1]
    product, num_tokens, heads = product.contiguous(), batch_size * length, []
    cos, sin, angles_stride = _angles(cos, sin)
    with torch.cuda.device_of(product):
        for index, part in enumerate(parts_of(ranks, num_heads, head_dim)):
            constants = _constants(part, index, width, rotary_dim, head_dim)
            heads.append(product.new_empty(batch_size, length, part.num_heads, head_dim))
            form_at_once_kernel[(-(-num_tokens // constants["BLOCK_T"]),)](
                product, cos, sin, heads[-1], num_tokens, length, angles_stride, **constants
            )
    return heads


def _gradient(
    q_gradient: torch.Tensor,
    k_gradient: torch.Tensor,
    v_gradient: torch.Tensor,
    product: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    ranks: list[int],
    num_heads: list[int],
    head_dim: int,
) -> torch.Tensor:
    (batch_size, length, width), rotary_dim = product.shape, cos.shape[-1]
    product, num_tokens = product.contiguous(), batch_size * length
    cos, sin, angles_stride = _angles(cos, sin)
    result, parts = product.new_empty(product.shape), parts_of(ranks, num_heads, head_dim)
    with torch.cuda.device_of(product):
        for index, (part, gradient) in enumerate(zip(parts, (q_gradient, k_gradient, v_gradient))):
            constants = _constants(part, index, width, rotary_dim, head_dim)
            end = part.a_start + part.rank * part.num_heads
            gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
            gradients_at_once_kernel[(-(-num_tokens // constants["BLOCK_T"]),)](
                gradient, product, cos, sin, result, num_tokens, length, angles_stride, *gradient.stride()[:3],
                PADDING=width - end if index == 2 else 0, AHEAD=AHEAD, **constants,
            )  # fmt: skip
    return result


# torch.compile takes the operators whole; without it the functions are called as they are, which costs the host less.
_form_op = torch.library.custom_op(operator_name("heads_at_once"), _form, mutates_args=())
_gradient_op = torch.library.custom_op(operator_name("heads_at_once_gradient"), _gradient, mutates_args=())


@_form_op.register_fake
def _(product, cos, sin, ranks, num_heads, head_dim):
    return [product.new_empty(*product.shape[:2], heads, head_dim) for heads in num_heads]


@_gradient_op.register_fake
def _(q_gradient, k_gradient, v_gradient, product, cos, sin, ranks, num_heads, head_dim):
    return product.new_empty(product.shape)
