# Copyright 2026 The T6 for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Caches of rows in fewer bits, in every way in which they are used, against models without a cache whose factors are rounded as
soon as they are made. In float64, where two ways to compute a factor round it to the same bits.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig, StaticCache
from transformers.cache_utils import DynamicCache

from modeling_t6 import T6Cache, factor_pages_t6, factor_space_t6, flash_tpa_t6, paged_t6
from modeling_t6.cache_t6 import CACHE_NAME, FactorLayout, cache_nbytes, dtype_name
from modeling_t6.factors_t6 import TensorProductFactors

from ..versions import once_but
from . import interpreter
from .common import DEVICE, OFFLOADED_MODE, cached, random_ids, random_model, tiny_config
from .test_attention import LargestResult
from .test_generation import generate
from .test_quantized_rows import reference_factors
from .test_reference import left_padded, positions


every_dtype = pytest.mark.parametrize("dtype", ["int4", "float8_e4m3fn"])
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}


def rounded(dtype: str, layout: FactorLayout, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A [batch, seq, rank, num_heads], or a constant, and B [batch, seq, rank, head_dim] as rows of that dtype hold them."""
    if dtype != "int4":
        return tuple(x.to(getattr(torch, dtype)).to(x.dtype) if x.dim() == 4 else x for x in (a, b))
    return read_rows(layout, layout.quantized.pack(a, b), a)


def read_rows(layout: FactorLayout, rows: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in float64 of rows of 4 bits, number by number; `a` if A is constant."""
    sizes = layout.rank, layout.num_heads, layout.head_dim
    factors = [reference_factors(row, *sizes) for row in rows.flatten(0, 2).cpu().numpy()]
    read_a, read_b = (
        torch.tensor(np.array([[rank[i] for rank in token] for token in factors])).unflatten(0, rows.shape[:3:2])
        for i in (0, 1)
    )
    if layout.num_heads == 0:  # A is the scale
        return a, (read_b * read_a).to(a)
    return read_a.to(a), read_b.to(a)


@contextlib.contextmanager
def rounding(dtype: str | None) -> Iterator[None]:
    """A context in which every model rounds the factors of its keys and values."""
    project = TensorProductFactors.project

    @functools.wraps(project)
    def rounded_project(self, *args, **kwargs):
        factors = project(self, *args, **kwargs)
        factors.a_k, factors.b_k = rounded(dtype, self.key_layout, factors.a_k, factors.b_k)
        factors.a_v, factors.b_v = rounded(dtype, self.value_layout, factors.a_v, factors.b_v)
        return factors

    with mock.patch.object(TensorProductFactors, "project", project if dtype is None else rounded_project):
        yield


def expected_tokens(model, ids: torch.Tensor, dtype: str, **kwargs) -> torch.Tensor:
    with rounding(dtype):
        return generate(model, ids, use_cache=False, **kwargs)


def model_of(**fields):
    return random_model(tiny_config(**fields), dtype=torch.float64)


MODES = {
    "default": {},
    "static": {"cache_implementation": "static"},
    **OFFLOADED_MODE,
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "chunked-prefill-static": {"prefill_chunk_size": 5, "cache_implementation": "static"},
}


@every_dtype
@pytest.mark.parametrize(
    "fields",
    [{}, {"num_attention_heads": 6, "num_key_value_heads": 3}, {"noncontextual_a": True}, SLIDING],
    ids=["tpa", "grouped heads", "constant A", "sliding"],
)
def test_greedy(dtype, fields):
    model, outputs = model_of(**fields), {"return_dict_in_generate": True, "output_logits": True}
    ids = random_ids(model.config, 2, 13)
    with rounding(dtype):
        expected = generate(model, ids, use_cache=False, **outputs)
    logits = torch.stack(expected.logits, dim=1)
    exact = generate(model, ids, use_cache=False, **outputs).logits[0]
    assert (logits[:, 0] - exact).abs().max() > 0.01  # rounding shows
    for name, kwargs in MODES.items():
        if fields is SLIDING and "prefill_chunk_size" in kwargs:  # static layers with a window take no pieces
            continue
        batch = 1 if "prompt_lookup_num_tokens" in kwargs else 2
        output = generate(model, ids[:batch], cache_dtype=dtype, **outputs, **kwargs)
        assert torch.equal(output.sequences, expected.sequences[:batch]), name
        torch.testing.assert_close(torch.stack(output.logits, dim=1), logits[:batch], atol=1e-9, rtol=1e-9, msg=name)
        kinds = {layer.stored_rows()[0].dtype for layer in cached(output).layers}
        assert kinds == {torch.uint8 if dtype == "int4" else torch.float8_e4m3fn}, name


@every_dtype
@pytest.mark.parametrize("implementation", [None, "static"])
def test_beams(dtype, implementation):
    model = model_of()
    ids, kwargs = random_ids(model.config, 2, 7), {"num_beams": 3, "num_return_sequences": 2}
    expected = expected_tokens(model, ids, dtype, **kwargs)
    output = generate(model, ids, cache_dtype=dtype, cache_implementation=implementation, **kwargs)
    assert torch.equal(output, expected)


@every_dtype
def test_assisted(dtype):
    """An assistant of which few tokens are taken; its cache is of the same dtype."""
    model = model_of()
    ids, assistant = random_ids(model.config, 1, 9), random_model(tiny_config(num_hidden_layers=1), seed=3).double()
    expected = expected_tokens(model, ids, dtype)
    assert torch.equal(generate(model, ids, assistant_model=assistant, cache_dtype=dtype), expected)


@every_dtype
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_batches(dtype, attn_implementation):
    """A left-padded batch, cropped, repeated, reordered and selected from, by its logits."""
    model = model_of(attn_implementation=attn_implementation)
    rows, ids, mask = left_padded(model.config, (14, 6))
    with rounding(dtype):
        expected = [model(row[None], use_cache=False).logits[0, -3:] for row in rows]
    cache = T6Cache(config=model.config, dtype=dtype)
    model(ids, attention_mask=mask, position_ids=positions(mask), **{CACHE_NAME: cache})
    cache.crop(-3)
    cache.batch_repeat_interleave(2)
    order = torch.tensor([3, 1, 2], device=DEVICE)
    cache.reorder_cache(order)
    cache.batch_select_indices(order[1:] - 1)  # one of each sequence: [1, 0]
    ids, mask = ids.flip(0), mask.flip(0)
    logits = model(
        ids[:, -3:], attention_mask=mask, position_ids=positions(mask)[:, -3:], **{CACHE_NAME: cache}
    ).logits
    for ours, theirs in zip(logits, reversed(expected)):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("fields", [{}, {"noncontextual_a": True, "v_rank": 3}], ids=["tpa", "constant A"])
@pytest.mark.parametrize("query_length", [1, 4, 12])
@torch.no_grad()
def test_attention_reads_what_the_bytes_say(fields, query_length, monkeypatch):
    """Chunk by chunk, or as heads where there are many queries: softmax(Q K^T) V of the bytes, read number by number."""
    monkeypatch.setattr(factor_space_t6, "FACTOR_SPACE_CHUNK", 7)
    model = model_of(num_hidden_layers=1, **fields)
    ids, cache = random_ids(model.config, 2, 20 + query_length), T6Cache(config=model.config, dtype="int4")
    layer, attended = model.model.layers[0].self_attn, {}
    model(ids[:, :20], **{CACHE_NAME: cache})

    def record(module, args, kwargs, output):
        attended.update(kwargs, hidden_states=args[0])

    layer.register_forward_hook(record, with_kwargs=True)
    layer.o_proj.register_forward_pre_hook(lambda module, args: attended.update(output=args[0]))
    model(ids[:, 20:], **{CACHE_NAME: cache})
    query = layer.queries(layer.project(attended["hidden_states"], attended["position_embeddings"]))
    held, layouts = cache.layers[0], (layer.key_layout, layer.value_layout)
    assert held.keys.dtype == torch.uint8 and held.keys.shape[-1] == layouts[0].quantized.width
    constants = (layer.k_a, layer.v_a) if fields else (query, query)
    factors = [read_rows(*each) for each in zip(layouts, (held.keys, held.values), constants)]
    key, value = (torch.einsum(f"{'' if a.dim() == 2 else 'bs'}rh,bsrd->bshd", a, b) / b.shape[2] for a, b in factors)
    scores = torch.einsum("bqhd,bshd->bhqs", query, key) / math.sqrt(16)
    scores += torch.full(scores.shape[-2:], -math.inf, dtype=torch.float64).triu(21).to(scores.device)
    expected = torch.einsum("bhqs,bshd->bqhd", scores.softmax(-1), value)
    torch.testing.assert_close(attended["output"], expected.flatten(2), atol=1e-10, rtol=1e-10)
    if not fields:
        torch.testing.assert_close(held.a_k, factors[0][0].float())
    torch.testing.assert_close(held.b_v, factors[1][1].float(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decoding_makes_numbers_of_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(factor_space_t6, "FACTOR_SPACE_CHUNK", 32)
    model = model_of()
    ids, cache = random_ids(model.config, 1, 801), T6Cache(config=model.config, dtype="int4")
    model(ids[:, :800], **{CACHE_NAME: cache})
    model(ids[:, 800:], **{CACHE_NAME: cache})  # makes room
    cache.crop(-1)
    with LargestResult() as largest:
        model(ids[:, 800:], **{CACHE_NAME: cache})
    # The bytes of the scales and zero points: not B, which has 8 for each rank and becomes 16 numbers.
    assert largest.numel <= 801 * 2 * 4


@pytest.mark.parametrize("fields", [{}, {"num_attention_heads": 17, "head_dim": 24}, {"noncontextual_a": True}])
@torch.no_grad()
def test_bytes(fields):
    """
    B in 4 bits, A in 8 and its padding, 4 bytes for each 32 features of a rank, to a multiple of 8; of a static cache likewise.
    """
    model = random_model(tiny_config(**fields), dtype=torch.bfloat16)
    config = model.config
    heads = 0 if config.noncontextual_a else math.ceil(config.num_attention_heads / 8) * 8
    sizes = [math.ceil(rank * (config.head_dim / 2 + heads + 4) / 8) * 8 for rank in config.ranks(0)]
    output = generate(model, random_ids(config, 3, 6), cache_dtype="int4", return_dict_in_generate=True)
    tokens = cached(output).get_seq_length()
    assert cached(output).nbytes == 2 * 3 * tokens * sum(sizes)
    static = generate(
        model,
        random_ids(config, 3, 6),
        cache_dtype="int4",
        return_dict_in_generate=True,
        cache_implementation="static",
    )
    assert cache_nbytes(cached(static)) == 2 * 3 * cached(static).get_max_length() * sum(sizes)


@every_dtype
def test_compiled(dtype):
    model = model_of(num_hidden_layers=1)
    ids = random_ids(model.config, 2, 13)
    expected = expected_tokens(model, ids, dtype)
    compile_config = CompileConfig(backend="aot_eager", fullgraph=True, dynamic=False, mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    output = generate(
        model, ids, cache_dtype=dtype, cache_implementation="static", compile_config=compile_config, disable_compile=False
    )  # fmt: skip
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(output, expected)


@pytest.mark.parametrize("length", [9, 12, 13])
def test_long_rope_across_the_switch(length):
    """The rows that are made anew are of the same dtype."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 12}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    model = model_of(rope_parameters=rope)
    ids = random_ids(model.config, 1, length)
    expected = expected_tokens(model, ids, "int4")
    for implementation in (None, "static"):
        output = generate(
            model, ids, cache_dtype="int4", cache_implementation=implementation, return_dict_in_generate=True
        )
        assert torch.equal(output.sequences, expected)
        assert cached(output).layers[0].stored_dtype == torch.uint8


@torch.no_grad()
def test_rows_that_others_assign():
    """Some of the rows, or rows of another dtype, as by packages that prune caches: both are stored as the rest."""
    model = model_of(num_hidden_layers=1)
    ids, positions = random_ids(model.config, 2, 20), torch.arange(19, 20, device=DEVICE)[None]
    logits = []
    for dtype in ("int4", None):
        cache = T6Cache(config=model.config, dtype="int4")
        model(ids[:, :19], **{CACHE_NAME: cache})
        layer = cache.layers[0]
        if dtype is None:
            plain = T6Cache(config=model.config)
            model(ids[:, :19], **{CACHE_NAME: plain})
            layer.keys, layer.values = plain.layers[0].keys, plain.layers[0].values
        layer.keys, layer.values = layer.keys[:, :, 4:], layer.values[:, :, 4:]
        logits.append(model(ids[:, 19:], position_ids=positions, **{CACHE_NAME: cache}).logits)
        assert layer.keys.dtype == torch.uint8 and layer.keys.shape[-2] == 16
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)


@pytest.mark.skipif(flash_tpa_t6.triton is None, reason="Triton is for Linux")
@pytest.mark.parametrize("implementation", once_but({"dynamic": None, "static": "static"}.items(), "static"))
def test_kernels(implementation, monkeypatch):
    """They write and read rows of float8, in both kinds of cache; rows of 4 bits they read."""
    interpreter.round_float8(monkeypatch)
    interpreter.make_haste(monkeypatch)
    launches, store, attend = [], factor_pages_t6._store_in_triton, flash_tpa_t6._flash_tpa
    monkeypatch.setattr(factor_pages_t6, "_store_in_triton", lambda *args: launches.append("store") or store(*args))
    monkeypatch.setattr(flash_tpa_t6, "_flash_tpa", lambda *args: launches.append("attend") or attend(*args))
    fields = {"num_hidden_layers": 1, "head_dim": 32}
    model = random_model(tiny_config(attn_implementation="flash_tpa", **fields))
    other, ids = random_model(tiny_config(**fields)), random_ids(model.config, 2, 18)
    kwargs = {"cache_implementation": implementation, "max_new_tokens": 3}
    for dtype, expected in (("float8_e4m3fn", ["store", "attend"] * 2), ("int4", ["attend"] * 2)):
        launches.clear()
        output = generate(model, ids, cache_dtype=dtype, **kwargs)
        assert launches == expected
        assert torch.equal(output, generate(other, ids, cache_dtype=dtype, **kwargs))


def test_configurations(tmp_path):
    """`cache_dtype` of a `GenerationConfig`, of one that was saved, and of the model's own, which an argument overrides."""
    model = model_of()
    ids = random_ids(model.config, 1, 13)
    GenerationConfig(cache_dtype="int4", max_new_tokens=4).save_pretrained(tmp_path)

    def dtype_of(**kwargs) -> torch.dtype:
        output = model.generate(ids, return_dict_in_generate=True, disable_compile=True, **kwargs)
        return cached(output).layers[0].keys.dtype

    assert dtype_of(generation_config=GenerationConfig.from_pretrained(tmp_path)) == torch.uint8
    assert dtype_of(max_new_tokens=4) == torch.float64
    model.generation_config.cache_dtype = "int4"
    assert dtype_of(max_new_tokens=4) == torch.uint8
    assert dtype_of(max_new_tokens=4, cache_dtype=torch.float8_e4m3fn) == torch.float8_e4m3fn
    assert dtype_of(max_new_tokens=4, cache_dtype=None) == torch.float64
    cache = T6Cache(config=model.config, dtype="int4")
    assert dtype_of(max_new_tokens=4, **{CACHE_NAME: cache}) == torch.uint8


def test_the_configuration_of_the_model():
    """Its `cache_dtype` is that of caches for which nothing else is said."""
    model = model_of(cache_dtype="int4")
    ids = random_ids(model.config, 1, 13)
    for kwargs in ({}, {"cache_implementation": "static"}, {"cache_dtype": None}):
        output = generate(model, ids, return_dict_in_generate=True, **kwargs)
        assert cached(output).layers[0].stored_dtype == torch.uint8
        assert torch.equal(output.sequences, expected_tokens(model, ids, "int4"))
    output = generate(model, ids, cache_dtype="float8_e4m3fn", return_dict_in_generate=True)
    assert cached(output).layers[0].keys.dtype == torch.float8_e4m3fn


def test_names_that_are_no_dtype_of_a_cache():
    model = model_of()
    for dtype in ("int8", torch.bfloat16, 4):
        message = f"`cache_dtype` must be None, .* int4 or float8_e4m3fn, got {dtype}"
        with pytest.raises(ValueError, match=message):
            generate(model, random_ids(model.config, 1, 3), cache_dtype=dtype)
    with pytest.raises(ValueError, match="`dtype` must be None, .* got int8"):
        T6Cache(config=model.config, dtype="int8")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"noncontextual_b": True}, "`noncontextual_b`=True"),
        ({"shared_b": True, "v_rank": 2}, "`shared_b`=True"),
        ({"c_factor_dim": 4}, "`c_factor_dim`=4"),
        (
            {
                "head_dim": 15,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.55},
            },
            "even `head_dim`, got 15",
        ),
    ],
    ids=["constant B", "shared B", "third order", "odd head_dim"],
)
def test_models_without_rows_of_4_bits(fields, named):
    model = random_model(tiny_config(**fields))
    with pytest.raises(ValueError, match=f"`cache_dtype`='int4' .*{named}"):
        generate(model, random_ids(model.config, 1, 3), cache_dtype="int4")
    with pytest.raises(ValueError, match=f"`dtype`='int4' .*{named}"):
        T6Cache(config=model.config, dtype="int4")
    model.config.cache_dtype = "int4"
    with pytest.raises(ValueError, match=f"`cache_dtype`='int4' .*{named}"):
        model(random_ids(model.config, 1, 3))


def test_what_excludes_each_other():
    model = random_model(tiny_config())
    ids, config = random_ids(model.config, 1, 3), model.config
    caches = {
        "T6Cache": T6Cache(config=config),
        "float8": T6Cache(config=config, dtype="float8_e4m3fn"),
        "DynamicCache": DynamicCache(config=config),
        "StaticCache": StaticCache(config=config, max_cache_len=20),
    }
    for cache in caches.values():
        with pytest.raises(ValueError, match="`cache_dtype`=int4 and the `.*` that is given differ"):
            generate(model, ids, cache_dtype="int4", **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="`cache_dtype`=int4 needs a cache, and `use_cache` is False"):
        generate(model, ids, cache_dtype="int4", use_cache=False)
    with pytest.raises(ValueError, match="`cache_dtype`=int4 .* got `cache_implementation`='quantized'"):
        generate(model, ids, cache_dtype="int4", cache_implementation="quantized")
    with pytest.raises(ValueError, match="Continuous batching .* leave `cache_dtype` out"):
        generate(model, ids, cache_dtype="int4", cache_implementation="paged")
    with pytest.raises(ValueError, match="Continuous batching .* leave `cache_dtype` out"):
        model.generate_batch(
            [[2, 3]], GenerationConfig(cache_dtype="int4"), continuous_batching_config=ContinuousBatchingConfig()
        )
    with pytest.raises(RuntimeError, match="Rows of 4 bits have no gradient"):
        model(ids, **{CACHE_NAME: T6Cache(config=config, dtype="int4")})


@pytest.mark.parametrize("cache_dtype", [None, "int4"])
def test_continuous_batching_says_what_it_keeps(cache_dtype, monkeypatch):
    """Where the configuration alone asks for other rows, as that of a compressed model may."""
    messages = []
    monkeypatch.setattr(paged_t6.logger, "warning", messages.append)
    model = random_model(tiny_config(cache_dtype=cache_dtype))
    model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig())
    assert [("`cache_dtype`='int4'" in message) for message in messages] == [True] * (cache_dtype is not None)


@torch.no_grad()
def test_a_cache_of_another_model_is_refused():
    model, other = random_model(tiny_config()), random_model(tiny_config(head_dim=64))
    cache, ids = T6Cache(config=other.config, dtype="int4"), random_ids(model.config, 1, 3)
    other(ids, **{CACHE_NAME: cache})
    with pytest.raises(RuntimeError, match=r"must be rows \[batch, 1, seq, 40\] and \[batch, 1, seq, 24\] in layer 0"):
        model(ids, **{CACHE_NAME: cache})


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int4"])
def test_training(dtype):
    """What the configuration says of caches changes no gradient, also where `use_cache` is left at its default."""
    gradients = []
    for cache_dtype in (None, dtype):
        model = random_model(tiny_config(cache_dtype=cache_dtype)).train()
        ids = random_ids(model.config, 2, 9)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        assert dtype_name(getattr(model(ids), CACHE_NAME)) == dtype
