"""The source and the result side by side, in float32."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from modeling_t6 import T6Cache, T6ForCausalLM
from modeling_t6.cache_t6 import CACHE_NAME, cache_nbytes

from .files.errors import ConversionError
from .files.memory import available_memory
from .sources.official import research_logits


EXACT = 1e-5  # of the largest logit: float32 has 7 digits, and a model adds up thousands of numbers
ROUNDED = 0.1  # weights rounded to half precision are another model, but not one as far away as a wrong one
OFFICIAL = 1e-4


@dataclass
class Comparison:
    logit_difference: float
    greedy_tokens: int
    cache_bytes: float
    source_cache_bytes: float | None

    def __str__(self) -> str:
        text = f"logits differ by {self.logit_difference:.1e} of the largest; "
        text += f"cache {self.cache_bytes:,.0f} bytes per token in float32"
        if self.source_cache_bytes is not None:
            text += f", the source's {self.source_cache_bytes:,.0f}; {self.greedy_tokens} greedy tokens are equal"
        return text


def fits_in_memory(numbers: int) -> bool:
    """Whether source and result, `numbers` weights each, fit into what is free, in float32 and with room to run."""
    return 2.5 * 4 * numbers < available_memory()


def random_ids(vocab_size: int, length: int) -> torch.Tensor:
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


def relative_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: torch.Tensor, num_tokens: int, cache) -> torch.Tensor:
    tokens = []
    for _ in range(num_tokens):
        logits = model(ids, use_cache=True, **{CACHE_NAME: cache}).logits[:, -1]
        ids = logits.argmax(-1, keepdim=True)
        tokens.append(ids)
    return torch.cat(tokens, dim=1)


def compare_with_transformers(source: Path, result: Path, rounded: bool = False, num_tokens: int = 16) -> Comparison:
    """
    Compares logits of random tokens, greedy continuations and bytes of cache.

    Raises:
        ConversionError: if the logits or the greedy tokens differ, or the factors need more room than K and V did.
    """
    expected_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model = T6ForCausalLM.from_pretrained(result, dtype=torch.float32).eval()
    length = min(48, model.config.max_position_embeddings - num_tokens)
    ids = random_ids(model.config.vocab_size, length)
    with torch.no_grad():
        difference = relative_difference(
            model(ids, use_cache=False).logits, expected_model(ids, use_cache=False).logits
        )
    limit = ROUNDED if rounded else EXACT
    if not difference <= limit:
        raise ConversionError(
            f"verification failed: logits differ by {difference:.1e} of the largest, over {limit:.0e}"
        )
    caches = T6Cache(config=model.config), DynamicCache(config=expected_model.config)
    tokens = [greedy(m, ids, num_tokens, cache) for m, cache in zip((model, expected_model), caches)]
    if not rounded and not torch.equal(*tokens):
        raise ConversionError("verification failed: the greedy continuations differ")
    per_token = [cache_nbytes(cache) / (2 * (length + num_tokens - 1)) for cache in caches]
    if per_token[0] > per_token[1]:
        raise ConversionError(
            f"verification failed: {per_token[0]} bytes of cache per token, the source has {per_token[1]}"
        )
    return Comparison(difference, 0 if rounded else num_tokens, *per_token)


def compare_with_research_code(arguments: dict, checkpoint, result: Path, rounded: bool = False) -> Comparison:
    """Compares logits of random tokens with those that the research code computes from its own weights."""
    model = T6ForCausalLM.from_pretrained(result, dtype=torch.float32).eval()
    length = min(48, model.config.max_position_embeddings)
    ids = random_ids(model.config.vocab_size, length)
    with torch.no_grad():
        expected = research_logits(arguments, {name: tensor.float() for name, tensor in checkpoint}, ids)
        cache = T6Cache(config=model.config)
        logits = model(ids, **{CACHE_NAME: cache}).logits
    difference = relative_difference(logits, expected)
    limit = ROUNDED if rounded else OFFICIAL
    if not difference <= limit:
        raise ConversionError(
            f"verification failed: logits differ by {difference:.1e} of the largest, over {limit:.0e}"
        )
    return Comparison(difference, 0, cache.nbytes / ids.numel(), None)
