"""The factor projections of a layer as one product: the same outputs and gradients as one by one"""

import copy
import importlib.util

import pytest
import torch
from torch import nn

from modeling_t6 import T6ForCausalLM, factor_product_t6
from modeling_t6.factor_product_t6 import FactorProjections, RowProduct, packed_factors

from ..versions import once_but
from .common import projected_one_by_one, random_ids, random_model
from .test_variants import HALF_ROPE, VARIANTS, config_of


# Sums of at most some hundred products, in another order: what rounding leaves of 16 and of 7 digits.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """The rows of each product of several projections, as they are computed."""
    rows, concatenate = [], factor_product_t6._concatenate

    def record(parameters, *args):
        joined = concatenate(parameters, *args)
        if joined.dim() == 2:
            rows.append(len(joined))
        return joined

    monkeypatch.setattr(factor_product_t6, "_concatenate", record)
    return rows


def projections_of(model):
    """Every factor projection, `q_proj` not among them, by its name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith(("_a_proj", "_b_proj", "_c_proj")) and isinstance(module, nn.Linear)
    }


def logits_and_gradients(model, ids):
    weights = dict(model.named_parameters())
    logits = model(ids, use_cache=False).logits
    probe = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return logits, dict(zip(weights, torch.autograd.grad((logits * probe).sum(), list(weights.values()))))


@pytest.mark.once
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["weights", "biases"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_as_one_by_one(variant, bias, dtype, products):
    """Heads are 5, so that no projection to A has a multiple of 8 outputs."""
    model = random_model(config_of(variant, attention_bias=bias), dtype=dtype)
    ids = random_ids(model.config, 2, 11)
    with projected_one_by_one():
        expected, expected_gradients = logits_and_gradients(model, ids)
    assert not products
    logits, gradients = logits_and_gradients(model, ids)
    assert len(products) == 2 and all(rows % 8 == 0 for rows in products)  # one a layer
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        scale = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], atol=tolerance * scale, rtol=0, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=tolerance, rtol=tolerance)
    assert len(products) == 4


def test_few_tokens_without_gradients(products):
    model = random_model(config_of("TPA"))
    with torch.no_grad():
        model(random_ids(model.config, 3, factor_product_t6.MAX_OVERHEAD_BOUND_TOKENS), use_cache=False)
    assert not products


def hooked(model, projection):
    seen = []
    projection.register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


def offloaded(model, projection):
    seen, forward = [], projection.forward
    projection.forward = lambda x: seen.append(x) or forward(x)
    return seen


def with_gradient_hook(model, projection):
    seen = []
    projection.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs))
    return seen


def parametrized(model, projection):
    class Doubled(nn.Module):
        def forward(self, weight):
            seen.append(weight)
            return 2 * weight

    seen = []
    nn.utils.parametrize.register_parametrization(projection, "weight", Doubled())
    return seen


@pytest.mark.parametrize("extend", [hooked, offloaded, with_gradient_hook, parametrized], ids=lambda f: f.__name__)
def test_extended_projections_are_called(extend, products):
    """What others have added to one projection is run; the other layer stays one product."""
    model = random_model(config_of("TPA"))
    seen = extend(model, model.model.layers[1].self_attn.k_a_proj)
    model(random_ids(model.config, 2, 11), use_cache=False).logits.sum().backward()
    assert seen and len(products) == 1


def test_hooks_on_all_modules(products):
    model, seen = random_model(config_of("TPA")), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        model(random_ids(model.config, 2, 11), use_cache=False)
    finally:
        hook.remove()
    assert set(projections_of(model).values()) <= set(seen) and not products


def test_dtypes_that_differ_are_computed_alone(products):
    model = random_model(config_of("TPA"))
    model.model.layers[0].self_attn.v_b_proj.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(random_ids(model.config, 2, 11), use_cache=False).logits
    assert logits.isfinite().all() and len(products) == 1


def test_autocast(products):
    model = random_model(config_of("TPA", attention_bias=True))
    ids = random_ids(model.config, 2, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with projected_one_by_one():
            expected = model(ids, use_cache=False).logits
        logits = model(ids, use_cache=False).logits
    assert len(products) == 2 and logits.dtype == expected.dtype
    # Products are of the same bfloat16 numbers, rounded from sums in another order: 1 in 2^8 of a few factors.
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs PEFT")
def test_lora(products):
    from peft import LoraConfig, get_peft_model

    model = random_model(config_of("TPA"))
    lora = LoraConfig(target_modules=["q_a_proj", "v_b_proj"], r=2, init_lora_weights=False, layers_to_transform=[0])
    model = get_peft_model(model, lora).train()
    ids = random_ids(model.config, 2, 11)
    with projected_one_by_one():
        expected = model(ids, use_cache=False).logits
    logits = model(ids, use_cache=False).logits
    assert len(products) == 1
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
    logits.sum().backward()
    adapters = [(name, p) for name, p in model.named_parameters() if "lora_" in name]
    assert adapters and all(p.grad is not None and p.grad.abs().max() > 0 for _, p in adapters)


def replace_data(model, other):
    for name, projection in projections_of(model).items():
        projection.weight.data = other.get_submodule(name).weight.data.clone()


def replace_modules(model, other):
    for name in projections_of(model):
        model.set_submodule(name, other.get_submodule(name))


CHANGES = {
    "load_state_dict": lambda model, other: model.load_state_dict(other.state_dict()),
    "load_state_dict(assign=True)": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    ".data =": replace_data,
    "other modules": replace_modules,
}


@pytest.mark.parametrize("compiled", once_but({"eager": False, "compiled": True}.items(), "eager"))
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_are_never_stale(change, compiled):
    """Whatever replaces the weights, the next product is of the new ones; so is that of a copy, and after a step of SGD."""
    config = config_of("TPA", num_hidden_layers=1)
    model, other = random_model(config), random_model(config)
    with torch.no_grad():
        for projection in projections_of(other).values():
            projection.weight.mul_(-1.5)
    ids = random_ids(config, 2, 11)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.no_grad():
        before = forward(ids, use_cache=False).logits
        change(model, other)
        after = forward(ids, use_cache=False).logits
        with projected_one_by_one():
            expected = model(ids, use_cache=False).logits
    assert (before - after).abs().max() > 0.01
    torch.testing.assert_close(after, expected, atol=2e-5, rtol=2e-5)
    clone = copy.deepcopy(model)
    forward(ids, use_cache=False).logits.square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        stepped = forward(ids, use_cache=False).logits
        torch.testing.assert_close(clone(ids, use_cache=False).logits, after, atol=2e-5, rtol=2e-5)
        with projected_one_by_one():
            expected = model(ids, use_cache=False).logits
    assert (stepped - after).abs().max() > 0.01
    torch.testing.assert_close(stepped, expected, atol=1e-4, rtol=1e-4)


def test_checkpoints_are_as_before(tmp_path):
    """Names, order and bytes of the parameters after forward and backward passes, and of what is saved."""
    model = random_model(config_of("TPA"))
    names, footprint = list(model.state_dict()), model.get_memory_footprint()
    ids = random_ids(model.config, 2, 11)
    model(ids, use_cache=False).logits.sum().backward()
    assert list(model.state_dict()) == names and model.get_memory_footprint() == footprint
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    saved = T6ForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[name]), name


def generated_logits(model, ids):
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(ids, attention_mask=torch.ones_like(ids), **options).logits)


def packed(model):
    return [module.packed for module in model.modules() if isinstance(module, FactorProjections)]


@pytest.mark.parametrize("bias", [False, True], ids=["weights", "biases"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_packs_once(variant, bias, products):
    """One product a layer for the prompt and for each token of it, of weights put together once."""
    model = random_model(config_of(variant, attention_bias=bias), dtype=torch.float64)
    ids = random_ids(model.config, 2, 11)
    with projected_one_by_one():
        expected = generated_logits(model, ids)
    assert not products
    torch.testing.assert_close(generated_logits(model, ids), expected, atol=1e-11, rtol=1e-11)
    assert len(products) == 2 and not any(layer.is_valid for layer in packed(model))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 5},
        {"num_attention_heads": 24, "v_rank": 2},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "rope_parameters": HALF_ROPE},
    ],
    ids=["padded", "rotated", "grouped-partial-RoPE"],
)
@pytest.mark.parametrize("qk_norm", [False, "heads"], ids=["plain", "normed"])
@torch.no_grad()
def test_rows_of_one_product(fields, qk_norm):
    """On a CPU the product makes rows as the layout packs factors, for prompts and for tokens."""
    model = random_model(config_of("TPA", attention_bias=True, qk_norm=qk_norm, **fields), dtype=torch.float64)
    layer = model.model.layers[1].self_attn
    layouts = layer.key_layout, layer.value_layout
    assert all(layout.rotates == (layout.num_heads == 24) for layout in layouts)
    for tokens in (1, 11):
        hidden_states = torch.randn(3, tokens, model.config.hidden_size, dtype=torch.float64)
        rotation = model.model.rotary_emb(hidden_states, torch.arange(7, 7 + tokens)[None])
        apart = layer.project(hidden_states, rotation)
        with packed_factors(model):
            made, parts = layer.project_to_rows(hidden_states, rotation), layer.project_factors(hidden_states)
        assert layer.project_to_rows(hidden_states, rotation) is None
        torch.testing.assert_close(parts, layer.project_factors(hidden_states), atol=1e-12, rtol=1e-12)
        if qk_norm and layouts[0].rotates:
            assert made is None  # A in rotated rows cannot be normalised in place
            continue
        rows = layouts[0].pack(apart.a_k, apart.b_k), layouts[1].pack(apart.a_v, apart.b_v)
        torch.testing.assert_close((made.key_rows, made.value_rows), rows, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(layer.queries(made), layer.queries(apart), atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_norm_of_heads_whose_terms_cancel():
    """In float32 a query that is the small difference of large terms keeps its digits, as it is normalised when it is formed."""
    model = random_model(config_of("TPA", qk_norm="heads", q_rank=2))
    for layer in model.model.layers:
        b, a = layer.self_attn.q_b_proj, layer.self_attn.q_a_proj
        rows = b.weight.view(2, -1, b.in_features)
        rows[1] = -rows[0] * (1 + 1e-3)
        columns = a.weight.view(-1, 2, a.in_features)
        columns[:, 1] = columns[:, 0]
    ids = random_ids(model.config, 1, 9)
    expected = copy.deepcopy(model).double()(ids).logits
    with packed_factors(model):
        result = model(ids).logits
    assert (result - expected).norm() < 1e-3 * expected.norm()


@torch.no_grad()
def test_norms_with_hooks_are_called():
    """A norm that does more than its weight says is not applied to rows."""
    model = random_model(config_of("TPA", qk_norm="heads"))
    ids, calls = random_ids(model.config, 1, 5), []
    expected = generated_logits(model, ids)
    layer = model.model.layers[0].self_attn
    layer.k_norm.register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(generated_logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == 4 and not isinstance(layer.packed.product, RowProduct)
    assert isinstance(model.model.layers[1].self_attn.packed.product, RowProduct)


def copy_into_data(model, other):
    for name, projection in projections_of(model).items():
        projection.weight.data.copy_(other.get_submodule(name).weight)  # moves no version of the weight


@pytest.mark.parametrize("change", [*CHANGES.values(), copy_into_data], ids=[*CHANGES, ".data.copy_"])
def test_next_generate_sees_other_weights(change, products):
    """In the memory of before, which graphs may read; also between `inference_mode` and without."""
    model, other = (random_model(config_of("TPA"), seed=seed) for seed in (0, 1))
    ids = random_ids(model.config, 2, 11)
    with torch.inference_mode():
        before = generated_logits(model, ids)
    places = [layer.product.weight.data_ptr() for layer in packed(model)]
    change(model, other)
    after = generated_logits(model, ids)
    with projected_one_by_one():
        expected = generated_logits(model, ids)
    assert (before[0] - after[0]).abs().max() > 0.01
    torch.testing.assert_close(after, expected, atol=2e-5, rtol=2e-5)
    assert len(products) == 4 and [layer.product.weight.data_ptr() for layer in packed(model)] == places


def test_packed_where_it_is_the_same():
    """Not for gradients, nor for what is more than its weights or has them elsewhere; a copy of the model packs its own."""
    model = random_model(config_of("TPA"))
    first, second = (layer.self_attn for layer in model.model.layers)
    seen = hooked(model, second.k_a_proj)
    ids = random_ids(model.config, 2, 3)
    with packed_factors(model):
        assert first.packed.is_valid and not second.packed.is_valid
        assert not copy.deepcopy(model).model.layers[0].self_attn.packed.is_valid
        model(ids, use_cache=False).logits.sum().backward()
        assert first.q_b_proj.weight.grad.abs().max() > 0 and seen
        with packed_factors(model):
            pass
        assert first.packed.is_valid
    with pytest.raises(KeyError), packed_factors(model):
        raise KeyError
    assert not first.packed.is_valid
    first.v_a_proj.weight.data = first.v_a_proj.weight.data[:0]  # as FSDP leaves it outside of a forward pass
    with packed_factors(model):
        assert not first.packed.is_valid


def test_packed_weights_that_move():
    """Such as an offloaded model's at its first forward pass, inside of `generate()`: no copy stays where they were."""
    model = random_model(config_of("TPA"))
    ids = random_ids(model.config, 2, 3)
    hook = model.register_forward_pre_hook(lambda model, args: model.to(torch.float64) and None)
    logits = generated_logits(model, ids)
    hook.remove()
    assert logits.dtype == torch.float32 and all(layer.product is None for layer in packed(model))
    with projected_one_by_one():
        torch.testing.assert_close(logits, generated_logits(model, ids))
    generated_logits(model, ids)
    places = [layer.product.weight.data_ptr() for layer in packed(model)]
    model.to(torch.float64)  # which they have
    assert [layer.product.weight.data_ptr() for layer in packed(model)] == places
    model.to(torch.bfloat16)
    assert all(layer.product is None for layer in packed(model))


class Codes(nn.Module):
    """A layer as AWQ and GPTQ leave it, which has no `weight`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("codes", linear.weight.detach().t().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.codes


class CodesOnDemand(Codes):
    """As PyTorch's own quantisation leaves it: the weight is what a method returns."""

    def weight(self) -> torch.Tensor:
        return self.codes.t()


@pytest.mark.parametrize("quantized", [Codes, CodesOnDemand])
@pytest.mark.parametrize("is_packed", [True, False])
def test_quantized_projections_that_move(quantized, is_packed):
    """`model.to()` asks them for no weight, and leaves no copies of those that were."""
    model = random_model(config_of("TPA"))
    ids = random_ids(model.config, 2, 3)
    expected = generated_logits(model, ids)
    if not is_packed:
        model = copy.deepcopy(model)  # which makes copies of its own
    for layer in model.model.layers:
        for name in ("k_a_proj", "v_b_proj"):
            setattr(layer.self_attn, name, quantized(getattr(layer.self_attn, name)))
    model.to(torch.float64)
    assert all(layer.product is None for layer in packed(model))
    torch.testing.assert_close(generated_logits(model, ids), expected, atol=2e-5, rtol=2e-5)


def test_packed_in_a_compiled_step():
    """One graph, which takes the weight as an input that stays where it is, and sees what is packed later."""
    model = random_model(config_of("TPA", num_hidden_layers=1))
    layer, ids = model.model.layers[0].self_attn, random_ids(model.config, 2, 1)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        with torch.no_grad(), packed_factors(model):
            logits = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits, atol=2e-5, rtol=2e-5)
        layer.q_b_proj.weight.data.mul_(-1.5)
    assert len(graphs) == 1
    # What CUDA graphs go by: without, the weight would be copied in each step.
    assert layer.packed.product.weight._dynamo_static_input_type == "unguarded"
    (name,) = (node.name for node in graphs[0].graph.nodes if "product_weight" in node.name)
    assert "packed" in name
