"""Rows of factors into pages, and keys and values out of them, in Triton and in PyTorch, against the model in float64."""

import importlib.util
import sys

import pytest
import torch

from modeling_t6 import factor_pages_t6
from modeling_t6.cache_t6 import FactorLayout
from modeling_t6.factor_pages_t6 import form_heads_from_pages, select_ranks, store_factors

from .common import DEVICE
from .factor_pages_cases import check_form, check_store, random_case


pytestmark = pytest.mark.once
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs and compiled kernels need a GPU")


@pytest.fixture(autouse=True)
def checked_interpreter(monkeypatch):
    if DEVICE != "cpu" or factor_pages_t6.triton is None:
        return
    from . import interpreter

    interpreter.compute_as_a_gpu(monkeypatch, float8=True)


@pytest.fixture(params=["triton", "torch"])
def implementation(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(factor_pages_t6, "triton", None)
    elif factor_pages_t6.triton is None:
        pytest.skip("Triton is for Linux")
    else:  # nothing else may answer for the kernels
        for name in ("_store_in_torch", "_form_in_torch"):
            monkeypatch.delattr(factor_pages_t6, name)


@pytest.mark.parametrize("seed", range(16))
def test_random_cases(implementation, seed):
    """On a GPU, `factor_pages_cases` runs as many as one likes; the interpreter runs small ones."""
    case = random_case(seed)
    check_store(case, DEVICE)
    check_form(case, DEVICE)


PLAIN = {
    "heads": 5, "head_dim": 16, "q_rank": 3, "k_rank": 2, "v_rank": 1, "constant_a": False, "activation": None,
    "qk_norm": False, "partial": 1.0, "dtype": torch.float32, "float8": False, "tokens": 7, "page_size": 3,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "t6-small": {"heads": 34, "head_dim": 64, "q_rank": 6, "v_rank": 2, "dtype": torch.bfloat16},
    "t6-large": {"heads": 47, "head_dim": 64, "q_rank": 6, "v_rank": 2, "dtype": torch.bfloat16, "float8": True},
    "t6-xl": {"heads": 78, "head_dim": 64, "q_rank": 6, "v_rank": 2, "dtype": torch.bfloat16},
    "kvonly": {"q_rank": None},
    "kvonly, qk-norm": {"q_rank": None, "qk_norm": True, "partial": 0.5},
    "qk-norm": {"qk_norm": True},
    "qk-norm of heads": {"qk_norm": "heads", "heads": 11, "k_rank": 3, "partial": 0.5},
    "qk-norm of heads, rotated rows, softmax": {"qk_norm": "heads", "heads": 21, "activation": "softmax"},
    "qk-norm of heads, sigmoid, kvonly": {"qk_norm": "heads", "q_rank": None, "k_rank": 1, "activation": "sigmoid"},
    "qk-norm of heads, t6-large": {"qk_norm": "heads", "heads": 47, "head_dim": 64, "dtype": torch.bfloat16},
    "sigmoid": {"activation": "sigmoid"},
    "softmax": {"activation": "softmax", "heads": 11, "k_rank": 3},
    "constant-a": {"constant_a": True, "k_rank": 16, "v_rank": 16, "heads": 32},
    "constant-a, kvonly": {"constant_a": True, "q_rank": None, "k_rank": 4, "v_rank": 4, "heads": 8},
    "partial, float8": {"partial": 0.25, "float8": True, "head_dim": 80},
    "many ranks": {"q_rank": 16, "k_rank": 16, "v_rank": 13, "head_dim": 24},
    "grouped": {"heads": 12, "groups": 3, "activation": "softmax"},
    "grouped, rotated rows, qk-norm of heads": {"heads": 34, "groups": 2, "qk_norm": "heads", "dtype": torch.bfloat16},
    "grouped, constant-a, kvonly": {
        "constant_a": True,
        "q_rank": None,
        "k_rank": 4,
        "v_rank": 4,
        "heads": 16,
        "groups": 2,
    },
    "odd head_dim": {"head_dim": 18, "heads": 3},
    "many requests": {"requests": 130, "tokens": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(implementation, name):
    case = random_case(len(name), **PLAIN | VARIANTS[name])
    check_store(case, DEVICE)
    check_form(case, DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_factors_beyond_the_range_of_float8(implementation, dtype):
    a, b = (
        torch.full((2, 3, 1), 1e4, dtype=dtype, device=DEVICE),
        torch.full((2, 1, 16), -1e5, dtype=dtype, device=DEVICE),
    )
    layout = FactorLayout(1, 3, 16)
    key_pages, value_pages = torch.zeros(2, 1, 2, layout.width, dtype=torch.uint8, device=DEVICE)
    cos, sin = torch.ones(2, 8, device=DEVICE), torch.zeros(2, 8, device=DEVICE)
    store_factors(a, b, a, b, a, b, cos, sin, torch.tensor([1, 0], device=DEVICE), key_pages, value_pages)
    for pages in (key_pages, value_pages):
        stored_a, stored_b = layout.unpack(pages.view(torch.float8_e4m3fn).float()[None])
        assert (stored_a == 448).all() and (stored_b == -448).all()


def test_pages_beyond_32_bits(implementation):
    """The second page begins 2^31 numbers after the first."""
    layout, tokens = FactorLayout(2, 3, 16), 3
    storage = torch.empty(2**31 + 16 * layout.width, dtype=torch.uint8, device=DEVICE)  # of which little is touched
    key_pages = storage.as_strided((2, 4, layout.width), (2**31, 2 * layout.width, 1))
    value_pages = storage[layout.width :].as_strided((2, 4, layout.width), (2**31, 2 * layout.width, 1))
    a, b = torch.randn(tokens, 3, 2, device=DEVICE), torch.randn(tokens, 2, 16, device=DEVICE)
    cos, sin = torch.ones(tokens, 8, device=DEVICE), torch.zeros(tokens, 8, device=DEVICE)
    slots = torch.tensor([5, 6, 7], device=DEVICE)
    store_factors(a, b, a, b, a, -b, cos, sin, slots, key_pages, value_pages)
    key, value = torch.empty(2, tokens, 3, 16, device=DEVICE)
    form_heads_from_pages(key_pages, value_pages, slots, key, value, 2, 2)
    a, b = (x.to(torch.float8_e4m3fn).float() for x in (a, b))
    expected = torch.einsum("nhr,nrd->nhd", a, b) / 2
    torch.testing.assert_close(key, expected)
    torch.testing.assert_close(value, -expected)


def test_no_tokens(implementation):
    b = torch.randn(0, 1, 16, device=DEVICE)
    pages = torch.zeros(1, 1, 16, device=DEVICE)
    no_slots = torch.zeros(0, dtype=torch.long, device=DEVICE)
    angles = torch.ones(0, 8, device=DEVICE)
    assert store_factors(None, b, None, b, None, b, angles, angles, no_slots, pages, pages).shape == (0, 1, 16)
    a = torch.ones(1, 1, device=DEVICE)
    form_heads_from_pages(pages, pages, no_slots, b, b, 1, 1, a, a)
    assert (pages == 0).all()


CONSTANTS = {  # A [R, h], and the ranks that it selects
    "mha": (torch.eye(5) * 5, [0, 1, 2, 3, 4]),
    "gqa": (torch.eye(3).repeat_interleave(4, 1) * 3, [0, 1, 2]),
    "gqa, of one process": (torch.eye(4).repeat_interleave(2, 1)[:, 4:], [2, 3]),
    "mqa": (torch.full((1, 6), 2.0), [0]),
    "groups of other sizes": (torch.eye(2).repeat_interleave(torch.tensor([2, 3]), 1), None),
    "groups that do not divide": (torch.eye(2).repeat_interleave(2, 1)[:, :3], None),
    "two ranks in a head": (torch.eye(3) + torch.eye(3).roll(1, 0), None),
    "a head of nothing": (torch.eye(3)[:, :2] * torch.tensor([1.0, 0.0]), None),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_select_ranks(name):
    a, ranks = CONSTANTS[name]
    selected = select_ranks(a)
    if ranks is None:
        assert selected is None
    else:
        assert selected.ranks.tolist() == ranks
        rebuilt = torch.zeros(len(a), len(ranks)).index_put(
            (selected.ranks.long(), torch.arange(len(ranks))), selected.weights
        )
        assert torch.equal(rebuilt.repeat_interleave(a.shape[1] // len(ranks), 1), a)


def test_bad_input():
    b, angles, slots = torch.randn(2, 1, 16), torch.ones(2, 8), torch.tensor([0, 1])
    pages = torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match="rows of 16 and 16 numbers, got sizes .1, 2, 16. and .1, 2, 8."):
        store_factors(None, b, None, b, None, b, angles, angles, slots, pages, pages[..., :8])
    with pytest.raises(ValueError, match="rows of 24 and 24 numbers"):
        form_heads_from_pages(pages, pages, slots, b, b, 1, 1)


@pytest.mark.skipif(factor_pages_t6.triton is None, reason="PyTorch takes any strides")
def test_factors_with_other_numbers_between():
    b, angles = torch.randn(2, 1, 16, device=DEVICE), torch.ones(2, 8, device=DEVICE)
    slots, pages = torch.tensor([0, 1], device=DEVICE), torch.zeros(1, 2, 16, device=DEVICE)
    apart = torch.randn(2, 1, 32, device=DEVICE)[..., ::2]
    with pytest.raises(ValueError, match="`b_v` must be .* contiguous"):
        store_factors(None, b, None, b, None, apart, angles, angles, slots, pages, pages)


def test_without_triton(monkeypatch):
    """Where there is no Triton, the file is imported all the same."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "modeling_t6.factor_pages_kernels_t6", raising=False)
    spec = importlib.util.spec_from_file_location("modeling_t6.copied_factor_pages_t6", factor_pages_t6.__file__)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert copied.triton is None and "modeling_t6.factor_pages_kernels_t6" not in sys.modules


# On a GPU only.


def compilations() -> int:
    from modeling_t6.factor_pages_kernels_t6 import form_heads_kernel, store_factors_kernel

    return sum(
        len(cache[0])
        for kernel in (form_heads_kernel, store_factors_kernel)
        for cache in kernel.device_caches.values()
    )


@needs_gpu
def test_one_compilation_for_every_number_of_tokens():
    case = random_case(0, **PLAIN)
    check_store(case, DEVICE), check_form(case, DEVICE)
    before = compilations()
    for tokens in (1, 2, 15, 16, 17, 64, 100, 257):
        for requests in (1, 2, 16, 130):
            other = case | {"tokens": tokens, "requests": requests}
            check_store(other, DEVICE), check_form(other, DEVICE)
    assert compilations() == before


@needs_gpu
def test_in_a_cuda_graph():
    layout, tokens = FactorLayout(2, 5, 16), 9
    a, b = torch.randn(tokens, 5, 2, device=DEVICE), torch.randn(tokens, 2, 16, device=DEVICE)
    cos, sin = torch.rand(2, tokens, 8, device=DEVICE)
    slots = torch.arange(tokens, device=DEVICE)
    key_pages, value_pages = torch.zeros(2, 5, 4, layout.width, device=DEVICE)
    key, value = torch.zeros(2, tokens, 5, 16, device=DEVICE)

    def step() -> torch.Tensor:
        query = store_factors(a, b, a, b, a, b, cos, sin, slots, key_pages, value_pages)
        form_heads_from_pages(key_pages, value_pages, slots, key, value, 2, 2)
        return query

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query = step()
    for _ in range(3):
        for tensor in (a, b, cos, sin):
            tensor.uniform_(-1, 1)
        slots.copy_(torch.randperm(20, device=DEVICE)[:tokens])
        graph.replay()
        replayed = [x.clone() for x in (query, key_pages, value_pages, key, value)]
        assert torch.equal(step(), replayed[0])
        for actual, expected in zip((key_pages, value_pages, key, value), replayed[1:]):
            assert torch.equal(actual, expected)
