"""Heads out of the one product of factors, and its gradient, by kernels through Triton's interpreter, against float64."""

import math

import pytest
import torch

from modeling_t6 import heads_at_once_t6
from modeling_t6.heads_at_once_t6 import HeadsAtOnce

from .common import DEVICE, random_ids, random_model, tiny_config


pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(heads_at_once_t6.triton is None, reason="Triton is for Linux"),
]
# Of the norm: sums of up to 256 products in float32, rounded once to the dtype.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
HAS_KERNELS = heads_at_once_t6._has_kernels
# batch, tokens, ranks of queries, keys and values, heads, heads of keys and values, head_dim, rotated of it
SHAPES = [
    (1, 1, (1, 1, 1), 1, 1, 16, 16),
    (1, 2, (6, 2, 2), 34, 34, 64, 64),
    (3, 5, (3, 2, 1), 5, 5, 33, 32),
    (1, 4, (8, 1, 2), 6, 2, 128, 32),
    (2, 11, (7, 3, 16), 4, 1, 20, 12),
    (1, 3, (2, 5, 4), 3, 3, 256, 256),
]


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


def inputs_of(shape: tuple, dtype: torch.dtype) -> tuple[list[torch.Tensor], tuple]:
    """The product of a layer's factors, whose padding is NaN, and the angles of its tokens; and the sizes."""
    batch, tokens, ranks, heads, kv_heads, head_dim, rotary_dim = shape
    num_heads = heads, kv_heads, kv_heads
    columns = sum(rank * (h + head_dim) for rank, h in zip(ranks, num_heads))
    product = torch.full((batch, tokens, -(-columns // 8) * 8), math.nan, dtype=dtype, device=DEVICE)
    product[..., :columns] = torch.randn(batch, tokens, columns)
    angles = torch.rand(batch if tokens % 2 else 1, tokens, rotary_dim // 2) * 7
    cos, sin = (x.repeat(1, 1, 2).to(DEVICE, dtype) for x in (angles.cos(), angles.sin()))
    return [product, cos, sin], (ranks, num_heads, head_dim)


def reference(product: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sizes: tuple) -> list[torch.Tensor]:
    """Q, K and V from the equations: pairs of features as complex numbers, which RoPE turns."""
    ranks, num_heads, head_dim = sizes
    half, turned = cos.shape[-1] // 2, torch.complex(cos, sin)[..., : cos.shape[-1] // 2].unsqueeze(2)
    b_sizes, a_sizes = [r * head_dim for r in ranks], [r * h for r, h in zip(ranks, num_heads)]
    *factors, _ = product.split([*b_sizes, *a_sizes, product.shape[-1] - sum(b_sizes + a_sizes)], dim=-1)
    results = []
    for index, (rank, heads) in enumerate(zip(ranks, num_heads)):
        b, a = factors[index].unflatten(-1, (rank, head_dim)), factors[index + 3].unflatten(-1, (heads, rank))
        if index < 2:
            pairs = torch.complex(b[..., :half], b[..., half : 2 * half]) * turned
            b = torch.cat([pairs.real, pairs.imag, b[..., 2 * half :]], dim=-1)
        results.append(torch.einsum("nthr,ntrd->nthd", a, b) / rank)
    return results


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)).replace(", ", "-"))
def test_heads_and_gradient(shape, dtype, launches):
    torch.manual_seed(shape[3])
    (product, cos, sin), sizes = inputs_of(shape, dtype)
    product.requires_grad_()
    wide = product.detach().double().requires_grad_()
    expected = reference(wide, cos.double(), sin.double(), sizes)
    # As attention returns them, heads before tokens.
    gradients = [torch.randn(x.transpose(1, 2).shape, device=DEVICE).to(dtype).transpose(1, 2) for x in expected]
    (expected_gradient,) = torch.autograd.grad(expected, wide, [x.double() for x in gradients])
    heads = HeadsAtOnce.apply(product, cos, sin, *sizes)
    (gradient,) = torch.autograd.grad(heads, product, gradients)
    assert launches == ["_form", "_gradient"]
    assert [error(*pair) < TOLERANCES[dtype] for pair in zip(heads, expected)] == [True] * 3
    assert error(gradient, expected_gradient) < TOLERANCES[dtype]
    is_padding = product[0, 0].isnan()
    assert not gradient[..., is_padding].any()  # which goes on to the hidden states
    assert [x.dtype for x in (*heads, gradient)] == [dtype] * 4


def test_gradient_of_a_part(launches):
    """Of heads that nothing reads there is none; that of a sum is one number, expanded."""
    (product, cos, sin), sizes = inputs_of(SHAPES[2], torch.float32)
    product.requires_grad_()
    wide = product.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference(wide, cos.double(), sin.double(), sizes)[1].sum(), wide)
    (gradient,) = torch.autograd.grad(HeadsAtOnce.apply(product, cos, sin, *sizes)[1].sum(), product)
    assert error(gradient, expected) < 1e-6 and len(launches) == 2


def test_gradients_of_gradients(launches):
    (product, cos, sin), sizes = inputs_of((2, 2, (2, 1, 2), 3, 3, 16, 16), torch.float32)
    results = []
    for form in (HeadsAtOnce.apply, lambda *args: reference(*args[:3], args[3:])):
        leaf = product.nan_to_num().clone().requires_grad_()
        loss = sum(x.square().sum() for x in form(leaf, cos, sin, *sizes))
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        results.append([gradient, *torch.autograd.grad(gradient.square().sum(), leaf)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert launches == ["_form", "_gradient"]  # the second of the last gradients alone


@pytest.mark.parametrize("rebuilt", [False, True], ids=["kept", "rebuilt"])
@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({}, True),
        ({"num_key_value_heads": 2, "num_attention_heads": 4, "attention_bias": True}, True),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, True),
        ({"q_rank": None}, False),
        ({"noncontextual_a": True}, False),
        ({"noncontextual_b": True}, False),
        ({"shared_b": True, "v_rank": 2}, False),
        ({"qk_norm": True}, False),
        ({"head_factor_act": "sigmoid"}, False),
        ({"q_rank": 17}, False),
    ],
    ids=["plain", "grouped, biases", "partial", "kvonly", "constant A", "constant B", "shared", "norm", "act", "rank"],
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


def test_autocast(launches, monkeypatch):
    """The product is in half precision, the angles are not: gradients are, to its digits, those of float32."""
    from modeling_t6 import attention_t6

    model = random_model(tiny_config(num_hidden_layers=1)).train()
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


def test_compiled_layer(launches, monkeypatch):
    """One graph, forward and backward, in which nothing stands between the operators and the products."""
    model = random_model(tiny_config(num_hidden_layers=1)).train()
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
        results.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    forward, backward = ([str(node.target) for node in graph.graph.nodes] for graph in graphs)
    assert [sum("heads_at_once" in name for name in names) for names in (forward, backward)] == [1, 2]
    assert not any(name.startswith(("aten.cat", "aten.constant_pad", "aten.slice_b")) for name in backward)


def test_function_transforms(launches, monkeypatch):
    """`torch.func` gives no memory to read, and is passed by."""
    monkeypatch.setattr(heads_at_once_t6, "is_supported", lambda *args: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    hidden_states, answers = torch.randn(2, 1, 4, 8), []
    assert HAS_KERNELS(hidden_states[0])
    torch.func.vmap(lambda x: answers.append(HAS_KERNELS(x)) or x)(hidden_states)
    assert answers == [False]


def test_operators(launches, monkeypatch):
    """What torch.compile takes whole has the shapes and strides that it is told."""
    (product, cos, sin), sizes = inputs_of(SHAPES[2], torch.float32)
    ranks, num_heads, head_dim = sizes
    monkeypatch.undo()
    if DEVICE == "cpu":
        from . import interpreter

        interpreter.patch_language_once(monkeypatch)
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    product = product.nan_to_num()
    rest = product, cos, sin, list(ranks), list(num_heads), head_dim
    gradients = [torch.randn(3, 5, heads, head_dim, device=DEVICE) for heads in num_heads]
    torch.library.opcheck(heads_at_once_t6._form_op, rest, **tests)
    torch.library.opcheck(heads_at_once_t6._gradient_op, (*gradients, *rest), **tests)
