"""Rows of 8 and 4 bits in training: what a model reads there is what it reads from its cache."""

import copy

import pytest
import torch

from conversion.smaller.normed_heads import with_normed_heads
from conversion.smaller.reconstruct import reconstruct
from conversion.smaller.straight_through import as_read, rounded_rows
from modeling_t6 import T6Cache, heads_at_once_t6
from modeling_t6.cache_t6 import CACHE_DTYPES, CACHE_NAME, FactorLayout

from ..common import exact_model, log_probabilities, random_ids


pytestmark = pytest.mark.once


def through_cache(model, ids: torch.Tensor) -> torch.Tensor:
    cached = {CACHE_NAME: T6Cache(config=model.config), "use_cache": True}
    return model(ids, **cached).logits.float().log_softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("family", ["llama-biases", "qwen3", "qwen3, normed heads"])
def test_reads_what_the_cache_holds(family, cache_dtype):
    model, ids = exact_model(family.split(",")[0], "gqa"), random_ids(3, 40)
    model = with_normed_heads(model) if "normed heads" in family else model
    whole = log_probabilities(model, ids)
    model.config.cache_dtype = cache_dtype
    expected = through_cache(model, ids)
    assert (expected - whole).abs().max() > 1e-3  # rounding is seen
    with rounded_rows(model):
        found = log_probabilities(model, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert torch.equal(log_probabilities(model, ids), whole)


@torch.no_grad()
def test_rounds_where_a_gpu_forms_heads_at_once(monkeypatch):
    class Formed(Exception):
        pass

    def form(*args):
        raise Formed

    # Of a GPU all but that it is there.
    monkeypatch.setattr(heads_at_once_t6, "_has_kernels", lambda hidden_states: heads_at_once_t6.AT_ONCE)
    monkeypatch.setattr(heads_at_once_t6, "_form", form)
    model, ids = with_normed_heads(exact_model("qwen3", "gqa")).float(), random_ids(3, 40)
    model.config.cache_dtype = "int4"
    with rounded_rows(model):
        found = log_probabilities(model, ids)
    torch.testing.assert_close(found, through_cache(model, ids), rtol=0, atol=1e-4)
    with pytest.raises(Formed):
        log_probabilities(model, ids)


def test_gradient_is_that_of_what_went_in():
    layouts = FactorLayout(3, 0, 24), FactorLayout(2, 0, 24)
    for index, layout in enumerate(layouts):
        b = torch.randn(2, 5, layout.rank, 24, requires_grad=True)
        weights = torch.randn(b.shape)
        _, read = as_read(None, b, layouts, index, "float8_e4m3fn")
        assert 1e-3 < (read - b).norm() / b.norm() < 0.05
        (read * weights).sum().backward()
        assert torch.equal(b.grad, weights)


def test_learns_to_lower_what_makes_steps_large():
    """A constant that is added before rounding and subtracted behind it does nothing but make the steps larger."""
    layouts = (FactorLayout(2, 0, 64),) * 2
    x = torch.randn(4, 32, 2, 64, generator=torch.Generator().manual_seed(0))
    constant = torch.zeros(64)
    constant[[3, 40]] = 30.0
    constant.requires_grad_(True)

    def error(constant: torch.Tensor) -> torch.Tensor:
        return (as_read(None, x + constant, layouts, 0, "int4")[1] - constant - x).square().mean()

    before = error(constant).item()
    optimizer = torch.optim.Adam([constant], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        error(constant).backward()
        optimizer.step()
    least = error(torch.zeros(64)).item()
    assert before > 5 * least and error(constant).item() < 1.5 * least


@torch.no_grad()
def test_reconstruction_learns_with_rounding():
    """Of a model whose ranks are whole: its values have a constant, which the output's bias can add as well."""
    source = exact_model("llama-biases", "gqa")
    for layer in source.model.layers:
        layer.self_attn.v_b_proj.bias[::7] += 20 * layer.self_attn.v_b_proj.weight.norm(dim=1).mean()
    ids, others = random_ids(68, 60).split([60, 8])
    model = copy.deepcopy(source)
    model.config.cache_dtype = "int4"
    rounded = copy.deepcopy(model)
    errors = reconstruct(model, source, ids, 150, quiet=True)
    before, after = map(sum, zip(*errors))
    assert after < 0.5 * before
    expected = log_probabilities(source, others)

    def divergence(model) -> torch.Tensor:
        return (expected.exp() * (expected - through_cache(model, others))).sum(-1).mean()

    assert divergence(model) < 0.9 * divergence(rounded)
