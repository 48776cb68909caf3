"""
The launch sizes of FlashTPA's kernels, tried one against another: what `choose_launch` was written from.

    python benchmarks/flash_tpa_sweep.py --processes 15 --output sweep.json

Prints, for each shape of model and cache, the time and the share of the copy bandwidth of the fastest settings and of
the one that `choose_launch` takes.
"""

import argparse
import dataclasses
import functools
import itertools
import json

import torch
from gpu import LARGER_THAN_L2, copy_bandwidth, graph_seconds, machine
from triton.runtime.errors import OutOfResources

from modeling_t6 import flash_tpa_t6
from modeling_t6.cache_t6 import FactorLayout
from modeling_t6.flash_tpa_t6 import Launch, choose_launch, flash_tpa


SHAPES = {  # batch, tokens, heads, head_dim, rank, dtype of the cache
    "8 x 32k, h 32, rank 1": (8, 32768, 32, 64, 1, "bfloat16"),
    "8 x 32k, h 32, rank 2": (8, 32768, 32, 64, 2, "bfloat16"),
    "8 x 128k, h 32, rank 1": (8, 131072, 32, 64, 1, "bfloat16"),
    "8 x 128k, h 32, rank 2": (8, 131072, 32, 64, 2, "bfloat16"),
    "8 x 32k, h 34, rank 2": (8, 32768, 34, 64, 2, "bfloat16"),
    "8 x 128k, h 34, rank 2": (8, 131072, 34, 64, 2, "bfloat16"),
    "8 x 128k, h 47, rank 2": (8, 131072, 47, 64, 2, "bfloat16"),
    "8 x 32k, h 78, rank 2": (8, 32768, 78, 64, 2, "bfloat16"),
    "8 x 128k, h 78, rank 2": (8, 131072, 78, 64, 2, "bfloat16"),
    "8 x 128k, h 32, d 128, rank 1": (8, 131072, 32, 128, 1, "bfloat16"),
    "8 x 32k, h 32, d 128, rank 2": (8, 32768, 32, 128, 2, "bfloat16"),
    "8 x 128k, h 32, d 128, rank 2": (8, 131072, 32, 128, 2, "bfloat16"),
    "8 x 128k, h 32, rank 1, fp8": (8, 131072, 32, 64, 1, "float8_e4m3fn"),
    "8 x 128k, h 32, rank 2, fp8": (8, 131072, 32, 64, 2, "float8_e4m3fn"),
    "1 x 4k, h 32, rank 2": (1, 4096, 32, 64, 2, "bfloat16"),
}


def default_launch(shape) -> Launch:
    _, _, heads, head_dim, rank, dtype = shape
    itemsize = getattr(torch, dtype).itemsize
    return choose_launch(1, heads, head_dim, rank, rank, False, itemsize, flash_tpa_t6._device_limits(device())[1])


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def candidates(shape) -> list[Launch]:
    base, heads = default_launch(shape), shape[2]
    widths = {(base.block_h, base.rest_h), (32, 0), (min(64, 1 << (heads - 1).bit_length()), 0)}
    widths |= {(32, 16)} if 32 < heads <= 48 else {(64, 16)} if 64 < heads else set()
    found = []
    sizes = itertools.product((32, 64, 128), sorted(widths), (2, 3, 4), (1, 2), (4, 8), (1, 2, 3, 4))
    for n, (h, rest), stages, step, warps, programs in sizes:
        used = (
            n * 2 * shape[4] * (stages * base.block_d + (stages - 1) * (h + rest)) * getattr(torch, shape[5]).itemsize
        )
        # 8 warps must not share out a tile of 16 columns: see `choose_launch`.
        fits = 100_000 < programs * used <= 220_000 and (warps == 4 or n == 128 and not rest)
        if fits and shape[4] % step == 0 and n * step >= 64:  # rows of a product
            found.append(Launch(n, 1, h, rest, base.block_d, True, stages, step, warps, programs))
    return [base, *(launch for launch in found if launch != base)]


def inputs(shape, copies: int = 1):
    batch, tokens, heads, head_dim, rank, dtype = shape
    width = FactorLayout(rank, heads, head_dim).width
    rows = lambda: torch.randn(batch, 1, tokens, width, device="cuda", dtype=torch.bfloat16).to(getattr(torch, dtype))  # noqa: E731
    query = torch.randn(batch, 1, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    return query, [(rows(), rows()) for _ in range(copies)]


def run(launch: Launch, query: torch.Tensor, rows, rank: int) -> torch.Tensor:
    flash_tpa_t6.choose_launch = lambda *args: launch
    return flash_tpa(query, *rows, rank, rank, query.shape[-1] ** -0.5)


def compiles(job: tuple) -> tuple:
    """Fills Triton's cache on disk; whether the setting fits the chip."""
    shape, launch = job
    query, rows = inputs((1, 256, *shape[2:]))
    try:
        run(launch, query, rows[0], shape[4])
        torch.cuda.synchronize()
        return job, True
    except OutOfResources:
        return job, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--top", type=int, default=4)
    parser.add_argument("--output")
    args = parser.parse_args()
    shapes = {name: SHAPES[name] for name in args.shapes}
    # The grid is no part of what is compiled.
    one_program = lambda launch: dataclasses.replace(launch, programs_per_sm=1)  # noqa: E731
    jobs = {((0, 0, *s[2:]), one_program(c)) for s in shapes.values() for c in candidates(s)}
    with torch.multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        fits = dict(pool.imap_unordered(compiles, jobs, chunksize=2))
    bandwidth = copy_bandwidth()
    print(f"{machine()}; copies move {bandwidth / 1e12:.2f} TB/s; {len(jobs)} settings compiled")

    results = []
    for name, shape in shapes.items():
        batch, tokens, heads, head_dim, rank, dtype = shape
        num_bytes = batch * tokens * 2 * rank * (heads + head_dim) * getattr(torch, dtype).itemsize
        query, rows = inputs(shape, copies=min(16, -(-LARGER_THAN_L2 // num_bytes)))
        timed, expected = [], None
        for launch in candidates(shape):
            if not fits[((0, 0, *shape[2:]), one_program(launch))]:
                continue
            seconds = graph_seconds(
                [functools.partial(run, launch, query, pair, rank) for pair in rows] * max(1, 4 // len(rows)), 5
            )
            timed.append(
                {
                    "shape": name,
                    "seconds": seconds,
                    "share": num_bytes / seconds / bandwidth,
                    **dataclasses.asdict(launch),
                }
            )
            # All settings compute the same: one that does not was miscompiled.
            output = run(launch, query, rows[0], rank).float()
            expected = output if len(timed) == 1 else expected
            timed[-1]["difference"] = ((output - expected).norm() / expected.norm()).item()
        chosen, results = timed[0], results + timed
        print(f"{name}: {num_bytes / 1e6:.0f} MB, {num_bytes / bandwidth * 1e6:.1f} us at the bandwidth of copies")
        for row in [chosen, *sorted(timed, key=lambda row: row["seconds"])[: args.top]]:
            print(
                f"  {row['seconds'] * 1e6:7.1f} us {row['share']:4.0%}  tokens {row['block_n']} heads {row['block_h']}+{row['rest_h']} "
                f"stages {row['stages']} step {row['step']} warps {row['warps']} programs {row['programs_per_sm']}"
                + (" (chosen)" if row is chosen else "")
                + (f" WRONG by {row['difference']:.0%}" if not row["difference"] < 0.01 else ""),
                flush=True,
            )
        del rows
        torch.cuda.empty_cache()
    if args.output:
        with open(args.output, "w") as file:
            json.dump({"machine": machine(), "copy_bandwidth": bandwidth, "results": results}, file)


if __name__ == "__main__":
    main()
