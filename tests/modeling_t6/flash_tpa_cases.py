"""
Random cases of FlashTPA, and the reference in float64.

    python -m tests.modeling_t6.flash_tpa_cases 0 500      # on a GPU: that many seeds, in as many processes as cores
"""

import math
import random

import torch

from modeling_t6.cache_t6 import FactorLayout
from modeling_t6.flash_tpa_t6 import flash_tpa
from modeling_t6.quantized_rows_t6 import rotate_features

from .random_cases import run_cases


# float16 has 11 significant bits and bfloat16 8: the products' weights are rounded to them, and the sum averages that.
TOLERANCES = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
# Queries of float16 over rows of 4 bits are rounded once more, when they are rotated, and so is n * scale + zero.
ROTATED_TOLERANCE = 2e-3
HEADS = (1, 3, 12, 16, 22, 32, 34, 47, 61, 64, 78, 80, 97, 130)


def low_bit_model(choose: random.Random) -> dict:
    """Fields of a case that the low-bit kernel takes, if there is one query token and nothing is masked."""
    return {
        "dtype": choose.choice((torch.bfloat16, torch.float16)),
        "heads": choose.choice((12, 25, 32, 34, 47, 61, 64, 78)),
        "head_dim": 64,
        "k_rank": choose.randint(1, 2),
        "v_rank": choose.randint(1, 2),
        "constant_a": False,
        "groups": 1,
    }


def random_case(seed: int, **fixed) -> dict:
    """A shape from the ranges that the kernels cover; `fixed` sets some of its fields."""
    choose = random.Random(seed)
    case = {
        "dtype": choose.choice(list(TOLERANCES)),
        "batch": choose.choice((1, 2, 3)),
        "heads": choose.choice(HEADS),
        "head_dim": choose.choice((32, 48, 64, 80, 96, 128, 256)),
        "k_rank": choose.randint(1, 8),
        "v_rank": choose.randint(1, 8),
        "queries": choose.choice((1, 1, 1, 2, 3, 5, 8, 16)),
        "constant_a": choose.random() < 0.25,
        "tokens": choose.choice((1, 17, 64, 100, 129, 500, 1000, 3000)),
        "room": choose.choice((0, 0, 7, 100)),
        "mask": choose.choice(("none", "none", "padding", "boolean", "additive")),
        "wide_rows": choose.random() < 0.3,
        "heads_first": choose.random() < 0.3,
        "groups": choose.choice((1, 1, 1, 2, 3, 4, 8, 34)),
        "rows": choose.choice(("model", "model", "float8_e4m3fn", "int4", "int4")),
        "seed": seed,
    }
    if case["rows"] != "model" and choose.random() < 0.5:  # what the low-bit kernel reads
        case |= low_bit_model(choose) | {"queries": 1, "mask": "none"}
    if case["constant_a"]:
        case["k_rank"], case["v_rank"] = choose.choice((1, 4, 8, 16)), choose.choice((1, 4, 8, 16))
    case |= ({"groups": 1, "rows": "model"} if "heads" in fixed else {}) | fixed
    case["heads"] = max(1, case["heads"] // case["groups"]) * case["groups"]
    case["tokens"] = max(case["tokens"], case["queries"])
    # The float64 reference forms K and V.
    while case["batch"] * case["tokens"] * case["heads"] * case["head_dim"] > 2e7 and case["tokens"] > 100:
        case["tokens"] //= 2
    return case


def tolerance(case: dict) -> float:
    """Of `relative_error`."""
    is_rotated = case["rows"] == "int4" and case["dtype"] == torch.float16
    return ROTATED_TOLERANCE if is_rotated else TOLERANCES[case["dtype"]]


def relative_error(case: dict, device: str) -> float:
    """‖out - ref‖ / ‖ref‖, with NaN in every cached row that does not count and beside the rows."""
    choose = random.Random(case["seed"])
    torch.manual_seed(case["seed"])
    batch, heads, head_dim, queries = (case[name] for name in ("batch", "heads", "head_dim", "queries"))
    dtype, room = case["dtype"], case["tokens"] + case["room"]
    lengths = torch.tensor([case["tokens"], *(choose.randint(queries, case["tokens"]) for _ in range(batch - 1))])
    if no_lengths := case["room"] == 0 and choose.random() < 0.5:
        lengths[:] = room
    scaling = choose.choice((1.0, 0.3)) * head_dim**-0.5

    kv_heads = heads // case["groups"]
    query = torch.randn(batch, queries, heads, head_dim).to(dtype)
    if case["heads_first"]:
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    all_rows, constants, states = [], [], []
    for rank in (case["k_rank"], case["v_rank"]):
        layout = FactorLayout(rank, 0 if case["constant_a"] else kv_heads, head_dim)
        a = torch.randn(rank, kv_heads) if case["constant_a"] else torch.randn(batch, room, rank, kv_heads)
        a, b = a.to(dtype), torch.randn(batch, room, rank, head_dim).to(dtype)
        rows, not_a_number = layout.pack(None if case["constant_a"] else a, b), math.nan
        if case["rows"] == "int4":  # whose bytes of ones are NaN in float8 and, two of them, in float16
            rows, not_a_number = layout.quantized.pack(None if case["constant_a"] else a, b), 255
            read_a, b = layout.quantized.unpack(rows, torch.float64)
            a, b = a if case["constant_a"] else read_a, rotate_features(b)
        elif case["rows"] != "model":
            rows = rows.to(torch.float8_e4m3fn)
            read_a, b = layout.unpack(rows.double())
            a = a if case["constant_a"] else read_a
        states.append(torch.einsum("...rh,bnrd->bhnd" if a.dim() == 2 else "bnrh,bnrd->bhnd", a.double(), b.double()))
        for i, length in enumerate(lengths):
            rows[i, :, length:] = not_a_number
        if case["wide_rows"]:
            width = rows.shape[-1] + choose.choice((0, 5, 8))
            buffer = torch.full((batch, 1, room + 3, width), not_a_number, dtype=rows.dtype, device=device)
            buffer[:, :, :room, : rows.shape[-1]] = rows.to(device)
            rows = buffer[:, :, :room, : rows.shape[-1]]
        all_rows.append(rows.to(device))
        constants.append(a.to(device) if case["constant_a"] else None)

    token, last = torch.arange(room), (lengths[:, None] - queries + torch.arange(queries))[:, None, :, None]
    visible, mask, bias = token <= last, None, 0.0
    if case["mask"] == "padding":
        hidden = torch.tensor([choose.randint(0, int(length) - queries) for length in lengths])
        mask = (token >= hidden[:, None])[:, None, None]
        visible = visible & mask
    elif case["mask"] == "boolean":
        mask = visible = visible & (
            (torch.rand(batch, choose.choice((1, heads)), queries, room) < 0.8) | (token == last)
        )
    elif case["mask"] == "additive":
        bias = torch.randn(batch, 1, queries, room).to(dtype)
        mask = bias.masked_fill(~visible, torch.finfo(dtype).min)
        bias = bias.double()

    states = [x.repeat_interleave(case["groups"], dim=1) for x in states]
    key, value = states[0] / case["k_rank"], states[1] / case["v_rank"]
    scores = torch.einsum("bqhd,bhnd->bhqn", query.double(), key) * scaling + bias
    probabilities = scores.masked_fill(~visible, -math.inf).softmax(-1)
    expected = torch.einsum("bhqn,bhnd->bqhd", probabilities, value)
    output = flash_tpa(
        query.to(device), *all_rows, case["k_rank"], case["v_rank"], scaling, *constants,
        mask=None if mask is None else mask.to(device),
        lengths=None if no_lengths else lengths.to(device),
        causal=case["mask"] in ("none", "padding"),
        groups=case["groups"],
    )  # fmt: skip
    assert output.dtype == dtype and output.shape == query.shape
    return ((output.cpu().double() - expected).norm() / expected.norm()).item()


def _run(seed: int) -> tuple[str, dict, float, float]:
    torch.set_num_threads(1)
    case = random_case(seed)
    return f"{case['dtype']}, {case['rows']}", case, relative_error(case, "cuda"), tolerance(case)


if __name__ == "__main__":
    run_cases(_run, chunksize=4)
