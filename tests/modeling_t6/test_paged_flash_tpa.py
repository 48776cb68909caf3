"""FlashTPA on pages, on a GPU or through Triton's interpreter, against float64 and over every row that no one may read."""

import random
from pathlib import Path

import pytest
import torch

from modeling_t6 import flash_tpa_pages_t6, flash_tpa_t6
from modeling_t6.flash_tpa_pages_t6 import Pieces, paged_flash_tpa, schedule_pieces

from .common import DEVICE
from .flash_tpa_cases import TOLERANCES
from .paged_flash_tpa_cases import Batch, random_case, relative_error, small_case


pytestmark = [pytest.mark.once, pytest.mark.skipif(flash_tpa_t6.triton is None, reason="Triton is for Linux")]
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs and compiled kernels need a GPU")
PLAIN = {
    "dtype": torch.float32, "float8": False, "heads": 5, "head_dim": 32, "k_rank": 2, "v_rank": 1, "constant_a": False,
    "max_queries": 1, "sliding_window": None, "page_size": 16, "shared": False, "wide_rows": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def checked_interpreter(monkeypatch):
    if DEVICE != "cpu":
        return
    from . import interpreter

    interpreter.compute_as_a_gpu(monkeypatch)


def check(case: dict) -> None:
    assert relative_error(case, DEVICE) < TOLERANCES[case["dtype"]]


@pytest.mark.parametrize("seed", range(12))
def test_random_batches(seed):
    """On a GPU, `paged_flash_tpa_cases` runs as many as one likes; the interpreter runs small ones."""
    check((small_case if DEVICE == "cpu" else random_case)(seed))


@pytest.mark.parametrize("page_size", [1, 8, 16, 24, 32, 64, 128, 272])
def test_page_sizes(page_size):
    """Pages that are parts of a tile, tiles that are parts of a page, and neither."""
    check(random_case(page_size, **PLAIN | {"page_size": page_size, "lengths": [130, 1, 33], "shared": True}))


@pytest.mark.parametrize("heads, head_dim", [(34, 64), (47, 64), (78, 64), (3, 33)])
@pytest.mark.parametrize("page_size", [16, 64])
def test_head_counts(heads, head_dim, page_size):
    fixed = {"dtype": torch.bfloat16, "heads": heads, "head_dim": head_dim, "page_size": page_size, "v_rank": 2}
    check(random_case(heads, **PLAIN | fixed | {"lengths": [90, 40]}))


@pytest.mark.parametrize("heads, groups", [(48, 4), (36, 3), (48, 2), (34, 34)], ids=str)
@pytest.mark.parametrize("page_size", [16, 64])
def test_grouped_heads(heads, groups, page_size):
    fixed = {"dtype": torch.bfloat16, "heads": heads, "groups": groups, "head_dim": 64, "page_size": page_size}
    check(random_case(heads, **PLAIN | fixed | {"v_rank": 2, "lengths": [90, 40], "max_queries": 1 + groups % 2}))


@pytest.mark.parametrize("lengths", [[17, 1], [90]], ids=str)
def test_heads_of_an_odd_size(lengths):
    """Rows of pages start on 16 bytes, those of B within them do not: compiled as others, the second 16 tokens were lost."""
    fixed = {"dtype": torch.bfloat16, "heads": 32, "head_dim": 33, "k_rank": 8, "v_rank": 5, "page_size": 64}
    check(random_case(284, **PLAIN | fixed | {"lengths": lengths, "sliding_window": 64, "wide_rows": True}))


@pytest.mark.parametrize("window", [1, 7, 33, 100])
@pytest.mark.parametrize("page_size", [8, 32])
def test_sliding_windows(window, page_size):
    """Of one token and more, longer than a request; what is before them is NaN, its pages are given back."""
    fixed = {"sliding_window": window, "page_size": page_size, "lengths": [3, 90, 64, 0, 80], "max_queries": 3}
    check(random_case(window, **PLAIN | fixed))


@pytest.mark.parametrize("max_queries", [2, 3, 16])
def test_ragged_queries(max_queries):
    """Requests of no token to as many as there may be, over as many rows or more."""
    check(random_case(max_queries, **PLAIN | {"max_queries": max_queries, "lengths": [40, 0, 16, 1, 70, 0, 20]}))


@pytest.mark.parametrize("ranks", [(16, 16), (1, 8)], ids=str)
def test_constant_a(ranks):
    fixed = {"constant_a": True, "k_rank": ranks[0], "v_rank": ranks[1], "page_size": 32, "dtype": torch.bfloat16}
    check(random_case(1, **PLAIN | fixed | {"lengths": [70, 20]}))


@pytest.mark.parametrize("page_size", [16, 128])
def test_float8(page_size):
    fixed = {"float8": True, "dtype": torch.float16, "v_rank": 2, "heads": 12, "head_dim": 64, "page_size": page_size}
    check(random_case(2, **PLAIN | fixed | {"lengths": [150, 31]}))


LOW_BIT = PLAIN | {
    "float8": True, "dtype": torch.bfloat16, "heads": 32, "head_dim": 64, "k_rank": 1, "lengths": [200, 0, 1, 33, 64, 97],
}  # fmt: skip


@pytest.mark.parametrize(
    "heads, k_rank, v_rank, page_size",
    [(32, 1, 1, 16), (32, 1, 1, 24), (25, 1, 1, 64), (34, 2, 2, 8), (47, 2, 1, 32), (61, 1, 2, 24), (12, 1, 2, 64)],
)
def test_pages_of_the_low_bit_kernel(heads, k_rank, v_rank, page_size, monkeypatch):
    """Tiles within a page, of several pages, of pages that end within them; pieces of several tiles, whole requests."""
    monkeypatch.setattr(flash_tpa_pages_t6, "device_limits", lambda device: (1, 232448))
    monkeypatch.setattr(flash_tpa_pages_t6, "decode_kernel", None)
    flash_tpa_pages_t6._launches.cache_clear()
    fixed = {"heads": heads, "k_rank": k_rank, "v_rank": v_rank, "page_size": page_size, "shared": True}
    check(random_case(page_size, **LOW_BIT | fixed))


def test_low_bit_kernel_over_pieces_of_half_its_tiles(monkeypatch):
    """As of layers of other ranks, which may have the same pieces: tiles then begin within a page's."""
    from modeling_t6.flash_tpa_low_bit_kernels_t6 import LowBitLaunch

    launches = [LowBitLaunch(32, 1, 1), LowBitLaunch(32, 2, 1)]
    monkeypatch.setattr(flash_tpa_pages_t6, "_low_bit_launch", lambda *args: launches.pop(0))
    flash_tpa_pages_t6._launches.cache_clear()
    check(random_case(3, **LOW_BIT | {"page_size": 64, "dtype": torch.float16}))
    assert not launches


@pytest.mark.parametrize(
    "field",
    [{"sliding_window": 70}, {"max_queries": 2}, {"page_size": 12}, {"wide_rows": True}, {"head_dim": 32}],
    ids=lambda field: next(iter(field)),
)
def test_pages_that_the_other_kernel_reads(field, monkeypatch):
    """Pieces that begin within tiles, several tokens, pages that end within 8 tokens, rows that do not start on 8 bytes."""
    monkeypatch.setattr(flash_tpa_pages_t6, "low_bit_decode_kernel", None)
    flash_tpa_pages_t6._launches.cache_clear()
    case = random_case(2, **LOW_BIT | {"lengths": [90, 40], "page_size": 16} | field)
    assert not case["wide_rows"] or Batch(case, DEVICE).key_pages.stride(1) % 8
    check(case)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("rank", [1, 3])
def test_float8_values_that_start_in_the_middle_of_16_bytes(rank, page_size):
    fixed = {"float8": True, "dtype": torch.bfloat16, "heads": 34, "head_dim": 64, "k_rank": rank, "v_rank": rank}
    case = random_case(7, **PLAIN | fixed | {"page_size": page_size, "lengths": [70, 3]})
    assert Batch(case, DEVICE).value_pages.data_ptr() % 16 == 8
    check(case)


def test_one_long_request_beside_many_short_ones():
    check(random_case(3, **PLAIN | {"lengths": [5] * 9 + [600] + [7] * 8}))


def test_a_cache_of_more_numbers_than_32_bits_count():
    """Only the pages of the request are touched: the rest of the memory is asked for, and never used."""
    case = random_case(4, **PLAIN | {"float8": True, "dtype": torch.float16, "lengths": [40], "page_size": 32})
    batch = Batch(case, DEVICE)
    width = batch.key_pages.shape[2] + batch.value_pages.shape[2]
    last = 2**31 // (32 * width) + 1
    pages = torch.empty(last + 2, 32, width, dtype=torch.float8_e4m3fn, device=DEVICE)
    for i, page in enumerate(batch.table[0, :2].tolist()):
        rows = torch.cat([batch.key_pages[page].float(), batch.value_pages[page].float()], -1)
        pages[last + i] = rows.to(pages.dtype)
        batch.table[0, i] = last + i
    batch.key_pages, batch.value_pages = pages.split([batch.key_pages.shape[2], batch.value_pages.shape[2]], -1)
    output, expected = batch.run(DEVICE), batch.expected()
    assert (output[: len(expected)].double() - expected).norm() / expected.norm() < TOLERANCES[torch.float16]


def test_refuses_what_does_not_fit():
    batch = Batch(random_case(5, **PLAIN | {"lengths": [20, 3]}), DEVICE)
    pieces = Pieces.empty(2, 1, 5, 32, 2, 1, torch.float32, DEVICE)
    lengths, starts = torch.tensor([20, 3], dtype=torch.int32), torch.arange(3, dtype=torch.int32)

    def attend(query=batch.query, table=batch.table, max_query_length=1, **kwargs):
        query, table, seen = (x.to(DEVICE) for x in (query, table, lengths))
        rows = batch.key_pages, batch.value_pages
        paged_flash_tpa(query, *rows, table, seen, pieces, 2, 1, 0.2, max_query_length, **kwargs)

    with pytest.raises(ValueError, match="sliding_window is 7, that of the pieces None"):
        attend(sliding_window=7)
    with pytest.raises(ValueError, match="1 to 16, got 17"):
        attend(max_query_length=17)
    with pytest.raises(ValueError, match="query must be"):
        attend(query=batch.query[None])
    with pytest.raises(ValueError, match="block_table"):
        attend(table=batch.table[:1])
    with pytest.raises(ValueError, match="output must be"):
        attend(output=batch.query[:1])
    with pytest.raises(ValueError, match="Pieces for 2 requests"):
        schedule_pieces(lengths[:1].to(DEVICE), starts.to(DEVICE), pieces)


# The schedule.


def schedule(lengths: list[int], queries: list[int], window: int | None = None, at_once: int = 8) -> list[list[tuple]]:
    """The pieces (first row, end, place of the partial result) of each request, every slot and entry checked."""
    pieces = Pieces.empty(len(lengths), 16, 8, 32, 1, 1, torch.float32, DEVICE, sliding_window=window)
    num_slots = max(at_once, at_once + len(lengths))
    pieces = Pieces(
        torch.full((num_slots, 8), -9, dtype=torch.int32, device=DEVICE),
        torch.full((len(lengths) + 1, 4), -9, dtype=torch.int32, device=DEVICE),
        at_once,
        3 * at_once,
        pieces.tile,
        window,
    )
    starts = torch.tensor([0, *queries], device=DEVICE).cumsum(0, dtype=torch.int32)
    schedule_pieces(torch.tensor(lengths, dtype=torch.int32, device=DEVICE), starts, pieces)
    slots = pieces.slots.tolist()
    found = [[] for _ in lengths]
    for request, first, end, partial, *_ in slots:
        if request >= 0:
            found[request].append((first, end, partial))
    used = sum(map(len, found))
    assert all(slot[0] == -1 for slot in slots[used:])
    entries = pieces.splits.tolist()
    split = {i: of_request for i, of_request in enumerate(found) if len(of_request) > 1}
    assert entries[1 : 1 + entries[0][0]] == [
        [of_request[0][2], len(of_request), int(starts[i]), int(starts[i + 1])] for i, of_request in split.items()
    ]
    places = [place for of_request in split.values() for _, _, place in of_request]
    assert places == list(range(len(places))) and len(places) <= pieces.num_partials
    assert all(of_request[0][2] == -1 for of_request in found if len(of_request) == 1)
    return found


@pytest.mark.parametrize("window", [None, 50])
def test_schedule_covers_every_row_once(window, monkeypatch):
    """Also for more requests than are looked at together."""
    monkeypatch.setattr(flash_tpa_pages_t6, "SCHEDULED_REQUESTS", 16)
    choose = random.Random(0)
    for count, longest in ((1, 4000), (3, 100), (16, 900), (37, 2000), (60, 60)):
        lengths = [choose.choice((0, 1, longest, choose.randint(1, longest))) for _ in range(count)]
        queries = [min(length, choose.randint(0, 3)) for length in lengths]
        for length, n, pieces in zip(lengths, queries, schedule(lengths, queries, window)):
            first = 0 if window is None else max(0, length - n - window + 1)
            if n == 0 or length == 0:
                assert pieces == []
                continue
            assert pieces[0][0] == first and pieces[-1][1] == length
            assert all(a[1] == b[0] and a[0] < a[1] for a, b in zip(pieces, pieces[1:]))
            assert all(piece[0] % 16 == 0 for piece in pieces[1:])


def test_schedule_fills_the_chip_once_with_requests_of_one_length():
    for count in (1, 2, 4, 8):
        found = schedule([16 * 1000] * count, [1] * count)
        assert all(len(pieces) == 8 // count for pieces in found)


def test_schedule_divides_the_longest_alone():
    found = schedule([16] * 20 + [16 * 400], [1] * 21)
    assert all(len(pieces) == 1 for pieces in found[:-1]) and len(found[-1]) >= 6


# On a GPU only.


def number_of_compilations() -> int:
    from modeling_t6.flash_tpa_kernels_t6 import combine_pages_kernel, decode_kernel, schedule_kernel
    from modeling_t6.flash_tpa_low_bit_kernels_t6 import low_bit_decode_kernel

    kernels = (combine_pages_kernel, decode_kernel, low_bit_decode_kernel, schedule_kernel)
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@needs_gpu
@pytest.mark.parametrize("rows", [{"max_queries": 4}, {"float8": True}], ids=["bfloat16", "float8"])
def test_one_compilation_for_every_batch(rows):
    fixed = PLAIN | {"dtype": torch.bfloat16, "heads": 32, "head_dim": 64} | rows
    check(random_case(0, **fixed | {"lengths": [4]}))
    before = number_of_compilations()
    for seed, lengths in enumerate(([1], [2], [17, 300], [16] * 16, [5000, 1], [33] * 100)):
        check(random_case(seed, **fixed | {"lengths": lengths}))
    assert number_of_compilations() == before


@needs_gpu
def test_what_is_timed_begins_after_what_it_reads(monkeypatch):
    """The benchmarks' stream waits for the one that fills slots and pages: slots not yet written point anywhere."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from gpu import graph_seconds

    filled, seen = torch.zeros(1, device=DEVICE), []
    torch.cuda._sleep(10**8)
    filled.fill_(1)
    graph_seconds([lambda: seen.append(filled.clone())])
    assert seen[0].item() == 1


@needs_gpu
@pytest.mark.parametrize("heads, float8, queries", [(12, False, 3), (32, True, 1)], ids=["bfloat16", "float8"])
def test_a_graph_is_replayed_for_another_batch(heads, float8, queries):
    fixed = PLAIN | {"dtype": torch.bfloat16, "heads": heads, "head_dim": 64, "max_queries": queries, "page_size": 64}
    fixed["float8"] = float8
    # One number of pages and of query tokens, since the graph keeps the addresses.
    batches = [
        Batch(random_case(seed, **fixed | {"lengths": lengths}), DEVICE)
        for seed, lengths in ((0, [4000, 70, 900, 1]), (1, [1, 2000, 3, 2900]), (2, [0, 0, 4900, 64]))
    ]
    num_pages, num_tokens = (max(getattr(b, name).shape[0] for b in batches) for name in ("key_pages", "query"))
    width = batches[0].key_pages.shape[2] + batches[0].value_pages.shape[2]
    pages = torch.empty(num_pages, 64, width, dtype=batches[0].key_pages.dtype, device=DEVICE)
    query = torch.empty(num_tokens, heads, 64, dtype=torch.bfloat16, device=DEVICE)
    table = torch.empty(5, 90, dtype=torch.int32, device=DEVICE)
    lengths, starts = (torch.empty(n, dtype=torch.int32, device=DEVICE) for n in (4, 5))
    pieces = Pieces.empty(4, queries, heads, 64, 2, 1, pages.dtype, DEVICE)

    def fill(batch):
        rows = torch.cat([batch.key_pages.float(), batch.value_pages.float()], -1)
        pages[: len(rows)] = rows.to(pages.dtype)
        query[: batch.query.shape[0]] = batch.query.to(DEVICE)
        table[:, : batch.table.shape[1]] = batch.table
        lengths.copy_(torch.tensor(batch.lengths))
        starts.copy_(torch.tensor(batch.starts))

    def attend():
        schedule_pieces(lengths, starts, pieces)
        rows = pages.split([batches[0].key_pages.shape[2], batches[0].value_pages.shape[2]], -1)
        return paged_flash_tpa(query, *rows, table, lengths, pieces, 2, 1, scaling, queries)

    scaling = 64**-0.5
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fill(batches[0])
        attend()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            output = attend()
        for batch in batches:
            batch.scaling = scaling
            fill(batch)
            graph.replay()
            expected = batch.expected()
            difference = output[: len(expected)].cpu().double() - expected
            assert difference.norm() / expected.norm() < TOLERANCES[torch.bfloat16]
