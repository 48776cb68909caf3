"""Training that keeps factors and forms heads again for the backward pass, against training that keeps heads."""

import gc

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounter
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_t6 import T6Cache, attention_t6, heads_t6
from modeling_t6.attention_t6 import should_recompute_heads
from modeling_t6.factors_t6 import form_heads, norm_key_heads
from modeling_t6.heads_t6 import form_all_heads

from ..versions import once_but
from .common import random_ids, random_model, tiny_config
from .test_variants import VARIANTS


BATCH, SEQ, HEADS, HEAD_DIM = 2, 40, 5, 16
EAGER = {"attn_implementation": "eager", "attention_dropout": 0.3}
CASES = VARIANTS | {
    "QK norm": {"qk_norm": True},
    "shared B, third order": {"shared_b": True, "v_rank": 2, "c_factor_dim": 4},
    "grouped heads, QK norm of heads": {"num_attention_heads": 6, "num_key_value_heads": 2, "qk_norm": "heads"},
    "sliding window": {"sliding_window": 4},
    "eager, dropout": EAGER,
}
# Partitions forward and backward as inductor does, but generates no code.
PARTITION = {"backend": "aot_eager_decomp_partition", "fullgraph": True}


def choose(monkeypatch, rebuild: bool) -> None:
    monkeypatch.setattr(attention_t6, "RECOMPUTE_HEADS_EAGER", rebuild)
    monkeypatch.setattr(attention_t6, "RECOMPUTE_HEADS_COMPILED", rebuild)


def gradients(overrides: dict, compiled: bool = False) -> list[torch.Tensor]:
    """The logits of a left-padded batch, and the gradient of every parameter."""
    model = random_model(tiny_config(**overrides), dtype=torch.float64).train()
    if compiled:
        for layer in model.model.layers:
            layer.compile(**PARTITION)
    ids = random_ids(model.config, BATCH, 12)
    mask = (torch.arange(12) >= torch.tensor([[0], [5]])).long().to(ids.device)
    torch.manual_seed(3)
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    torch.manual_seed(4)  # what is computed again drops out what it did before
    (logits * torch.randn(logits.shape, dtype=logits.dtype).to(logits)).sum().backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("case", once_but(CASES, "TPA", "shared B", "sliding window", "eager, dropout"))
def test_gradients(case, monkeypatch):
    choose(monkeypatch, rebuild=False)
    expected = gradients(CASES[case])
    choose(monkeypatch, rebuild=True)
    for ours, theirs in zip(gradients(CASES[case]), expected):
        # float64 has 16 digits, and the operations are the same.
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.once
@pytest.mark.parametrize("case", ["non-contextual A", "shared B, third order", "grouped heads, QK norm of heads"])
def test_gradients_of_compiled_layers(case, monkeypatch):
    choose(monkeypatch, rebuild=False)
    expected = gradients(CASES[case])
    choose(monkeypatch, rebuild=True)
    torch._dynamo.reset()
    for ours, theirs in zip(gradients(CASES[case], compiled=True), expected):
        # Sums in another order: of float64's 16 digits they lose a few.
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


class Results(TorchDispatchMode):
    """Remembers which memory operations wrote their results to, without keeping it."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def kept(self) -> list[int]:
        """Bytes of the storages that are still there."""
        gc.collect()
        return [nbytes for storage, nbytes in self.storages.values() if not storage.expired()]


def kept_bytes(overrides: dict, compiled: bool) -> list[int]:
    """Sizes of what an attention layer of float32 keeps from its forward to its backward pass, without its parameters."""
    model = random_model(tiny_config(num_attention_heads=HEADS, head_dim=HEAD_DIM, **overrides)).train()
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(BATCH, SEQ, 48, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(SEQ)[None])
    if not compiled:
        with Results() as results:
            output = attention(hidden, positions)[0]
        sizes = results.kept()
        sizes.remove(output.untyped_storage().nbytes())
        return sizes
    torch._dynamo.reset()
    output = torch.compile(attention, **PARTITION)(hidden, positions)[0]
    nodes, storages = [output.grad_fn], {}
    while nodes:
        node = nodes.pop()
        nodes += [function for function, _ in node.next_functions if function is not None]
        for tensor in getattr(node, "saved_tensors", ()):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    for parameter in attention.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return list(storages.values())


@pytest.mark.once
@pytest.mark.parametrize(
    "overrides, compiled", [({}, False), ({"qk_norm": True}, False), ({"qk_norm": True}, True)], ids=str
)
def test_heads_are_not_kept(overrides, compiled, monkeypatch):
    heads_bytes = BATCH * SEQ * HEADS * HEAD_DIM * 4
    choose(monkeypatch, rebuild=False)
    plain = kept_bytes(overrides, compiled)
    assert sum(nbytes >= heads_bytes for nbytes in plain) >= 4  # Q, K, V and the output: what is looked for is found
    choose(monkeypatch, rebuild=True)
    rebuilt = kept_bytes(overrides, compiled)
    product_bytes = BATCH * SEQ * 128 * 4  # of which factors are slices: 6 ranks of 5 + 16 numbers, and 2 that fill up
    large = [nbytes for nbytes in rebuilt if nbytes >= heads_bytes]
    assert large.count(product_bytes) == 1 and len(large) == 2  # the other is the output
    assert sum(plain) - sum(rebuilt) >= 2 * heads_bytes  # of three that are gone; the factors of one may be new


class Partitioned(Exception):
    pass


@pytest.mark.once
def test_heads_are_not_kept_by_flash_attention(monkeypatch):
    """Forward and backward, as inductor partitions them around the operator of a GPU. Nothing runs."""

    def attention(query, key, value, is_causal=False, **kwargs):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]

    def forward_compiler(graph, _):
        raise Partitioned(graph)

    choose(monkeypatch, rebuild=True)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    model = random_model(tiny_config(num_attention_heads=HEADS, head_dim=HEAD_DIM), dtype=torch.bfloat16).train()
    hidden = torch.randn(BATCH, SEQ, 48, dtype=torch.bfloat16)
    positions = model.model.rotary_emb(hidden, torch.arange(SEQ)[None])
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=forward_compiler, partition_fn=min_cut_rematerialization_partition)
    with pytest.raises(BackendCompilerFailed) as error:
        torch.compile(model.model.layers[0].self_attn, backend=backend, fullgraph=True)(hidden, positions)
    graph = error.value.inner_exception.args[0].graph
    assert sum("_flash_attention" in str(node.target) for node in graph.nodes) == 1
    saved = [node.meta["val"] for node in graph.output_node().args[0][1:] if node.op == "call_function"]
    sizes = [value.numel() for value in saved if isinstance(value, torch.Tensor)]
    assert sizes.count(BATCH * SEQ * HEADS * HEAD_DIM) == 1  # the output
    assert BATCH * SEQ * HEADS in sizes  # its log-sum-exp


@pytest.mark.once
def test_exported_programs_keep_nothing(monkeypatch):
    choose(monkeypatch, rebuild=True)
    attention = random_model(tiny_config()).train().cpu().model.layers[0].self_attn
    hidden, rotation = torch.randn(1, 4, 48), torch.randn(1, 4, 16)
    program = torch.export.export(attention, (hidden, (rotation, rotation)), strict=True)
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("scaled_dot_product" in target for target in targets)
    assert not any("checkpoint" in target for target in targets)


@pytest.mark.once
@pytest.mark.parametrize("compiled", [False, True])
def test_probabilities_are_not_kept(compiled, monkeypatch):
    choose(monkeypatch, rebuild=True)
    assert max(kept_bytes(EAGER, compiled)) < BATCH * HEADS * SEQ * SEQ * 4


def test_gradient_checkpointing_keeps_nothing_of_attention(monkeypatch):
    choose(monkeypatch, rebuild=True)
    model = random_model(tiny_config()).train()
    model.gradient_checkpointing_enable()
    with Results() as results:
        hidden = model.model(random_ids(model.config, BATCH, SEQ), use_cache=False).last_hidden_state
    assert BATCH * SEQ * 5 * 16 * 4 not in results.kept()
    hidden.sum().backward()


def test_when_heads_are_rebuilt(monkeypatch):
    choose(monkeypatch, rebuild=True)
    # Which Dynamo, up to torch 2.11, takes for True in torch.compile.
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert should_recompute_heads(None, is_checkpointed=False)
    assert not should_recompute_heads(None, is_checkpointed=True) and not should_recompute_heads(
        T6Cache(), is_checkpointed=False
    )
    with torch.no_grad():
        assert not should_recompute_heads(None, is_checkpointed=False)


@pytest.mark.parametrize("shapes", [((2, 3, 4, 5), (2, 3, 4, 6)), ((4, 5), (2, 3, 4, 6)), ((2, 3, 4, 5), (4, 6))])
def test_sums_of_outer_products(shapes, monkeypatch):
    factors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = torch.einsum("...rh,...rd->...hd", *factors) / 4
    probe = torch.randn_like(expected)
    expected = [expected, *torch.autograd.grad(expected, factors, probe)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for most in (0, 8):
        monkeypatch.setattr(heads_t6, "MAX_OUTER_PRODUCTS", most)
        heads = form_all_heads(*factors)
        ours = [heads, *torch.autograd.grad(heads, factors, probe)]
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(
    "shapes", [((2, 3, 4, 5), (2, 3, 4, 6)), ((2, 3, 4, 5), (4, 6)), ((2, 3, 1, 5), (2, 3, 1, 6))]
)
def test_norm_of_key_heads(shapes, compiling, monkeypatch):
    """Heads of the normed factors are those that PyTorch's norm makes of heads."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    factors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    heads = form_heads(*norm_key_heads(*factors, weight, 1e-3))
    expected = torch.nn.functional.rms_norm(form_heads(*factors), (6,), weight, 1e-3)
    probe = torch.randn_like(expected)
    ours, expected = ([x, *torch.autograd.grad(x, [*factors, weight], probe)] for x in (heads, expected))
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("overrides", [{}, {"sliding_window": 4}], ids=["full", "sliding"])
def test_layers_share_a_graph(overrides):
    """Layers that are compiled one by one, as accelerate and others do it, are compiled once."""
    torch._dynamo.reset()
    model, graphs = random_model(tiny_config(num_hidden_layers=3, **overrides)), CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=graphs)
    model(random_ids(model.config, 1, 6), use_cache=False)
    assert graphs.frame_count == 1
