"""Whatever the engine does with requests and pages, answers are those of `generate()`."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock
from uuid import uuid4

import pytest
import torch

from modeling_t6 import T6Cache, T6ForCausalLM
from vllm_t6 import attention

from ..modeling_t6 import interpreter
from ..modeling_t6.common import random_model, tiny_config
from .common import MIXED_LAYERS, ask, assert_same, engine, generate, metric, random_prompts, serve_exactly
from .preloaded import interpret_kernels


MODELS = {
    "plain": {},
    "mixed_layers": MIXED_LAYERS,
    "noncontextual_a": {"noncontextual_a": True},
    "kv_only": {"q_rank": None},
}


def make_model(name: str, folder: Path, **fields) -> T6ForCausalLM:
    model = random_model(tiny_config(**MODELS[name] | fields))
    model.save_pretrained(folder)
    return model


def shared_prompts() -> list[torch.Tensor]:
    """32 that begin with the same 100 tokens."""
    (start,) = random_prompts((100,), each=1, seed=5)
    return [torch.cat([start.expand(8, -1), rest], dim=1) for rest in random_prompts((1, 12, 60, 100), each=8)]


@pytest.mark.parametrize("chunk", [None, 64], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", ["plain", "mixed_layers"])
def test_prefix_cache(name, chunk, tmp_path):
    """What was asked before lies in the cache: rows are read that another request wrote."""
    model, prompts = make_model(name, tmp_path), shared_prompts()
    expected = generate(model, prompts)
    settings = {} if chunk is None else {"max_num_batched_tokens": chunk, "max_num_seqs": 32}
    with engine(tmp_path, enable_prefix_caching=True, **settings) as llm:
        for round in range(2):
            outputs = ask(llm, prompts)
            assert_same(outputs, expected)
            if round == 1:
                assert min(output.num_cached_tokens for output in outputs) >= 80


def test_no_prefix_cache(tmp_path):
    model, prompts = make_model("plain", tmp_path), shared_prompts()
    expected = generate(model, prompts)
    with engine(tmp_path, enable_prefix_caching=False) as llm:
        for _ in range(2):
            outputs = ask(llm, prompts)
            assert_same(outputs, expected)
            assert not any(output.num_cached_tokens for output in outputs)


@pytest.mark.parametrize("name", ["plain", "mixed_layers", "noncontextual_a"])
def test_chunked_prefill(name, tmp_path):
    """At most 64 tokens a step: prompts come in pieces, beside requests that decode."""
    model, prompts = make_model(name, tmp_path), random_prompts((1, 40, 70, 200), each=8)
    with engine(tmp_path, max_num_batched_tokens=64, max_num_seqs=32) as llm:
        assert_same(ask(llm, prompts), generate(model, prompts))


def test_one_group_for_layers_of_both_kinds(tmp_path):
    """vLLM may keep the pages of sliding layers as those of full ones; each layer goes by its own window all the same."""
    model, prompts = make_model("mixed_layers", tmp_path), random_prompts((1, 40, 70, 200), each=8)
    settings = {"disable_hybrid_kv_cache_manager": True, "max_num_batched_tokens": 64, "max_num_seqs": 32}
    with engine(tmp_path, **settings) as llm:
        assert_same(ask(llm, prompts), generate(model, prompts))


@pytest.mark.parametrize(("name", "num_blocks"), [("plain", 20), ("mixed_layers", 60)], ids=["plain", "mixed_layers"])
def test_preemption(name, num_blocks, tmp_path):
    """Requests lose their pages to others, and begin anew."""
    model, prompts = make_model(name, tmp_path), random_prompts((1, 5, 17, 40), each=8)
    with engine(tmp_path, num_gpu_blocks_override=num_blocks, enable_prefix_caching=False) as llm:
        outputs = ask(llm, prompts, new_tokens=40)
        assert metric(llm, "num_preemptions") > 0
    assert_same(outputs, generate(model, prompts, new_tokens=40))


@pytest.mark.parametrize(
    ("name", "block_size"), [("plain", 8), ("plain", 48), ("mixed_layers", 32), ("mixed_layers", 128), ("plain", None)]
)
def test_block_size(name, block_size, tmp_path):
    serve_exactly(make_model(name, tmp_path), tmp_path, block_size=block_size)


@pytest.mark.parametrize("name", ["plain", "mixed_layers", "noncontextual_a"])
def test_float8_rows(name, tmp_path):
    """
    The cache of Transformers rounds rows to the same dtype. A number that lies between two of float8's may be rounded
    down here and up there, which moves logits by more than sums in another order do.
    """
    model, prompts = make_model(name, tmp_path), random_prompts()
    expected = generate(model, prompts, make_cache=lambda: T6Cache(config=model.config, dtype=torch.float8_e4m3fn))
    with engine(tmp_path, kv_cache_dtype="fp8") as llm:
        assert_same(ask(llm, prompts), expected, tie=2e-2, few=12)


def test_rows_are_what_the_configuration_says(tmp_path):
    """Without a `kv_cache_dtype`, those of the folder; with one, those."""
    random_model(tiny_config(cache_dtype="float8_e4m3fn")).save_pretrained(tmp_path)
    for settings, expected in (({}, "fp8"), ({"kv_cache_dtype": "bfloat16", "dtype": "bfloat16"}, "bfloat16")):
        with engine(tmp_path, **settings) as llm:
            assert llm.llm_engine.vllm_config.cache_config.cache_dtype == expected
            assert len(ask(llm, random_prompts(), new_tokens=2)) == sum(map(len, random_prompts()))


@pytest.mark.parametrize(
    ("name", "num_proposed"), [("plain", 3), ("mixed_layers", 3), ("noncontextual_a", 15), ("plain", 20)]
)
def test_ngram_speculation(name, num_proposed, tmp_path):
    model = make_model(name, tmp_path)
    prompts = [ids.repeat(1, 4) for ids in random_prompts((3, 7, 11, 20), each=8)]
    speculation = {
        "method": "ngram", "num_speculative_tokens": num_proposed, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
    }  # fmt: skip
    with engine(tmp_path, speculative_config=speculation) as llm:
        outputs = ask(llm, prompts, 40)
        assert metric(llm, "spec_decode_num_accepted_tokens") > 50
    assert_same(outputs, generate(model, prompts, new_tokens=40))


NEW_IN_TWO = 3  # tokens: each takes a third of a second, for which the two wait for one another


def serve_in_two_processes(folders: list[Path], prompts: list[torch.Tensor], **settings) -> list:
    """
    Outputs of the models one after the other. vLLM would have its workers import everything anew, for half a minute each:
    they are forked from this process, in which no engine has run, instead.
    """
    executor, outputs = "vllm.v1.executor.multiproc_executor", []
    with mock.patch(f"{executor}.get_mp_context", return_value=get_context("fork")):
        for folder in folders:
            name = f"t6_{uuid4().hex}"  # of what they share, which vLLM leaves in memory
            with (
                mock.patch(f"{executor}.get_file_store_init_method", return_value=f"file://{folder}/{name}"),
                engine(folder, distributed_executor_backend="mp", **settings) as llm,
            ):
                outputs.append(ask(llm, prompts, NEW_IN_TWO))
            for shared in Path("/dev/shm").glob(f"{name}*"):
                shared.unlink()
    return outputs


def test_tensor_parallelism(tmp_path, processes):
    """Two processes share the heads, over gloo."""
    folders = [tmp_path / name for name in ("plain", "constant_a")]
    # Constant A of keys and values is split by columns, all other projections by rows.
    models = [
        make_model("plain", folders[0], num_attention_heads=6),
        make_model("kv_only", folders[1], num_attention_heads=6, noncontextual_a=True),
    ]
    prompts = random_prompts()
    asked = processes.submit(serve_in_two_processes, folders, prompts, tensor_parallel_size=2)
    for model, outputs in zip(models, asked.result()):
        assert_same(outputs, generate(model, prompts, NEW_IN_TWO))


def test_pipeline_parallelism(tmp_path, processes):
    """
    Two processes have a layer each. On a CPU, vLLM makes room for what one tells the other in the step by which it
    compiles, and fails without: Dynamo traces the model, and nothing is made of what it sees.
    """
    model, prompts = make_model("plain", tmp_path), random_prompts()
    traced = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    asked = processes.submit(serve_in_two_processes, [tmp_path], prompts, pipeline_parallel_size=2, **traced)
    assert_same(asked.result()[0], generate(model, prompts, NEW_IN_TWO))


def serve_interpreted(folder: Path, prompts: list[torch.Tensor]) -> tuple[list, int]:
    """Outputs, and how often the kernel was called, in a process of its own."""
    interpreter.make_haste(pytest.MonkeyPatch())
    calls, kernel = [], attention.paged_flash_tpa
    attention.paged_flash_tpa = lambda *args, **kwargs: calls.append(args) or kernel(*args, **kwargs)
    with engine(folder) as llm:
        return ask(llm, prompts, new_tokens=3), len(calls)


def test_kernels(tmp_path, context_of_processes):
    """The kernels in the engine, by Triton's interpreter: it takes seconds a token."""
    model = make_model("plain", tmp_path, num_hidden_layers=2)
    prompts = random_prompts((3, 18), each=2)
    with ProcessPoolExecutor(1, mp_context=context_of_processes, initializer=interpret_kernels) as process:
        outputs, num_calls = process.submit(serve_interpreted, tmp_path, prompts).result()
    assert num_calls == 6  # of each layer by the self-check, and for two tokens each: the first comes of the prompt
    assert_same(outputs, generate(model, prompts, new_tokens=3))
