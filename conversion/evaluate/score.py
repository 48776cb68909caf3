"""How much of an answer a model finds, with all that it knows of the text in its cache."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import Cache, PreTrainedModel

from modeling_t6.cache_t6 import CACHE_NAME

from .tasks import Sample


@dataclass
class Score:
    """
    Attributes:
        exact: part of the answers that greedy decoding gives exactly.
        log_probability: mean over answers of that of their tokens, each after those before it, in nats.
        count: of samples.
    """

    exact: float
    log_probability: float
    count: int


@torch.no_grad()
def score_samples(
    model: PreTrainedModel,
    make_cache: Callable[[], Cache],
    samples: list[Sample],
    batch_size: int,
    bar: tqdm | None = None,
) -> Score:
    """
    Scores samples with prompts of one length. The prompt goes into an empty cache, its last token and the answer are read
    after it: a token of the answer is greedy decoding's where it is the most probable after those before it, so that one pass
    tells whether all of them are.

    Args:
        make_cache: makes an empty cache for the model.
    """
    exact, log_probability = [], []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        prompts = torch.tensor([sample.prompt for sample in batch], device=model.device)
        longest = max(len(sample.answer) for sample in batch)
        # What is behind a shorter answer changes nothing before it.
        answers = torch.tensor([sample.answer + [0] * (longest - len(sample.answer)) for sample in batch])
        counted = torch.tensor([[place < len(sample.answer) for place in range(longest)] for sample in batch])
        answers, counted = answers.to(model.device), counted.to(model.device)
        cache = {CACHE_NAME: make_cache(), "use_cache": True}
        model.base_model(prompts[:, :-1], **cache)
        logits = model(torch.cat([prompts[:, -1:], answers[:, :-1]], dim=1), **cache).logits.float()
        found = (logits.argmax(-1) == answers) | ~counted
        scores = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0].masked_fill(~counted, 0)
        exact += found.all(-1).tolist()
        log_probability += (scores.sum(-1) / counted.sum(-1)).tolist()
        if bar is not None:
            bar.update(len(batch))
    return Score(sum(exact) / len(samples), sum(log_probability) / len(samples), len(samples))
