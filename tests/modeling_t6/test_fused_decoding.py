"""Decoded tokens by one kernel behind the projections, through Triton's interpreter, against the steps that it replaces."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from modeling_t6 import T6Cache, factor_pages_t6, stored_factors_t6
from modeling_t6.cache_t6 import CACHE_NAME
from modeling_t6.stored_factors_t6 import store_decoded

from .common import DEVICE, random_ids, random_model, tiny_config


pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(factor_pages_t6.triton is None, reason="Triton is for Linux"),
]


@pytest.fixture(autouse=True)
def checked_interpreter(monkeypatch):
    if DEVICE != "cpu":
        return
    from . import interpreter

    interpreter.compute_as_a_gpu(monkeypatch, float8=True)


@pytest.fixture
def launches(monkeypatch):
    """One entry for each launch of the kernel."""
    calls, store = [], factor_pages_t6._store_in_triton
    monkeypatch.setattr(factor_pages_t6, "_store_in_triton", lambda *args: calls.append(1) or store(*args))
    return calls


def make_model(dtype: torch.dtype = torch.float32, **fields):
    return random_model(tiny_config(num_hidden_layers=1, attn_implementation="flash_tpa", **fields), dtype=dtype)


def make_cache(config, kind: str, room: int = 40):
    if kind == "static":
        return StaticCache(config=config, max_cache_len=room)
    return T6Cache(config=config, dtype=torch.float8_e4m3fn if kind == "float8" else None)


def step(model, cache, hidden_states: torch.Tensor, past: int, fused: bool, monkeypatch):
    """The queries and the rows that attention gets of some tokens after `past` others."""
    monkeypatch.setattr(stored_factors_t6, "FUSED", fused)
    positions = torch.arange(past, past + hidden_states.shape[1], device=DEVICE)[None]
    angles = model.model.rotary_emb(hidden_states, positions)
    layer = model.model.layers[0].self_attn
    factors = store_decoded(layer, hidden_states, angles, cache)
    end = past + hidden_states.shape[1]
    return layer.queries(factors), factors.key_rows[:, :, :end], factors.value_rows[:, :, :end]


# Of the largest number: each step outside of the kernel rounds to the dtype, the kernel once. float8 rounds to 3 bits
# what differs in the last ones of 24.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.03}
VARIANTS = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "sigmoid": {"head_factor_act": "sigmoid"},
    "softmax": {"head_factor_act": "softmax", "num_attention_heads": 11},
    "kvonly": {"q_rank": None},
    "constant-a": {"noncontextual_a": True, "k_rank": 3, "v_rank": 4},
    "qk-norm, partial": {
        "qk_norm": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "qk-norm of heads": {"qk_norm": "heads", "head_factor_act": "sigmoid", "k_rank": 3, "num_attention_heads": 17},
    "grouped heads": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_factor_act": "softmax"},
    "grouped constant A": {"num_attention_heads": 6, "num_key_value_heads": 2, "noncontextual_a": True},
    "rotated rows of A": {"num_attention_heads": 17, "q_rank": 1, "k_rank": 4, "v_rank": 3},
}


@pytest.mark.parametrize("kind", ["dynamic", "static", "float8"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_queries_and_rows(launches, monkeypatch, name, kind):
    """Two sequences; a prompt, then three tokens at once, then one at a time beyond the room that there was."""
    fields = dict(VARIANTS[name])
    dtype = fields.pop("dtype", torch.float32)
    model = make_model(dtype, **fields)
    caches = {fused: make_cache(model.config, kind) for fused in (True, False)}
    ids = random_ids(model.config, 2, 20)
    for cache in caches.values():
        model(ids, **{CACHE_NAME: cache})
    launches.clear()
    past = 20
    for count in (3, 1, 1):
        hidden_states = torch.randn(2, count, 48, device=DEVICE).to(dtype)
        outputs = {
            fused: step(model, cache, hidden_states, past, fused, monkeypatch) for fused, cache in caches.items()
        }
        for what, fused, plain in zip(("query", "key rows", "value rows"), outputs[True], outputs[False]):
            assert fused.dtype == plain.dtype and fused.shape == plain.shape
            fused, plain = fused.float(), plain.float()
            tolerance = TOLERANCES[dtype] if fused.dtype != torch.float8_e4m3fn else 0
            if what != "query" and kind == "float8":  # one step of the rounding
                tolerance = 2**-3
            assert (fused - plain).abs().max() <= tolerance * plain.abs().max(), what
        past += count
    assert len(launches) == 3


@torch.no_grad()
def test_room_behind_rows_is_not_touched(launches, monkeypatch):
    """A cropped cache overwrites what was removed, and nothing else, in either kind of cache."""
    model = make_model()
    hidden_states = torch.randn(2, 1, 48, device=DEVICE)
    for kind in ("dynamic", "static"):
        cache = make_cache(model.config, kind)
        model(random_ids(model.config, 2, 20), **{CACHE_NAME: cache})
        step(model, cache, hidden_states, 20, True, monkeypatch)  # makes room
        layer = cache.layers[0]
        if kind == "dynamic":
            layer.crop(-3)
            storages = layer._storage
        else:
            layer.cumulative_length.sub_(3)
            storages = layer.keys, layer.values
        for storage in storages:
            storage[:, :, 18:] = math.nan
        before = [storage.clone() for storage in storages]
        _, key_rows, value_rows = step(model, cache, hidden_states, 18, True, monkeypatch)
        assert key_rows.isfinite().all() and value_rows.isfinite().all()
        for storage, old in zip(storages, before):
            storage[:, :, 18] = math.nan
            assert torch.equal(storage.nan_to_num(-1e9), old.nan_to_num(-1e9))
    assert len(launches) == 4


@torch.no_grad()
def test_no_room_on_the_device(launches, monkeypatch):
    """Where the host cannot tell: nothing is written, and the answer is NaN in place of a wrong one."""
    model = make_model()
    cache = make_cache(model.config, "static", room=20)
    model(random_ids(model.config, 2, 20), **{CACHE_NAME: cache})
    layer = cache.layers[0]
    before = layer.keys.clone(), layer.values.clone()
    query, key_rows, value_rows = step(model, cache, torch.randn(2, 1, 48, device=DEVICE), 20, True, monkeypatch)
    assert query.isnan().all() and launches
    assert torch.equal(layer.keys, before[0]) and torch.equal(layer.values, before[1])


@torch.no_grad()
def test_another_batch_is_refused():
    model = make_model()
    cache = make_cache(model.config, "dynamic")
    model(random_ids(model.config, 2, 20), **{CACHE_NAME: cache})
    with pytest.raises(RuntimeError, match="holds a batch of 2 sequences, got rows of size 3"):
        model(random_ids(model.config, 3, 1), **{CACHE_NAME: cache})


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"cache_implementation": "static"}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}],
    ids=["dynamic", "static", "beams", "prompt-lookup"],
)
def test_generated_tokens(launches, monkeypatch, kwargs):
    model = make_model()
    batch = 1 if "prompt_lookup_num_tokens" in kwargs else 2
    ids = random_ids(model.config, batch, 18)
    mask = torch.ones_like(ids)
    if batch == 2:
        ids[0, :7] = mask[0, :7] = 0  # padding
    tokens = []
    for fused in (True, False):
        monkeypatch.setattr(stored_factors_t6, "FUSED", fused)
        tokens.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, disable_compile=True, **kwargs)
        )
    assert torch.equal(*tokens) and launches


class Operators(TorchDispatchMode):
    """The operators that compute something, views left out."""

    VIEWS = ("view", "slice", "select", "squeeze", "expand", "transpose", "alias", "as_strided", "aten.t.", "unbind")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not any(view in str(function) for view in self.VIEWS):
            self.names.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("kind, most", [("dynamic", 0), ("static", 1)])
@torch.no_grad()
def test_operators_beside_the_launch(monkeypatch, kind, most):
    """None but projections, and the count of a static cache's tokens; before, some twenty."""
    model = make_model(head_factor_act="sigmoid")
    cache = make_cache(model.config, kind)
    model(random_ids(model.config, 2, 20), **{CACHE_NAME: cache})
    hidden_states = torch.randn(2, 1, 48, device=DEVICE)
    step(model, cache, hidden_states, 20, True, monkeypatch)
    # The interpreter's launch is made of operators itself.
    monkeypatch.setattr(factor_pages_t6, "_store_in_triton", lambda a_q, b_q, *args: b_q.expand(-1, -1, -1))
    angles = model.model.rotary_emb(hidden_states, torch.tensor([[21]], device=DEVICE))
    layer, counts = model.model.layers[0].self_attn, {}
    for fused in (True, False):
        monkeypatch.setattr(stored_factors_t6, "FUSED", fused)
        with Operators() as operators:
            factors = store_decoded(layer, hidden_states, angles, cache)
            if not fused:
                layer.queries(factors)
        counts[fused] = [name for name in operators.names if ".mm." not in name and "addmm" not in name]
    print({fused: len(names) for fused, names in counts.items()})
    assert len(counts[True]) <= most, counts[True]
    assert len(counts[False]) > 15


@torch.no_grad()
def test_compiled_step_over_a_static_cache():
    """One graph, in which the operator writes into the cache itself."""
    model = make_model()
    ids = random_ids(model.config, 2, 22)
    expected = random_model(tiny_config(num_hidden_layers=1, attn_implementation="sdpa"))(ids).logits
    cache = make_cache(model.config, "static")
    model(ids[:, :18], **{CACHE_NAME: cache})
    names = set()

    def backend(graph, inputs):
        names.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    for position in range(18, 22):
        logits = compiled(ids[:, position : position + 1], **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(logits[:, 0], expected[:, position], atol=1e-4, rtol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert any("append_factors" in name for name in names) and not any("index_copy" in name for name in names)


def test_operator():
    """Schema (what it writes to), fake kernel and behaviour under tracing, as PyTorch checks them."""
    a_k, b, angles = (torch.randn(4, n, m, device=DEVICE) for n, m in ((5, 2), (2, 16), (1, 8)))
    rows = [torch.zeros(2, 9, 2 * (8 + 16), device=DEVICE) for _ in range(2)]
    length = torch.tensor([6], device=DEVICE)
    arguments = (
        a_k, b, a_k.clone(), b.clone(), a_k.clone(), b.clone(), angles[:, 0], angles[:, 0].clone(), length, *rows,
        None, None, -2, 2, 1e-6, "sigmoid", False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.t6.append_factors.default, arguments)
