"""
Attention of one decoding step on a GPU: FlashTPA against torch's SDPA over cached keys and values.

    python benchmarks/decode_attention_gpu.py --output decode.json     # measure
    python benchmarks/decode_attention_gpu.py --plot decode.json decode.png

Every time is one call out of a CUDA graph of calls that read different caches. MHA, GQA and MQA get the fastest of
cuDNN's, FlashAttention's and the memory-efficient kernel, with the queries of a group of heads as its query tokens
where that is faster. Shares are of the bandwidth of copies, measured in the same run, each cached number counted once.
"""

import argparse

from options import add_output, describe, draw, save
from shapes import CacheShape


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    add_output(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import functools
import itertools

import torch
from gpu import copies_larger_than_l2, copy_bandwidth, graph_seconds, machine, random_cache
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from modeling_t6.cache_t6 import FactorLayout
from modeling_t6.factor_space_t6 import factor_space_attention
from modeling_t6.flash_tpa_t6 import flash_tpa


BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
CACHES = ((1, 4096), (8, 8192), (8, 32768), (8, 131072), (16, 131072))
MODELS = {  # heads, head_dim, rank, dtype of the cache, heads that share A
    "T6 rank 1": (32, 64, 1, "bfloat16"),
    "T6 rank 2": (32, 64, 2, "bfloat16"),
    "T6 rank 1, FP8": (32, 64, 1, "float8_e4m3fn"),
    "T6 rank 2, FP8": (32, 64, 2, "float8_e4m3fn"),
    "T6 rank 1, INT4": (32, 64, 1, "int4"),
    "T6 rank 2, INT4": (32, 64, 2, "int4"),
    "T6 rank 2, h 34": (34, 64, 2, "bfloat16"),
    "T6 rank 2, h 47": (47, 64, 2, "bfloat16"),
    "T6 rank 2, h 78": (78, 64, 2, "bfloat16"),
    "T6 rank 2, d 128": (32, 128, 2, "bfloat16"),
    "T6 rank 2, groups": (32, 64, 2, "bfloat16", 4),
    "T6 2, h 78, groups": (78, 64, 2, "bfloat16", 3),
    "T6 4, h 48, groups": (48, 128, 4, "bfloat16", 4),
}
KEY_VALUE_HEADS = {"MHA": 32, "GQA-8": 8, "GQA-4": 4, "MQA": 1}
HEADS, HEAD_DIM = 32, 64
MAX_BYTES = 60e9


def time_t6(shape: CacheShape) -> dict:
    rank, scaling = shape.rank, shape.head_dim**-0.5
    layout = FactorLayout(rank, shape.heads // shape.groups, shape.head_dim)
    copies = copies_larger_than_l2(shape.num_bytes)
    query, rows = random_cache(shape, copies)
    factors = [layout.read(x[:1], torch.float32) for x in rows[0]]
    expected = factor_space_attention(query[:1].float(), *factors, None, scaling)[0]
    attend = functools.partial(flash_tpa, query, groups=shape.groups)
    output = attend(*rows[0], rank, rank, scaling)[:1]
    error = ((output - expected).norm() / expected.norm()).item()
    assert error < 1e-2, f"FlashTPA and the PyTorch path disagree: {error}"
    del factors
    calls = [lambda pair=pair: attend(*pair, rank, rank, scaling) for pair in rows]
    seconds = graph_seconds(calls * max(1, 8 // copies))
    cache_bytes = 2 * rows[0][0].nbytes
    return {"seconds": seconds, "bytes": shape.num_bytes, "cache_bytes": cache_bytes, "error": error}


def time_sdpa(batch: int, tokens: int, heads: int) -> dict:
    num_bytes = 2 * batch * tokens * heads * HEAD_DIM * 2
    copies = copies_larger_than_l2(num_bytes)
    shape = (batch, heads, tokens, HEAD_DIM)
    states = [tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)) for _ in range(copies)]
    query = torch.randn(batch, HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    best = None
    for backend, folded in itertools.product(BACKENDS, (False, True)):
        if folded and heads == HEADS:
            continue
        q = query.view(batch, heads, HEADS // heads, HEAD_DIM) if folded else query
        attend = functools.partial(scaled_dot_product_attention, q, enable_gqa=not folded and heads < HEADS)
        try:
            with sdpa_kernel(backend):
                seconds = graph_seconds([functools.partial(attend, *s) for s in states] * max(1, 8 // copies))
        except RuntimeError:  # the back end does not take this shape
            continue
        if best is None or seconds < best["seconds"]:
            best = {
                "seconds": seconds,
                "bytes": num_bytes,
                "cache_bytes": num_bytes,
                "backend": f"{backend.name.split('_')[0].lower()}{' folded' * folded}",
            }
    return best


def measure(caches) -> dict:
    bandwidth = copy_bandwidth()
    print(f"{machine()}; bfloat16, one query token; copies move {bandwidth / 1e12:.2f} TB/s")
    print(f"{'batch x tokens':16}{'model':20}{'time':>10}  {'cache':>10}  {'of copies':>9}")
    results = []
    for batch, tokens in caches:
        jobs = {
            name: lambda m=model, b=batch, t=tokens: time_t6(CacheShape(b, t, *m)) for name, model in MODELS.items()
        }
        jobs |= {name: lambda h=h, b=batch, t=tokens: time_sdpa(b, t, h) for name, h in KEY_VALUE_HEADS.items()}
        for name, job in jobs.items():
            if name in KEY_VALUE_HEADS and 4 * batch * tokens * KEY_VALUE_HEADS[name] * HEAD_DIM > MAX_BYTES:
                continue
            row = {"batch": batch, "tokens": tokens, "model": name} | job()
            row["share"] = row["bytes"] / row["seconds"] / bandwidth
            results.append(row)
            print(
                f"{f'{batch} x {tokens:,}':16}{name:20}{row['seconds'] * 1e6:7.1f} us  {row['bytes'] / 1e6:7,.0f} MB  "
                f"{row['share']:9.0%}  {row.get('backend', '')}",
                flush=True,
            )
            torch.cuda.empty_cache()
    return {"machine": machine(), "copy_bandwidth": bandwidth, "results": results}


def plot(data: dict, figure) -> None:
    axes = figure.subplots(1, 2)
    shown = ("MHA", "GQA-8", "GQA-4", "MQA", "T6 rank 2", "T6 rank 1", "T6 rank 2, FP8", "T6 rank 1, FP8")
    for name in shown:
        rows = [row for row in data["results"] if row["model"] == name and row["batch"] == 8]
        style = "-o" if name.startswith("T6") else "--s"
        tokens = [row["tokens"] for row in rows]
        axes[0].plot(tokens, [row["seconds"] * 1e6 for row in rows], style, label=name)
        axes[1].plot(tokens, [row["cache_bytes"] / 2**30 for row in rows], style, label=name)
    for axis, label in zip(axes, ("decoding attention, one layer (us)", "cache of one layer (GiB)")):
        axis.set(xscale="log", yscale="log", xlabel="cached tokens of each of 8 sequences", ylabel=label)
        axis.set_xticks([8192, 32768, 131072], ["8k", "32k", "128k"])
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"h = 32, d = 64, bfloat16: {data['machine']}", fontsize=9)


def main() -> None:
    args = parse_args()
    if args.plot:
        draw(plot, args.plot, (11, 4.5))
    else:
        save(measure(CACHES), args.output)


if __name__ == "__main__":
    main()
