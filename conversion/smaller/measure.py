"""Perplexity of a model, and the bytes of its cache."""

from collections.abc import Iterator
from unittest import mock

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Cache, PreTrainedModel

from modeling_t6 import T6Cache
from modeling_t6.cache_t6 import CACHE_NAME, cache_nbytes


@torch.no_grad()
def cache_bytes_per_token(model: PreTrainedModel, cache: Cache, itemsize: int) -> float:
    """
    Bytes that an empty `cache` takes for each of some tokens, with numbers of `itemsize` bytes in place of the model's; what is
    held in another dtype stays as it is.
    """
    length = min(48, model.config.max_position_embeddings)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    model(ids, use_cache=True, **{CACHE_NAME: cache})
    of_model = cache.layers[0].keys.dtype == model.dtype
    return cache_nbytes(cache) / ids.numel() * (itemsize / model.dtype.itemsize if of_model else 1)


LOGITS = 2**26  # at once: 256 MiB of float32


def logits_in_pieces(model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None = None) -> Iterator[torch.Tensor]:
    """
    Logits [batch, piece, vocab] of `ids` [batch, seq], piece by piece, so that those of a long window are never in memory
    together. The layers run once, through an empty `cache` if there is one; what stands behind them (the head, a scale, a
    cap) is the model's own.
    """
    cached = {"use_cache": False} if cache is None else {"use_cache": True, CACHE_NAME: cache}
    outputs = model.base_model(ids, **cached)
    size = max(1, LOGITS // (len(ids) * model.config.get_text_config().vocab_size))
    for states, piece in zip(outputs.last_hidden_state.split(size, dim=1), ids.split(size, dim=1)):
        known = type(outputs)(**{**outputs, "last_hidden_state": states})
        with mock.patch.object(model.base_model, "forward", return_value=known):
            logits = model(piece, use_cache=False).logits
        yield logits


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, batch_size: int, name: str, quiet: bool = False) -> float:
    """
    exp of the mean loss of each token of the windows `ids` [n, length] after those before it in its window, which it reads as
    the `cache_dtype` of the model's configuration, if there is one, leaves them.
    """
    is_rounded = getattr(model.config, "cache_dtype", None) is not None
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch in tqdm(ids.split(batch_size), desc=f"perplexity, {name}", unit="batch", disable=quiet):
        batch = batch.to(model.device)
        targets = batch[:, 1:]
        cache = T6Cache(config=model.config) if is_rounded else None
        for logits in logits_in_pieces(model, batch[:, :-1], cache):
            piece, targets = targets[:, : logits.shape[1]], targets[:, logits.shape[1] :]
            total += F.cross_entropy(logits.float().flatten(0, 1), piece.flatten(), reduction="sum").double()
    return (total / (ids.shape[0] * (ids.shape[1] - 1))).exp().item()
