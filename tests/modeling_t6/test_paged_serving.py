"""Transformers' continuous batching over pages by the kernel, through Triton's interpreter or on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from modeling_t6 import flash_tpa_t6, paged_t6
from modeling_t6.paged_t6 import page_factors

from ..versions import once_but
from .common import DEVICE, random_ids, random_model, tiny_config


pytestmark = pytest.mark.skipif(flash_tpa_t6.triton is None, reason="Triton is for Linux")
NEW = 4
LENGTHS = (3, 14, 1, 9)
# Interpreted, a layer takes long: all else that several layers do is asked of the engine in `test_serving.py`.
ONE_LAYER = {"num_hidden_layers": 1}
MIXED_LAYERS = {
    "num_hidden_layers": 2,
    "sliding_window": 6,
    "layer_types": ["full_attention", "sliding_attention"],
}
CONFIGS = {
    "full": ONE_LAYER,
    "mixed windows": MIXED_LAYERS,
    "constant A": ONE_LAYER | {"noncontextual_a": True, "sliding_window": 6},
    "ranks by layer": {"k_rank": [1, 3], "v_rank": [2, 4]},
    "KV-only": ONE_LAYER | {"q_rank": None, "qk_norm": True},
    "grouped heads": ONE_LAYER | {"num_attention_heads": 6, "num_key_value_heads": 2, "qk_norm": "heads"},
    "all else": ONE_LAYER
    | {
        "head_factor_act": "softmax",
        "head_norm": True,
        "output_gate": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
}


@pytest.fixture(autouse=True)
def checked_interpreter(monkeypatch):
    if DEVICE == "cpu":
        from . import interpreter

        interpreter.check_addresses(monkeypatch)
        interpreter.make_haste(monkeypatch)


def served_model(**overrides):
    return random_model(tiny_config(attn_implementation="flash_tpa", **overrides))


def make_prompts(config) -> list[list[int]]:
    return [random_ids(config, length, seed=length).tolist() for length in LENGTHS]


def alone(model, prompt: list[int]) -> list[int]:
    """Greedy decoding without any cache."""
    ids = torch.tensor([prompt], device=DEVICE)
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=False)
    return output[0, len(prompt) :].tolist()


def make_manager(model, **overrides):
    """An engine of small pages and steps of few tokens, whose pages hold NaN where nothing has been written."""
    fields = {"num_blocks": 64, "block_size": 4, "max_batch_tokens": 12} | overrides
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(**fields),
    )
    manager.batch_processor = manager._create_batch_processor()
    for rows in manager.batch_processor.cache.factors.rows:
        rows.fill_(float("nan"))
    return manager


def answer(manager, prompts: list[list[int]]) -> list[list[int]]:
    names = manager.add_requests(prompts)
    manager.start()
    outputs = [manager.get_result(timeout=300) for _ in prompts]
    manager.stop(block=True)
    assert [output.error for output in outputs] == [None] * len(prompts)
    tokens = {output.request_id: output.generated_tokens for output in outputs}
    return [tokens[name] for name in names]


@pytest.mark.parametrize("name", once_but(CONFIGS, "mixed windows"))
def test_requests_decode_over_pages_in_place(name, monkeypatch):
    """The kernel is given the engine's own memory, and no row of a request that decodes is copied."""
    model = served_model(**CONFIGS[name])
    prompts = make_prompts(model.config)
    expected = [alone(model, prompt) for prompt in prompts]
    manager = make_manager(model)
    places = {rows.untyped_storage().data_ptr() for rows in manager.batch_processor.cache.factors.rows}
    decoded, attend = 0, paged_t6.paged_flash_tpa

    def recorded(query, key_pages, value_pages, *args, **kwargs):
        nonlocal decoded
        decoded += len(query)
        assert {pages.untyped_storage().data_ptr() for pages in (key_pages, value_pages)} <= places
        return attend(query, key_pages, value_pages, *args, **kwargs)

    monkeypatch.setattr(paged_t6, "paged_flash_tpa", recorded)
    assert answer(manager, prompts) == expected
    # Of the new tokens the last is not read; a piece of a prompt that is one token is read like a new one.
    assert (NEW - 1) * len(prompts) <= decoded / model.config.num_hidden_layers < (NEW + 1) * len(prompts)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU fills its graphs up")
@pytest.mark.parametrize("overrides", once_but({"full": ONE_LAYER, "mixed windows": MIXED_LAYERS}.items(), "full"))
def test_steps_that_are_filled_up(overrides):
    """As for graphs: three requests decode as four, the last of which has no rows, and prompts come with tokens of none."""
    model = served_model(**overrides)
    prompts = make_prompts(model.config)[:3]
    manager = make_manager(model, max_batch_tokens=32)
    manager.batch_processor.model_runner.pad_inputs = True
    assert answer(manager, prompts) == [alone(model, prompt) for prompt in prompts]


def test_a_decoding_step_reads_nothing_on_the_host(monkeypatch):
    """What a CUDA graph records would be computed of the numbers of the step that it was recorded in."""
    model = served_model()
    monkeypatch.setattr(paged_t6, "schedule_pieces", lambda lengths, query_starts, pieces: pieces)
    monkeypatch.setattr(
        paged_t6, "paged_flash_tpa", lambda query, *args, output=None, **kwargs: torch.mul(query, 0, out=output)
    )
    reads, steps = [], []
    manager = make_manager(model)
    forward = model.model.forward

    def watched(*args, **kwargs):
        with monkeypatch.context() as patches:
            for name in ("tolist", "item", "__bool__", "__int__", "__index__", "cpu", "numpy", "nonzero"):
                plain = getattr(torch.Tensor, name)
                patches.setattr(
                    torch.Tensor,
                    name,
                    lambda *args, n=name, f=plain, **kwargs: (reads.append(n), f(*args, **kwargs))[1],
                )
            output = forward(*args, **kwargs)
        decodes = kwargs["block_table"] is not None
        steps.append((decodes, tuple(reads)))
        reads.clear()
        return output

    monkeypatch.setattr(model.model, "forward", watched)
    answer(manager, make_prompts(model.config))
    assert {read for decodes, read in steps if decodes} == {()}
    assert any(read for decodes, read in steps if not decodes)  # so that the watch is seen to see


GRAPHS = {
    "default": ({}, {}, (False, True), True, 64),
    "asked for both": ({}, {"use_cuda_graph": True}, (False, True), True, 64),
    "refused": ({}, {"use_cuda_graph": False}, (False, False), False, 64),
    "not overlapped": ({}, {"use_async_batching": False}, (False, True), False, 64),
    "no block tables": ({}, {"max_blocks_per_request": 0}, (False, False), False, 0),
    "some": ({}, {"max_blocks_per_request": 7}, (False, True), True, 7),
    "windows": ({"sliding_window": 6}, {}, (False, False), False, 0),
    "positions read on the host": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        {},
        (False, False),
        False,
        64,
    ),
}


@pytest.mark.parametrize("fields, asked, graphs, overlapped, pages", GRAPHS.values(), ids=GRAPHS)
def test_what_the_engine_is_told_on_a_gpu(fields, asked, graphs, overlapped, pages, monkeypatch):
    monkeypatch.setattr(paged_t6, "attends_on_pages", lambda *args: True)
    model = SimpleNamespace(config=tiny_config(**fields), device=torch.device("cuda"), dtype=torch.bfloat16)
    asked = ContinuousBatchingConfig(block_size=4, **asked)
    resolved = ContinuousBatchingConfig(block_size=4, use_cuda_graph=(False, False), use_async_batching=False)
    manager = SimpleNamespace(model=model, continuous_batching_config=resolved, _create_batch_processor=None)
    page_factors(manager, asked)
    assert resolved.cuda_graph_booleans == graphs and resolved.use_async_batching is overlapped
    assert resolved.max_blocks_per_request == pages


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("overlapped", [True, False], ids=["overlapped", "one by one"])
def test_graphs(overlapped):
    """In float32, where the order of sums alone differs from `generate()`."""
    model = served_model()
    prompts = make_prompts(model.config)
    manager = make_manager(model, use_async_batching=overlapped, block_size=16)
    manager.warmup()
    assert answer(manager, prompts) == [alone(model, prompt) for prompt in prompts]
