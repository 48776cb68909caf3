"""Perplexity of long windows: logits in pieces are those of the model, and no more of them are in memory than a piece."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conversion.smaller import measure
from tests.conversion.common import FAMILIES, SIZES, exact_model, random_ids, source_model
from tests.modeling_t6.test_attention import LargestResult


# Families that do something to their logits behind the head, or return more than logits.
OTHERS = {
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 16},
    "cohere": {"logit_scale": 0.3},
    "mixtral": {"num_local_experts": 2, "output_router_logits": True},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2},
}


def model_of(name: str):
    if name == "t6":
        return exact_model()
    if name in FAMILIES:
        return source_model(name, "gqa", torch.float64)
    config = AutoConfig.for_model(name, **SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2} | OTHERS[name])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["t6", "llama", "granite", "phi3", "mistral-sliding", *OTHERS])
def test_logits_in_pieces(name, monkeypatch):
    model, ids = model_of(name), random_ids(2, 40)
    forward = model.base_model.forward
    monkeypatch.setattr(measure, "LOGITS", 2 * 99 * 9)
    with torch.no_grad():
        pieces = list(measure.logits_in_pieces(model, ids))
        assert [piece.shape for piece in pieces] == 4 * [(2, 9, 99)] + [(2, 4, 99)]
        assert model.base_model.forward == forward
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, rtol=1e-5, atol=1e-5)


def test_perplexity_holds_a_piece_of_logits(monkeypatch):
    model = exact_model(vocab_size=4096)
    ids = random_ids(3, 200)
    monkeypatch.setattr(measure, "LOGITS", 3 * 4096 * 10)
    with LargestResult() as largest:
        value = measure.perplexity(model, ids, 3, "", quiet=True)
    assert largest.numel <= 3 * 4096 * 10 < 3 * 4096 * 199
    with torch.no_grad():
        scores = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert value == pytest.approx(math.exp(-scores.mean().item()), rel=1e-6)
