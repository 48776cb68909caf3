"""Mixed precision by `torch.autocast`: every variant and every cache, within one rounding or so of the same without."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_t6 import T6Cache

from .common import DEVICE, cached, random_ids, random_model
from .test_generation import generate, greedy
from .test_variants import VARIANTS, config_of


DTYPES = {"bfloat16": (torch.bfloat16, 0.1), "float16": (torch.float16, 0.02)}  # and a few roundings of each


@pytest.mark.once
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype,tolerance", DTYPES.values(), ids=DTYPES)
def test_every_variant(variant, dtype, tolerance):
    """Prompt and decoding, over caches that begin or end outside autocast, and a training step."""
    model = random_model(config_of(variant))
    ids = random_ids(model.config, 2, 14)
    expected = model(ids, use_cache=False).logits
    autocast = torch.autocast(DEVICE, dtype)

    def assert_close(logits, exact):
        assert (logits.float() - exact).square().mean().sqrt() < tolerance * expected.std()

    with torch.no_grad():
        for make_cache in (T6Cache, DynamicCache):
            for first, second in ((True, True), (True, False), (False, True)):
                cache, logits = make_cache(config=model.config), []
                for enabled, start, end in ((first, 0, 11), (second, 11, 12), (second, 12, 14)):
                    with torch.autocast(DEVICE, dtype, enabled=enabled):
                        logits.append(model(ids[:, start:end], cache=cache).logits)
                assert_close(torch.cat(logits, dim=1), expected)
                assert cache.layers[0].keys.dtype == cache.layers[1].values.dtype == torch.float32
        with autocast:
            assert_close(model(ids, use_cache=False).logits, expected)
    with autocast:
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in model.parameters())


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "quantized": {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", "nbits": 8}},
    "chunked-prefill": {"prefill_chunk_size": 5, "cache_implementation": "static"},
    "no-cache": {"use_cache": False},
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kwargs", CACHES.values(), ids=CACHES)
def test_generation(implementation, kwargs):
    """float16 keeps enough digits for the tokens of full precision, with a window and with constant A."""
    window = None if kwargs.get("cache_implementation") == "quantized" else 6  # as Transformers has it
    for fields in ({"sliding_window": window}, {"q_rank": None, "noncontextual_a": True}):
        model = random_model(config_of("TPA", attn_implementation=implementation, **fields))
        ids = random_ids(model.config, 2, 13)
        with torch.autocast(DEVICE, torch.float16):
            output = generate(model, ids, max_new_tokens=4, **kwargs)
        assert torch.equal(output, greedy(model, ids, new=4))


@pytest.mark.parametrize("window", [None, 6])
def test_float8_cache(window):
    model = random_model(config_of("TPA", sliding_window=window))
    ids = random_ids(model.config, 2, 13)
    cache = T6Cache(config=model.config, dtype=torch.float8_e4m3fn)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        for start, end in ((0, 12), (12, 13)):
            assert model(ids[:, start:end], cache=cache).logits.isfinite().all()
    assert cached(model(ids[:, :1], cache=cache)).layers[0].keys.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    "fields", [{}, {"noncontextual_a": True}, {"noncontextual_b": True}, {"sliding_window": 6}], ids=str
)
@torch.no_grad()
def test_another_half_precision(fields):
    """A model of one, autocast to the other: the hidden states of later layers are in float32, all rows in its own."""
    model = random_model(config_of("TPA", **fields), dtype=torch.bfloat16)
    ids = random_ids(model.config, 2, 13)
    expected = model.float()(ids, use_cache=False).logits[:, -1]
    model.bfloat16()
    for cache in (T6Cache(config=model.config), DynamicCache(config=model.config), StaticCache(model.config, 14)):
        with torch.autocast(DEVICE, torch.float16):
            logits = [model(ids[:, start:end], cache=cache).logits for start, end in ((0, 12), (12, 13))][1][:, -1]
        assert (logits.float() - expected).square().mean().sqrt() < 0.1 * expected.std()
        assert {layer.values.dtype for layer in cache.layers} == {torch.bfloat16}
    with torch.autocast(DEVICE, torch.float16):
        generate(model, ids, max_new_tokens=2, cache_implementation="static", disable_compile=True)
