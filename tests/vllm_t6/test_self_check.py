"""The check of the pages at load passes on what works, and no fault that is put in gets by."""

import copy
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from vllm_t6 import attention
from vllm_t6.attention import FactorImpl
from vllm_t6.layer import FactorAttention
from vllm_t6.metadata import FactorMetadata
from vllm_t6.self_check import check_pages

from ..modeling_t6.common import random_model, tiny_config
from .common import MIXED_LAYERS, engine


MODELS = {
    "plain": ({}, {}),
    "mixed_layers": (MIXED_LAYERS, {}),
    "noncontextual_a": ({"noncontextual_a": True}, {}),
    "qk_norm": ({"qk_norm": True}, {}),
    "qk_norm_of_heads": ({"qk_norm": "heads"}, {}),
    "grouped_heads": ({"num_attention_heads": 6, "num_key_value_heads": 2}, {}),
    "fp8": ({}, {"kv_cache_dtype": "fp8"}),
    "bfloat16": ({}, {"dtype": "bfloat16"}),
}


NUM_BLOCKS = 99


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def layers(request, tmp_path_factory) -> Iterator[list[FactorAttention]]:
    """Those of an engine, with numbers in all their pages."""
    folder, (fields, settings) = tmp_path_factory.mktemp("t6"), request.param
    random_model(tiny_config(**fields)).save_pretrained(folder)
    with engine(folder, num_gpu_blocks_override=NUM_BLOCKS, **settings) as llm:
        layers = list(llm.llm_engine.vllm_config.compilation_config.static_forward_context.values())
        for layer in layers:
            layer.kv_cache.random_(0, 100)
        yield layers


@pytest.mark.parametrize("num_blocks", [1, 2, NUM_BLOCKS])
def test_passes_and_leaves_pages_as_they_were(layers, num_blocks):
    for layer in layers:
        held = layer.kv_cache.clone()
        check_pages(layer.impl, layer.kv_cache[:num_blocks])
        assert torch.equal(layer.kv_cache, held)


def test_pages_that_are_given_back_are_freed(layers, monkeypatch):
    """vLLM gives layers empty tensors in the place of pages: after it has measured what CUDA graphs take, and at its end."""
    layer = layers[0]
    monkeypatch.setattr(layer, "_kv_cache", layer.kv_cache)  # put back
    pages = torch.zeros_like(layer.kv_cache[:3])
    freed = weakref.ref(pages)
    layer.kv_cache = pages
    layer.impl.pages(layer.kv_cache)
    layer.kv_cache = torch.tensor([])
    del pages
    assert freed() is None


@torch.no_grad()
def test_layers_of_one_pass_share_queries_and_those_of_another_do_not(layers):
    """A pass that is recorded as a CUDA graph must not write into memory of one before it."""
    impl, kv_cache = layers[0].impl, layers[0].kv_cache
    nothing = torch.empty(0, dtype=torch.int32)
    metadata = FactorMetadata(torch.full((2,), -1), nothing, nothing, nothing, num_decodes=0, max_decode_queries=1)
    columns = sum(impl.projection_sizes.values())

    def attend(impl: FactorImpl, tokens: int = 3) -> torch.Tensor:
        angles = torch.zeros(tokens, impl.config.rotary_dim // 2, dtype=impl.dtype)
        output = torch.empty(tokens, impl.num_heads * impl.head_size, dtype=impl.dtype)
        impl.forward(None, torch.zeros(tokens, columns, dtype=impl.dtype), angles, angles, kv_cache, metadata, output)
        return metadata.query

    query = attend(impl)
    assert attend(copy.copy(impl)) is query
    metadata.partials = query, query
    again = attend(impl)
    assert again is not query and again.shape == query.shape and metadata.partials is None
    assert len(attend(impl, tokens=2)) == 2


def with_slots(store: Callable, change: Callable) -> Callable:
    """Where rows are written is changed, but for those of the reference."""

    def changed(*args):
        args = list(args)
        if is_kernel(args):
            args[5] = change(args[5])
        store(*args)

    return changed


def is_kernel(args: list) -> bool:
    """Of `store_projections`: whether it may be the kernel, and is not the reference."""
    return args[10] is None


def next_slot(store: Callable) -> Callable:
    return with_slots(store, lambda slots: slots.roll(1))


def last_page_not_written(store: Callable) -> Callable:
    return with_slots(store, lambda slots: slots.where(slots < (NUM_BLOCKS - 1) * 16, -1))


def nothing_written(store: Callable) -> Callable:
    return with_slots(store, lambda slots: torch.full_like(slots, -1))


def other_queries(store: Callable) -> Callable:
    def changed(*args):
        store(*args)
        if is_kernel(args):
            args[8].mul_(1.1)

    return changed


def other_values(store: Callable) -> Callable:
    def changed(*args):
        args = list(args)
        if is_kernel(args):
            start, n, m = args[1].b_v
            args[0] = args[0].clone()
            args[0][:, start : start + n * m] *= 1.3
        store(*args)

    return changed


def pages_in_another_order(decode: Callable) -> Callable:
    def changed(query, key_pages, value_pages, block_table, *args):
        return decode(query, key_pages, value_pages, block_table.flip(1), *args)

    return changed


def nan_outputs(decode: Callable) -> Callable:
    def changed(*args):
        decode(*args)
        args[-1][-1, -1, -1] = torch.nan

    return changed


def other_outputs(attend: Callable) -> Callable:
    def changed(*args):
        earlier = attend(*args)
        args[-1].mul_(1.1)
        return earlier

    return changed


FAULTS = [
    ("store_projections", next_slot, "key rows"),
    ("store_projections", last_page_not_written, "key rows"),
    ("store_projections", nothing_written, "key rows"),
    ("store_projections", other_queries, "queries"),
    ("store_projections", other_values, "value rows"),
    ("attend_to_piece", other_outputs, "attention of prompts"),
    ("attend_to_piece", nan_outputs, "attention of prompts"),
    ("paged_factor_space_attention", pages_in_another_order, "attention of decoded tokens"),
    ("paged_factor_space_attention", other_outputs, "attention of decoded tokens"),
    ("paged_factor_space_attention", nan_outputs, "attention of decoded tokens"),
]


@pytest.mark.parametrize(
    ("function", "fault", "named"), FAULTS, ids=[f"{function}-{fault.__name__}" for function, fault, _ in FAULTS]
)
def test_fails(layers, function, fault, named, monkeypatch):
    monkeypatch.setattr(attention, function, fault(getattr(attention, function)))
    for layer in layers:
        held = layer.kv_cache.clone()
        with pytest.raises(RuntimeError, match=f"with this cache: {named} are off"):
            check_pages(layer.impl, layer.kv_cache)
        assert torch.equal(layer.kv_cache, held)


def test_fails_for_heads_that_are_formed_with_the_rows(layers, monkeypatch):
    if layers[0].impl.constant_a:
        pytest.skip("of a constant A heads are formed of pages alone")
    store = attention.store_projections

    def changed(*args) -> None:
        store(*args)
        if len(args) > 11:
            args[12].mul_(1.3)

    monkeypatch.setattr(attention, "store_projections", changed)
    for layer in layers:
        with pytest.raises(RuntimeError, match="with this cache: attention of new prompts are off"):
            check_pages(layer.impl, layer.kv_cache)
