"""
Random cases of the kernels from the product of a layer's factors to its heads and back, and the reference in float64.

    python -m tests.modeling_t6.heads_cases 0 96      # on a GPU: that many seeds, in as many processes as cores
"""

import math
import random

import torch

from modeling_t6.heads_at_once_t6 import HeadsAtOnce

from .random_cases import run_cases


# Of the norm: sums of up to 256 products in float32, rounded once to the dtype.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# With norms, a head whose terms cancel has fewer digits than they, and gradients are sums of terms that were rounded before.
NORMED_TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def random_shape(choose: random.Random) -> tuple:
    """
    Batch, tokens, ranks of queries, keys and values, heads, heads of keys and values, head_dim, rotated of it: ranks to 16, head sizes
    that are no powers of two, tokens that fill no tile, and now and then no factors of queries.
    """
    kv_heads, half = choose.randint(1, 5), choose.choice((1, 3, 8, 16, 20, 24, 32))
    ranks = tuple(choose.choice((1, 2, 3, 6, 8, 9, 16)) for _ in range(3))
    head_dim = 2 * half + choose.choice((0, 0, 0, 1, 7, 20))
    batch, tokens, heads = choose.randint(1, 3), choose.randint(1, 18), kv_heads * choose.randint(1, 5)
    if choose.random() < 0.2:
        ranks, heads = (0, *ranks[1:]), 0
    return batch, tokens, ranks, heads, kv_heads, head_dim, 2 * half


def inputs_of(
    shape: tuple, dtype: torch.dtype, normed: bool = False, device: str = "cpu"
) -> tuple[list[torch.Tensor | None], tuple]:
    """
    The product of a layer's factors, whose padding is NaN, the weights of its norms, and the angles of its tokens; and the sizes, last
    an epsilon that shows.
    """
    batch, tokens, ranks, heads, kv_heads, head_dim, rotary_dim = shape
    num_heads = heads, kv_heads, kv_heads
    columns = sum(rank * (h + head_dim) for rank, h in zip(ranks, num_heads))
    product = torch.full((batch, tokens, -(-columns // 8) * 8), math.nan, dtype=dtype, device=device)
    product[..., :columns] = torch.randn(batch, tokens, columns)
    angles = torch.rand(batch if tokens % 2 else 1, tokens, rotary_dim // 2) * 7
    cos, sin = (x.repeat(1, 1, 2).to(device, dtype) for x in (angles.cos(), angles.sin()))
    weights = [(torch.rand(head_dim) + 0.5).to(device, dtype) if normed and rank else None for rank in ranks[:2]]
    return [product, *weights, cos, sin], (ranks, num_heads, head_dim, 0.05)


def reference(product, q_weight, k_weight, cos, sin, ranks, num_heads, head_dim, eps) -> list[torch.Tensor]:
    """Q, K and V from the equations: heads are formed, normalised, and pairs of features turned as complex numbers."""
    half, turned = cos.shape[-1] // 2, torch.complex(cos, sin)[..., : cos.shape[-1] // 2].unsqueeze(2)
    b_sizes, a_sizes = [r * head_dim for r in ranks], [r * h for r, h in zip(ranks, num_heads)]
    *factors, _ = product.split([*b_sizes, *a_sizes, product.shape[-1] - sum(b_sizes + a_sizes)], dim=-1)
    results = []
    for index, (rank, heads) in enumerate(zip(ranks, num_heads)):
        b, a = factors[index].unflatten(-1, (rank, head_dim)), factors[index + 3].unflatten(-1, (heads, rank))
        formed = torch.einsum("nthr,ntrd->nthd", a, b) / rank
        weight = (q_weight, k_weight, None)[index]
        if weight is not None:
            formed = weight * formed / (formed.square().mean(-1, keepdim=True) + eps).sqrt()
        if index < 2:
            pairs = torch.complex(formed[..., :half], formed[..., half : 2 * half]) * turned
            formed = torch.cat([pairs.real, pairs.imag, formed[..., 2 * half :]], dim=-1)
        results.append(formed)
    return results


def leaves_of(inputs: list[torch.Tensor | None], dtype: torch.dtype | None = None) -> list[torch.Tensor | None]:
    """Of the inputs those that have gradients, in that dtype: the product, and the norms' weights, if any."""
    return [None if x is None else x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in inputs[:3]]


def error(result: torch.Tensor, expected: torch.Tensor, size: float = 0.0) -> float:
    """
    As a part of the norm, or of `size` if that is larger; where the expected is zero, the norm itself; infinite where something is not
    a number, which no maximum hides.
    """
    ratio = ((result.double() - expected).norm() / max(expected.norm().item(), size, 1e-30)).item()
    return math.inf if math.isnan(ratio) else ratio


def results_and_expected(
    inputs: list[torch.Tensor | None],
    sizes: tuple,
    leaves: list[torch.Tensor | None] | None = None,
    num_outputs: int = 3,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """
    Queries, keys and values, and the gradients of what has any: by kernels, in float64, and how large the numbers are of whose rounding
    their errors are made. The gradient of a norm's weight is a sum over tokens and heads, which may cancel; its terms may not.
    """
    leaves, wide = leaves_of(inputs) if leaves is None else leaves, leaves_of(inputs, torch.float64)
    for index, weight in enumerate(wide[1:], 1):  # one of each token and head, whose gradients are the terms
        if weight is not None:
            places = *inputs[0].shape[:2], sizes[1][index - 1]
            wide[index] = weight.detach().expand(*places, -1).clone().requires_grad_()
    expected = reference(*wide, *(x.double() for x in inputs[3:]), *sizes)[:num_outputs]
    heads = HeadsAtOnce.apply(*leaves, *inputs[3:], *sizes)[:num_outputs]
    # As attention returns them, heads before tokens.
    gradients = [torch.randn_like(x.transpose(1, 2).contiguous()).transpose(1, 2) for x in heads]
    leaves, wide = ([x for x in tensors if x is not None] for tensors in (leaves, wide))
    results = torch.autograd.grad(heads, leaves, gradients)
    of_product, *terms = torch.autograd.grad(expected, wide, [x.double() for x in gradients])
    exact = [*expected, of_product]
    scales = [x.norm().item() for x in (*exact, *terms)]
    return [*heads, *results], [*exact, *(x.sum((0, 1, 2)) for x in terms)], scales


def random_errors(seed: int, device: str, normed: bool = True) -> tuple[tuple, torch.dtype, list[float]]:
    """A random shape and dtype, and the errors of Q, K, V and of the gradients of the product and of both weights."""
    choose = random.Random(seed)
    shape, dtype = random_shape(choose), choose.choice(list(TOLERANCES))
    torch.manual_seed(seed)
    results, expected, scales = results_and_expected(*inputs_of(shape, dtype, normed, device))
    columns = sum(rank * (heads + shape[5]) for rank, heads in zip(shape[2], (shape[3], shape[4], shape[4])))
    assert not results[3][..., columns:].any(), "the gradient of the padding is not zero"
    return shape, dtype, [error(*numbers) for numbers in zip(results, expected, scales)]


def _run(seed: int) -> tuple[str, tuple, float, float]:
    torch.set_num_threads(1)
    empty = torch.Tensor.new_empty
    # What no kernel writes is not a number.
    torch.Tensor.new_empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan)
    try:
        normed = seed % 4 > 0
        shape, dtype, errors = random_errors(seed, "cuda", normed)
    finally:
        torch.Tensor.new_empty = empty
    name = f"{dtype}, {'normed' if normed else 'plain'}"
    return name, shape, max(errors), (NORMED_TOLERANCES if normed else TOLERANCES)[dtype]


if __name__ == "__main__":
    run_cases(_run)
