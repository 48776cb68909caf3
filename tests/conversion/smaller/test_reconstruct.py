"""Reconstruction: what a compressed attention learns, restated, and what it keeps."""

import copy

import pytest
import torch

from conversion.smaller.compress import compress
from conversion.smaller.options import METHODS
from conversion.smaller.reconstruct import CHECKED, reconstruct
from conversion.smaller.straight_through import rounded_rows
from modeling_t6 import T6ForCausalLM
from modeling_t6.cache_t6 import CACHE_DTYPES

from ..common import FAMILIES, divergence, exact_model, log_probabilities, random_ids


pytestmark = pytest.mark.once


def output_errors(model: T6ForCausalLM, source: T6ForCausalLM, ids: torch.Tensor) -> list[float]:
    """For each layer, the error of the output of its attention where it reads what the source's reads."""
    states = source.model(ids, output_hidden_states=True).hidden_states
    positions = torch.arange(ids.shape[1])[None]
    options = {"position_embeddings": source.model.rotary_emb(states[0], positions), "attention_mask": None}
    errors = []
    for state, old, new in zip(states, source.model.layers, model.model.layers):
        x = old.input_layernorm(state)
        expected, found = (layer.self_attn(x, **options)[0] for layer in (old, new))
        errors.append(((found - expected).square().mean() / expected.square().mean()).item())
    return errors


def disturbed(source: T6ForCausalLM) -> T6ForCausalLM:
    """A copy with other projections in its attentions."""
    model, generator = copy.deepcopy(source), torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        for name, parameter in layer.self_attn.named_parameters():
            if name in ("k_a", "v_a"):
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(0.2 * noise * parameter.square().mean().sqrt())
    return model


@torch.no_grad()
def test_what_is_learnt():
    source = exact_model("llama", "mha", num_hidden_layers=2)
    ids, others = random_ids(68, 60).split([60, 8])
    model = disturbed(source)
    before = copy.deepcopy(model)
    found = reconstruct(model, source, ids, 150, quiet=True)
    # The numbers that it returns: over the windows from which nothing was learnt. A mean of ratios, here a ratio of means.
    for column, measured in enumerate((before, model)):
        expected = torch.tensor(output_errors(measured, source, ids[::CHECKED]))
        torch.testing.assert_close(torch.tensor([pair[column] for pair in found]), expected, rtol=0.05, atol=0)
    # On texts that it has not seen at all.
    for old, new in zip(output_errors(before, source, others), output_errors(model, source, others)):
        assert new < 0.5 * old
    expected = log_probabilities(source, others)
    assert divergence(model, others, expected) < 0.5 * divergence(before, others, expected)
    # All but the attentions are the source's.
    weights, old = dict(model.named_parameters()), dict(source.named_parameters())
    assert all(torch.equal(weights[name], old[name]) for name in weights if "self_attn" not in name)


@torch.no_grad()
@pytest.mark.parametrize("cache_dtype", [None, *CACHE_DTYPES])
def test_normed_heads(cache_dtype):
    """Layers with the norm of formed heads, of unequal ranks, read as their rows are, and learn."""
    source, ids = exact_model("qwen3", "gqa"), random_ids(68, 60)
    model = compress(source, ids, [1, 2, 1], [2, 1, 1], quiet=True)
    assert model.config.qk_norm == "heads"
    model.config.cache_dtype = cache_dtype
    before = copy.deepcopy(model)
    found = reconstruct(model, source, ids[:60], 60, quiet=True)
    for column, measured in enumerate((before, model)):
        with rounded_rows(measured):
            expected = torch.tensor(output_errors(measured, source, ids[:60:CHECKED]))
        torch.testing.assert_close(torch.tensor([pair[column] for pair in found]), expected, rtol=0.05, atol=0)
    assert found[0][1] < 0.8 * found[0][0]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_smaller_cache_loses_less(method):
    source = exact_model("llama", "mha", num_hidden_layers=2)
    ids = random_ids(200, 60)
    model = compress(source, ids, [2], [1], method=method, quiet=True)
    before = copy.deepcopy(model)
    assert all(new < old for old, new in reconstruct(model, source, ids, 200, quiet=True))
    others = random_ids(208, 60)[200:]
    expected = log_probabilities(source, others)
    assert divergence(model, others, expected) < divergence(before, others, expected)
    assert (model.config.k_rank, model.config.v_rank) == (2, 1)
    assert model.model.layers[0].self_attn.k_a.shape == (2, 4)


@torch.no_grad()
def test_features_of_many_sizes():
    """A B that is large where A is small, as fits have them, does not keep the others from learning, nor they it."""
    source = exact_model("llama", "mha", num_hidden_layers=2)
    for layer in source.model.layers:
        attention = layer.self_attn
        d = attention.head_dim
        attention.k_a[3, 3] /= 1000
        attention.k_b_proj.weight[3 * d :] *= 1000
        attention.k_b_proj.weight[:d] *= 1000
        attention.q_proj.weight[:d] /= 1000
    ids = random_ids(60, 60)
    found = reconstruct(disturbed(source), source, ids, 100, quiet=True)
    assert all(new < 0.5 * old for old, new in found)


@torch.no_grad()
def test_a_layer_that_does_not_gain_stays_as_it_was():
    """An exact model has nothing to learn; what a step changes is worse, and not kept."""
    source = exact_model("llama", "gqa")
    model = copy.deepcopy(source)
    found = reconstruct(model, source, random_ids(6, 40), 3, quiet=True)
    assert all(new == old < 1e-20 for old, new in found)
    weights = source.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_one_window_is_enough():
    source = exact_model("llama", "mha")
    found = reconstruct(disturbed(source), source, random_ids(1, 60), 30, quiet=True)
    assert all(new < old for old, new in found)


@torch.no_grad()
def test_half_precision_is_learnt_in_float32():
    """Steps that bfloat16 weights would round away."""
    source = exact_model("llama", "mha", num_hidden_layers=2)
    ids, model = random_ids(20, 60), disturbed(source)
    half_source, half = copy.deepcopy(source).bfloat16(), copy.deepcopy(model).bfloat16()
    exact, rounded = (reconstruct(*models, ids, 60, quiet=True) for models in ((model, source), (half, half_source)))
    assert half.dtype == torch.bfloat16
    for (old, new), (half_old, half_new) in zip(exact, rounded):
        assert half_old == pytest.approx(old, rel=0.05) and half_new == pytest.approx(new, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    """Its masks, scalings and norms reach the attention that learns."""
    source = exact_model(family, "gqa")
    found = reconstruct(disturbed(source), source, random_ids(20, 60), 30, quiet=True)
    assert len(found) == 3 and all(new < 0.9 * old for old, new in found)
