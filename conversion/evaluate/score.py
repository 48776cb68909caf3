"""How much of an answer a model finds when all that it knows of the text is in its cache."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import Cache, PreTrainedModel

from modeling_t6.cache_t6 import CACHE_NAME

from ..smaller.languages import Language
from .tasks import Sample


SLACK = 16  # tokens that a model may say beside the answer, in a format of its own


@dataclass
class Score:
    """
    Attributes:
        found: mean part of an answer's values that greedy decoding says, whatever it says between them.
        exact: part of the answers that greedy decoding gives exactly.
        log_probability: mean over answers of that of their tokens, each after those before it, in nats.
        count: of samples.
        log_probabilities: of each sample's answer, the mean over its tokens.
    """

    found: float
    exact: float
    log_probability: float
    count: int
    log_probabilities: list[float]


@torch.no_grad()
def score_samples(
    model: PreTrainedModel,
    make_cache: Callable[[], Cache],
    language: Language,
    samples: list[Sample],
    batch_size: int,
    bar: tqdm | None = None,
    context: int | None = None,
) -> Score:
    """
    Scores samples with prompts of one length. The prompt fills an empty cache; then one pass over its last token and the answer shows
    whether each token of the answer is the most probable one, as greedy decoding needs it. Where one is not, greedy decoding
    goes on from a copy of the cache.

    Args:
        make_cache: makes an empty cache for the model.
        language: in which the samples are told.
        context: the model's, behind which it is asked for nothing.
    """
    found, exact, log_probabilities = [], [], []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        prompts = torch.tensor([sample.prompt for sample in batch], device=model.device)
        longest = max(len(sample.answer) for sample in batch)
        # What is behind a shorter answer changes nothing before it.
        answers = torch.tensor([sample.answer + [0] * (longest - len(sample.answer)) for sample in batch])
        counted = torch.tensor([[place < len(sample.answer) for place in range(longest)] for sample in batch])
        answers, counted = answers.to(model.device), counted.to(model.device)
        cache = make_cache()
        model.base_model(prompts[:, :-1], **cached(cache))
        before = copy.deepcopy(cache)
        logits = model(torch.cat([prompts[:, -1:], answers[:, :-1]], dim=1), **cached(cache)).logits.float()
        del cache
        all_best = ((logits.argmax(-1) == answers) | ~counted).all(-1).tolist()
        scores = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0].masked_fill(~counted, 0)
        exact += all_best
        log_probabilities += (scores.sum(-1) / counted.sum(-1)).tolist()
        count = longest + SLACK
        if context is not None:  # there may be no positions behind it
            count = min(count, context - prompts.shape[1] + 1)
        said = answers if all(all_best) else decode_greedily(model, before, prompts[:, -1:], count)
        for sample, ids, is_best in zip(batch, said.tolist(), all_best):
            found.append(1.0 if is_best else language.part_found(sample.values, ids))
        if bar is not None:
            bar.update(len(batch))
    means = (sum(parts) / len(samples) for parts in (found, exact, log_probabilities))
    return Score(*means, len(samples), log_probabilities)


def cached(cache: Cache) -> dict:
    return {CACHE_NAME: cache, "use_cache": True}


def decode_greedily(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, count: int) -> torch.Tensor:
    """`count` tokens [batch, count] after those in the cache and `ids` [batch, 1]."""
    said = []
    for _ in range(count):
        ids = model(ids, **cached(cache)).logits[:, -1:].argmax(-1)
        said.append(ids)
    return torch.cat(said, dim=1)
