"""
The launch sizes of FlashTPA's kernels, tried one against another: what `choose_launch` was written from.

    python benchmarks/flash_tpa_sweep.py --processes 15 --output sweep.json

Prints, for each shape of model and cache, the time and the share of the copy bandwidth of the fastest settings and of
the one that is taken: by `choose_low_bit_launch` where its kernel reads the rows, which is tried beside the other then, else by
`choose_launch`; for rows of 8 and of 4 bits also the part that this is of the time of bfloat16 rows of the
same shape, where both are asked for. `--chosen` times nothing else: low-bit rows beside others by

    python benchmarks/flash_tpa_sweep.py --chosen --match "x 128k, h 32, rank"
"""

import argparse

from options import add_output, describe, save
from shapes import CacheShape


SHAPES = {
    "8 x 32k, h 32, rank 1": CacheShape(8, 32768, 32, 64, 1, "bfloat16"),
    "8 x 32k, h 32, rank 2": CacheShape(8, 32768, 32, 64, 2, "bfloat16"),
    "8 x 128k, h 32, rank 1": CacheShape(8, 131072, 32, 64, 1, "bfloat16"),
    "8 x 128k, h 32, rank 2": CacheShape(8, 131072, 32, 64, 2, "bfloat16"),
    "8 x 32k, h 34, rank 2": CacheShape(8, 32768, 34, 64, 2, "bfloat16"),
    "8 x 128k, h 34, rank 2": CacheShape(8, 131072, 34, 64, 2, "bfloat16"),
    "8 x 128k, h 47, rank 2": CacheShape(8, 131072, 47, 64, 2, "bfloat16"),
    "8 x 32k, h 78, rank 2": CacheShape(8, 32768, 78, 64, 2, "bfloat16"),
    "8 x 128k, h 78, rank 2": CacheShape(8, 131072, 78, 64, 2, "bfloat16"),
    "8 x 128k, h 32, d 128, rank 1": CacheShape(8, 131072, 32, 128, 1, "bfloat16"),
    "8 x 32k, h 32, d 128, rank 2": CacheShape(8, 32768, 32, 128, 2, "bfloat16"),
    "8 x 128k, h 32, d 128, rank 2": CacheShape(8, 131072, 32, 128, 2, "bfloat16"),
    "8 x 128k, h 32, rank 1, fp8": CacheShape(8, 131072, 32, 64, 1, "float8_e4m3fn"),
    "8 x 128k, h 32, rank 2, fp8": CacheShape(8, 131072, 32, 64, 2, "float8_e4m3fn"),
    "8 x 128k, h 34, rank 2, fp8": CacheShape(8, 131072, 34, 64, 2, "float8_e4m3fn"),
    "8 x 128k, h 78, rank 1, fp8": CacheShape(8, 131072, 78, 64, 1, "float8_e4m3fn"),
    "8 x 128k, h 78, rank 2, fp8": CacheShape(8, 131072, 78, 64, 2, "float8_e4m3fn"),
    "8 x 128k, h 32, d 128, rank 1, fp8": CacheShape(8, 131072, 32, 128, 1, "float8_e4m3fn"),
    "8 x 128k, h 32, d 128, rank 2, fp8": CacheShape(8, 131072, 32, 128, 2, "float8_e4m3fn"),
    "8 x 128k, h 32, rank 1, int4": CacheShape(8, 131072, 32, 64, 1, "int4"),
    "8 x 128k, h 32, rank 2, int4": CacheShape(8, 131072, 32, 64, 2, "int4"),
    "8 x 128k, h 78, rank 2, int4": CacheShape(8, 131072, 78, 64, 2, "int4"),
    "8 x 128k, h 32, d 128, rank 2, int4": CacheShape(8, 131072, 32, 128, 2, "int4"),
    "16 x 128k, h 32, rank 1": CacheShape(16, 131072, 32, 64, 1, "bfloat16"),
    "16 x 128k, h 32, rank 2": CacheShape(16, 131072, 32, 64, 2, "bfloat16"),
    "16 x 128k, h 32, rank 1, fp8": CacheShape(16, 131072, 32, 64, 1, "float8_e4m3fn"),
    "16 x 128k, h 32, rank 2, fp8": CacheShape(16, 131072, 32, 64, 2, "float8_e4m3fn"),
    "16 x 128k, h 32, rank 1, int4": CacheShape(16, 131072, 32, 64, 1, "int4"),
    "16 x 128k, h 32, rank 2, int4": CacheShape(16, 131072, 32, 64, 2, "int4"),
    "1 x 4k, h 32, rank 2": CacheShape(1, 4096, 32, 64, 2, "bfloat16"),
}


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--match", default="", metavar="TEXT", help="only shapes whose name has it")
    parser.add_argument("--chosen", action="store_true", help="only what is taken")
    parser.add_argument("--low-bit", action="store_true", help="besides, only other settings of the low-bit kernel")
    parser.add_argument("--top", type=int, default=4)
    add_output(parser, plots=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import functools
import itertools

import torch
from gpu import copies_larger_than_l2, copy_bandwidth, graph_seconds, machine, random_cache
from triton.runtime.errors import OutOfResources

from modeling_t6 import flash_tpa_t6
from modeling_t6.flash_tpa_low_bit_kernels_t6 import LowBitLaunch
from modeling_t6.flash_tpa_t6 import Launch, choose_launch, choose_low_bit_launch, flash_tpa


def stored_dtype(shape: CacheShape) -> torch.dtype:
    return torch.uint8 if shape.dtype == "int4" else getattr(torch, shape.dtype)


def default_launch(shape: CacheShape) -> Launch:
    _, _, heads, head_dim, rank, _, _ = shape
    shared_memory, stored = flash_tpa_t6.device_limits(device())[1], stored_dtype(shape)
    itemsize, unit = stored.itemsize, flash_tpa_t6.elements_per_load(rank, rank, head_dim, stored, True)
    return choose_launch(1, heads, head_dim, rank, rank, False, itemsize, shared_memory, elements_per_load=unit)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def low_bit_candidates(shape: CacheShape) -> list[LowBitLaunch]:
    """The chosen launch first; none for shapes that its kernel is not for."""
    chosen = choose_low_bit_launch(
        shape.heads, shape.head_dim, shape.rank, shape.rank, torch.bfloat16, stored_dtype(shape)
    )  # fmt: skip
    # As many warps on a multiprocessor as it has registers for.
    sizes = ((32, 1, 8, None), (32, 2, 4, None), (32, 4, 2, None), (16, 1, 9, None), (16, 1, 12, 168), (16, 4, 3, 168))
    found = [LowBitLaunch(*size) for size in sizes]
    return [chosen, *(launch for launch in found if launch != chosen)] if chosen else []


def candidates(shape: CacheShape, args: argparse.Namespace) -> list[Launch | LowBitLaunch]:
    low_bit = low_bit_candidates(shape)
    found = low_bit if args.low_bit and low_bit else low_bit + other_candidates(shape)
    return found[:1] if args.chosen or args.low_bit and not low_bit else found


def other_candidates(shape: CacheShape) -> list[Launch]:
    base, heads = default_launch(shape), shape.heads
    widths = {(base.block_h, base.rest_h), (32, 0), (min(64, 1 << (heads - 1).bit_length()), 0)}
    widths |= {(32, 16)} if 32 < heads <= 48 else {(64, 16)} if 64 < heads else set()
    found = []
    sizes = itertools.product((32, 64, 128), sorted(widths), (2, 3, 4), (1, 2), (4, 8), (1, 2, 3, 4))
    # Numbers that are to be converted need warps rather than bytes in flight.
    least = {"bfloat16": 100_000, "float8_e4m3fn": 50_000, "int4": 30_000}[shape.dtype]
    b_bytes, a_bytes = {"bfloat16": (2, 2), "float8_e4m3fn": (1, 1), "int4": (0.5, 1)}[shape.dtype]
    for n, (h, rest), stages, step, warps, programs in sizes:
        used = n * 2 * shape.rank * (stages * base.block_d * b_bytes + (stages - 1) * (h + rest) * a_bytes)
        # 8 warps must not share out a tile of 16 columns: see `choose_launch`.
        fits = least < programs * used <= 220_000 and (warps == 4 or n == 128 and not rest)
        if fits and shape.rank % step == 0 and n * step >= 64:  # rows of a product
            found.append(Launch(n, 1, h, rest, base.block_d, True, stages, step, warps, programs))
    return [base, *(launch for launch in found if launch != base)]


def run(launch: Launch | LowBitLaunch, query: torch.Tensor, rows, rank: int) -> torch.Tensor:
    flash_tpa_t6.choose_low_bit_launch = lambda *args: launch if isinstance(launch, LowBitLaunch) else None
    flash_tpa_t6.choose_launch = lambda *args: launch
    return flash_tpa(query, *rows, rank, rank, query.shape[-1] ** -0.5)


def compiles(job: tuple) -> tuple:
    """Fills Triton's cache on disk; whether the setting fits the chip."""
    shape, launch = job
    query, rows = random_cache(shape._replace(batch=1, tokens=256))
    try:
        run(launch, query, rows[0], shape.rank)
        torch.cuda.synchronize()
        return job, True
    except OutOfResources:
        return job, False


def main() -> None:
    args = parse_args()
    shapes = {name: SHAPES[name] for name in args.shapes if args.match in name}
    settings = {name: candidates(shape, args) for name, shape in shapes.items()}
    # Neither the grid nor the size of the cache is part of what is compiled.
    one_program = lambda launch: launch._replace(programs_per_sm=1)  # noqa: E731
    compiled = lambda shape: shape._replace(batch=0, tokens=0)  # noqa: E731
    jobs = {(compiled(shape), one_program(c)) for name, shape in shapes.items() for c in settings[name]}
    with torch.multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        fits = dict(pool.imap_unordered(compiles, jobs, chunksize=2))
    bandwidth = copy_bandwidth()
    print(f"{machine()}; copies move {bandwidth / 1e12:.2f} TB/s; {len(jobs)} settings compiled")

    results, of_16_bits = [], {}
    for name, shape in shapes.items():
        rank, num_bytes = shape.rank, shape.num_bytes
        query, rows = random_cache(shape, copies_larger_than_l2(num_bytes))
        timed, expected = [], None
        for launch in settings[name]:
            if not fits[compiled(shape), one_program(launch)]:
                continue
            seconds = graph_seconds(
                [functools.partial(run, launch, query, pair, rank) for pair in rows] * max(1, 4 // len(rows)), 5
            )
            timed.append(
                {
                    "shape": name,
                    "seconds": seconds,
                    "share": num_bytes / seconds / bandwidth,
                    "launch": " ".join(f"{name} {value}" for name, value in launch._asdict().items()),
                }
            )
            # All settings compute the same: one that does not was miscompiled.
            output = run(launch, query, rows[0], rank).float()
            expected = output if len(timed) == 1 else expected
            timed[-1]["difference"] = ((output - expected).norm() / expected.norm()).item()
        chosen, results = timed[0], results + timed
        if shape.dtype == "bfloat16":
            of_16_bits[shape] = chosen["seconds"]
        plain = of_16_bits.get(shape._replace(dtype="bfloat16"))
        part = "" if plain is None else f", {chosen['seconds'] / plain:.3f} of bfloat16's time"
        print(
            f"{name}: {num_bytes / 1e6:.0f} MB, {num_bytes / bandwidth * 1e6:.1f} us at the bandwidth of copies{part}"
        )
        for row in [chosen, *sorted(timed, key=lambda row: row["seconds"])[: args.top]]:
            print(
                f"  {row['seconds'] * 1e6:7.1f} us {row['share']:4.0%}  {row['launch']}"
                + (" (chosen)" if row is chosen else "")
                + (f" WRONG by {row['difference']:.0%}" if not row["difference"] < 0.01 else ""),
                flush=True,
            )
        del rows
        torch.cuda.empty_cache()
    save({"machine": machine(), "copy_bandwidth": bandwidth, "results": results}, args.output)


if __name__ == "__main__":
    main()
