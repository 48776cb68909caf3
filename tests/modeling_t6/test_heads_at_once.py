"""Heads out of the one product of factors, and its gradient, by kernels through Triton's interpreter, against float64."""

import math

import pytest
import torch

from modeling_t6 import heads_at_once_t6
from modeling_t6.heads_at_once_t6 import HeadsAtOnce

from .common import DEVICE, random_ids, random_model, tiny_config
from .heads_cases import (
    NORMED_TOLERANCES,
    TOLERANCES,
    error,
    inputs_of,
    leaves_of,
    random_errors,
    reference,
    results_and_expected,
)


pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(heads_at_once_t6.triton is None, reason="Triton is for Linux"),
]
HAS_KERNELS = heads_at_once_t6._has_kernels
# batch, tokens, ranks of queries, keys and values, heads, heads of keys and values, head_dim, rotated of it
SHAPES = [
    (1, 1, (1, 1, 1), 1, 1, 16, 16),
    (1, 2, (6, 2, 2), 34, 34, 64, 64),
    (3, 5, (3, 2, 1), 5, 5, 33, 32),
    (1, 4, (8, 1, 2), 6, 2, 128, 32),
    (2, 11, (7, 3, 16), 4, 1, 20, 12),
    (1, 3, (2, 5, 4), 3, 3, 256, 256),
    (2, 3, (0, 2, 1), 0, 5, 33, 32),  # no factors of queries
]
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """One entry for each pass through kernels. Numbers that no kernel writes are NaN."""
    calls, empty = [], torch.Tensor.new_empty
    for name in ("_form", "_gradient"):
        plain = getattr(heads_at_once_t6, name)
        monkeypatch.setattr(
            heads_at_once_t6, name, lambda *args, plain=plain, name=name: calls.append(name) or plain(*args)
        )
    if DEVICE != "cpu":
        return calls
    from . import interpreter

    interpreter.compute_as_a_gpu(monkeypatch)
    # Of a GPU all but that it is there.
    monkeypatch.setattr(heads_at_once_t6, "_has_kernels", lambda hidden_states: True)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan))
    return calls


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)).replace(", ", "-"))
def test_heads_and_gradient(shape, dtype, normed, launches):
    torch.manual_seed(shape[3])
    inputs, sizes = inputs_of(shape, dtype, normed, DEVICE)
    results, *expected = results_and_expected(inputs, sizes)
    assert launches == ["_form", "_gradient"]
    tolerance = (NORMED_TOLERANCES if normed else TOLERANCES)[dtype]
    assert [error(*numbers) < tolerance for numbers in zip(results, *expected)] == [True] * len(results)
    assert len(results) == 4 + normed * (1 + (shape[2][0] > 0))
    is_padding = inputs[0][0, 0].isnan()
    assert not results[3][..., is_padding].any()  # which goes on to the hidden states
    assert {x.dtype for x in results} == {dtype}


@pytest.mark.parametrize("seed", range(3))
def test_random_shapes_with_norms(seed, launches):
    """More of them: `heads_cases`, on a GPU."""
    shape, dtype, errors = random_errors(seed, DEVICE)
    assert max(errors) < NORMED_TOLERANCES[dtype], (shape, dtype, errors)


@pytest.mark.parametrize("scales", [(1e-2, 1e-2), (1e2, 1e2), (1e-2, 1e2), (1e2, 1e-2)], ids=str)
def test_small_and_large_factors(scales, launches):
    """Heads are normalised whatever their size: neither overflow nor zeros on the way, in float16."""
    torch.manual_seed(0)
    (product, *rest), (*sizes, _) = inputs_of((1, 9, (6, 2, 2), 8, 8, 64, 64), torch.float16, True, DEVICE)
    product = product.nan_to_num()
    product[..., : 10 * 64] *= scales[1]  # B, then A
    product[..., 10 * 64 :] *= scales[0]
    results, *expected = results_and_expected([product, *rest], (*sizes, 1e-6), num_outputs=2)
    errors = [error(*numbers) for numbers in zip(results, *expected)]
    assert max(errors) < NORMED_TOLERANCES[torch.float16], errors


def test_weights_of_another_dtype(launches):
    """Under autocast norms have weights of float32, factors are of bfloat16: each gradient is of its own."""
    inputs, sizes = inputs_of(SHAPES[0], torch.bfloat16, True, DEVICE)
    leaves = [leaves_of(inputs)[0], *leaves_of(inputs, torch.float32)[1:]]
    results, *expected = results_and_expected(inputs, sizes, leaves)
    assert [x.dtype for x in results] == [torch.bfloat16] * 4 + [torch.float32] * 2
    assert max(error(*numbers) for numbers in zip(results, *expected)) < NORMED_TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_gradient_of_a_part(normed, launches):
    """Of heads that nothing reads there is none; that of a sum is one number, expanded."""
    inputs, sizes = inputs_of(SHAPES[2], torch.float32, normed, DEVICE)
    leaves, wide = leaves_of(inputs), leaves_of(inputs, torch.float64)
    heads = HeadsAtOnce.apply(*leaves, *inputs[3:], *sizes)
    expected = reference(*wide, *(x.double() for x in inputs[3:]), *sizes)
    for index in (0, 2) if normed else (0,):  # the product, and the keys' norm
        (result,) = torch.autograd.grad(heads[1].sum(), leaves[index], retain_graph=True)
        (expected_result,) = torch.autograd.grad(expected[1].sum(), wide[index], retain_graph=True)
        assert error(result, expected_result) < (1e-5 if normed else 1e-6)
    if normed:
        assert not torch.autograd.grad(heads[1].sum(), leaves[1])[0].any()


@pytest.mark.parametrize("frozen", [None, 0, 1, 2], ids=["plain", "product", "queries' norm", "keys' norm"])
def test_gradients_of_gradients(frozen, launches):
    inputs, sizes = inputs_of((2, 2, (2, 1, 2), 3, 3, 16, 16), torch.float32, frozen is not None, DEVICE)
    inputs[0], results = inputs[0].nan_to_num(), []
    for form in (HeadsAtOnce.apply, reference):
        leaves = leaves_of(inputs)
        if frozen is not None:
            leaves[frozen].requires_grad_(False)
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        loss = sum(x.square().sum() + x[..., 0].sum() for x in form(*leaves, *inputs[3:], *sizes))
        gradients = torch.autograd.grad(loss, wanted, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in gradients), wanted)
        results.append([*gradients, *second])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert launches == ["_form", "_gradient"]  # the second of the last gradients alone


@pytest.mark.parametrize("rebuilt", [False, True], ids=["kept", "rebuilt"])
@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({}, True),
        ({"num_key_value_heads": 2, "num_attention_heads": 4, "attention_bias": True}, True),
        ({"rope_parameters": PARTIAL_ROPE}, True),
        ({"q_rank": None}, True),
        ({"noncontextual_a": True}, False),
        ({"noncontextual_b": True}, False),
        ({"shared_b": True, "v_rank": 2}, False),
        ({"qk_norm": "heads"}, True),
        ({"qk_norm": "heads", "num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 20}, True),
        ({"qk_norm": "heads", "q_rank": 9, "rope_parameters": PARTIAL_ROPE}, True),
        ({"qk_norm": True}, False),
        ({"qk_norm": "heads", "head_factor_act": "sigmoid"}, False),
        ({"qk_norm": "heads", "q_rank": None}, True),
        ({"head_factor_act": "sigmoid"}, False),
        ({"q_rank": 17}, False),
    ],
    ids=[
        "plain",
        "grouped, biases",
        "partial",
        "kvonly",
        "constant A",
        "constant B",
        "shared",
        "norms",
        "grouped, norms",
        "partial, norms",
        "norm of rows",
        "norms, act",
        "norms, kvonly",
        "act",
        "rank",
    ],
)
def test_gradients_of_a_model(fields, fits, rebuilt, launches, monkeypatch):
    """Logits and weights' gradients are those without, for every variant; the kernels are used for those that fit."""
    from modeling_t6 import attention_t6, heads_t6

    monkeypatch.setattr(attention_t6, "RECOMPUTE_HEADS_EAGER", rebuilt)
    monkeypatch.setattr(heads_t6, "KERNELS", False)
    model = random_model(tiny_config(num_hidden_layers=1, **fields)).train()
    ids, results = random_ids(model.config, 2, 5), []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(heads_at_once_t6, "_has_kernels", lambda hidden_states: False)
        model.zero_grad()
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        results.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        results[-1]["logits"] = output.logits.detach()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    assert launches == ([] if not fits else ["_form", "_form", "_gradient"] if rebuilt else ["_form", "_gradient"])


@pytest.mark.parametrize("norm", [False, "heads"], ids=["plain", "normed"])
def test_autocast(norm, launches, monkeypatch):
    """The product is in half precision, the angles are not: gradients are, to its digits, those of float32."""
    from modeling_t6 import attention_t6

    model = random_model(tiny_config(num_hidden_layers=1, qk_norm=norm)).train()
    ids, results, dtypes = random_ids(model.config, 2, 5), [], []
    form = attention_t6.heads_at_once
    monkeypatch.setattr(
        attention_t6,
        "heads_at_once",
        lambda *args: (heads := form(*args), dtypes.append({factor.dtype for factor in heads}))[0],
    )
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([weight.grad for weight in model.model.layers.parameters()])
    assert [error(half, exact.double()) < 3e-2 for exact, half in zip(*results)] == [True] * len(results[0])
    assert dtypes == [{torch.float32}, {torch.bfloat16}] and launches == ["_form", "_gradient"] * 2


@pytest.mark.parametrize("norm", [False, "heads"], ids=["plain", "normed"])
def test_gradients_of_gradients_under_autocast(norm, launches, monkeypatch):
    """As without kernels, to the digits of half precision."""
    model = random_model(tiny_config(num_hidden_layers=1, qk_norm=norm)).train()
    model.set_attn_implementation("eager")
    ids, results = random_ids(model.config, 2, 5), []
    weights = list(model.model.layers.parameters())
    for has_kernels in (True, False):
        if not has_kernels:
            monkeypatch.setattr(heads_at_once_t6, "_has_kernels", lambda hidden_states: False)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        results.append(torch.autograd.grad(sum(x.float().square().sum() for x in gradients), weights))
    assert [error(one, other.double()) < 6e-2 for one, other in zip(*results)] == [True] * len(weights)
    assert launches == ["_form", "_gradient"]  # of the last gradients alone


def change_eps(norm) -> None:
    norm.variance_epsilon *= 100


def spread_weight(norm) -> None:
    norm.weight = torch.nn.Parameter(torch.rand(2 * len(norm.weight), device=DEVICE)[::2])


@pytest.mark.parametrize("change", [change_eps, spread_weight])
def test_norms_that_kernels_do_not_read(change, launches, monkeypatch):
    """One epsilon for both norms, weights without gaps; others are formed and normalised one after the other."""
    model = random_model(tiny_config(num_hidden_layers=1, qk_norm="heads")).eval()
    ids = random_ids(model.config, 1, 9)
    change(model.model.layers[0].self_attn.k_norm)
    with torch.no_grad():
        result = model(ids, use_cache=False).logits
        torch.testing.assert_close(result, model(ids).logits, rtol=1e-4, atol=1e-5)  # through a cache
    assert not launches


def test_paths(launches):
    """With a cache, for few tokens and where projections are more than their weights, factors are made one by one."""
    model = random_model(tiny_config(num_hidden_layers=1, q_rank=9)).eval()
    ids = random_ids(model.config, 1, 9)
    with torch.no_grad():
        expected = model(ids).logits  # a cache is written
        model(ids[:, :8], use_cache=False)
        assert not launches
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
        assert launches == ["_form"]
        model.model.layers[0].self_attn.q_a_proj.register_forward_hook(lambda *args: None)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    assert launches == ["_form"]


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_norms_with_hooks(name, launches):
    """A norm that does more than its weight says is called."""
    model, calls = random_model(tiny_config(num_hidden_layers=1, qk_norm="heads")).eval(), []
    ids = random_ids(model.config, 1, 9)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        getattr(model.model.layers[0].self_attn, name).register_forward_hook(lambda *args: calls.append(name))
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    assert calls == [name] and launches == ["_form"]


@pytest.mark.parametrize(
    ("fields", "is_frozen"),
    [({}, False), ({"qk_norm": "heads"}, False), ({"qk_norm": "heads"}, True), ({"qk_norm": "heads", "q_rank": None}, False)],
    ids=["plain", "normed", "frozen", "kvonly"],
)  # fmt: skip
def test_compiled_layer(fields, is_frozen, launches, monkeypatch):
    """One graph, forward and backward, in which nothing stands between the operators and the products."""
    model = random_model(tiny_config(num_hidden_layers=1, **fields)).train()
    if is_frozen:
        model.model.layers[0].self_attn.k_norm.requires_grad_(False)
    ids, results, graphs = random_ids(model.config, 2, 5), [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    for compiled in (False, True):
        if compiled:
            compiler = aot_autograd(fw_compiler=backend, bw_compiler=backend)
            model.model.layers[0].compile(fullgraph=True, dynamic=False, backend=compiler)
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        results.append({name: x.grad.clone() for name, x in model.named_parameters() if x.requires_grad})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    forward, backward = ([str(node.target) for node in graph.graph.nodes] for graph in graphs)
    assert [sum("heads_at_once" in name for name in names) for names in (forward, backward)] == [1, 2]
    # Of queries without factors RoPE is turned back by itself.
    moved = ("aten.cat", "aten.constant_pad", "aten.slice_b")
    assert "q_rank" in fields or not any(name.startswith(moved) for name in backward)


def test_function_transforms(launches, monkeypatch):
    """`torch.func` gives no memory to read, and is passed by."""
    monkeypatch.setattr(heads_at_once_t6, "is_supported", lambda *args: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    hidden_states, answers = torch.randn(2, 1, 4, 8), []
    assert HAS_KERNELS(hidden_states[0])
    torch.func.vmap(lambda x: answers.append(HAS_KERNELS(x)) or x)(hidden_states)
    assert answers == [False]


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_operators(normed, launches, monkeypatch):
    """What torch.compile takes whole has the shapes and strides that it is told."""
    (product, *inputs), (ranks, num_heads, head_dim, eps) = inputs_of(SHAPES[2], torch.float32, normed, DEVICE)
    monkeypatch.undo()
    if DEVICE == "cpu":
        from . import interpreter

        interpreter.make_haste(monkeypatch)
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    rest = product.nan_to_num(), *inputs, list(ranks), list(num_heads), head_dim, eps
    gradients = [torch.randn(3, 5, heads, head_dim, device=DEVICE) for heads in num_heads]
    torch.library.opcheck(heads_at_once_t6._form_op, rest, **tests)
    torch.library.opcheck(heads_at_once_t6._gradient_op, (*gradients, *rest), **tests)
