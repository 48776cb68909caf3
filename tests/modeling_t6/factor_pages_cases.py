"""
Random cases of the kernels between projections and pages, and their references in float64.

    python -m tests.modeling_t6.factor_pages_cases 0 100      # on a GPU: that many seeds, in as many processes as cores
    compute-sanitizer --tool memcheck python -m tests.modeling_t6.factor_pages_cases 0 10 0      # in this process
"""

import math
import random

import torch
from torch import nn

from modeling_t6 import T6Config, factor_pages_t6
from modeling_t6.cache_t6 import factor_layouts
from modeling_t6.factor_pages_t6 import (
    FactorColumns,
    FactorTransform,
    form_heads_from_pages,
    select_ranks,
    slots_of_rows,
    store_factors,
    store_projections,
)
from modeling_t6.factors_t6 import TensorProductFactors

from .random_cases import run_cases


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT8 = torch.float8_e4m3fn
# Half a unit in the last place of what is stored, and of float32's sums; then the smallest numbers of a dtype.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11, FLOAT8: 2**-4}
ABSOLUTE = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5, FLOAT8: 2**-10}


class Part(nn.Module):
    """A projection whose output is a part of its input: hidden states are then the projections, digit by digit."""

    def __init__(self, part: slice):
        super().__init__()
        self.part = part

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states[..., self.part]


def random_case(seed: int, **fixed) -> dict:
    """A shape and a variant; `fixed` sets some of its fields."""
    choose = random.Random(seed)
    case = {
        "dtype": choose.choice(DTYPES),
        "float8": choose.random() < 0.3,
        "heads": choose.choice((1, 5, 8, 12, 32, 34, 47, 78)),
        "head_dim": choose.choice((16, 24, 64, 80, 96, 128, 256)),
        "q_rank": choose.choice((None, 1, 3, 6, 8)),
        "k_rank": choose.choice((1, 2, 3, 5, 8)),
        "v_rank": choose.choice((1, 2, 3, 5, 8)),
        "constant_a": choose.random() < 0.25,
        "activation": choose.choice((None, None, "sigmoid", "softmax")),
        "qk_norm": choose.choice((False, False, False, True, "heads")),
        "partial": choose.choice((1.0, 1.0, 0.5, 0.25)),
        "tokens": choose.choice((1, 3, 6)),
        "requests": choose.choice((1, 2, 5)),
        "page_size": choose.choice((1, 16, 48)),
        "groups": choose.choice((1, 1, 1, 2, 3, 8)),
        "seed": seed,
    }
    if case["constant_a"]:
        case |= {"k_rank": choose.choice((2, 8, 16)), "v_rank": choose.choice((1, 8, 16)), "activation": None}
        case |= {"qk_norm": bool(case["qk_norm"])}
    case |= ({"groups": 1} if "heads" in fixed else {}) | fixed
    return case | {"heads": max(1, case["heads"] // case["groups"]) * case["groups"]}


def make_layer(case: dict) -> TensorProductFactors:
    """The module of the model, in float64, with random parameters."""
    config = T6Config(
        hidden_size=8,
        num_attention_heads=case["heads"],
        num_key_value_heads=case["heads"] // case["groups"],
        head_dim=case["head_dim"],
        q_rank=case["q_rank"],
        k_rank=case["k_rank"],
        v_rank=case["v_rank"],
        noncontextual_a=case["constant_a"],
        head_factor_act=case["activation"],
        qk_norm=case["qk_norm"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": case["partial"]},
        num_hidden_layers=1,
    )
    layer = TensorProductFactors(config, 0)
    layer._add_qk_norms()
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape).to(case["dtype"]).double()
    return layer.requires_grad_(False)


def random_pages(case: dict, blocks: int, widths: tuple[int, int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of NaN, keys and values in one tensor or in two, with other numbers between pages."""
    choose = random.Random(case["seed"] + 1)
    dtype = FLOAT8 if case["float8"] else case["dtype"]
    room = case["page_size"] + choose.choice((0, 0, 1))
    if choose.random() < 0.5:
        pages = torch.full((blocks, room, sum(widths)), math.nan, device=device).to(dtype)
        views = pages[:, : case["page_size"]].split(widths, dim=-1)
    else:
        views = [
            torch.full((blocks, room, w), math.nan, device=device).to(dtype)[:, : case["page_size"]] for w in widths
        ]
    return tuple(views)


def as_given(pages: torch.Tensor) -> torch.Tensor:
    return pages.view(torch.uint8) if pages.dtype == FLOAT8 else pages


def numbers(x: torch.Tensor) -> torch.Tensor:
    return x.float().cpu().double()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """The numbers that float64 gives, rounded."""
    if dtype == FLOAT8:
        expected = expected.clamp(-448, 448)
    torch.testing.assert_close(
        numbers(actual), expected, rtol=RELATIVE[dtype] * 1.01, atol=ABSOLUTE[dtype], msg=lambda m: f"{what}: {m}"
    )


def near_formed(actual: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """
    Which numbers of heads [heads, head_dim] are those of A [rank, heads] and B [rank, head_dim] as rows have them, rounded. The program
    that forms heads computes A and B again, in another order than the one that stores them: now and then it rounds to a neighbour.
    """
    exact = torch.einsum("rh,rd->hd", a, b) / len(a)
    rounded = exact.to(dtype).double()
    exact = exact.where(rounded.isfinite(), rounded)  # beyond float16, perhaps
    neighbours = 4 * RELATIVE[dtype] * torch.einsum("rh,rd->hd", a.abs(), b.abs()) / len(a)
    torch.testing.assert_close(numbers(actual), exact, rtol=RELATIVE[dtype] * 1.01, atol=neighbours.max().item() + ABSOLUTE[dtype], msg=lambda m: f"{what}: {m}")  # fmt: skip
    return torch.isclose(numbers(actual), exact, rtol=RELATIVE[dtype] * 1.01, atol=ABSOLUTE[dtype])


def check_store(case: dict, device: str, store=store_factors) -> None:
    """
    Queries and rows are those of the model's module in float64; all else in the pages is as it was. The factors as columns of
    one product are the same numbers.
    """
    torch.manual_seed(case["seed"])
    choose = random.Random(case["seed"] + 2)
    layer, dtype, tokens = make_layer(case), case["dtype"], case["tokens"]
    heads, head_dim, constant_a = case["heads"], case["head_dim"], case["constant_a"]
    kv_heads = heads // case["groups"]

    # One product, of which all six are parts, in random order and with other numbers between.
    shapes = {"q_proj": (heads, head_dim)} if layer.q_rank is None else {"q_b_proj": (layer.q_rank, head_dim)}
    shapes |= {"k_b_proj": (layer.k_rank, head_dim), "v_b_proj": (layer.v_rank, head_dim)}
    if not constant_a:
        ranks = {"q": layer.q_rank, "k": layer.k_rank, "v": layer.v_rank}
        sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
        shapes |= {f"{name}_a_proj": (sizes[name], rank) for name, rank in ranks.items() if rank is not None}
    parts, end = {}, 0
    for name in choose.sample(list(shapes), len(shapes)):
        start = end + choose.choice((0, 0, 1, 8))
        end = start + math.prod(shapes[name])
        parts[name] = slice(start, end)
        setattr(layer, name, Part(parts[name]))
    product = torch.full((tokens, end + choose.choice((0, 3))), math.nan)
    for name, part in parts.items():
        largest = 300 if case["float8"] and name[0] in "kv" else 1  # beyond the range of float8
        product[:, part] = torch.randn(tokens, part.stop - part.start) * largest
    product = product.to(dtype)

    half = layer.config.rotary_dim // 2
    angles = torch.rand(tokens, half) * 100
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    rotation = tuple(torch.cat([x, x], dim=-1)[None].double() for x in (cos, sin))
    factors = layer.project(product[None].double(), rotation)
    expected_query = layer.queries(factors)[0]
    layouts = factor_layouts(layer.config, 0)
    expected_rows = [
        layout.pack(a, b)[0, 0]
        for layout, a, b in zip(layouts, (factors.a_k, factors.a_v), (factors.b_k, factors.b_v))
    ]

    page_size, blocks = case["page_size"], 2 + tokens // case["page_size"] + 1
    slots = torch.randperm(blocks * page_size)[:tokens]
    slots[torch.rand(tokens) < 0.2] = -1
    slots = slots[: tokens - choose.choice((0, 0, 1))]
    widths = tuple(layout.width for layout in layouts)
    pages = random_pages(case, blocks, widths, device)

    product = product.to(device)
    columns = FactorColumns(
        *(
            (parts[name].start, *shapes[name]) if name in parts else None
            for name in (
                *("q_a_proj", "q_proj" if layer.q_rank is None else "q_b_proj"),
                *("k_a_proj", "k_b_proj", "v_a_proj", "v_b_proj"),
            )
        )
    )
    a_q, *others = columns.views(product)
    constant_a_q = layer.q_a.to(device, dtype) if constant_a and layer.q_rank is not None else None
    tokens_at = cos.to(device), sin.to(device), slots.to(device)
    norms = (
        [norm.weight.to(device, dtype) for norm in (layer.q_norm, layer.k_norm)] if case["qk_norm"] else (None, None)
    )
    transform = FactorTransform(*norms, layer.config.rms_norm_eps, case["activation"], case["qk_norm"] == "heads")
    query = store(
        a_q if constant_a_q is None else constant_a_q, *others, *tokens_at, *(as_given(x) for x in pages), transform
    )
    assert query.dtype == dtype
    other_query, other_pages = torch.empty_like(query), random_pages(case, blocks, widths, device)
    states, first = {}, choose.choice((0, 0, 1, tokens))
    if not constant_a:
        room = torch.full((2, tokens - first, kv_heads, head_dim), math.nan, dtype=dtype, device=device)
        states = dict(zip(("key", "value"), room))
    store_projections(
        product, columns, constant_a_q, *tokens_at, *(as_given(x) for x in other_pages), other_query, transform,
        **states, first_formed=first,
    )  # fmt: skip
    for (name, formed), rows, layout in zip(states.items(), other_pages, layouts):
        near = []
        for i, slot in enumerate(slots.tolist()[first:]):
            if slot >= 0:
                a, b = layout.unpack(numbers(rows[slot // page_size, slot % page_size])[None, None, None])
                near.append(near_formed(formed[i], a[0, 0], b[0, 0], dtype, name))
                formed[i] = math.nan
        if near:
            near = torch.stack(near)
            assert (~near).sum() <= max(1, 0.01 * near.numel()), f"{name}: {(~near).sum()} of {near.numel()} numbers"
        assert formed.isnan().all(), f"{name}: heads of tokens without a row are written"
    for name, x, other in zip(("query", "key rows", "value rows"), (query, *pages), (other_query, *other_pages)):
        assert torch.equal(x.float().nan_to_num(0.5), other.float().nan_to_num(0.5)), (
            f"{name}: not those of the product"
        )
    assert_near(query, expected_query, dtype, "query")
    for name, rows, expected in zip(("key rows", "value rows"), pages, expected_rows):
        rows = rows.cpu()
        for i, slot in enumerate(slots.tolist()):
            if slot >= 0:
                at = slot // page_size, slot % page_size
                assert_near(rows[at], expected[i], rows.dtype, name)
                as_given(rows)[at] = (
                    torch.full_like(rows[at], math.nan, dtype=torch.float32).to(rows.dtype).view(as_given(rows).dtype)
                )
        assert rows.float().isnan().all(), f"{name}: other numbers of the pages are written"


def check_form(case: dict, device: str, form=form_heads_from_pages) -> None:
    """K and V are those of float64; all else in the workspace is as it was."""
    torch.manual_seed(case["seed"])
    choose = random.Random(case["seed"] + 3)
    dtype, head_dim, page_size = (case[name] for name in ("dtype", "head_dim", "page_size"))
    heads = case["heads"] // case["groups"]
    num_requests = case["requests"]
    first_positions = [choose.choice((0, 0, 7, 50)) for _ in range(num_requests)]
    lengths = [choose.choice((0, 1, 2, case["tokens"])) for _ in range(num_requests)]
    ends = [first + length for first, length in zip(first_positions, lengths)]
    most_pages = max(-(-end // page_size) for end in ends) + 1
    blocks = num_requests * most_pages
    block_table = torch.randperm(blocks).view(num_requests, most_pages)

    states, constants, layouts = [], [], []
    for rank in (case["k_rank"], case["v_rank"]):
        selects = case["constant_a"] and heads % rank == 0
        layout = factor_pages_t6._layouts(rank, rank, 0 if case["constant_a"] else heads, head_dim)[0]
        a, b = (torch.randn(sum(lengths), rank, size).to(dtype) for size in (heads, head_dim))
        if case["constant_a"]:
            a = a[0] if len(a) else torch.ones(rank, heads, dtype=dtype)
        if selects:
            a = (a * torch.eye(rank)[:, torch.randperm(rank)].repeat_interleave(heads // rank, 1)).to(dtype)
            a = a[:, :: heads // rank].repeat_interleave(heads // rank, 1)
        layouts.append(layout), states.append((a, b)), constants.append(a.to(device) if case["constant_a"] else None)
    pages = random_pages(case, blocks, tuple(layout.width for layout in layouts), device)
    requests = torch.arange(num_requests).repeat_interleave(torch.tensor(lengths))
    positions = torch.cat([torch.arange(first, end) for first, end in zip(first_positions, ends)])
    expected = []
    for view, layout, (a, b) in zip(pages, layouts, states):
        rows = layout.pack(a[None], b[None])[0, 0].to(view.dtype).to(device)
        at = block_table[requests, positions // page_size].to(device), (positions % page_size).to(device)
        as_given(view)[at] = as_given(rows)
        stored_a, stored_b = layout.unpack(numbers(rows)[None, None])
        stored_a = a.double() if case["constant_a"] else stored_a[0]
        equation = "rh,nrd->nhd" if case["constant_a"] else "nrh,nrd->nhd"
        expected.append(torch.einsum(equation, stored_a, stored_b[0]) / layout.rank)

    row_starts = torch.tensor([0, *lengths]).cumsum(0)
    if case["constant_a"]:
        selected = [select_ranks(a) for a in constants]
        sizes = {None if s is None else len(s.ranks) for s in selected}
        if None not in sizes and len(sizes) == 1:  # the key/value heads alone
            constants, (num_heads,) = selected, sizes
            expected = [x[:, :: heads // num_heads] for x in expected]
    num_heads = expected[0].shape[1]
    total = sum(lengths)
    workspace = torch.full((total + 3, 2, num_heads, head_dim), math.nan, dtype=dtype, device=device)
    key, value = (
        workspace.unbind(1)
        if case["seed"] % 2
        else [torch.full_like(workspace[:, 0].contiguous(), math.nan) for _ in range(2)]
    )
    slots = slots_of_rows(
        block_table.int().to(device), torch.tensor(first_positions).int().to(device), row_starts.int().to(device),
        page_size, total + choose.choice((0, 2)),
    )  # fmt: skip
    form(*(as_given(x) for x in pages), slots, key, value, case["k_rank"], case["v_rank"], *constants)
    for name, actual, states in zip(("key", "value"), (key, value), expected):
        assert_near(actual[:total], states, dtype, name)
        assert actual[total:].isnan().all(), f"{name}: other rows of the workspace are written"


def _run(seed: int) -> tuple[str, str, float, float]:
    torch.set_num_threads(1)
    case = random_case(seed)
    if seed % 2 == 0:
        case |= {"tokens": 60 * case["tokens"], "requests": 40 * case["requests"] % 199}
    failures = []
    for check in (check_store, check_form):
        try:
            check(case, "cuda")
        except AssertionError as error:
            failures.append(f"{check.__name__}: {error}")
    return "failed checks", "\n".join([str(case), *failures]), float(len(failures)), 0.0


if __name__ == "__main__":
    run_cases(_run, chunksize=2)
