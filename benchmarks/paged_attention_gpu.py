"""
Attention of one decoding step on a GPU over pages: FlashTPA with a block table against FlashTPA over rows that lie one
after another, and over batches of mixed lengths.

    python benchmarks/paged_attention_gpu.py --output paged.json
    python benchmarks/paged_attention_gpu.py --match "h 32, rank 2"     # of rows of bfloat16 and of float8

Every time is one call out of a CUDA graph of calls that read different caches; pages lie in random order. The schedule of
pieces, which a step needs once for all its layers, is timed by itself. Shares are of the bandwidth of copies, measured in
the same run, each cached number counted once. Of float8 rows also the part that it is of the time of bfloat16 rows of the
same shape is printed, if that was measured before. `--quick` takes few shapes, and tells where the time goes: it adds the
contiguous kernel over keys and values side by side, as pages hold them, both kernels without the one that combines, and
other settings of the launch.
"""

import argparse
import concurrent.futures
import contextlib

from options import add_output, describe, save
from shapes import CacheShape


SHAPES = [
    CacheShape(8, tokens, heads, 64, rank, dtype)
    for tokens in (8192, 32768, 131072)
    for heads in (32, 34, 47, 78)
    for dtype in ("bfloat16", "float8_e4m3fn")
    for rank in (1, 2)
] + [CacheShape(1, 1024, 32, 64, 2, "bfloat16"), CacheShape(512, 600, 32, 64, 1, "bfloat16")]
BATCHES = {  # lengths of the requests
    "512 x 600": [600] * 512,
    "100 x 2k": [2048] * 100,
    "255 x 500 + 1 x 100k": [500] * 100 + [100_000] + [500] * 155,
    "256 x 100 to 4k": [100 + 4000 * i // 256 * 37 % 4000 for i in range(256)],
    "7 x 1k + 1 x 128k": [1024] * 7 + [131072],
}
MODELS = {
    "h 32, rank 1": (32, 64, 1, "bfloat16"),
    "h 32, rank 2": (32, 64, 2, "bfloat16"),
    "h 32, rank 1, FP8": (32, 64, 1, "float8_e4m3fn"),
    "h 32, rank 2, FP8": (32, 64, 2, "float8_e4m3fn"),
}
PAGE_SIZES = (16, 64, 128)
QUICK = [
    shape
    for shape in SHAPES
    if shape.tokens in (8192, 32768) and shape.heads in (32, 34, 78) and shape.dtype == "bfloat16"
]
# Names of `flash_tpa_pages_t6` set to other values, and fields of its `Launch`.
VARIANTS = {
    "combine x2": ({"COMBINE_PROGRAMS": 2}, {}),
    "combine x8": ({"COMBINE_PROGRAMS": 8}, {}),
    "tile 64": ({}, {"block_n": 64}),
    "2 stages": ({}, {"stages": 2}),
}


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--processes", type=int, default=15, help="that compile the kernels beforehand")
    parser.add_argument("--page-sizes", nargs="+", type=int, default=list(PAGE_SIZES), metavar="TOKENS")
    parser.add_argument("--match", default="", metavar="TEXT", help="only shapes and batches whose name has it")
    parser.add_argument("--quick", action="store_true", help="few shapes, and where their time goes")
    add_output(parser, plots=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import functools
import itertools
import math
from unittest import mock

import torch
from gpu import copies_larger_than_l2, copy_bandwidth, graph_seconds, machine

from modeling_t6 import flash_tpa_pages_t6, flash_tpa_t6
from modeling_t6.cache_t6 import FactorLayout
from modeling_t6.flash_tpa_pages_t6 import Pieces, paged_flash_tpa, schedule_pieces
from modeling_t6.flash_tpa_t6 import flash_tpa


class Requests:
    """A decoding step of requests of those lengths: `copies` caches of pages, and the calls that read them."""

    def __init__(self, lengths: list[int], model: tuple, page_size: int, copies: int = 1):
        self.heads, self.head_dim, self.rank, dtype = model
        self.dtype, self.page_size = getattr(torch, dtype), page_size
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device="cuda")
        self.width = FactorLayout(self.rank, self.heads, self.head_dim).width
        counts = [-(-length // page_size) for length in lengths]
        order = torch.randperm(sum(counts), device="cuda", dtype=torch.int32)
        self.table = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device="cuda")
        for row, pages in zip(self.table, order.split(counts)):
            row[: len(pages)] = pages
        self.query = torch.randn(len(lengths), self.heads, self.head_dim, device="cuda", dtype=torch.bfloat16)
        self.pages = [
            torch.randn(sum(counts), page_size, 2 * self.width, device="cuda", dtype=torch.bfloat16).to(self.dtype)
            for _ in range(copies)
        ]
        self.plan()

    def plan(self) -> None:
        self.pieces = Pieces.empty(
            len(self.lengths), 1, self.heads, self.head_dim, self.rank, self.rank, self.dtype, "cuda"
        )
        self.schedule()

    def schedule(self) -> None:
        schedule_pieces(self.lengths, self.starts, self.pieces)

    def attend(self, copy: int = 0) -> torch.Tensor:
        rows = self.pages[copy].split(self.width, dim=-1)
        return paged_flash_tpa(
            self.query, *rows, self.table, self.lengths, self.pieces, self.rank, self.rank,
            self.head_dim**-0.5, 1,
        )  # fmt: skip

    def calls(self) -> list:
        copies = len(self.pages)
        return [functools.partial(self.attend, copy) for copy in range(copies)] * max(1, 8 // copies)

    def error(self) -> float:
        """Beside FlashTPA over each request's rows by itself."""
        errors, output = [], self.attend().float()
        longest = int(self.lengths.argmax())
        for i in sorted({0, 1 % len(self.lengths), longest, len(self.lengths) - 1}):
            length = int(self.lengths[i])
            pages = self.pages[0][self.table[i, : -(-length // self.page_size)].long()]
            rows = [x.contiguous() for x in pages.flatten(0, 1)[None, None, :length].split(self.width, dim=-1)]
            expected = flash_tpa(self.query[i][None, None], *rows, self.rank, self.rank, self.head_dim**-0.5)[0, 0]
            errors.append(((output[i] - expected.float()).norm() / expected.float().norm()).item())
        return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


@contextlib.contextmanager
def variant(names: dict, fields: dict):
    """The kernels on pages with other settings."""
    choose = flash_tpa_pages_t6.choose_launch
    names = names | {"choose_launch": lambda *args, **kwargs: choose(*args, **kwargs)._replace(**fields)}
    with replaced(flash_tpa_pages_t6, **names):
        yield


@contextlib.contextmanager
def replaced(module, **names):
    """Other things of these names in a module, for launches that are chosen anew."""
    try:
        with mock.patch.multiple(module, **names):
            flash_tpa_pages_t6._launches.cache_clear()
            yield
    finally:
        flash_tpa_pages_t6._launches.cache_clear()


class NoKernel:
    """In the place of one: is launched, and does nothing."""

    arg_names = ()

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def without_combining():
    kernel = NoKernel()
    with replaced(flash_tpa_t6, combine_kernel=kernel), replaced(flash_tpa_pages_t6, combine_pages_kernel=kernel):
        yield


def contiguous_calls(shape: CacheShape, copies: int, side_by_side: bool = False) -> list:
    batch, tokens, heads, head_dim, rank, dtype, _ = shape
    width = FactorLayout(rank, heads, head_dim).width
    query = torch.randn(batch, 1, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    calls = []
    for _ in range(copies):
        sizes = (batch, 1, tokens, 2 * width) if side_by_side else (2, batch, 1, tokens, width)
        rows = torch.randn(sizes, device="cuda", dtype=torch.bfloat16).to(getattr(torch, dtype))
        pair = rows.split(width, dim=-1) if side_by_side else rows.unbind()
        calls.append(functools.partial(flash_tpa, query, *pair, rank, rank, head_dim**-0.5))
    return calls * max(1, 8 // copies)


def compile_kernels(job: tuple) -> None:
    """Fills Triton's cache on disk. A page size of 0 stands for rows that lie one after another."""
    model, page_size, settings, side_by_side = job
    if page_size:
        with variant(*settings):
            Requests([300, 2], model, page_size).attend()
    else:
        contiguous_calls(CacheShape(2, 300, *model), 1, side_by_side)[0]()
    torch.cuda.synchronize()


def measure_shape(shape: CacheShape, page_sizes: list[int], details: bool) -> list[dict]:
    """Requests of one length: pages against rows that lie one after another."""
    copies = copies_larger_than_l2(shape.num_bytes)
    calls = contiguous_calls(shape, copies)
    contiguous = {"contiguous": graph_seconds(calls)}
    if details:
        with without_combining():
            contiguous["contiguous, not combined"] = graph_seconds(calls)
        del calls
        contiguous["side by side"] = graph_seconds(contiguous_calls(shape, copies, side_by_side=True))
    calls, results = None, []
    for page_size in page_sizes:
        requests = Requests([shape.tokens] * shape.batch, shape[2:6], page_size, copies)
        row = {"shape": shape._asdict(), "page_size": page_size} | contiguous
        row |= {"seconds": graph_seconds(requests.calls()), "error": requests.error()}
        if details:
            row["schedule"] = graph_seconds([requests.schedule] * 8)
            with without_combining():
                row["not combined"] = graph_seconds(requests.calls())
            for name, settings in VARIANTS.items():
                with variant(*settings):
                    requests.plan()
                    row[name] = graph_seconds(requests.calls())
        results.append(row)
        del requests
    return results


def measure_batch(name: str, model_name: str, page_size: int) -> list[dict]:
    """Requests of mixed lengths, beside the bandwidth of copies."""
    lengths, model = BATCHES[name], MODELS[model_name]
    shape = CacheShape(1, sum(lengths), *model)
    requests = Requests(lengths, model, page_size, copies_larger_than_l2(shape.num_bytes))
    seconds, schedule = graph_seconds(requests.calls()), graph_seconds([requests.schedule] * 8)
    row = {"requests": name, "model": model_name, "page_size": page_size, "seconds": seconds, "schedule": schedule}
    row |= {"bytes": shape.num_bytes, "pieces": int((requests.pieces.slots[:, 0] >= 0).sum())}
    return [row | {"divided": int(requests.pieces.splits[0, 0]), "error": requests.error()}]


class Worker:
    """A process that measures one thing after another, and is replaced where one of them breaks it."""

    def __init__(self):
        self._start()

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)

    def measure(self, function, *args) -> list[dict]:
        try:
            return self.pool.submit(function, *args).result()
        except Exception as error:
            print(f"{function.__name__}{args} failed: {str(error).splitlines()[0]}", flush=True)
            self.pool.shutdown(cancel_futures=True)
            self._start()
            return []


def name_of(shape: CacheShape) -> str:
    stored = ", FP8" if shape.dtype == "float8_e4m3fn" else ""
    return f"{shape.batch} x {shape.tokens:,}, h {shape.heads}, rank {shape.rank}{stored}"


def of_bfloat16(name: str, seconds: list[float], measured: dict[str, list[float]]) -> str:
    """What times are of those of bfloat16 rows; `measured` are those of before, by name."""
    measured[name] = seconds
    plain = measured.get(name.removesuffix(", FP8"), ()) if name.endswith(", FP8") else ()
    ratios = ", ".join(f"{mine / other:.3f}" for mine, other in zip(seconds, plain))
    return f"   {ratios} of bfloat16's time" if ratios else ""


def print_shape(rows: list[dict], measured: dict[str, list[float]]) -> None:
    name, contiguous = name_of(CacheShape(**rows[0]["shape"])), rows[0]["contiguous"]
    ratios = "".join(f"{row['seconds'] / contiguous:9.3f}" for row in rows)
    part = of_bfloat16(name, [contiguous, *(row["seconds"] for row in rows)], measured)
    error = max(row["error"] for row in rows)
    print(f"{name:36}{contiguous * 1e6:8.1f} us{ratios}   error {error:.1e}{part}", flush=True)
    for row in rows if "schedule" in rows[0] else ():
        names = ("side by side", "contiguous, not combined", "seconds", "not combined", *VARIANTS, "schedule")
        times = "; ".join(f"{name if name != 'seconds' else 'pages'} {row[name] * 1e6:.1f}" for name in names)
        print(f"    page {row['page_size']}: {times} us", flush=True)


def measure(page_sizes: list[int], processes: int, quick: bool, match: str) -> dict:
    shapes = [shape for shape in (QUICK if quick else SHAPES) if match in name_of(shape)]
    batches = [names for names in itertools.product(BATCHES, MODELS) if not quick and match in ", ".join(names)]
    models = sorted({shape[2:6] for shape in shapes} | {MODELS[model] for _, model in batches})
    plain = ({}, {})
    jobs = [(model, page_size, plain, False) for model in models for page_size in (0, *page_sizes)]
    if quick:
        jobs += [(model, 0, plain, True) for model in models]
        jobs += list(itertools.product(models, page_sizes, [v for v in VARIANTS.values() if v[1]], [False]))
    with torch.multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(compile_kernels, jobs, chunksize=1)
    bandwidth = copy_bandwidth()
    print(f"{machine()}; bfloat16, one query token; copies move {bandwidth / 1e12:.2f} TB/s")
    worker, results, measured = Worker(), [], {}
    heading = "".join(f"{f'page {size}':>9}" for size in page_sizes)
    print(f"{'batch x tokens, heads, rank':36}{'rows':>11}{heading}   (pages: time as a multiple)")
    for shape in shapes:
        rows = worker.measure(measure_shape, shape, page_sizes, quick)
        results += rows
        if rows:
            print_shape(rows, measured)
    if batches:
        print(
            f"\n{'requests':24}{'model':20}{'page':>5}{'time':>11}{'of copies':>11}{'schedule':>11}  pieces, divided"
        )
        for (batch, model), page_size in itertools.product(batches, page_sizes):
            for row in worker.measure(measure_batch, batch, model, page_size):
                row["share"] = row["bytes"] / row["seconds"] / bandwidth
                results.append(row)
                part = of_bfloat16(f"{batch}, page {page_size}, {model}", [row["seconds"]], measured)
                print(
                    f"{batch:24}{model:20}{page_size:5}{row['seconds'] * 1e6:8.1f} us{row['share']:11.0%}"
                    f"{row['schedule'] * 1e6:8.1f} us  {row['pieces']}, {row['divided']}   error {row['error']:.1e}{part}",
                    flush=True,
                )
    worker.pool.shutdown()
    return {"machine": machine(), "copy_bandwidth": bandwidth, "results": results}


def main() -> None:
    args = parse_args()
    save(measure(args.page_sizes, args.processes, args.quick, args.match), args.output)


if __name__ == "__main__":
    main()
