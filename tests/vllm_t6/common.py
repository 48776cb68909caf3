"""Engines over folders of tiny models, and what `generate()` answers to the same requests."""

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from transformers import PreTrainedModel
from vllm import LLM, SamplingParams


# Of the requests in a batch, in tokens: one, and those around the ends of pages. As they decode, 12 pass the end of a page, and 20
# that of the windows.
LENGTHS = (1, 12, 16, 20, 33, 64, 65, 130)
NEW_TOKENS = 6
# Logits in float32 differ by less between two ways to add the same numbers up. Where the reference's two best tokens are
# as near to each other, either is right, and what follows is another text.
TIE = 1e-4


MIXED_LAYERS = {
    "sliding_window": 24,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


class Answers(NamedTuple):
    """Each [requests, new tokens]: greedy tokens, their log-probabilities and by how much their logits are the best."""

    tokens: torch.Tensor
    log_probabilities: torch.Tensor
    margins: torch.Tensor


def random_prompts(lengths: tuple[int, ...] = LENGTHS, each: int = 4, seed: int = 1) -> list[torch.Tensor]:
    """For each length that many prompts, [each, length]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 97, (each, length), generator=generator) for length in lengths]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: list[torch.Tensor],
    new_tokens: int = NEW_TOKENS,
    make_cache: Callable | None = None,
) -> Answers:
    """What Transformers answers, prompts of one length at a time."""
    parts = []
    for ids in prompts:
        output = model.generate(
            ids,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            past_key_values=make_cache and make_cache(),
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = torch.stack(output.logits, dim=1)
        best = logits.topk(2).values
        log_probabilities = best[..., 0] - logits.logsumexp(-1)
        parts.append((output.sequences[:, ids.shape[1] :], log_probabilities, best[..., 0] - best[..., 1]))
    return Answers(*map(torch.cat, zip(*parts)))


@contextmanager
def engine(folder: Path, **settings) -> Iterator[LLM]:
    """vLLM over a folder, in this process unless the settings say otherwise."""
    defaults = {
        "dtype": "float32",
        "max_model_len": 256,
        "block_size": 16,
        "kv_cache_memory_bytes": 2**26,
        "enforce_eager": True,
        "disable_log_stats": False,
    }
    # An engine collects garbage eight times, which takes seconds where all that was imported is looked through: also what
    # the engine before was the first to import.
    gc.collect()
    gc.freeze()
    replace_kernels_once()
    with mock.patch("gc.freeze"), mock.patch("gc.unfreeze"):
        llm = LLM(str(folder), skip_tokenizer_init=True, **defaults | settings)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


@functools.cache
def replace_kernels_once() -> None:
    """On a CPU, each engine looks through every module for kernels to put others in their place, which the first has done."""
    if find_spec("vllm.triton_utils.dispatcher") is None:
        return
    from vllm.triton_utils import dispatcher

    register = dispatcher.register_kernels

    def register_new(kernels: dict[str, Callable]) -> None:
        if new := {name: kernel for name, kernel in kernels.items() if name not in dispatcher._registry}:
            register(new)

    dispatcher.register_kernels = register_new


def metric(llm: LLM, name: str) -> float:
    """What vLLM has counted so far, as its /metrics has it."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def ask(llm: LLM, prompts: list[torch.Tensor], new_tokens: int = NEW_TOKENS) -> list:
    """vLLM's outputs for all the prompts at once."""
    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=0)
    requests = [{"prompt_token_ids": ids} for group in prompts for ids in group.tolist()]
    return llm.generate(requests, greedy, use_tqdm=False)


def assert_same(outputs: list, expected: Answers, tie: float = TIE, few: int = 2) -> None:
    """
    Tokens and log-probabilities are those of the reference, request by request, up to a near tie of the reference's own.
    No more than a `few` requests end at one, and its answers differ from one another: faults show.
    """
    assert len(outputs) == len(expected.tokens)
    ends = [int(torch.cat([margins, torch.zeros(1)]).lt(tie).nonzero()[0]) for margins in expected.margins]
    assert sum(end < expected.tokens.shape[1] for end in ends) <= few
    assert len(expected.tokens.unique(dim=0)) > len(expected.tokens) / 2
    for number, (output, end) in enumerate(zip(outputs, ends)):
        answer = output.outputs[0]
        tokens = list(answer.token_ids)
        assert len(tokens) == expected.tokens.shape[1]
        assert tokens[:end] == expected.tokens[number, :end].tolist(), f"request {number}"
        chosen = torch.tensor([step[token].logprob for step, token in zip(answer.logprobs, tokens)])
        torch.testing.assert_close(chosen[:end], expected.log_probabilities[number, :end], atol=tie, rtol=0)


def serve_exactly(model: PreTrainedModel, folder: Path, **settings) -> None:
    """Saves a model, and asserts that vLLM answers as it does."""
    model.save_pretrained(folder)
    prompts = random_prompts()
    with engine(folder, **settings) as llm:
        assert_same(ask(llm, prompts), generate(model, prompts))
