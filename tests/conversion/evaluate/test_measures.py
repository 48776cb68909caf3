"""What is measured, against plain restatements."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig

from conversion.evaluate import evaluation
from conversion.evaluate.agreement import Agreement
from conversion.evaluate.caches import RoundedCache, make_cache, rounded
from conversion.evaluate.evaluation import bytes_per_token, measure_windows, refuse_caches
from conversion.evaluate.positions import LossByPosition
from conversion.evaluate.score import Score, score_samples
from conversion.evaluate.tasks import Sample, make_samples
from conversion.files.errors import ConversionError
from conversion.smaller.languages import Sentences, Tokens
from modeling_t6 import T6Config, T6ForCausalLM
from modeling_t6.cache_t6 import CACHE_NAME

from ..common import as_t6, exact_model, random_ids, source_model
from .test_tasks import characters


pytestmark = pytest.mark.once


class Induction(nn.Module):
    """Predicts what followed the last occurrence of the last token among the `sight` tokens before it: its cache is a list."""

    device = torch.device("cpu")

    def __init__(self, sight: int):
        super().__init__()
        self.base_model, self.sight = self, sight

    def forward(self, ids, use_cache=True, **kwargs):
        past = kwargs[CACHE_NAME]
        logits = torch.zeros(*ids.shape, 99)
        for row, tokens in enumerate(ids.tolist()):
            while len(past) <= row:
                past.append([])
            for place, token in enumerate(tokens):
                seen = past[row][-self.sight :]
                where = [i for i, other in enumerate(seen[:-1]) if other == token]
                if where:
                    logits[row, place, seen[where[-1] + 1]] = 50.0
                past[row].append(token)
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("task", ["needle", "keys", "copying"])
def test_who_sees_the_fact_finds_it(task):
    samples = make_samples(Tokens(99), task, 100, 6)
    found = score_samples(Induction(1000), list, Tokens(99), samples, 4)
    assert found.found == found.exact == 1 and found.log_probability > -1e-3 and found.count == 6
    blind = score_samples(Induction(5), list, Tokens(99), samples, 4)
    assert blind.found < 0.2 and blind.exact == 0 and blind.log_probability < -1


@pytest.mark.parametrize("model", [exact_model(), source_model("llama", "gqa", torch.float64)], ids=["t6", "llama"])
def test_score_is_that_of_the_whole_pass_and_of_greedy_decoding(model):
    samples = make_samples(Tokens(99), "values", 61, 5)
    for sample in samples[:3]:  # answers that greedy decoding gives, of several lengths
        prompt = torch.tensor([sample.prompt])
        more = 4 + len(sample.prompt) % 2
        sample.answer = model.generate(prompt, max_new_tokens=more, do_sample=False)[0, -more:].tolist()
    samples[1].answer = samples[1].answer[:3]
    score = score_samples(model, lambda: make_cache(model), Tokens(99), samples, 2)
    assert score.exact == 3 / 5
    expected = 0.0
    for sample in samples:
        ids = torch.tensor([sample.prompt + sample.answer])
        with torch.no_grad():
            log_probs = model(ids, use_cache=False).logits.log_softmax(-1)[0, len(sample.prompt) - 1 : -1]
        expected += log_probs.gather(-1, torch.tensor(sample.answer)[:, None]).mean().item() / 5
    assert score.log_probability == pytest.approx(expected, rel=1e-5)
    assert len(score.log_probabilities) == 5 and sum(score.log_probabilities) / 5 == score.log_probability


class Scripted(nn.Module):
    """Says the same ids behind every prompt, whatever it reads: its cache counts the tokens since the prompt."""

    device = torch.device("cpu")

    def __init__(self, said: list[int]):
        super().__init__()
        self.said, self.base_model = said, lambda ids, **kwargs: None

    def forward(self, ids, **kwargs):
        logits, cache = torch.zeros(*ids.shape, 256), kwargs[CACHE_NAME]
        for place in range(ids.shape[1]):
            logits[:, place, (self.said + [0] * 99)[len(cache)]] = 9.0
            cache.append(None)
        return type("Output", (), {"logits": logits})


SAID = {
    ", in this order: 12345 and 67890.": (1 / 2, 0),
    " 12345, 24680": (1, 1),
    ":\n1. 24680\n2. 12345": (1, 0),
    " 123456, 2468": (0, 0),
    " 12345,                              24680": (1 / 2, 0),  # too late
}


@pytest.mark.parametrize("said, expected", SAID.items(), ids=lambda value: None if isinstance(value, tuple) else value)
def test_values_are_found_in_any_format(said, expected):
    language = Sentences(characters())
    sample = Sample([1, 2, 3], language.encode(" 12345, 24680"), ["12345", "24680"], 0.5, [0])
    score = score_samples(Scripted(language.encode(said)), list, language, [sample], 1)
    assert (score.found, score.exact) == expected


def test_loss_by_position():
    logits, targets = torch.randn(3, 21, 9, dtype=torch.double), torch.randint(9, (3, 21))
    losses = LossByPosition(22)
    for start, end in ((0, 8), (8, 21)):
        losses.add(logits[:, start:end], targets[:, start:end], start)
    each = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].mean(0)
    buckets = [(1, 1), (2, 3), (4, 7), (8, 15), (16, 21)]
    found = losses.by_position()
    assert [(bucket["first"], bucket["last"]) for bucket in found] == buckets
    assert [b["loss"] for b in found] == pytest.approx([each[a - 1 : b].mean().item() for a, b in buckets], rel=1e-5)
    assert losses.loss == pytest.approx(each.mean().item(), rel=1e-5)


def test_agreement():
    logits, expected = torch.randn(2, 7, 9, dtype=torch.double), torch.randn(2, 7, 9, dtype=torch.double)
    agreement, same = Agreement(), Agreement()
    agreement.add(logits, expected)
    same.add(logits, logits)
    p, q = expected.softmax(-1), logits.softmax(-1)
    assert agreement.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert agreement.first_choice == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert (same.kl, same.first_choice) == (0, 1)


@pytest.mark.parametrize("bits, group", [(8, 64), (4, 32), (2, 32)])
def test_rounding_stays_within_half_a_step(bits, group):
    x = torch.randn(2, 3, 5, 64) * torch.logspace(-2, 2, 5)[:, None]
    groups = x.unflatten(-1, (-1, group))
    span = groups.amax(-1) - groups.amin(-1)
    error = (rounded(x, bits, group) - x).unflatten(-1, (-1, group)).abs().amax(-1)
    half = span / (2**bits - 1) / 2
    parameters = 2**-11 * (groups.abs().amax(-1) + 2 * span) + 2**bits * 2**-24  # of the step and the least in float16
    assert (error <= half + parameters).all() and (error > 0.5 * half).all()
    assert torch.equal(rounded(torch.full((2, 64), 3.0), bits, group), torch.full((2, 64), 3.0))


def test_bytes_and_windows_of_rounded_caches():
    source = source_model("llama", "mha")  # 3 layers, 4 heads of 16
    assert bytes_per_token(source, "model", torch.bfloat16) == 3 * 2 * 4 * 16 * 2
    assert bytes_per_token(source, "8", torch.bfloat16) == 3 * 2 * 4 * (16 + 4)
    assert bytes_per_token(source, "4", torch.bfloat16) == 3 * 2 * 4 * (8 + 4)
    assert bytes_per_token(source, "2", torch.bfloat16) == 3 * 2 * 4 * (4 + 4)
    model, windows = as_t6(source), random_ids(3, 50)
    assert bytes_per_token(model, "float8_e4m3fn", torch.bfloat16) == 3 * 2 * 4 * 16
    assert bytes_per_token(model, "int4", torch.bfloat16) == 3 * 2 * 48  # 4 ranks of 8 bytes and a scale of 2, in 16s
    rows = {kind: measure_windows(source, kind, kind, windows, 2, source) for kind in ("model", "8", "4", "2")}
    assert 0 <= rows["model"]["kl"] < 1e-6 < rows["8"]["kl"] < rows["4"]["kl"] < rows["2"]["kl"]
    exact = measure_windows(model, "model", "t6", windows, 2, source)
    assert exact["kl"] < 1e-5 and exact["perplexity"] == pytest.approx(rows["model"]["perplexity"], rel=1e-5)
    cache = RoundedCache(source.config, 8)
    source(windows, use_cache=True, **{CACHE_NAME: cache})
    plain = DynamicCache(config=LlamaConfig(num_hidden_layers=3))
    source(windows, use_cache=True, **{CACHE_NAME: plain})
    # The first layer's keys come before any rounding.
    assert torch.equal(cache.layers[0].keys, rounded(plain.layers[0].keys, 8, 16))


def test_a_model_without_rows_of_4_bits_is_named():
    config = T6Config(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=4, shared_b=True
    )
    model = T6ForCausalLM(config)
    refuse_caches(Path("folder"), model, ["model", "float8_e4m3fn"])
    with pytest.raises(ConversionError, match="--cache-dtypes int4: folder: .*`shared_b`=True"):
        refuse_caches(Path("folder"), model, ["model", "int4"])


def test_long_samples_take_no_more_tokens_at_a_time_than_windows(monkeypatch):
    counts = {}
    score = Score(0.0, 0.0, 0.0, 1, [0.0])
    monkeypatch.setattr(
        evaluation, "score_samples", lambda *words: counts.update({len(words[3][0].prompt): words[4]}) or score
    )
    samples = {("needle", n): [Sample([0] * n, [0], [], 0.5, [0])] for n in (50, 100, 250, 2000)}
    evaluation.score_all(source_model("llama", "mha"), "model", "", Tokens(99), samples, 8, window=100)
    assert counts == {50: 8, 100: 8, 250: 3, 2000: 1}
