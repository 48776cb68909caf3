"""
Heads formed from the factors of many tokens on a GPU, and the gradients of these factors: the kernels beside PyTorch's batched products.

    python benchmarks/heads_gpu.py --output heads.json

Then queries, keys and values of a layer at once, out of the product of its factors, and the product's gradient, with RoPE: without the
norms of formed heads, and with them (`qk_norm="heads"`), beside what torch.compile makes of the same, forward and backward together.

Each time is one call out of a CUDA graph. Shares are of the bandwidth of copies in the same run, of what must be read and written
once: factors and heads, and for gradients both of the factors'. `--sweep` and `--sweep-layer` try other sizes of the launch.
"""

import argparse
import functools
import itertools
import os

from options import add_output, describe, save


SHAPES = {  # batch, tokens, rank, heads, head_dim
    "t6-small, Q": (16, 1024, 6, 34, 64),
    "t6-small, K or V": (16, 1024, 2, 34, 64),
    "t6-medium, Q": (8, 1024, 6, 47, 64),
    "t6-xl, Q": (1, 32768, 6, 78, 64),
    "t6-xl, K or V": (1, 32768, 2, 78, 64),
    "8B, Q": (1, 8192, 16, 32, 128),
}
LAYERS = {  # batch, tokens, ranks, heads, heads of keys and values, head_dim
    "25M": (32, 1024, (6, 2, 2), 8, 8, 64),
    "25M, rank 1 of V": (32, 1024, (6, 2, 1), 8, 8, 64),
    "t6-small": (16, 1024, (6, 2, 2), 34, 34, 64),
    "t6-medium": (8, 1024, (6, 2, 2), 47, 47, 64),
    "t6-xl": (1, 32768, (6, 2, 2), 78, 78, 64),
    "8B": (1, 8192, (16, 2, 2), 32, 32, 128),
    "8B, rank 1": (1, 8192, (8, 1, 1), 32, 32, 128),
}


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument(
        "--sweep",
        nargs="*",
        choices=SHAPES,
        default=[],
        metavar="SHAPE",
        help="of these: numbers of a tile, warps",
    )
    parser.add_argument(
        "--sweep-layer",
        nargs="*",
        choices=LAYERS,
        default=[],
        metavar="LAYER",
        help="of these: sizes as in heads_at_once_t6",
    )
    parser.add_argument(
        "--layers", nargs="*", choices=LAYERS, default=list(LAYERS), metavar="LAYER", help="these alone"
    )
    parser.add_argument(
        "--shapes", nargs="*", choices=SHAPES, default=list(SHAPES), metavar="SHAPE", help="these alone"
    )
    add_output(parser, plots=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

from contextlib import AbstractContextManager
from unittest import mock

import torch
from gpu import copies_larger_than_l2, copy_bandwidth, graph_seconds, machine

from modeling_t6 import heads_at_once_t6, heads_t6
from modeling_t6.factors_t6 import apply_rotary_pos_emb, form_heads, norm_key_heads


def factors_of(batch: int, tokens: int, rank: int, heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """A and B as slices of one product, and the gradient of the heads, as attention returns it."""
    product = torch.randn(batch, tokens, rank * (heads + head_dim), device="cuda", dtype=torch.bfloat16)
    b, a = product.split([rank * head_dim, rank * heads], dim=-1)
    gradient = torch.randn(batch, heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16)
    return (
        a.unflatten(-1, (heads, rank)).transpose(-1, -2),
        b.unflatten(-1, (rank, head_dim)),
        gradient.transpose(1, 2),
    )


def products(gradient: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return gradient @ b.transpose(-1, -2), a @ gradient


def measure_shape(shape: tuple[int, ...], bandwidth: float, with_products: bool) -> dict:
    batch, tokens, rank, heads, head_dim = shape
    factors, formed = batch * tokens * rank * (heads + head_dim) * 2, batch * tokens * heads * head_dim * 2
    inputs = [factors_of(*shape) for _ in range(max(2, min(4, copies_larger_than_l2(formed))))]
    ways = {
        "heads": lambda a, b, g: heads_t6._form(a, b),
        "gradients": lambda a, b, g: heads_t6._gradients_in_triton(g, a, b),
    }
    if with_products:
        ways |= {
            "heads by products": lambda a, b, g: form_heads(a, b),
            "gradients by products": lambda a, b, g: products(g, a, b),
        }
    result = {}
    for name, way in ways.items():
        seconds = graph_seconds([functools.partial(way, *x) for x in inputs])
        num_bytes = formed + factors * (1 if name.startswith("heads") else 2)
        result[name] = {"seconds": seconds, "share": num_bytes / seconds / bandwidth}
    return result


def layer_inputs(shape: tuple, normed: bool) -> tuple[list[torch.Tensor], tuple]:
    """The gradients of Q, K and V, laid out as attention's operators do it, and the arguments that form these."""
    batch, tokens, ranks, heads, kv_heads, head_dim = shape
    num_heads, options = (heads, kv_heads, kv_heads), {"device": "cuda", "dtype": torch.bfloat16}
    product = torch.randn(batch, tokens, -(-factor_columns(shape) // 8) * 8, **options)
    weights = [torch.ones(head_dim, **options) if normed else None for _ in range(2)]
    angles = torch.rand(1, tokens, head_dim, **options)
    gradients = [torch.randn(batch, tokens, number, head_dim, **options) for number in num_heads]
    return gradients, (product, *weights, angles, angles, ranks, num_heads, head_dim, 1e-6)


def form_as_before(product, q_weight, k_weight, cos, sin, ranks, num_heads, head_dim, eps) -> list[torch.Tensor]:
    """Normed heads as layers form them without the kernels that do it at once."""
    (a_q, a_k, a_v), (b_q, b_k, b_v) = heads_at_once_t6.split_factors(product, ranks, num_heads, head_dim)
    query = torch.nn.functional.rms_norm(heads_t6.form_all_heads(a_q, b_q), (head_dim,), q_weight, eps)
    a_k, b_k = norm_key_heads(a_k, b_k, k_weight, eps)
    key = heads_t6.form_all_heads(a_k, apply_rotary_pos_emb(b_k, cos, sin))
    return [apply_rotary_pos_emb(query, cos, sin), key, heads_t6.form_all_heads(a_v, b_v)]


def compiled_pass(gradients: list[torch.Tensor], rest: tuple, form) -> None:
    leaves = [x.detach().requires_grad_() for x in rest[:3]]
    torch.autograd.grad(form(*leaves, *rest[3:]), leaves, gradients)


def factor_columns(shape: tuple) -> int:
    _, _, ranks, heads, kv_heads, head_dim = shape
    return sum(rank * (number + head_dim) for rank, number in zip(ranks, (heads, kv_heads, kv_heads)))


def measure_layer(shape: tuple, bandwidth: float, normed: bool, repeats: int = 7, with_compiled: bool = False) -> dict:
    """Times of a layer's heads and of the gradient of its product, each pass as a whole."""
    batch, tokens, ranks, heads, kv_heads, head_dim = shape
    columns = factor_columns(shape)
    product_bytes, formed_bytes = (batch * tokens * n * 2 for n in (columns, (heads + 2 * kv_heads) * head_dim))
    inputs = [layer_inputs(shape, normed) for _ in range(max(2, min(4, copies_larger_than_l2(formed_bytes))))]
    ways = {
        "heads": (lambda g, rest: heads_at_once_t6._form(*rest), product_bytes + formed_bytes),
        "gradient": (lambda g, rest: heads_at_once_t6._gradient(*g, *rest), 2 * product_bytes + formed_bytes),
    }
    if with_compiled:
        torch._dynamo.reset()
        form = torch.compile(form_as_before, dynamic=False)
        ways["both by torch.compile"] = (
            lambda g, rest: compiled_pass(g, rest, form), 3 * product_bytes + 2 * formed_bytes
        )  # fmt: skip
    result = {}
    for name, (way, num_bytes) in ways.items():
        seconds = graph_seconds([functools.partial(way, *x) for x in inputs], repeats)
        result[name] = {"seconds": seconds, "share": num_bytes / seconds / bandwidth}
    return result


SIZES = ("TILE", "TOKENS", "STAGES", "HEADS")  # of `heads_at_once_t6`


def launched_with(sizes: tuple[int, ...]) -> AbstractContextManager:
    """In the block, kernels are started with other sizes."""
    return mock.patch.multiple(heads_at_once_t6, **dict(zip(SIZES, sizes)))


def compile_layer(job: tuple) -> None:
    """Fills Triton's cache on disk: for a few tokens, which a compiled kernel does not ask about."""
    (_, _, *shape), sizes, normed = job
    gradients, rest = layer_inputs((2, 64, *shape), normed)
    with launched_with(sizes):
        heads_at_once_t6._form(*rest)
        heads_at_once_t6._gradient(*gradients, *rest)


def measure_layers(layers: list[str], sweep: list[str], bandwidth: float) -> dict:
    results = {}
    others = [
        *itertools.product((256,), (4, 8, 16, 32), (2, 3, 4), (16,)),
        (64, 8, 1, 16),
        (128, 8, 3, 32),
        (512, 2, 2, 16),
    ]
    if sweep:
        jobs = [(LAYERS[name], sizes, normed) for name in sweep for sizes in others for normed in (False, True)]
        processes = min(16, len(os.sched_getaffinity(0)))
        with torch.multiprocessing.get_context("spawn").Pool(processes) as pool:
            pool.map(compile_layer, jobs, chunksize=1)
    for name, normed in itertools.product(layers, (False, True)):
        title, shape = f"{name}, normed" if normed else name, LAYERS[name]
        results[title] = measure_layer(shape, bandwidth, normed, with_compiled=normed)
        cells = (f"{way} {row['seconds'] * 1e6:8.1f} us ({row['share']:4.0%})" for way, row in results[title].items())
        print(f"{title + ', Q, K and V':36}", "; ".join(cells), flush=True)
        for sizes in others if name in sweep else ():
            with launched_with(sizes):
                row = results[f"{title} {sizes}"] = measure_layer(shape, bandwidth, normed, 3)
            times = ", ".join(f"{x['seconds'] * 1e6:.1f} us" for x in row.values())
            print(f"    tile, tokens, stages, heads {sizes}: {times}", flush=True)
    return results


def measure(args: argparse.Namespace) -> dict:
    bandwidth, results = copy_bandwidth(), {}
    print(f"{machine()}; bfloat16; copies move {bandwidth / 1e12:.2f} TB/s")
    for name in args.shapes:
        shape = SHAPES[name]
        results[name] = measure_shape(shape, bandwidth, True)
        cells = (f"{way} {row['seconds'] * 1e6:8.1f} us ({row['share']:4.0%})" for way, row in results[name].items())
        print(f"{name:18}", "; ".join(cells), flush=True)
        if name in args.sweep:
            plain = heads_t6.FORM_TILE, heads_t6.GRADIENT_TILE, heads_t6.WARPS
            for sizes in itertools.product((1024, 2048, 4096, 8192), (1, 2, 4, 8)):
                heads_t6.FORM_TILE = heads_t6.GRADIENT_TILE = sizes[0]
                heads_t6.WARPS = sizes[1]
                row = results[f"{name} {sizes}"] = measure_shape(shape, bandwidth, False)
                print(f"    tile, warps {sizes}: " + ", ".join(f"{x['seconds'] * 1e6:.1f} us" for x in row.values()))
            heads_t6.FORM_TILE, heads_t6.GRADIENT_TILE, heads_t6.WARPS = plain
    layers = measure_layers(args.layers, args.sweep_layer, bandwidth)
    return {"machine": machine(), "copy_bandwidth": bandwidth, "results": results, "layers": layers}


def main() -> None:
    args = parse_args()
    save(measure(args), args.output)


if __name__ == "__main__":
    main()
