"""Attention in factor space against attention over K and V formed plainly."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_t6 import T6Cache, factor_space_t6
from modeling_t6.cache_t6 import FactorLayout
from modeling_t6.factor_space_t6 import attend_in_factor_space, chunks_of_rows, factor_space_attention

from .common import random_ids, random_model, tiny_config


def random_inputs(batch, queries, keys, heads=5, d=8, k_rank=2, v_rank=3, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    query = torch.randn(batch, queries, heads, d, dtype=torch.float64).to(dtype)
    key, value = (
        tuple(torch.randn(batch, keys, rank, size, dtype=torch.float64).to(dtype) for size in (heads, d))
        for rank in (k_rank, v_rank)
    )
    return query, key, value


def naive(query, key_factors, value_factors, visible, bias=0.0, scaling=0.3):
    """visible: boolean, and bias: additive, both broadcastable to [batch, h, queries, keys]."""
    key, value = (torch.einsum("bmrh,bmrd->bhmd", a, b) / a.shape[2] for a, b in (key_factors, value_factors))
    scores = torch.einsum("bqhd,bhmd->bhqm", query, key) * scaling + bias
    probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhqm,bhmd->bqhd", probabilities, value), probabilities


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("queries", [1, 2, 8])
@pytest.mark.parametrize("keys", [8, 15, 33, 100])
@pytest.mark.parametrize("chunk,long", [(16, 1000), (8192, 1000), (16, 15), (8192, 15)])
def test_causal(monkeypatch, batch, queries, keys, chunk, long):
    """In one chunk and in several; `long`: from so many tokens on as in long caches."""
    monkeypatch.setattr(factor_space_t6, "FACTOR_SPACE_CHUNK", chunk)
    monkeypatch.setattr(factor_space_t6, "MIN_TOKENS_IN_BLOCKS", long)
    inputs = random_inputs(batch, queries, keys)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    output, probabilities = factor_space_attention(*inputs, None, 0.3)
    assert probabilities is None
    torch.testing.assert_close(output, naive(*inputs, visible)[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["boolean", "finfo-min", "minus-infinity", "bias"])
@pytest.mark.parametrize("chunk", [16, 8192])
def test_masks(monkeypatch, kind, chunk):
    """Left padding of 0, 5 and 40 tokens: the last hides whole chunks before the first that is seen."""
    monkeypatch.setattr(factor_space_t6, "FACTOR_SPACE_CHUNK", chunk)
    inputs = random_inputs(3, 2, 50)
    visible = torch.arange(50) >= torch.tensor([0, 5, 40])[:, None, None, None]
    visible = visible & torch.ones(2, 50, dtype=torch.bool).tril(48)
    bias = torch.zeros(3, 1, 2, 50, dtype=torch.float64)
    if kind == "boolean":
        mask = visible
    elif kind == "bias":
        bias = torch.randn(3, 5, 2, 50, dtype=torch.float64)
        mask = bias.masked_fill(~visible, torch.finfo(torch.float64).min)
    else:
        low = torch.finfo(torch.float64).min if kind == "finfo-min" else -torch.inf
        mask = bias.masked_fill(~visible, low)
    output, _ = factor_space_attention(*inputs, mask, 0.3)
    torch.testing.assert_close(output, naive(*inputs, visible, bias)[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_additive_mask_in_half_precision(dtype):
    """Its lowest number, or infinity, hides as a boolean does."""
    query, keys, values = random_inputs(2, 1, 50)
    inputs = query.to(dtype), *(tuple(factor.to(dtype) for factor in factors) for factors in (keys, values))
    visible = (torch.arange(50) >= torch.tensor([0, 40])[:, None, None, None]).expand(2, 1, 1, 50)
    expected = factor_space_attention(*inputs, visible, 0.3)[0]
    for low in (torch.finfo(dtype).min, -torch.inf):
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, low)
        assert torch.equal(factor_space_attention(*inputs, mask, 0.3)[0], expected)


def test_a_query_that_sees_nothing_is_finite():
    """The row of a padding token: its output is not used, but a NaN would spread to tokens that are."""
    inputs = random_inputs(1, 1, 20)
    for mask in (torch.zeros(1, 1, 1, 20, dtype=torch.bool), torch.full((1, 1, 1, 20), -torch.inf).double()):
        assert factor_space_attention(*inputs, mask, 0.3)[0].isfinite().all()


def test_hidden_rows_do_not_count():
    inputs = random_inputs(2, 1, 40)
    mask = torch.arange(40)[None, None, None] < 23
    expected = naive(*inputs, mask)[0]
    for a, b in inputs[1:]:
        a[:, 23:], b[:, 23:] = 1e30, -1e30
    torch.testing.assert_close(factor_space_attention(*inputs, mask, 0.3)[0], expected, atol=1e-12, rtol=1e-12)


def test_probabilities(monkeypatch):
    monkeypatch.setattr(factor_space_t6, "FACTOR_SPACE_CHUNK", 16)
    inputs = random_inputs(2, 3, 50)
    visible = torch.ones(3, 50, dtype=torch.bool).tril(47)
    output, probabilities = factor_space_attention(*inputs, None, 0.3, output_attentions=True)
    expected_output, expected = naive(*inputs, visible)
    torch.testing.assert_close(probabilities, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(output, expected_output, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("long", [1000, 10])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("k_rank,v_rank", [(1, 1), (2, 2), (4, 1), (1, 4)])
def test_ranks(monkeypatch, k_rank, v_rank, batch, long):
    monkeypatch.setattr(factor_space_t6, "MIN_TOKENS_IN_BLOCKS", long)
    inputs = random_inputs(batch, 1, 21, k_rank=k_rank, v_rank=v_rank)
    expected, _ = naive(*inputs, torch.ones(1, 21, dtype=torch.bool))
    torch.testing.assert_close(factor_space_attention(*inputs, None, 0.3)[0], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("all_at_once", [False, True])
@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch,long", [(1, 30), (2, 30), (2, 1000)])
def test_rows_of_a_cache(monkeypatch, batch, long, stored, all_at_once):
    """Padded and rotated rows, with more tokens behind them, are read as the factors that they were packed of."""
    monkeypatch.setattr(factor_space_t6, "FACTOR_SPACE_CHUNK", 16)
    monkeypatch.setattr(factor_space_t6, "MIN_TOKENS_IN_BLOCKS", long)
    query, *factors = random_inputs(batch, 1, 45, heads=20, k_rank=3)
    layouts = tuple(FactorLayout(a.shape[2], 20, 8) for a, _ in factors)
    assert all(layout.rotates and layout.padded_heads > 20 for layout in layouts)
    storage = [torch.full((batch, 1, 60, layout.width), torch.nan, dtype=stored) for layout in layouts]
    rows = tuple(x[:, :, :45].copy_(layout.pack(*each)) for x, layout, each in zip(storage, layouts, factors))
    chunks = chunks_of_rows(layouts, rows, torch.float64, all_at_once)
    output, probabilities = factor_space_attention(query, *chunks, None, 0.3, output_attentions=all_at_once)
    rounded = [tuple(x.to(stored).double() for x in each) for each in factors]
    expected = naive(query, *rounded, torch.tensor(True))
    torch.testing.assert_close(output, expected[0], atol=1e-12, rtol=1e-12)
    if all_at_once:
        torch.testing.assert_close(probabilities, expected[1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["float32", "bfloat16"]
)
def test_precision(dtype, tolerance):
    """float32 has 7 digits, bfloat16 2.4: a hundred terms of order 1 lose one."""
    inputs = random_inputs(2, 1, 100, dtype=dtype)
    double = [inputs[0].double(), *(tuple(factor.double() for factor in factors) for factors in inputs[1:])]
    expected, _ = naive(*double, torch.ones(1, 100, dtype=torch.bool))
    output = factor_space_attention(*inputs, None, 0.3)[0]
    assert output.dtype == dtype
    assert (output.double() - expected).abs().max() < tolerance * expected.abs().max()


def test_large_scores_do_not_overflow():
    query, key, value = random_inputs(1, 1, 64, dtype=torch.float32)
    output = factor_space_attention(query * 1e4, key, value, None, 1.0)[0]
    expected, _ = naive(
        query.double() * 1e4, *(tuple(x.double() for x in f) for f in (key, value)), torch.tensor(True), scaling=1.0
    )
    torch.testing.assert_close(output.double(), expected, atol=1e-4, rtol=1e-4)


def test_which_path_runs():
    cache = T6Cache()
    assert not attend_in_factor_space(1, cache)  # gradients are wanted
    with torch.no_grad():
        assert attend_in_factor_space(1, cache) and attend_in_factor_space(8, cache)
        assert not attend_in_factor_space(9, cache) and not attend_in_factor_space(1, None)


class LargestResult(TorchDispatchMode):
    """Remembers the most numbers that any operation newly put into memory."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_decoding_never_forms_keys_or_values(implementation):
    config = tiny_config(attn_implementation=implementation, num_attention_heads=16, head_dim=32)
    model, seq = random_model(config), 400
    cache = T6Cache(config=config)
    heads_numel = (seq + 1) * config.num_attention_heads * config.head_dim
    with torch.no_grad():
        with LargestResult() as prefill:
            model(random_ids(config, 1, seq), cache=cache)
        assert (
            prefill.numel >= heads_numel - config.num_attention_heads * config.head_dim
        )  # what is looked for is found
        # Room for the next tokens, which is a copy of the cache once in a while.
        model(random_ids(config, 1, 1), cache=cache)
        with LargestResult() as decoding:
            model(random_ids(config, 1, 1), cache=cache)
    assert decoding.numel < heads_numel / 4
