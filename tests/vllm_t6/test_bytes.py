"""vLLM's own count of what its cache takes: blocks times their size are the rows of factors, to the byte."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from vllm import LLM

from conversion.__main__ import main as convert
from conversion.smaller.compress import compress
from modeling_t6 import T6Config, T6ForCausalLM
from modeling_t6.cache_t6 import factor_layouts

from ..conversion.common import exact_model, random_ids, save_source
from ..modeling_t6.common import random_model, tiny_config
from .common import ask, assert_same, engine, generate, random_prompts


CONFIGURATIONS = Path(__file__).parents[2] / "configuration"


def cache_of(llm: LLM) -> tuple[int, list[torch.Tensor]]:
    """The tokens that the cache has pages for, as vLLM counts them, and the tensors that layers see."""
    config = llm.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    return config.cache_config.num_gpu_blocks * config.cache_config.block_size, [layer.kv_cache for layer in layers]


def bytes_of_token(llm: LLM) -> float:
    """In all layers."""
    num_tokens, pages = cache_of(llm)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in pages)}
    return sum(storages.values()) / num_tokens


def bytes_of_rows(config: T6Config, itemsize: int) -> int:
    layouts = [layout for layer in range(config.num_hidden_layers) for layout in factor_layouts(config, layer)]
    return sum(layout.width for layout in layouts) * itemsize


@pytest.mark.parametrize(("cache_dtype", "itemsize"), [("auto", 2), ("fp8", 1)])
@pytest.mark.parametrize(("name", "numbers"), [("t6-small", 2 * 2 * (40 + 64)), ("t6-xl", 2 * 2 * (80 + 64))])
def test_published_shape(name, numbers, cache_dtype, itemsize, tmp_path):
    """34 heads take the room of 40 beside a B of 64, and 78 that of 80."""
    config = AutoConfig.from_pretrained(CONFIGURATIONS / name, num_hidden_layers=2, vocab_size=96)
    config.save_pretrained(tmp_path)
    settings = {"load_format": "dummy", "dtype": "bfloat16", "kv_cache_dtype": cache_dtype}
    with engine(tmp_path, **settings) as llm:
        assert bytes_of_token(llm) == bytes_of_rows(config, itemsize) == 2 * numbers * itemsize


@pytest.mark.parametrize("layout", ["gqa", "mqa"])
def test_converted(layout, tmp_path):
    """As large as its source's, in the same vLLM, whose own attention takes pages of 32 tokens."""
    source, target = save_source(tmp_path / "source", "llama", layout), tmp_path / "t6"
    assert convert(["hf", str(source), str(target), "--no-verify"]) == 0
    with engine(target, block_size=32) as llm:
        converted, num_tokens = bytes_of_token(llm), cache_of(llm)[0]
    with engine(source, block_size=32) as llm:
        assert converted == bytes_of_token(llm)
        assert num_tokens == cache_of(llm)[0]


def test_compressed(tmp_path):
    """Ranks 2 and 1 of what were 4 heads, and exact as any other."""
    whole = exact_model("llama", "mha")
    compress(whole, random_ids(4, 40), [2], [1], quiet=True).float().save_pretrained(tmp_path)
    model, prompts = T6ForCausalLM.from_pretrained(tmp_path).eval(), random_prompts()
    with engine(tmp_path) as llm:
        assert bytes_of_token(llm) == bytes_of_rows(model.config, 4) == bytes_of_rows(whole.config, 4) * 3 / 8
        assert_same(ask(llm, prompts), generate(model, prompts))


def test_ranks_by_layer(tmp_path):
    """Each layer has pages of its own width."""
    config = tiny_config(num_hidden_layers=3, k_rank=[1, 2, 3], v_rank=[2, 2, 1])
    random_model(config).save_pretrained(tmp_path)
    with engine(tmp_path) as llm:
        assert [pages.shape[-1] for pages in cache_of(llm)[1]] == [3 * (8 + 16), 4 * (8 + 16), 4 * (8 + 16)]
        assert bytes_of_token(llm) == bytes_of_rows(config, 4)
