"""Heads, and the gradients of their factors, by kernels through Triton's interpreter, against float64."""

import math

import pytest
import torch

from modeling_t6 import heads_at_once_t6, heads_t6
from modeling_t6.heads_t6 import form_all_heads

from .common import DEVICE, random_ids, random_model, tiny_config


pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(heads_t6.triton is None, reason="Triton is for Linux"),
]
# Of the norm: sums of up to 256 products in float32, rounded once to the dtype.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
HAS_KERNELS = heads_t6._has_kernels
# batch, tokens, rank, heads, head_dim
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 3, 6, 34, 64),
    (1, 5, 2, 5, 33),
    (3, 4, 16, 78, 64),
    (1, 9, 19, 65, 128),
    (2, 2, 3, 16, 256),
]


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """One entry for each launch of a kernel. Numbers that no kernel writes are NaN."""
    calls, empty = [], torch.Tensor.new_empty
    for name in ("_form", "_gradients_in_triton"):
        plain = getattr(heads_t6, name)
        monkeypatch.setattr(heads_t6, name, lambda *args, plain=plain, name=name: calls.append(name) or plain(*args))
    if DEVICE != "cpu":
        return calls
    from . import interpreter

    interpreter.compute_as_a_gpu(monkeypatch)
    # Of a GPU all but that it is there.
    monkeypatch.setattr(heads_t6, "_has_kernels", lambda a, b, *gradient: a.dim() == b.dim() == 4)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan))
    return calls


def factors_of(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """A and B as slices of one product, of which everything else is NaN."""
    batch, tokens, rank, heads, head_dim = shape
    product = torch.full((batch, tokens, rank * (heads + head_dim) + 9), math.nan, dtype=dtype, device=DEVICE)
    product[..., 1:-8] = torch.randn(batch, tokens, rank * (heads + head_dim))
    b, a = product[..., 1:-8].split([rank * head_dim, rank * heads], dim=-1)
    return [a.unflatten(-1, (heads, rank)).transpose(-1, -2), b.unflatten(-1, (rank, head_dim))]


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_heads_and_gradients(shape, dtype, launches):
    torch.manual_seed(shape[3])
    factors = [x.requires_grad_() for x in factors_of(shape, dtype)]
    wide = [x.detach().double().requires_grad_() for x in factors]
    expected = torch.einsum("ntrh,ntrd->nthd", *wide) / shape[2]
    # As attention returns it, heads before tokens.
    gradient = (
        torch.randn_like(expected.transpose(1, 2), memory_format=torch.contiguous_format).to(dtype).transpose(1, 2)
    )
    expected = [expected, *torch.autograd.grad(expected, wide, gradient.double())]
    heads = form_all_heads(*factors)
    results = [heads, *torch.autograd.grad(heads, factors, gradient)]
    assert launches == ["_form", "_gradients_in_triton"]
    assert [error(*pair) < TOLERANCES[dtype] for pair in zip(results, expected)] == [True] * 3
    assert [result.dtype for result in results] == [dtype] * 3


def test_gradient_that_is_the_same_for_all(launches):
    """A sum's gradient is one number, expanded; B may be that of all sequences."""
    a, b = (x.requires_grad_() for x in factors_of((2, 3, 2, 5, 16), torch.float32))
    form_all_heads(a, b[:1].expand(2, -1, -1, -1)).sum().backward()
    expected = b.detach()[:1].sum(-1, keepdim=True).expand(2, 3, 2, 5) / 2
    torch.testing.assert_close(a.grad, expected)
    torch.testing.assert_close(b.grad[0], a.detach().sum((0, -1))[..., None].expand(3, 2, 16) / 2)
    assert not b.grad[1].any() and len(launches) == 2


def test_gradients_of_gradients(launches):
    a, b = (x.detach().clone().requires_grad_() for x in factors_of((1, 3, 2, 5, 16), torch.float32))
    results = []
    for form in (form_all_heads, lambda a, b: torch.einsum("ntrh,ntrd->nthd", a, b) / 2):
        gradients = torch.autograd.grad(form(a, b).square().sum(), (a, b), create_graph=True)
        results.append([*gradients, *torch.autograd.grad(sum(x.square().sum() for x in gradients), (a, b))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert launches == ["_form", "_gradients_in_triton"]  # the second of the last gradients alone


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_key_value_heads": 2, "num_attention_heads": 4}, {"q_rank": None}, {"noncontextual_b": True}],
    ids=["plain", "grouped", "kvonly", "constant B"],
)
def test_gradients_of_a_model(fields, launches, monkeypatch):
    """Weights' gradients with kernels are those without."""
    monkeypatch.setattr(heads_at_once_t6, "AT_ONCE", False)
    model = random_model(tiny_config(num_hidden_layers=1, **fields)).train()
    ids, gradients = random_ids(model.config, 2, 5), []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(heads_t6, "_has_kernels", lambda *tensors: False)
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert len(launches) == (4 if {"q_rank", "noncontextual_b"} & fields.keys() else 6)


def test_function_transforms(launches, monkeypatch):
    """Gradients of each sequence, by `torch.func`: the kernels are passed over."""
    monkeypatch.setattr(heads_t6, "_has_kernels", HAS_KERNELS)
    monkeypatch.setattr(heads_t6, "is_supported", lambda *args: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    a, b = torch.randn(3, 1, 4, 2, 5), torch.randn(3, 1, 4, 2, 16)
    assert heads_t6._has_kernels(a[0], b[0])
    gradients = torch.func.vmap(torch.func.grad(lambda *x: form_all_heads(*x).square().sum(), (0, 1)))(a, b)
    a, b = a.requires_grad_(), b.requires_grad_()
    expected = torch.autograd.grad((torch.einsum("sntrh,sntrd->snthd", a, b) / 2).square().sum(), (a, b))
    torch.testing.assert_close(gradients, expected)
    assert not launches


def test_gradients_as_an_operator(launches, monkeypatch):
    """What torch.compile takes whole has the shapes and strides that it is told."""
    a, b = factors_of((2, 3, 2, 5, 16), torch.float32)
    monkeypatch.undo()
    if DEVICE == "cpu":
        from . import interpreter

        interpreter.make_haste(monkeypatch)
    gradient = torch.randn(2, 3, 5, 16, device=DEVICE)
    torch.library.opcheck(heads_t6._gradients_op, (gradient, a, b), test_utils=("test_schema", "test_faketensor"))
