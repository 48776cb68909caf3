"""
Random cases of FlashTPA on pages, and the reference in float64.

    python -m tests.modeling_t6.paged_flash_tpa_cases 0 300         # on a GPU: that many seeds
    python -m tests.modeling_t6.paged_flash_tpa_cases 0 6 small     # for compute-sanitizer, in this process
"""

import itertools
import math
import random
import sys
from collections.abc import Callable
from functools import partial

import torch

from modeling_t6.cache_t6 import FactorLayout
from modeling_t6.flash_tpa_pages_t6 import Pieces, paged_flash_tpa, schedule_pieces

from .flash_tpa_cases import HEADS, TOLERANCES, low_bit_model
from .random_cases import run_cases


NO_PAGE = 10**9  # what a table holds where there is no page: no memory lies there
UNTOUCHED = 7.0


def random_case(seed: int, **fixed) -> dict:
    """A batch from the ranges that the kernels cover; `fixed` sets some of its fields."""
    choose = random.Random(seed)
    case = {
        "dtype": choose.choice(list(TOLERANCES)),
        "float8": choose.random() < 0.3,
        "heads": choose.choice(HEADS),
        "head_dim": choose.choice((32, 33, 48, 64, 64, 80, 96, 128, 256)),
        "k_rank": choose.randint(1, 8),
        "v_rank": choose.randint(1, 8),
        "constant_a": choose.random() < 0.25,
        "max_queries": choose.choice((1, 1, 1, 2, 3, 5, 8, 16)),
        "page_size": choose.choice((1, 8, 16, 16, 24, 32, 64, 64, 128, 256, 272)),
        "lengths": [
            choose.choice((0, 1, 17, 64, 100, 129, 500, 1000, 3000)) for _ in range(choose.choice((1, 2, 3, 6)))
        ],
        "sliding_window": choose.choice((None, None, None, 1, 7, 64, 100, 5000)),
        "shared": choose.random() < 0.3,
        "wide_rows": choose.random() < 0.3,
        "groups": choose.choice((1, 1, 1, 2, 3, 4, 8, 34)),
        "seed": seed,
    }
    if (case | fixed)["float8"] and choose.random() < 0.6:  # what the low-bit kernel reads, mostly
        case |= low_bit_model(choose) | {
            "max_queries": choose.choice((1, 1, 1, 3)),
            "sliding_window": choose.choice((None, None, None, 100)),
        }
    if case["constant_a"]:
        case["k_rank"], case["v_rank"] = choose.choice((1, 4, 8, 16)), choose.choice((1, 4, 8, 16))
    case |= ({"groups": 1} if "heads" in fixed else {}) | fixed
    case["heads"] = max(1, case["heads"] // case["groups"]) * case["groups"]
    if case["float8"] and case["dtype"] == torch.float32:
        case["dtype"] = torch.bfloat16
    # The float64 reference forms K and V.
    while max(case["lengths"]) * case["heads"] * case["head_dim"] > 1e7 and max(case["lengths"]) > 100:
        case["lengths"] = [length // 2 for length in case["lengths"]]
    return case


class Batch:
    """
    Requests over pages in random order. Every row that no query sees is NaN, as are pages of nobody, and what lies beside
    rows; the table points nowhere where a request has no page, or has given it back behind its window.
    """

    def __init__(self, case: dict, device: str):
        choose = random.Random(case["seed"])
        torch.manual_seed(case["seed"])
        heads, head_dim, page_size, window = (
            case[name] for name in ("heads", "head_dim", "page_size", "sliding_window")
        )
        self.case, dtype, kv_heads = case, case["dtype"], heads // case["groups"]
        cache_dtype = torch.float8_e4m3fn if case["float8"] else dtype
        self.lengths = list(case["lengths"])
        self.num_queries = [min(choose.randint(1, case["max_queries"]), length) for length in self.lengths]
        self.starts = list(itertools.accumulate(self.num_queries, initial=0))
        self.scaling = choose.choice((1.0, 0.3)) * head_dim**-0.5
        # Some tokens more than requests have, as in a graph of a larger batch.
        self.query = torch.full((self.starts[-1] + 2, heads, head_dim), math.nan)
        self.query[: self.starts[-1]] = torch.randn(self.starts[-1], heads, head_dim)
        self.query = self.query.to(dtype)

        layouts = [
            FactorLayout(case[name], 0 if case["constant_a"] else kv_heads, head_dim) for name in ("k_rank", "v_rank")
        ]
        num_pages = [-(-length // page_size) for length in self.lengths]
        # Some pages of the first request begin others, too: a prefix they share.
        self.shared = [0] * len(num_pages)
        if case["shared"] and window is None:
            self.shared = [0] + [min(self.lengths[0], length) // page_size for length in self.lengths[1:]]
        numbers = list(range(sum(num_pages) + 3))
        choose.shuffle(numbers)
        table = torch.full((len(num_pages) + 1, max(num_pages) + 2), NO_PAGE, dtype=torch.int32)
        for i, (count, shared) in enumerate(zip(num_pages, self.shared)):
            table[i, :shared] = table[0, :shared]
            table[i, shared:count] = torch.tensor([numbers.pop() for _ in range(shared, count)])
        extra = choose.choice((8, 16, 5)) if case["wide_rows"] else 0
        widths = [layout.width for layout in layouts]
        pages = torch.full((sum(num_pages) + 3, page_size, sum(widths) + extra), math.nan).to(cache_dtype)

        self.constants, factors = [], []
        for rank in (case["k_rank"], case["v_rank"]):
            self.constants.append(torch.randn(rank, kv_heads).to(dtype) if case["constant_a"] else None)
            of_requests = []
            for length, shared in zip(self.lengths, self.shared):
                a, b = (torch.randn(length, rank, n).to(cache_dtype).to(dtype) for n in (kv_heads, head_dim))
                if shared:
                    n = shared * page_size
                    a[:n], b[:n] = of_requests[0][0][:n], of_requests[0][1][:n]
                of_requests.append((a, b))
            factors.append(of_requests)
        self.first_seen = [
            0 if window is None else max(0, length - n - window + 1)
            for length, n in zip(self.lengths, self.num_queries)
        ]
        for i, (length, first) in enumerate(zip(self.lengths, self.first_seen)):
            tokens = torch.arange(first, length)
            rows = [
                layout.pack(None if case["constant_a"] else a[None], b[None])[0, 0]
                for layout, (a, b) in zip(layouts, (of_requests[i] for of_requests in factors))
            ]
            places = table[i, tokens // page_size].long()
            pages[places, tokens % page_size, : sum(widths)] = torch.cat(rows, -1)[first:].to(cache_dtype)
            table[i, : first // page_size] = NO_PAGE
        self.factors = factors
        pages = pages.to(device)
        self.key_pages, self.value_pages = pages[..., : widths[0]], pages[..., widths[0] : sum(widths)]
        self.table = table.to(device)

    def expected(self) -> torch.Tensor:
        case, window = self.case, self.case["sliding_window"]
        outputs = []
        for i, (length, n) in enumerate(zip(self.lengths, self.num_queries)):
            key, value = (
                torch.einsum("rh,nrd->hnd", constant.double(), b.double())
                if case["constant_a"]
                else torch.einsum("nrh,nrd->hnd", a.double(), b.double())
                for constant, (a, b) in zip(self.constants, (of_requests[i] for of_requests in self.factors))
            )
            key, value = (x.repeat_interleave(case["groups"], dim=0) for x in (key, value))
            query = self.query[self.starts[i] : self.starts[i + 1]].double()
            scores = torch.einsum("qhd,hnd->hqn", query, key) * self.scaling / case["k_rank"]
            token, position = torch.arange(length), torch.arange(length - n, length)[:, None]
            visible = token <= position
            if window is not None:
                visible &= token > position - window
            weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
            outputs.append(torch.einsum("hqn,hnd->qhd", weights, value) / case["v_rank"])
        return torch.cat(outputs)

    def run(self, device: str) -> torch.Tensor:
        case = self.case
        lengths, starts = (torch.tensor(x, dtype=torch.int32, device=device) for x in (self.lengths, self.starts))
        pieces = Pieces.empty(
            len(self.lengths), case["max_queries"], case["heads"], case["head_dim"], case["k_rank"], case["v_rank"],
            self.key_pages.dtype, device, case["constant_a"], case["sliding_window"],
            case["groups"],
        )  # fmt: skip
        schedule_pieces(lengths, starts, pieces)
        output = torch.full_like(self.query, UNTOUCHED, device=device)
        returned = paged_flash_tpa(
            self.query.to(device), self.key_pages, self.value_pages, self.table, lengths, pieces,
            case["k_rank"], case["v_rank"], self.scaling, case["max_queries"],
            *(None if a is None else a.to(device) for a in self.constants),
            sliding_window=case["sliding_window"], output=output, groups=case["groups"],
        )  # fmt: skip
        assert returned is output
        return output.cpu()


def relative_error(case: dict, device: str) -> float:
    """‖out - ref‖ / ‖ref‖; NaN if a token of no request was written."""
    batch = Batch(case, device)
    output, expected = batch.run(device), batch.expected()
    num_tokens = expected.shape[0]
    if not (output[num_tokens:] == UNTOUCHED).all():
        return math.nan
    if num_tokens == 0:
        return 0.0
    return ((output[:num_tokens].double() - expected).norm() / expected.norm()).item()


def small_case(seed: int, **fixed) -> dict:
    """As `random_case`, but of a size that Triton's interpreter, or compute-sanitizer, takes a moment for."""
    case = random_case(seed, **fixed)
    if "lengths" not in fixed:
        case["lengths"] = [min(length, 80 - i) for i, length in enumerate(case["lengths"][:3])]
    if "max_queries" not in fixed:
        case["max_queries"] = min(case["max_queries"], max(1, 100 // case["heads"]))
    case["head_dim"] = min(case["head_dim"], 96)
    return case


def _run(case_of: Callable[[int], dict], seed: int) -> tuple[str, dict, float, float]:
    torch.set_num_threads(1)
    case = case_of(seed)
    name = f"{case['dtype']}{' over float8' * case['float8']}"
    return name, case, relative_error(case, "cuda"), TOLERANCES[case["dtype"]]


if __name__ == "__main__":
    if sys.argv[3:] == ["small"]:
        run_cases(partial(_run, small_case), processes=0)
    else:
        run_cases(partial(_run, random_case), chunksize=4)
