"""Heads out of the one product of factors, and its gradient, by kernels through Triton's interpreter, against float64."""

import math
import random

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
# With norms, the sizes of heads whose terms cancel have fewer digits than the terms; three gradients of a few roundings are added.
NORMED_TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
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


def inputs_of(shape: tuple, dtype: torch.dtype, normed: bool = False) -> tuple[list[torch.Tensor | None], tuple]:
    """
    The product of a layer's factors, whose padding is NaN, the weights of its norms, and the angles of its tokens; and the sizes, last
    an epsilon that shows.
    """
    batch, tokens, ranks, heads, kv_heads, head_dim, rotary_dim = shape
    num_heads = heads, kv_heads, kv_heads
    columns = sum(rank * (h + head_dim) for rank, h in zip(ranks, num_heads))
    product = torch.full((batch, tokens, -(-columns // 8) * 8), math.nan, dtype=dtype, device=DEVICE)
    product[..., :columns] = torch.randn(batch, tokens, columns)
    angles = torch.rand(batch if tokens % 2 else 1, tokens, rotary_dim // 2) * 7
    cos, sin = (x.repeat(1, 1, 2).to(DEVICE, dtype) for x in (angles.cos(), angles.sin()))
    weights = [(torch.rand(head_dim) + 0.5).to(DEVICE, dtype) if normed else None for _ in range(2)]
    return [product, *weights, cos, sin], (ranks, num_heads, head_dim, 0.05)


def reference(product, q_weight, k_weight, cos, sin, ranks, num_heads, head_dim, eps) -> list[torch.Tensor]:
    """Q, K and V from the equations: heads are formed, normalised, and pairs of features turned as complex numbers."""
    half, turned = cos.shape[-1] // 2, torch.complex(cos, sin)[..., : cos.shape[-1] // 2].unsqueeze(2)
    b_sizes, a_sizes = [r * head_dim for r in ranks], [r * h for r, h in zip(ranks, num_heads)]
    *factors, _ = product.split([*b_sizes, *a_sizes, product.shape[-1] - sum(b_sizes + a_sizes)], dim=-1)
    results = []
    for index, (rank, heads) in enumerate(zip(ranks, num_heads)):
        b, a = factors[index].unflatten(-1, (rank, head_dim)), factors[index + 3].unflatten(-1, (heads, rank))
        formed = torch.einsum("nthr,ntrd->nthd", a, b) / rank
        weight = (q_weight, k_weight, None)[index]
        if weight is not None:
            formed = weight * formed / (formed.square().mean(-1, keepdim=True) + eps).sqrt()
        if index < 2:
            pairs = torch.complex(formed[..., :half], formed[..., half : 2 * half]) * turned
            formed = torch.cat([pairs.real, pairs.imag, formed[..., 2 * half :]], dim=-1)
        results.append(formed)
    return results


def leaves_of(inputs: list[torch.Tensor | None], dtype: torch.dtype | None = None) -> list[torch.Tensor | None]:
    """Of the inputs, those that gradients are wanted of, in that dtype."""
    return [None if x is None else x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in inputs[:3]]


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)).replace(", ", "-"))
def test_heads_and_gradient(shape, dtype, normed, launches):
    torch.manual_seed(shape[3])
    inputs, sizes = inputs_of(shape, dtype, normed)
    leaves, wide = leaves_of(inputs), leaves_of(inputs, torch.float64)
    wanted = slice(3 if normed else 1)
    expected = reference(*wide, *(x.double() for x in inputs[3:]), *sizes)
    # As attention returns them, heads before tokens.
    gradients = [torch.randn(x.transpose(1, 2).shape, device=DEVICE).to(dtype).transpose(1, 2) for x in expected]
    expected_gradients = torch.autograd.grad(expected, wide[wanted], [x.double() for x in gradients])
    heads = HeadsAtOnce.apply(*leaves, *inputs[3:], *sizes)
    results = torch.autograd.grad(heads, leaves[wanted], gradients)
    assert launches == ["_form", "_gradient"]
    tolerance = (NORMED_TOLERANCES if normed else TOLERANCES)[dtype]
    assert [error(*pair) < tolerance for pair in zip(heads, expected)] == [True] * 3
    assert [error(*pair) < tolerance for pair in zip(results, expected_gradients)] == [True] * len(results)
    is_padding = inputs[0][0, 0].isnan()
    assert not results[0][..., is_padding].any()  # which goes on to the hidden states
    assert {x.dtype for x in (*heads, *results)} == {dtype}


def test_random_shapes_with_norms(launches):
    """Ranks to 16, head sizes that are no powers of two, rotated in part, fewer heads of keys, tokens that fill no tile."""
    rng = random.Random(0)
    for seed in range(12):
        kv_heads, half = rng.randint(1, 5), rng.randint(1, 24)
        shape = (
            rng.randint(1, 3), rng.randint(1, 18), tuple(rng.choice((1, 2, 3, 6, 8, 9, 16)) for _ in range(3)),
            kv_heads * rng.randint(1, 5), kv_heads, 2 * half + rng.choice((0, 0, 1, 7, 20)), 2 * half,
        )  # fmt: skip
        dtype = rng.choice(list(NORMED_TOLERANCES))
        torch.manual_seed(seed)
        inputs, sizes = inputs_of(shape, dtype, True)
        leaves, wide = leaves_of(inputs), leaves_of(inputs, torch.float64)
        heads = HeadsAtOnce.apply(*leaves, *inputs[3:], *sizes)
        expected = reference(*wide, *(x.double() for x in inputs[3:]), *sizes)
        gradients = [torch.randn_like(x) for x in heads]
        results = [*heads, *torch.autograd.grad(heads, leaves, gradients)]
        expected += torch.autograd.grad(expected, wide, [x.double() for x in gradients])
        errors = [error(*pair) for pair in zip(results, expected)]
        # Rows of one token and rank 1 may have no gradient but what is rounded: a norm of one term takes all that is along it.
        assert max(errors) < NORMED_TOLERANCES[dtype], (shape, dtype, errors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_small_and_large_factors(dtype, launches):
    """Heads are normalised whatever their size: neither overflow nor zeros on the way, of factors 1e4 times as large or small."""
    torch.manual_seed(0)
    for a_scale, b_scale in ((1e-2, 1e-2), (1e2, 1e2), (1e-2, 1e2), (1e2, 1e-2)):
        (product, *rest), (*sizes, _) = inputs_of((1, 9, (6, 2, 2), 8, 8, 64, 64), dtype, True)
        product = product.nan_to_num()
        product[..., : 10 * 64] *= b_scale
        product[..., 10 * 64 :] *= a_scale
        inputs = [product, *rest]
        leaves, wide = leaves_of(inputs), leaves_of(inputs, torch.float64)
        heads = HeadsAtOnce.apply(*leaves, *inputs[3:], *sizes, 1e-6)[:2]
        expected = reference(*wide, *(x.double() for x in inputs[3:]), *sizes, 1e-6)[:2]
        gradients = [torch.randn_like(x) for x in heads]
        results = [*heads, *torch.autograd.grad(heads, leaves, gradients)]
        expected += torch.autograd.grad(expected, wide, [x.double() for x in gradients])
        errors = [error(*pair) for pair in zip(results, expected)]
        assert max(errors) < NORMED_TOLERANCES[dtype], (a_scale, b_scale, errors)


def test_weights_of_another_dtype(launches):
    """Under autocast norms have weights of float32, factors are of bfloat16: each gradient is of its own."""
    inputs, sizes = inputs_of(SHAPES[1], torch.bfloat16, True)
    leaves = [leaves_of(inputs)[0], *leaves_of(inputs, torch.float32)[1:]]
    wide = leaves_of(inputs, torch.float64)
    heads = HeadsAtOnce.apply(*leaves, *inputs[3:], *sizes)
    expected = reference(*wide, *(x.double() for x in inputs[3:]), *sizes)
    gradients = [torch.randn_like(x) for x in heads]
    results = torch.autograd.grad(heads, leaves, gradients)
    expected_gradients = torch.autograd.grad(expected, wide, [x.double() for x in gradients])
    assert [x.dtype for x in (*heads, *results)] == [torch.bfloat16] * 4 + [torch.float32] * 2
    pairs = [*zip(heads, expected), *zip(results, expected_gradients)]
    assert [error(*pair) < 6e-3 for pair in pairs] == [True] * 6


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_gradient_of_a_part(normed, launches):
    """Of heads that nothing reads there is none; that of a sum is one number, expanded."""
    inputs, sizes = inputs_of(SHAPES[2], torch.float32, normed)
    leaves, wide = leaves_of(inputs), leaves_of(inputs, torch.float64)
    wanted = slice(3 if normed else 1)
    expected = reference(*wide, *(x.double() for x in inputs[3:]), *sizes)[1].sum()
    expected_gradients = torch.autograd.grad(expected, wide[wanted], allow_unused=True)
    heads = HeadsAtOnce.apply(*leaves, *inputs[3:], *sizes)
    results = torch.autograd.grad(heads[1].sum(), leaves[wanted])
    assert len(launches) == 2
    for result, expected in zip(results, expected_gradients):
        assert not result.any() if expected is None else error(result, expected) < 1e-5 if normed else 1e-6


@pytest.mark.parametrize("frozen", [None, 0, 1, 2], ids=["plain", "product", "queries' norm", "keys' norm"])
def test_gradients_of_gradients(frozen, launches):
    inputs, sizes = inputs_of((2, 2, (2, 1, 2), 3, 3, 16, 16), torch.float32, frozen is not None)
    inputs[0], results = inputs[0].nan_to_num(), []
    for form in (HeadsAtOnce.apply, reference):
        leaves = leaves_of(inputs)
        if frozen is not None:
            leaves[frozen].requires_grad_(False)
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        loss = sum(x.square().sum() for x in form(*leaves, *inputs[3:], *sizes))
        loss = loss + sum(x[..., 0].sum() for x in form(*leaves, *inputs[3:], *sizes))
        gradients = torch.autograd.grad(loss, wanted, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in gradients), wanted)
        results.append([*gradients, *second])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert launches == ["_form"] * 2 + ["_gradient"] * (launches.count("_gradient"))


@pytest.mark.parametrize("rebuilt", [False, True], ids=["kept", "rebuilt"])
@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({}, True),
        ({"num_key_value_heads": 2, "num_attention_heads": 4, "attention_bias": True}, True),
        ({"rope_parameters": PARTIAL_ROPE}, True),
        ({"q_rank": None}, False),
        ({"noncontextual_a": True}, False),
        ({"noncontextual_b": True}, False),
        ({"shared_b": True, "v_rank": 2}, False),
        ({"qk_norm": "heads"}, True),
        ({"qk_norm": "heads", "num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 20}, True),
        ({"qk_norm": "heads", "q_rank": 9, "rope_parameters": PARTIAL_ROPE}, True),
        ({"qk_norm": True}, False),
        ({"qk_norm": "heads", "head_factor_act": "sigmoid"}, False),
        ({"qk_norm": "heads", "q_rank": None}, False),
        ({"head_factor_act": "sigmoid"}, False),
        ({"q_rank": 17}, False),
    ],
    ids=["plain", "grouped, biases", "partial", "kvonly", "constant A", "constant B", "shared", "norms", "grouped, norms", "partial, norms", "norm of rows", "norms, act", "norms, kvonly", "act", "rank"],
)
def test_gradients_of_a_model(fields, fits, rebuilt, launches, monkeypatch):
    """Logits and weights' gradients are those without, for every variant; the kernels are used for those that fit."""
    from modeling_t6 import attention_t6, heads_t6

    monkeypatch.setattr(attention_t6, "REBUILD_HEADS_EAGER", rebuilt)
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


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_operators(normed, launches, monkeypatch):
    """What torch.compile takes whole has the shapes and strides that it is told."""
    (product, *inputs), (ranks, num_heads, head_dim, eps) = inputs_of(SHAPES[2], torch.float32, normed)
    monkeypatch.undo()
    if DEVICE == "cpu":
        from . import interpreter

        interpreter.patch_language_once(monkeypatch)
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    rest = product.nan_to_num(), *inputs, list(ranks), list(num_heads), head_dim, eps
    gradients = [torch.randn(3, 5, heads, head_dim, device=DEVICE) for heads in num_heads]
    torch.library.opcheck(heads_at_once_t6._form_op, rest, **tests)
    torch.library.opcheck(heads_at_once_t6._gradient_op, (*gradients, *rest), **tests)
