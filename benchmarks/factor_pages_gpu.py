"""
Factors in an engine's pages on a GPU: projections to queries and rows, and rows to keys and values, as times of one layer.

    python benchmarks/factor_pages_gpu.py --output pages.json     # measure
    python benchmarks/factor_pages_gpu.py --sweep                 # launch sizes, tried one against another

Every time is one call out of a CUDA graph of calls that read and write different memory. Bytes are those that have to be
read and written, each number once. `both` stores rows and forms K and V in one launch. Of one token the host's time of a call is
measured, too, which a graph does not take. What the kernels give is compared with PyTorch's before it is timed;
`python -m tests.modeling_t6.factor_pages_cases 0 100` compares random shapes and variants with float64.
"""

import argparse

from options import add_output, describe, save


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--sweep", action="store_true", help="try launch sizes")
    add_output(parser, plots=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from gpu import copies_larger_than_l2, copy_bandwidth, graph_seconds, machine

from modeling_t6 import factor_pages_t6
from modeling_t6.cache_t6 import FactorLayout
from modeling_t6.factor_pages_t6 import (
    FactorColumns,
    SelectedRanks,
    form_heads_from_pages,
    select_ranks,
    store_projections,
)


class Shape(NamedTuple):
    heads: int
    head_dim: int
    q_rank: int | None
    rank: int
    float8: bool = False

    @property
    def selects(self) -> bool:
        """Converted from GQA: queries as they are projected, and a constant A that selects a rank for each head."""
        return self.q_rank is None

    @property
    def layout(self) -> FactorLayout:
        return FactorLayout(self.rank, 0 if self.selects else self.heads, self.head_dim)


MODELS = {
    "t6-small": Shape(34, 64, 6, 2),
    "t6-xl": Shape(78, 64, 6, 2),
    "t6-xl, FP8": Shape(78, 64, 6, 2, float8=True),
    "8B": Shape(32, 128, 6, 2),
    "8B, GQA-8": Shape(32, 128, None, 8),
}
TOKENS = (1, 64, 512, 8192)
PAGE_SIZE = 16
SIZES = {  # of QUERY_TILE and QUERY_NUMBERS, of PAIRS_TILE and PAIRS_NUMBERS
    "QUERY": ((512, 16), (1024, 16), (1024, 32), (2048, 16), (2048, 32), (2048, 64)),
    "PAIRS": ((2048, 16), (2048, 32), (4096, 16), (4096, 32), (8192, 32)),
}
SWEPT = ("t6-small", "t6-xl", "8B, GQA-8")


class Layer:
    """The tensors of one layer in one step of an engine."""

    def __init__(self, shape: Shape, tokens: int):
        self.shape = shape
        heads, head_dim, q_rank, rank, _ = shape
        random = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        parts = [(heads if q_rank is None else q_rank, head_dim), (rank, head_dim), (rank, head_dim)]
        if not shape.selects:
            parts += [(heads, q_rank), (heads, rank), (heads, rank)]
        sizes = [n * m for n, m in parts]
        product = random(tokens, -(-sum(sizes) // 8) * 8)
        places = [(start, *part) for start, part in zip(itertools.accumulate(sizes, initial=0), parts)]
        (b_q, b_k, b_v), (a_q, a_k, a_v) = places[:3], places[3:] or (None, None, None)
        cos, sin = torch.rand(2, tokens, head_dim // 2, device="cuda")
        width = shape.layout.width
        pages = torch.zeros(-(-tokens // PAGE_SIZE), PAGE_SIZE, 2 * width, device="cuda", dtype=torch.bfloat16)
        self.pages = (pages.to(torch.float8_e4m3fn) if shape.float8 else pages).split(width, dim=-1)
        self.slots = torch.randperm(self.pages[0].shape[0] * PAGE_SIZE, device="cuda")[:tokens]
        self.factors = product, FactorColumns(a_q, b_q, a_k, b_k, a_v, b_v), None, cos, sin
        self.query = product.new_empty(tokens, heads, head_dim)
        self.constants: tuple[SelectedRanks | None, ...] = (None, None)
        states = heads
        if shape.selects:
            a = rank * torch.eye(rank, device="cuda", dtype=torch.bfloat16).repeat_interleave(heads // rank, 1)
            self.constants, states = (select_ranks(a),) * 2, rank
        self.states = torch.zeros(2, tokens, states, head_dim, device="cuda", dtype=torch.bfloat16).unbind(0)
        self.rank = rank
        rows = tokens * 2 * width * self.pages[0].element_size()
        self.store_bytes = product.nbytes + cos.nbytes + sin.nbytes + tokens * heads * head_dim * 2 + rows
        self.form_bytes = rows + sum(x.nbytes for x in self.states)
        self.both_bytes = self.store_bytes + sum(x.nbytes for x in self.states)

    @property
    def takes_both(self) -> bool:
        return not self.shape.selects and not self.shape.float8

    def store(self) -> torch.Tensor:
        store_projections(*self.factors, self.slots, *self.pages, self.query)
        return self.query

    def both(self) -> None:
        store_projections(*self.factors, self.slots, *self.pages, self.query, key=self.states[0], value=self.states[1])

    def form(self) -> None:
        form_heads_from_pages(*self.pages, self.slots, *self.states, self.rank, self.rank, *self.constants)

    def check(self) -> None:
        """What both give is what PyTorch gives."""
        results = []
        forms = self.both if self.takes_both else self.form
        triton = factor_pages_t6.triton
        for implementation, form in ((triton, self.form), (None, self.form), (triton, forms)):
            with mock.patch.object(factor_pages_t6, "triton", implementation):
                query = self.store()
                form()
            results.append([x.float() for x in (query, *self.pages, *self.states)])
            for x in self.states:
                x.zero_()
        kernels, in_torch, at_once = results
        for actual, expected in zip((*kernels, *at_once), in_torch * 2):
            # A number between two of the dtype may be rounded to either; of pages it is then formed.
            error = ((actual - expected).norm() / expected.norm()).item()
            assert error < 5e-3, f"the kernels and PyTorch disagree: {error}"


def time_call(shape: Shape, tokens: int, name: str) -> tuple[float, int]:
    """Seconds and bytes of `store`, `form` or `both`."""
    layer = Layer(shape, tokens)
    num_bytes = getattr(layer, f"{name}_bytes")
    layers = [layer, *(Layer(shape, tokens) for _ in range(copies_larger_than_l2(num_bytes) - 1))]
    for other in layers:
        other.store()  # rows to read
    calls: list[Callable] = [getattr(other, name) for other in layers]
    return graph_seconds(calls * max(1, 16 // len(calls))), num_bytes


def host_seconds(call: Callable, calls: int = 200) -> float:
    """What a call takes the host, the shortest of some rounds; the GPU is not waited for."""
    rounds = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - start) / calls)
    return min(rounds)


def measure() -> dict:
    factor_pages_t6.MAX_FORMED_TOKENS = max(TOKENS)
    bandwidth = copy_bandwidth()
    print(f"{machine()}; bfloat16, pages of {PAGE_SIZE} tokens; copies move {bandwidth / 1e12:.2f} TB/s")
    results = []
    for (model, shape), tokens in itertools.product(MODELS.items(), TOKENS):
        layer = Layer(shape, tokens)
        layer.check()
        for name in ("store", "form", *(["both"] if layer.takes_both else [])):
            seconds, num_bytes = time_call(shape, tokens, name)
            results.append(
                {"model": model, "tokens": tokens, "call": name, "seconds": seconds, "bytes": num_bytes}
                | {"share": num_bytes / seconds / bandwidth}
            )
            if tokens == 1:
                results[-1]["host_seconds"] = host_seconds(getattr(layer, name))
                print(f"{model:12}{name:6}{results[-1]['host_seconds'] * 1e6:7.1f} us of the host")
            print(
                f"{model:12}{tokens:6,} tokens  {name:6}{seconds * 1e6:7.1f} us  {num_bytes / 1e6:7.2f} MB  "
                f"{num_bytes / seconds / 1e9:6,.0f} GB/s  {results[-1]['share']:4.0%} of copies",
                flush=True,
            )
        torch.cuda.empty_cache()
    return {"machine": machine(), "copy_bandwidth": bandwidth, "results": results}


@contextlib.contextmanager
def launched_with(name: str, sizes: tuple[int, int]) -> Iterator[bool]:
    """In the block, kernels are started with one of `SIZES[name]`; whether that is the chosen one."""
    names = f"{name}_TILE", f"{name}_NUMBERS"
    is_chosen = sizes == tuple(getattr(factor_pages_t6, part) for part in names)
    kept = (factor_pages_t6._store_sizes, factor_pages_t6._store_kernel, factor_pages_t6._form_kernel)
    with mock.patch.multiple(factor_pages_t6, **dict(zip(names, sizes))):
        for choice in kept:
            choice.cache_clear()
        yield is_chosen
    for choice in kept:
        choice.cache_clear()


def sweep() -> dict:
    results = []
    for model, (call, name) in itertools.product(SWEPT, (("store", "QUERY"), ("form", "PAIRS"))):
        for sizes in SIZES[name]:
            with launched_with(name, sizes) as is_chosen:
                times = [time_call(MODELS[model], tokens, call)[0] for tokens in TOKENS]
            results.append({"model": model, "call": call, "sizes": sizes, "seconds": times})
            microseconds = "".join(f"{seconds * 1e6:8.1f}" for seconds in times)
            print(f"{model:12}{call:6}{sizes!s:11}{microseconds} us{'  chosen' * is_chosen}", flush=True)
    return {"machine": machine(), "tokens": TOKENS, "results": results}


def main() -> None:
    args = parse_args()
    save(sweep() if args.sweep else measure(), args.output)


if __name__ == "__main__":
    main()
