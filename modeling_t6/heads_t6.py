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
"""Heads formed from factors for prompts and training: (1 / R) A^T B for every token, by a kernel, or fused by torch.compile"""

import torch

from .factors_t6 import form_heads
from .flash_tpa_t6 import DTYPES, LAUNCH_OPTIONS, MAX_HEAD_DIM, is_supported, operator_name, power_of_2


try:
    import triton

    from .heads_kernels_t6 import form_kernel, gradients_kernel
except ImportError:
    triton = None


# Whether kernels form heads and their gradients on GPUs that run them; a benchmark may switch it off.
KERNELS = True
# Under torch.compile, heads of up to this rank are sums of outer products, which it fuses; 0: always matrix products.
MAX_OUTER_PRODUCTS = 8
MAX_RANK = 64
# Launch sizes of the kernels: elements of a tile of heads and of a tile of their gradients, and warps.
FORM_TILE = 8192
GRADIENT_TILE = 2048
WARPS = 2


def form_all_heads(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """
    `form_heads` for the tokens of a prompt or a training step: heads [batch, seq, h, d] from A [batch, seq, R, h] and
    B [batch, seq, R, d], one of which may be constant.

    torch.compile fuses a sum of outer products with its surroundings, such as RoPE and the layout that attention needs. In
    eager mode a kernel forms the heads: PyTorch's batched products of so few rows take many times as long as writing the heads.
    """
    if a.dim() == b.dim() and len(b) < len(a):  # a constant B, rotated to the same positions in all sequences
        b = b.expand(len(a), -1, -1, -1)
    if torch.compiler.is_compiling():
        return form_heads(a, b) if a.shape[-2] > MAX_OUTER_PRODUCTS else SumOfOuterProducts.apply(a, b)
    return FormedHeads.apply(a, b) if _has_kernels(a, b) else form_heads(a, b)


class FormedHeads(torch.autograd.Function):
    """`form_heads` by a kernel."""

    @staticmethod
    def forward(ctx, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return _form(a, b)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _gradients(gradient, *ctx.saved_tensors)


class SumOfOuterProducts(torch.autograd.Function):
    """
    `form_heads` as a sum that torch.compile fuses. Its gradients are not left to autograd: those of outer products are
    sums over all features and all heads for each rank, which cost more than the forward pass gains.
    """

    @staticmethod
    def forward(ctx, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        rank = a.shape[-2]
        return sum(a[..., r, :, None] * b[..., r, None, :] for r in range(rank)) / rank

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _gradients(gradient, *ctx.saved_tensors)


def _has_kernels(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take A, B and, if given, the gradient of the heads: not constant, of one dtype, on a GPU."""
    a, b = tensors[:2]
    return (
        KERNELS
        and triton is not None
        and a.dim() == b.dim() == 4
        and a.dtype in DTYPES
        and all(tensor.is_cuda and tensor.dtype == a.dtype and tensor.numel() > 0 for tensor in tensors)
        and a.shape[-2] <= MAX_RANK
        and b.shape[-1] <= MAX_HEAD_DIM
        and type(a) is type(b) is torch.Tensor
        and not torch.is_autocast_enabled(a.device.type)
        # Tensors of `torch.func` have no memory; torch.compile cannot trace the question.
        and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())
        and is_supported(a.device, False)
    )


def _gradients(gradient: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of A and B, from that of the heads [batch, seq, h, d]."""
    is_compiling = torch.compiler.is_compiling()
    # With `create_graph` the gradients must be differentiable.
    if _has_kernels(a, b, gradient) and (is_compiling or not torch.is_grad_enabled()):
        a_gradient, b_gradient = (_gradients_op if is_compiling else _gradients_in_triton)(gradient, a, b)
        return a_gradient.transpose(-1, -2), b_gradient
    a_gradient = torch.matmul(gradient, b.transpose(-1, -2).to(gradient.dtype)).transpose(-1, -2) / a.shape[-2]
    b_gradient = torch.matmul(a.to(gradient.dtype), gradient) / a.shape[-2]
    # The gradient of a constant is a sum over tokens.
    return a_gradient.sum_to_size(a.shape).to(a.dtype), b_gradient.sum_to_size(b.shape).to(b.dtype)


def _sizes(a: torch.Tensor, b: torch.Tensor, tile: int) -> dict[str, int]:
    num_heads, block_d = a.shape[-1], power_of_2(b.shape[-1], 16)
    return {
        "RANK": a.shape[-2],
        "NUM_HEADS": num_heads,
        "HEAD_DIM": b.shape[-1],
        "BLOCK_R": power_of_2(a.shape[-2], 16),
        "BLOCK_H": min(max(16, tile // block_d), power_of_2(num_heads, 16)),
        "BLOCK_D": block_d,
        "num_warps": WARPS,
        **LAUNCH_OPTIONS,
    }


def _form(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (batch_size, num_tokens, _, num_heads), head_dim = a.shape, b.shape[-1]
    b = b if b.stride(-1) == 1 else b.contiguous()
    formed, sizes = a.new_empty(batch_size, num_tokens, num_heads, head_dim), _sizes(a, b, FORM_TILE)
    with torch.cuda.device_of(a):
        form_kernel[(batch_size * num_tokens, -(-num_heads // sizes["BLOCK_H"]))](
            a, b, formed, num_tokens, *a.stride(), *b.stride()[:3], **sizes
        )
    return formed


def _gradients_in_triton(
    gradient: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of A as [batch, seq, h, R], the layout of its projection, and of B [batch, seq, R, d]."""
    batch_size, num_tokens, rank, num_heads = a.shape
    b, gradient = (x if x.stride(-1) == 1 else x.contiguous() for x in (b, gradient))
    a_gradient = a.new_empty(batch_size, num_tokens, num_heads, rank)
    b_gradient = b.new_empty(b.shape)
    with torch.cuda.device_of(a):
        gradients_kernel[(batch_size * num_tokens,)](
            gradient,
            a,
            b,
            a_gradient,
            b_gradient,
            num_tokens,
            *gradient.stride()[:3],
            *a.stride(),
            *b.stride()[:3],
            **_sizes(a, b, GRADIENT_TILE),
        )
    return a_gradient, b_gradient


# For torch.compile, which cannot trace the function.
_gradients_op = torch.library.custom_op(operator_name("head_gradients"), _gradients_in_triton, mutates_args=())


@_gradients_op.register_fake
def _(gradient, a, b):
    return a.new_empty(*a.shape[:2], a.shape[3], a.shape[2]), b.new_empty(b.shape)
