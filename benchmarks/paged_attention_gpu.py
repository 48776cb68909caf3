"""
Attention of one decoding step on a GPU over pages: FlashTPA with a block table against FlashTPA over rows that lie one
after another, and over batches of mixed lengths.

    python benchmarks/paged_attention_gpu.py --output paged.json

Every time is one call out of a CUDA graph of calls that read different caches; pages lie in random order. The schedule of
pieces, which a step needs once for all its layers, is timed by itself. Shares are of the bandwidth of copies, measured in
the same run, each cached number counted once.
"""

import argparse

from options import add_output, describe, save
from shapes import CacheShape


SHAPES = [
    CacheShape(8, tokens, heads, 64, rank, "bfloat16")
    for tokens in (8192, 32768, 131072)
    for heads in (32, 34, 47, 78)
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
    "rank 1": (32, 64, 1, "bfloat16"),
    "rank 2": (32, 64, 2, "bfloat16"),
    "rank 2, FP8": (32, 64, 2, "float8_e4m3fn"),
}
PAGE_SIZES = (16, 64, 128)


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--processes", type=int, default=15, help="that compile the kernels beforehand")
    parser.add_argument("--page-sizes", nargs="+", type=int, default=list(PAGE_SIZES), metavar="TOKENS")
    add_output(parser, plots=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import functools
import itertools
import math

import torch
from gpu import copies_larger_than_l2, copy_bandwidth, graph_seconds, machine

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
        self.pieces = Pieces.empty(
            len(lengths), 1, self.heads, self.head_dim, self.rank, self.rank, self.dtype, "cuda"
        )
        self.schedule()

    def schedule(self) -> None:
        schedule_pieces(self.lengths, self.starts, self.pieces)

    def attend(self, copy: int = 0) -> torch.Tensor:
        rows = self.pages[copy].split(self.width, dim=-1)
        return paged_flash_tpa(
            self.query, *rows, self.table, self.lengths, self.starts, self.pieces, self.rank, self.rank,
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


def time_contiguous(shape: CacheShape, copies: int) -> float:
    batch, tokens, heads, head_dim, rank, _ = shape
    width = FactorLayout(rank, heads, head_dim).width
    rows = [
        torch.randn(2, batch, 1, tokens, width, device="cuda", dtype=torch.bfloat16).unbind() for _ in range(copies)
    ]
    query = torch.randn(batch, 1, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    calls = [functools.partial(flash_tpa, query, *pair, rank, rank, head_dim**-0.5) for pair in rows]
    return graph_seconds(calls * max(1, 8 // copies))


def compile_kernels(job: tuple) -> None:
    """Fills Triton's cache on disk. A page size of 0 stands for rows that lie one after another."""
    (heads, head_dim, rank, dtype), page_size = job
    if page_size:
        Requests([300, 2], (heads, head_dim, rank, dtype), page_size).attend()
    else:
        width = FactorLayout(rank, heads, head_dim).width
        rows = torch.randn(2, 2, 1, 300, width, device="cuda", dtype=torch.bfloat16).to(getattr(torch, dtype))
        query = torch.randn(2, 1, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        flash_tpa(query, *rows, rank, rank, head_dim**-0.5)
    torch.cuda.synchronize()


def measure(page_sizes: list[int], processes: int) -> dict:
    models = sorted({shape[2:] for shape in SHAPES} | set(MODELS.values()))
    with torch.multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(compile_kernels, list(itertools.product(models, (0, *page_sizes))), chunksize=1)
    bandwidth = copy_bandwidth()
    print(f"{machine()}; bfloat16, one query token; copies move {bandwidth / 1e12:.2f} TB/s")
    results = []
    heading = "".join(f"{f'page {size}':>9}" for size in page_sizes)
    print(f"{'batch x tokens, heads, rank':32}{'rows':>11}{heading}   (pages: time as a multiple)")
    for shape in SHAPES:
        copies = copies_larger_than_l2(shape.num_bytes)
        seconds = [time_contiguous(shape, copies)]
        line = (
            f"{f'{shape.batch} x {shape.tokens:,}, h {shape.heads}, rank {shape.rank}':32}{seconds[0] * 1e6:8.1f} us"
        )
        for page_size in page_sizes:
            requests = Requests([shape.tokens] * shape.batch, shape[2:], page_size, copies)
            seconds.append(graph_seconds(requests.calls()))
            row = {"shape": shape._asdict(), "page_size": page_size, "seconds": seconds[-1]}
            results.append(row | {"contiguous": seconds[0], "error": requests.error()})
            line += f"{seconds[-1] / seconds[0]:9.3f}"
            del requests
        print(line + f"   error {max(row['error'] for row in results[-len(page_sizes) :]):.1e}", flush=True)
    print(f"\n{'requests':24}{'model':14}{'page':>5}{'time':>11}{'of copies':>11}{'schedule':>11}  pieces, of several")
    for (name, lengths), (model_name, model), page_size in itertools.product(
        BATCHES.items(), MODELS.items(), page_sizes
    ):
        shape = CacheShape(1, sum(lengths), *model)
        requests = Requests(lengths, model, page_size, copies_larger_than_l2(shape.num_bytes))
        seconds, schedule = graph_seconds(requests.calls()), graph_seconds([requests.schedule] * 8)
        share = shape.num_bytes / seconds / bandwidth
        used = int((requests.pieces.slots[:, 0] >= 0).sum())
        row = {"requests": name, "model": model_name, "page_size": page_size, "seconds": seconds, "share": share}
        results.append(row | {"schedule": schedule, "pieces": used, "error": requests.error()})
        print(
            f"{name:24}{model_name:14}{page_size:5}{seconds * 1e6:8.1f} us{share:11.0%}{schedule * 1e6:8.1f} us  {used}, "
            f"{int(requests.pieces.splits[0, 0])}   error {results[-1]['error']:.1e}",
            flush=True,
        )
        del requests
    return {"machine": machine(), "copy_bandwidth": bandwidth, "results": results}


def main() -> None:
    args = parse_args()
    save(measure(args.page_sizes, args.processes), args.output)


if __name__ == "__main__":
    main()
