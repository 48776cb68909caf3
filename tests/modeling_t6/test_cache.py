"""The cache: what it holds, how it grows, and the operations of generation on it."""

import copy

import pytest
import torch
from transformers import DynamicCache

from modeling_t6 import T6Cache
from modeling_t6.cache_t6 import FactorLayout, cache_nbytes, factor_layouts, quantization_group_size

from .common import OFFLOADED_MODE, cached, random_ids, random_model, tiny_config


@pytest.mark.parametrize(
    "heads,rank,d,width",
    [(32, 2, 64, 192), (34, 2, 64, 208), (40, 3, 64, 312), (47, 2, 64, 224), (47, 1, 64, 112), (5, 1, 16, 24)],
)
def test_layout(heads, rank, d, width):
    layout = FactorLayout(rank, heads, d)
    assert layout.width == width and 2 * width % 16 == 0
    assert width - rank * (heads + d) < rank * 8
    a, b = torch.randn(2, 3, rank, heads), torch.randn(2, 3, rank, d)
    rows = layout.pack(a, b)
    assert rows.shape == (2, 1, 3, width)
    for unpacked, original in zip(layout.unpack(rows), (a, b)):
        assert torch.equal(unpacked, original)
    views = [x.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr() for x in layout.unpack(rows)]
    assert views == [not layout.rotates, True]
    assert layout.rotates == (heads in (34, 40))
    for r in range(rank):
        start = rank * d + r * layout.padded_heads + (8 if layout.rotates and r % 2 else 0)
        assert start % (16 if d == 64 else 8) == 0
        assert torch.equal(rows[:, 0, :, start : start + min(heads, 8)], a[:, :, r, :8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bytes_and_views(dtype):
    config = tiny_config(num_attention_heads=8, v_rank=3)  # rows need no alignment
    model = random_model(config, dtype=dtype)
    with torch.no_grad():
        cache = cached(model(random_ids(config, 2, 7)))
    assert type(cache) is T6Cache
    numbers = (config.k_rank + config.v_rank) * (config.num_attention_heads + config.head_dim)
    assert cache.nbytes == cache_nbytes(cache) == 2 * 2 * 7 * numbers * dtype.itemsize  # layers, batch, tokens
    layer = cache.layers[0]
    shapes = {name: tuple(getattr(layer, name).shape) for name in ("a_k", "b_k", "a_v", "b_v")}
    assert shapes == {"a_k": (2, 7, 2, 8), "b_k": (2, 7, 2, 16), "a_v": (2, 7, 3, 8), "b_v": (2, 7, 3, 16)}
    layer.a_k[0, 0, 0, 0] = 42
    assert (layer.keys == 42).any()


def test_views_hold_the_factors_of_the_layer():
    config = tiny_config()
    model = random_model(config, dtype=torch.float64)
    ids = random_ids(config, 1, 6)
    with torch.no_grad():
        cache = cached(model(ids))
        attention = model.model.layers[0].self_attn
        normed = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
        a_v = attention.v_a_proj(normed).view(1, 6, 5, 1).transpose(2, 3)
        b_v = attention.v_b_proj(normed).view(1, 6, 1, 16)
    torch.testing.assert_close(cache.layers[0].a_v, a_v)
    torch.testing.assert_close(cache.layers[0].b_v, b_v)


def rows(length: int, batch: int = 2, widths=(12, 8), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 1, length, width, generator=generator) for width in widths)


def filled(length: int, **kwargs) -> tuple[T6Cache, DynamicCache]:
    """A `T6Cache`, and Transformers' own cache with the same rows as its oracle."""
    caches = T6Cache(), DynamicCache()
    for cache in caches:
        cache.update(*rows(length, **kwargs), 0)
        cache.update(*rows(1, seed=1, **kwargs), 0)
    return caches


def assert_equal(cache: T6Cache, oracle: DynamicCache) -> None:
    assert cache.get_seq_length() == oracle.get_seq_length()
    for layer, expected in zip(cache.layers, oracle.layers):
        assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)


def test_appending_copies_nothing():
    cache = T6Cache()
    cache.update(*rows(100), 0)
    addresses = []
    for i in range(900):
        cache.update(*rows(1, seed=i), 0)
        addresses.append(cache.layers[0].keys.data_ptr())
    moves = sum(a != b for a, b in zip(addresses, addresses[1:]))
    assert moves <= 3  # 200, 400, 800, 1600 rows
    assert cache.layers[0]._storage[0].shape[-2] <= 2 * cache.get_seq_length()


OPERATIONS = {
    "crop": lambda cache: cache.crop(-3),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations(operation):
    cache, oracle = filled(9)
    operation(cache), operation(oracle)
    assert_equal(cache, oracle)
    batch = oracle.layers[0].keys.shape[0]
    for each in (cache, oracle):  # and appending goes on
        each.update(*rows(2, batch=batch, seed=5), 0)
    assert_equal(cache, oracle)


def test_cropped_rows_are_not_overwritten_in_views_taken_before():
    cache, _ = filled(9)
    keys = cache.layers[0].keys.clone()
    cache.crop(-4)
    cache.update(*rows(1, seed=7), 0)
    assert torch.equal(cache.layers[0].keys[:, :, :6], keys[:, :, :6])
    assert torch.equal(cache.layers[0].keys[:, :, 6:], rows(1, seed=7)[0])


def held(cache) -> list[torch.Tensor]:
    return [cache.layers[0].keys, cache.layers[0].values]


def assign(cache, function) -> None:
    cache.layers[0].keys, cache.layers[0].values = (function(tensor) for tensor in held(cache))


ASSIGNED = {
    "pruned": lambda cache: assign(cache, lambda x: x[:, :, 1::2]),
    "pruned data": lambda cache: [setattr(x, "data", x.data[:, :, 1::2]) for x in held(cache)],
    "data of the same size": lambda cache: [setattr(x, "data", x.data.flip(2)) for x in held(cache)],
    "more": lambda cache: assign(cache, lambda x: torch.cat([x, x], dim=2)),
    "another dtype": lambda cache: assign(cache, torch.Tensor.double),
    "a lower dtype": lambda cache: assign(cache, torch.Tensor.half),
}
OFFLOADED = {"offload": lambda cache: (cache.layers[0].offload(), cache.layers[0].prefetch())}


@pytest.mark.parametrize("change", ASSIGNED.values(), ids=ASSIGNED)
@pytest.mark.parametrize("operation", OPERATIONS | OFFLOADED)
@torch.no_grad()
def test_assigned_rows(change, operation):
    """They are what every operation goes on from, and never written to."""
    cache, oracle = filled(9)
    change(cache), change(oracle)
    assert_equal(cache, oracle)
    assigned, before = held(cache), [tensor.clone() for tensor in held(cache)]
    for each in (cache, oracle) if operation in OPERATIONS else (cache,):
        (OPERATIONS | OFFLOADED)[operation](each)
    assert_equal(cache, oracle)
    batch = held(oracle)[0].shape[0]
    for step in range(9):  # beyond the first room that the storage has
        if step == 4:
            change(cache), change(oracle)
        for each in (cache, oracle):
            each.update(*rows(1, batch=batch, seed=step), 0)
        assert_equal(cache, oracle)
        assert held(cache)[0].dtype == held(oracle)[0].dtype
    assert all(map(torch.equal, assigned, before))
    cache.reset()
    cache.update(*rows(2, seed=3), 0)
    assert torch.equal(held(cache)[0], rows(2, seed=3)[0])


@torch.no_grad()
def test_branches_from_the_same_rows():
    """Rows that were put aside and put back, and copies of a layer: none writes into those of another."""
    cache, oracle = filled(9)
    for each in (cache, oracle):
        aside = held(each)
        for seed in (1, 2):
            each.layers[0].keys, each.layers[0].values = aside
            each.update(*rows(3, seed=seed), 0)
            each.longest = [*getattr(each, "longest", ()), held(each)[0]]
        shallow = copy.copy(each.layers[0])
        shallow.update(*rows(1, seed=5)), each.update(*rows(1, seed=6), 0)
        each.longest += [shallow.keys, held(each)[0]]
    for ours, theirs in zip(cache.longest, oracle.longest):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("window", [1, 2, 4, 20])
@torch.no_grad()
def test_pruned_rows_of_sliding_layers(window):
    """The mask has a place for each row that is held, and all of them are those of the last tokens."""
    model = random_model(tiny_config(sliding_window=window, num_hidden_layers=1))
    ids = random_ids(model.config, 2, 9)
    cache = T6Cache(config=model.config)
    model(ids, cache=cache)
    kept = min(window - 1, 9)
    assert held(cache)[0].shape[2] == kept
    ASSIGNED["pruned"](cache)
    for _ in range(3):
        logits = model(ids[:, :2], cache=cache).logits
        assert logits.isfinite().all()
        kept = min(window - 1, held(cache)[0].shape[2])
        assert cache.get_mask_sizes(2, 0) == (kept + 2, cache.get_seq_length() - kept)
    cache.reset()
    assert torch.equal(model(ids, cache=cache).logits, model(ids, use_cache=False).logits)


CONTINUED = {"no gradient": torch.no_grad, "gradient": torch.enable_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("window", [None, 4])
def test_continues_across_inference_mode(implementation, window):
    """A cache that `generate()` filled in one mode goes on in each other, and training goes through what it holds."""
    model = random_model(tiny_config(num_hidden_layers=1, sliding_window=window))
    ids, new = random_ids(model.config, 2, 20), random_ids(model.config, 2, 1, seed=2)
    expected = model(torch.cat([ids, new], dim=1), use_cache=False).logits[:, -1:]
    for filled_in in (torch.inference_mode, torch.no_grad):
        for name, continued_in in CONTINUED.items():
            if implementation == "static" and name == "gradient":
                continue  # written in place, as everywhere in Transformers
            with filled_in():
                cache = cached(
                    model.generate(
                        ids, max_length=30, max_new_tokens=None, min_length=21, do_sample=False, eos_token_id=None,
                        stopping_criteria=[lambda ids, scores: torch.ones(len(ids), dtype=torch.bool)],
                        cache_implementation=implementation, return_dict_in_generate=True, disable_compile=True,
                    )
                )  # fmt: skip
            with continued_in():
                logits = model(new, cache=cache).logits
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
            if name == "gradient":
                logits.square().mean().backward()
                assert model.model.layers[0].self_attn.k_a_proj.weight.grad.abs().max() > 0


def test_reset():
    cache, _ = filled(9)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    cache.update(*rows(3, batch=1, seed=3), 0)
    assert torch.equal(cache.layers[0].keys, rows(3, batch=1, seed=3)[0])


def test_from_rows_of_other_processes():
    cache = T6Cache([rows(4), rows(4, seed=1)])
    assert len(cache.layers) == 2 and cache.get_seq_length() == 4
    assert torch.equal(cache.layers[1].values, rows(4, seed=1)[1])


def test_views_need_a_config():
    cache, _ = filled(2)
    with pytest.raises(ValueError, match=r"T6Cache\(config=...\)"):
        print(cache.layers[0].a_k)


@pytest.mark.parametrize("implementation", [None, "static", *OFFLOADED_MODE, "quantized"])
def test_caches_of_generate_hold_factors_only(implementation):
    config = tiny_config(num_attention_heads=24, head_dim=16, v_rank=2)
    model = random_model(config)
    new, kwargs = 12, {}
    if implementation == "quantized":
        kwargs = {"cache_config": {"backend": "hqq", "nbits": 4, "residual_length": 4}}
    output = model.generate(
        random_ids(config, 2, 30), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        cache_implementation=implementation, return_dict_in_generate=True, disable_compile=True, **kwargs,
    )  # fmt: skip
    cache = cached(output)
    widths = sum(layout.width for layout in factor_layouts(config, 0))
    assert widths == (config.k_rank + config.v_rank) * (config.num_attention_heads + config.head_dim)
    tokens = 41  # the last token's factors are not computed
    full = 2 * 2 * tokens * widths * 4  # layers, batch, tokens, numbers, bytes
    heads = 2 * 2 * tokens * 2 * config.num_attention_heads * config.head_dim * 4
    held = cache_nbytes(cache)
    if implementation == "static":
        allocated = cache.layers[0].keys.shape[-2]
        assert held == full / tokens * allocated and tokens <= allocated <= tokens + 1
    elif implementation == "quantized":
        # 4 bits in place of 32, scales and zeros of groups, and a few tokens as they are.
        assert 0.1 * full < held < 0.5 * full
    else:
        assert held == full
    assert held < heads / 4
    for layer in cache.layers:
        assert layer.keys.shape[1] == layer.values.shape[1] == 1  # rows of factors, no heads


def test_quantization_group_divides_rows():
    for heads in (5, 24, 34, 47, 61, 78):
        config = tiny_config(num_attention_heads=heads, head_dim=64)
        group = quantization_group_size(config)
        assert group % 8 == 0 and all(layout.width % group == 0 for layout in factor_layouts(config, 0))


def test_gradients_through_the_cache():
    config = tiny_config()
    model = random_model(config, dtype=torch.float64)
    ids = random_ids(config, 2, 8)
    gradients = []
    for split in (None, 5):
        model.zero_grad()
        if split is None:
            logits = model(ids, use_cache=False).logits
        else:
            first = model(ids[:, :split], use_cache=True)
            second = model(ids[:, split:], cache=cached(first))
            logits = torch.cat([first.logits, second.logits], dim=1)
        logits.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=1e-9, msg=name)
