"""Transformers' continuous batching and `transformers serve`: pages of factors, and the answers of a lone `generate()`."""

import asyncio
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerFast
from transformers.cli.serving.model_manager import ModelManager
from transformers.generation.continuous_batching import PagedAttentionCache

from modeling_t6 import T6ForCausalLM, flash_tpa_t6
from modeling_t6.cache_t6 import factor_layouts
from serving.command import within_context

from ..processes import free_port
from ..versions import once_but
from .common import random_ids, random_model, tiny_config
from .served import pages
from .test_attention import LargestResult
from .test_variants import CACHED, config_of, every_variant


NEW = 10
MIXED_LAYERS = {
    "num_hidden_layers": 4,
    "sliding_window": 6,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Each engine that ends collects garbage several times: not among all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def batching(**overrides) -> dict:
    """Small pages, and steps of few tokens: prompts are read in pieces, between the tokens of others."""
    # `block_size` is called `page_size` in newer versions, which take both.
    fields = {"num_blocks": 64, "block_size": 4, "max_batch_tokens": 12}
    return {
        "generation_config": GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1),
        "continuous_batching_config": ContinuousBatchingConfig(**fields | overrides),
    }


def lone(model, prompt: list[int], num_tokens: int = NEW) -> list[int]:
    """Greedy decoding of one prompt without any cache."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, use_cache=False)
    return output[0, len(prompt) :].tolist()


def prompts_of(config, lengths=(3, 21, 1, 9, 5)) -> list[list[int]]:
    return [random_ids(config, length, seed=length).tolist() for length in lengths]


def answers(model, prompts, **overrides) -> list[list[int]]:
    outputs = model.generate_batch(prompts, **batching(**overrides)).values()
    assert [output.error for output in outputs] == [None] * len(prompts)
    return [output.generated_tokens for output in outputs]


@every_variant
def test_generate_batch(variant):
    model = random_model(config_of(variant, **MIXED_LAYERS))
    prompts = prompts_of(model.config)
    expected = [lone(model, prompt) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    assert answers(model, prompts) == expected


CONFIGS = {
    "full": {},
    "all sliding": {"sliding_window": 6},
    "ranks by layer": {"k_rank": [1, 3], "v_rank": [2, 4]},
    "constant B, full": {"noncontextual_b": True},
    "eager": {"attn_implementation": "eager"},
    "flash_tpa": {"attn_implementation": "flash_tpa", "num_hidden_layers": 1},  # interpreted, a layer takes long
}


@pytest.mark.parametrize("overrides", once_but(CONFIGS.items(), "full", "all sliding", "eager"))
def test_generate_batch_of_other_configs(overrides, monkeypatch):
    if overrides.get("attn_implementation") == "flash_tpa" and flash_tpa_t6.triton is not None:
        from . import interpreter

        interpreter.make_haste(monkeypatch)
    model = random_model(tiny_config(**overrides))
    prompts = prompts_of(model.config)
    implementation = model.config._attn_implementation
    assert answers(model, prompts) == [lone(model, prompt) for prompt in prompts]
    assert model.config._attn_implementation == implementation  # as it was


def test_more_requests_than_the_cache_holds():
    model = random_model(tiny_config())
    prompts = [random_ids(model.config, 13, seed=seed).tolist() for seed in range(8)]
    assert answers(model, prompts, num_blocks=16) == [lone(model, prompt) for prompt in prompts]


def test_logits_in_float64():
    """
    Log probabilities of a batch, prompts in pieces, against those of whole sequences without a cache. The engine returns
    them in float32, and the factors go through float32 in RoPE's angles alone, the same ones in both.
    """
    model = random_model(tiny_config(**MIXED_LAYERS), dtype=torch.float64)
    prompts = prompts_of(model.config)
    for prompt, output in zip(prompts, model.generate_batch(prompts, **batching(return_logprobs=True)).values()):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output.generated_tokens]), use_cache=False)[0][0]
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(-1, torch.tensor(output.generated_tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output.logprobs).double(), expected, atol=1e-5, rtol=1e-5)


@every_variant
def test_cache_holds_factors(variant):
    """What a prompt leaves in the cache is the table of `docs/variants.md`, number by number; and so is its memory."""
    model = random_model(config_of(variant, num_attention_heads=47))
    config = model.config
    manager = model.init_continuous_batching(**batching())
    manager.batch_processor = manager._create_batch_processor()
    cache = manager.batch_processor.cache
    tensors = cache.key_cache + cache.value_cache if hasattr(cache, "key_cache") else [cache.cache_tensor]
    for tensor in tensors:
        tensor.zero_()
    manager.start()
    manager.add_request(random_ids(config, 11).tolist(), max_new_tokens=1)
    assert manager.get_result(timeout=60).error is None
    manager.stop(block=True)
    written = sum(int(tensor.view(torch.float32).count_nonzero()) for tensor in tensors)
    k, v = config.ranks(0)
    numbers = CACHED.get(variant, lambda h, d, k, v: (k + v) * (h + d))(47, 16, k, v)
    assert written == 11 * config.num_hidden_layers * numbers

    held = pages(cache)
    widths = sum(layout.width for layout in factor_layouts(config, 0))  # with the alignment of rows
    assert widths <= numbers + 7 * (k + v)
    assert held["nbytes"] >= held["tokens"] * config.num_hidden_layers * widths * 4
    assert held["nbytes"] <= (held["tokens"] + 64) * config.num_hidden_layers * (widths + 1) * 4  # the engine's spare


def test_decoding_forms_no_keys_or_values():
    """No operation of a step that decodes makes as many numbers as half the keys of its requests; a prompt's does."""
    model = random_model(tiny_config(num_attention_heads=64, num_hidden_layers=1, k_rank=1, vocab_size=8))
    config = model.config
    manager = model.init_continuous_batching(**batching(max_batch_tokens=128))
    sizes = []
    step = manager._generation_step

    def measured_step():
        with LargestResult() as largest:
            step()
        sizes.append(largest.numel)

    manager._generation_step = measured_step
    prompts = [random_ids(config, 60, seed=seed).tolist() for seed in range(2)]
    manager.add_requests(prompts, max_new_tokens=3)
    manager.start()
    for _ in prompts:
        assert manager.get_result(timeout=60).error is None
    manager.stop(block=True)
    keys = sum(len(prompt) for prompt in prompts) * config.num_attention_heads * config.head_dim
    assert len(sizes) == 3 and sizes[0] >= keys / 2
    assert max(sizes[1:]) < keys / 2


@pytest.mark.parametrize("variant", ["TPA", "shared B"])
def test_prefix_sharing(variant, monkeypatch):
    model = random_model(config_of(variant))
    matches = []
    search = PagedAttentionCache.search_prefix_match

    def recorded_search(*args):
        matches.append(search(*args))
        return matches[-1]

    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", recorded_search)
    prefix = random_ids(model.config, 14).tolist()
    prompts = [prefix + random_ids(model.config, length, seed=length).tolist() for length in (3, 6, 2)]
    expected = [lone(model, prompt) for prompt in prompts]
    with model.continuous_batching_context_manager(**batching()) as manager:
        for prompt, tokens in zip(prompts, expected):
            manager.add_request(prompt)
            assert manager.get_result(timeout=60).generated_tokens == tokens
    assert matches == [0, 12, 12]  # pages of 4 tokens


def test_forked_requests():
    """Greedy children of a request, for which the engine shares and copies pages, answer as it does."""
    model = random_model(tiny_config())
    (prompt,) = prompts_of(model.config, (10,))
    settings = batching()
    settings["generation_config"].num_return_sequences = 3
    expected = lone(model, prompt)
    with model.continuous_batching_context_manager(**settings) as manager:
        manager.add_request(prompt)
        outputs = [manager.get_result(timeout=60) for _ in range(3)]
    assert [output.generated_tokens for output in outputs] == [expected] * 3


def test_manager_is_kept():
    model = random_model(tiny_config())
    prompts = prompts_of(model.config)
    expected = [lone(model, prompt) for prompt in prompts]
    for _ in range(2):
        outputs = model.generate_batch(prompts, persistent_manager=True, **batching()).values()
        assert [output.generated_tokens for output in outputs] == expected
    model.destroy_cached_continuous_batching_manager()
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_graphs_and_compilation_are_off():
    model = random_model(tiny_config())
    manager = model.init_continuous_batching(**batching(default_compile_level=1, max_blocks_per_request=8))
    config = manager.continuous_batching_config
    assert config.varlen_compile_config is config.decode_compile_config is None
    assert config.cuda_graph_booleans == (False, False) and config.max_blocks_per_request == 0


CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    random_model(tiny_config(eos_token_id=2, max_position_embeddings=4096)).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<bos>": 1, "<eos>": 2} | {f"t{i}": i for i in range(3, 97)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


BLOCKS, BLOCK_SIZE = 64, 16


class Server:
    """A server of `folder` in a process of its own, as a user starts it."""

    def __init__(self, folder: Path, home: Path):
        port = free_port()
        command = [sys.executable, "-m", "tests.modeling_t6.served", str(folder)]
        command += ["--continuous-batching", "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--cb-num-blocks", str(BLOCKS), "--cb-block-size", str(BLOCK_SIZE), "--cb-max-batch-tokens", "64"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
        self.log = open(home / "server.log", "w+")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.url = f"http://127.0.0.1:{port}"
        for _ in range(3000):
            try:
                urllib.request.urlopen(f"{self.url}/health")
                return
            except OSError:
                assert self.process.poll() is None, self.messages()
                time.sleep(0.1)
        messages = self.messages()
        self.close()
        raise TimeoutError(messages)

    def messages(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def pages(self) -> dict[str, int]:
        self.process.send_signal(signal.SIGUSR1)
        (held,) = json.loads(next(line for line in self.process.stdout if line.startswith("[{")))  # not its log
        return held

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


async def streamed(client: openai.AsyncOpenAI, model: str, prompt: str, max_tokens: int, chat: bool) -> str:
    arguments = {"model": model, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    if chat:
        messages = [{"role": "user", "content": prompt}]
        stream = await client.chat.completions.create(messages=messages, **arguments)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    stream = await client.completions.create(prompt=prompt, **arguments)
    return "".join([chunk.choices[0].text or "" async for chunk in stream])


def test_server(folder, tmp_path):
    server = Server(folder, tmp_path)
    try:
        check_32_requests_at_once(folder, server)
        check_that_cancelling_frees_pages(folder, server)
        check_that_pages_hold_factors(folder, server)
        check_that_no_request_outgrows_the_cache(folder, server)
    finally:
        server.close()


def check_32_requests_at_once(folder: Path, server: Server) -> None:
    """Streams of mixed lengths, half of them chats: each is what the model answers alone."""
    generator = random.Random(0)
    requests = []
    for index in range(32):
        prompt = [generator.randrange(3, 97) for _ in range(generator.randrange(1, 90))]
        requests.append((prompt, generator.randrange(1, 40), index % 2 == 0))

    async def all_answers():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        async with client:
            texts = (" ".join(f"t{token}" for token in prompt) for prompt, _, _ in requests)
            calls = (streamed(client, str(folder), text, n, chat) for text, (_, n, chat) in zip(texts, requests))
            return await asyncio.gather(*calls)

    answered = asyncio.run(all_answers())
    model = T6ForCausalLM.from_pretrained(folder)
    ended = 0
    for (prompt, num_tokens, _), answer in zip(requests, answered):
        expected = lone(model, prompt, num_tokens)
        ended += expected[-1] == 2
        assert answer.split() == [f"t{token}" for token in expected if token > 2], server.messages()
    assert 0 < ended < 32  # some answers end by themselves, some at their limit
    held = server.pages()
    assert held["free"] == held["blocks"]


def check_that_cancelling_frees_pages(folder: Path, server: Server) -> None:
    async def cancel() -> list[dict]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        async with client:
            await streamed(client, str(folder), "t5", 1, chat=False)
            seen = [server.pages()]
            stream = await client.completions.create(
                model=str(folder), prompt="t7 " * 60, max_tokens=10**4, temperature=0, stream=True
            )
            async for _ in stream:
                break
            seen.append(server.pages())
            await stream.close()
            for _ in range(200):
                seen.append(server.pages())
                if seen[-1]["free"] == seen[0]["free"]:
                    break
                await asyncio.sleep(0.05)
            return seen

    before, during, *after = asyncio.run(cancel())
    assert before["free"] == before["blocks"]
    assert during["free"] < before["free"] - 2
    assert after[-1]["free"] == before["free"]


def check_that_pages_hold_factors(folder: Path, server: Server) -> None:
    held = server.pages()
    config = T6ForCausalLM.config_class.from_pretrained(folder)
    row = sum(layout.width for layout in factor_layouts(config, 0)) * config.num_hidden_layers
    spare = held["nbytes"] - BLOCKS * BLOCK_SIZE * row * 4
    assert 0 <= spare <= 8 * BLOCK_SIZE * row * 4  # a block or few that the engine writes padding to


def check_that_no_request_outgrows_the_cache(folder: Path, server: Server) -> None:
    """A request that asks for more than there is room for gets what there is; one that leaves no room is refused."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    endless = {"generation_config": json.dumps({"do_sample": False, "eos_token_id": -1})}
    room = BLOCKS * BLOCK_SIZE
    with client:
        for stream in (False, True):
            answer = client.completions.create(
                model=str(folder), prompt="t7 " * (room - 20), max_tokens=10**12, stream=stream, extra_body=endless
            )
            *_, last = answer if stream else [answer]
            assert (last.choices[0].finish_reason, last.usage.completion_tokens) == ("length", 20)
        for prompt, most, message in (("t7 " * room, 1, "has 1024 tokens"), ("t7", 0, "at least 1, got 0")):
            with pytest.raises(openai.BadRequestError) as refusal:
                client.completions.create(model=str(folder), prompt=prompt, max_tokens=most)
            assert message in refusal.value.response.json()["detail"]
        assert client.completions.create(model=str(folder), prompt="t5", max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize(
    "asked, length, given", [(10**12, 6, 250), (None, 6, 250), (10**12, 255, 1), (7, 6, 7)], ids=str
)
def test_answers_end_with_the_context(asked, length, given):
    """Without continuous batching, too, where prompts are tensors."""
    model = random_model(tiny_config())
    config = GenerationConfig(max_new_tokens=asked)
    seen = within_context(lambda *args: args)(None, model, None, {"input_ids": torch.ones(1, length)}, config)
    assert seen[4] is config and config.max_new_tokens == given


def test_server_of_transformers_loads_a_folder_that_names_an_auto_class(folder, tmp_path):
    """What to do without this package: see docs/transformers_engine.md."""
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["architectures"] = ["AutoModelForCausalLM"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    manager = ModelManager(device="cpu", trust_remote_code=True)
    model, _ = manager.load_model_and_processor(manager.process_model_name(str(tmp_path / "model")))
    assert type(model).__name__ == "T6ForCausalLM"
    manager.shutdown()
