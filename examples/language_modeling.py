# Copyright 2026 The T6 for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the examples share: tokenizers, tokens, packed windows and held-out loss."""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, Cache, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from command_line import InputError, loading
from conversion.smaller.measure import logits_in_pieces
from modeling_t6.cache_t6 import CACHE_NAME


IGNORED = -100  # the label that Transformers' losses skip; in a window it marks what lies beyond the text


# Tokens


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no text is out of its vocabulary, and decoding gives back every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        # Padding has its own token: a collator that hides padding from the loss must not hide the end of a text.
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    with loading("tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer {path} has neither a bos nor an eos token to set documents apart")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> torch.Tensor:
    """One stream of tokens: each document after a bos token, and before an eos token where that is another one."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = eos if bos is None else bos
    end = [] if eos in (None, start) else [eos]
    # `verbose=False`: documents are longer than the model's context, which is no mistake here.
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.cat([torch.tensor([start, *ids, *end]) for ids in encoded])


class RandomWindows(Dataset):
    """
    Windows of `block_length` tokens at random places. A pass cuts the stream into windows from a random start and
    shuffles them, so that it sees each token once and each pass cuts elsewhere.

    A window depends only on the seed and its index, so that a resumed run goes on with the very windows that the
    interrupted one would have had. The length covers the whole run: to `Trainer` it is one epoch.
    """

    def __init__(self, tokens: Sequence[int], block_length: int, num_windows: int, seed: int):
        self.tokens, self.block_length, self.num_windows, self.seed = tokens, block_length, num_windows, seed
        self.windows_per_pass = max(1, len(tokens) // block_length - 1)
        self._pass, self._starts = None, None

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> torch.Tensor:
        number, position = divmod(index, self.windows_per_pass)
        if number != self._pass:
            # PyTorch's CPU generator takes no more than 32 bits of a seed.
            generator = torch.Generator().manual_seed((1_000_003 * self.seed + number) % 2**32)
            spare = len(self.tokens) - self.windows_per_pass * self.block_length
            first = torch.randint(spare + 1, (1,), generator=generator)
            order = torch.randperm(self.windows_per_pass, generator=generator)
            self._pass, self._starts = number, (first + order * self.block_length).tolist()
        start = self._starts[position]
        return torch.as_tensor(self.tokens[start : start + self.block_length], dtype=torch.int64)


def held_out_windows(tokens: torch.Tensor, block_length: int) -> list[torch.Tensor]:
    """
    Consecutive windows that share one token, so that each token of the text but the first is predicted once. No window
    is longer than the text.
    """
    block_length = max(2, min(block_length, len(tokens)))
    stride = block_length - 1
    num_windows = math.ceil((len(tokens) - 1) / stride)
    tokens = nn.functional.pad(tokens, (0, num_windows * stride + 1 - len(tokens)), value=IGNORED)
    return list(tokens.unfold(0, block_length, stride))


def collate(windows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    labels = torch.stack(windows)
    return {"input_ids": labels.clamp(min=0), "labels": labels}  # causal: no token attends to padding after it


# Loss


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood [batch, seq], in nats, of the `targets` [batch, seq] that `logits` [batch, seq, vocab] predict."""
    return nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")


def window_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each window [batch], in nats, summed over its tokens."""
    return token_losses(logits[:, :-1], labels[:, 1:]).sum(1)


def text_size(documents: list[str]) -> tuple[int, int]:
    """Characters, and bytes of UTF-8."""
    return sum(map(len, documents)), sum(len(text.encode()) for text in documents)


def loss_report(nats: float, num_tokens: int, num_characters: int, num_bytes: int) -> dict[str, float]:
    """The loss per token, and the two measures that compare across tokenizers."""
    return {
        "loss_per_token": nats / num_tokens,
        "loss_per_character": nats / num_characters,
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }


@torch.inference_mode()
def total_loss(
    model: nn.Module, windows: list[torch.Tensor], batch_size: int, new_cache: Callable[[], Cache] | None = None
) -> float:
    """
    Nats of all windows. With `new_cache`, which makes an empty cache, tokens go through the model one by one, as in decoding.
    Logits are in memory piece by piece, however long the windows are.
    """
    model.eval()
    nats = 0.0
    for batch in DataLoader(windows, batch_size=batch_size, collate_fn=collate):
        ids, targets = (batch[name].to(model.device) for name in ("input_ids", "labels"))
        ids, targets = ids[:, :-1], targets[:, 1:]
        if new_cache is None:
            pieces = logits_in_pieces(model, ids)
        else:
            cache = {CACHE_NAME: new_cache()}
            pieces = (model(token, use_cache=True, **cache).logits for token in ids.split(1, dim=1))
        for logits in pieces:
            piece, targets = targets[:, : logits.shape[1]], targets[:, logits.shape[1] :]
            nats += token_losses(logits, piece).double().sum().item()
    return nats


@torch.inference_mode()
def position_losses(
    model: nn.Module, windows: list[torch.Tensor], batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of the tokens at each place of the windows but the first, float64 [length - 1], and how many tokens those are."""
    model.eval()
    nats = torch.zeros(len(windows[0]) - 1, dtype=torch.float64)
    counts = torch.zeros_like(nats, dtype=torch.long)
    for batch in DataLoader(windows, batch_size=batch_size, collate_fn=collate):
        ids, targets = batch["input_ids"].to(model.device)[:, :-1], batch["labels"].to(model.device)[:, 1:]
        start = 0
        for logits in logits_in_pieces(model, ids):
            end = start + logits.shape[1]
            piece = targets[:, start:end]
            nats[start:end] += token_losses(logits, piece).double().sum(0).cpu()
            counts[start:end] += (piece != IGNORED).sum(0).cpu()
            start = end
    return nats, counts
