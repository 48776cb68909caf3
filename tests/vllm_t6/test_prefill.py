"""How prompts are divided into pieces: nothing but the plan, on random batches, and attention by it in float64."""

import itertools
import math
import random
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from vllm.v1.attention.backends import fa_utils

from vllm_t6.prefill import WORKSPACE_ROWS, Piece, attend_to_piece, plan_pieces, workspace_rows


HEADS, DIM = 3, 8


class Case(NamedTuple):
    """`num_decodes` requests, of as many tokens, come before the prompts in the step; pages are in a random order."""

    query_lengths: list[int]
    lengths: list[int]
    num_decodes: int
    room: int
    window: int | None
    block_size: int
    block_table: torch.Tensor

    def plan(self) -> list[Piece]:
        slots = [torch.full((self.num_decodes,), -1)]
        slots += [self.slots(i)[-n:] for i, n in enumerate(self.query_lengths)]
        starts = itertools.accumulate([*[1] * self.num_decodes, *self.query_lengths], initial=0)
        return plan_pieces(
            self.query_lengths, self.lengths, self.num_decodes, self.num_decodes, self.room, self.window,
            self.block_table, self.block_size, torch.cat(slots), torch.tensor(list(starts), dtype=torch.int32),
        )  # fmt: skip

    def slots(self, request: int) -> torch.Tensor:
        """Of all rows of a prompt, in order."""
        positions = torch.arange(self.lengths[request])
        blocks = self.block_table[self.num_decodes + request, positions // self.block_size]
        return blocks.long() * self.block_size + positions % self.block_size


def random_case(seed: int) -> Case:
    choose = random.Random(seed)
    window = choose.choice((None, None, 1, 5, 40))
    lengths = [choose.choice((1, 2, 7, 16, 33, 90, 200)) for _ in range(choose.choice((1, 2, 5, 9)))]
    query_lengths = [choose.randint(1, min(length, 48)) for length in lengths]
    if choose.random() < 0.5:  # nothing is before some
        lengths = [n if choose.random() < 0.7 else length for n, length in zip(query_lengths, lengths)]
    # The workspace has room for all that a step adds to a request, and all that a window shows of it.
    room = max(query_lengths) + (window or 0) + choose.choice((0, 1, 30, 300))
    block_size, num_decodes = choose.choice((1, 8, 16, 48)), choose.choice((0, 1, 4))
    num_pages = -(-max(lengths) // block_size)
    shape = num_decodes + len(lengths), num_pages
    blocks = torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(seed)).view(shape)
    return Case(query_lengths, lengths, num_decodes, room, window, block_size, blocks.int())


def spans(starts: torch.Tensor) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise(starts.tolist())]


def visible(piece: Piece, num_queries: int, num_rows: int, window: int | None) -> torch.Tensor:
    """What FlashAttention shows each query token of a request: [queries, rows]."""
    if not piece.is_last:
        return torch.ones(num_queries, num_rows, dtype=torch.bool)
    rows, own = torch.arange(num_rows), torch.arange(num_rows - num_queries, num_rows)[:, None]
    return (rows <= own) & (rows > own - (window or num_rows))


@pytest.mark.parametrize("seed", range(60))
def test_plan(seed):
    """Every query token sees the rows that it is to see, each once, and no piece is larger than the workspace."""
    case = random_case(seed)
    starts = list(itertools.accumulate(case.query_lengths, initial=case.num_decodes))
    seen = {token: [] for token in range(starts[0], starts[-1])}
    for piece in case.plan():
        assert len(piece.slots) <= case.room
        assert piece.slots.dtype == torch.int64 and piece.query_starts.dtype == piece.row_starts.dtype == torch.int32
        queries, rows = spans(piece.query_starts), spans(piece.row_starts)
        assert piece.query_starts[-1] == piece.queries.stop - piece.queries.start
        assert piece.max_queries == max(span.stop - span.start for span in queries)
        assert piece.max_rows == max(span.stop - span.start for span in rows)
        for query_span, row_span in zip(queries, rows):
            tokens = range(query_span.start + piece.queries.start, query_span.stop + piece.queries.start)
            assert piece.is_first == all(not seen[token] for token in tokens)
            mask = visible(piece, len(tokens), row_span.stop - row_span.start, case.window)
            for token, shown in zip(tokens, mask):
                seen[token] += piece.slots[row_span][shown].tolist()
    for request, (start, end) in enumerate(itertools.pairwise(starts)):
        slots, length = case.slots(request).tolist(), case.lengths[request]
        for token in range(start, end):
            position = length - (end - token)
            first = 0 if case.window is None else max(0, position + 1 - case.window)
            assert seen[token] == slots[first : position + 1]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> tuple:
    """Attention [queries, h, d] and the logarithm of the sums of exponentials [queries, h]."""
    scores = torch.einsum("qhd,khd->qhk", query, key) * DIM**-0.5
    scores = scores.masked_fill(~mask[:, None], -math.inf)
    return torch.einsum("qhk,khd->qhd", scores.softmax(-1), value), scores.logsumexp(-1)


@pytest.mark.parametrize("seed", range(20))
def test_attention_by_pieces(seed):
    """Merged in float64 it is plain attention; pages that nobody looks at hold NaN."""
    case, generator = random_case(seed), torch.Generator().manual_seed(seed)
    keys, values = torch.full((2, case.block_table.numel() * case.block_size, HEADS, DIM), torch.nan).double()
    num_tokens = case.num_decodes + sum(case.query_lengths)
    query = torch.randn(num_tokens, HEADS, DIM, generator=generator, dtype=torch.double)
    expected, tokens = torch.zeros_like(query), case.num_decodes
    for request, (num_queries, length) in enumerate(zip(case.query_lengths, case.lengths)):
        slots, own = case.slots(request), slice(tokens, tokens + num_queries)
        keys[slots], values[slots] = torch.randn(2, length, HEADS, DIM, generator=generator, dtype=torch.double)
        rows, positions = torch.arange(length), torch.arange(length - num_queries, length)[:, None]
        mask = (rows <= positions) & (rows > positions - (case.window or length))
        expected[own], _ = attend(query[own], keys[slots], values[slots], mask)
        tokens += num_queries

    merged, sums = torch.zeros_like(query), torch.full((num_tokens, HEADS), -math.inf).double()
    for piece in case.plan():
        key, value = keys[piece.slots], values[piece.slots]
        if piece.is_first and piece.is_last:
            output = merged[piece.queries]
            attend_to_piece(query[piece.queries], key, value, piece, DIM**-0.5, case.window, None, None, output)
            continue
        for query_span, row_span in zip(spans(piece.query_starts), spans(piece.row_starts)):
            own = slice(query_span.start + piece.queries.start, query_span.stop + piece.queries.start)
            mask = visible(piece, own.stop - own.start, row_span.stop - row_span.start, case.window)
            attended, lse = attend(query[own], key[row_span], value[row_span], mask)
            total = torch.logaddexp(sums[own], lse)
            merged[own] = (
                merged[own] * (sums[own] - total).exp()[..., None] + attended * (lse - total).exp()[..., None]
            )
            sums[own] = total
    torch.testing.assert_close(merged, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("version", "rows"), [(3, WORKSPACE_ROWS), (None, 50_000)], ids=["merged", "whole"])
def test_without_flash_attention_all_rows_fit(version, rows, monkeypatch):
    """As on GPUs for which vLLM has none: PyTorch's attention merges no pieces."""
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size: version)
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=50_000, dtype=torch.float16, hf_text_config=SimpleNamespace(sliding_window=None, head_dim=64)
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
        device_config=SimpleNamespace(device_type="cuda"),
    )
    assert workspace_rows(config) == rows
