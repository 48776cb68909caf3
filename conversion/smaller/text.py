"""Text for calibration, healing and measurement, and windows of tokens."""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..files.errors import ConversionError


PIECE = 100_000  # characters: a tokenizer works on many pieces side by side, and slowly on one long text
PIECES = 256  # at a time
HELD_OUT = 0.1
WINDOW = 1024  # tokens, by default


def read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise ConversionError(f"{path} is empty: expected text")
    return text


def window_length(asked: int | None, context: int) -> int:
    """Tokens of a window: as many as `--window` asks for, or the context up to `WINDOW`."""
    return asked or min(WINDOW, context)


def split_held_out(text: str) -> tuple[str, str]:
    """The text but its last tenth, and that; cut between lines, where a tenth is of one line between words, else anywhere."""
    for end in ("\n", " ", ""):
        cut = text.find(end, int(len(text) * (1 - HELD_OUT))) + 1
        if 0 < cut < len(text):
            return text[:cut], text[cut:]
    return text, ""


def windows(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, name: str, most: int | None = None
) -> torch.Tensor:
    """
    Token ids [n, length] of a text, without the rest that fills no window, or of its first `most` windows; `name` is
    what errors call the text.
    """
    pieces, start = [], 0
    while start < len(text):
        end = len(text) if len(text) <= start + PIECE else text.rfind("\n", start, start + PIECE) + 1
        end = end or text.find("\n", start + PIECE) + 1 or len(text)  # a line longer than a piece is one
        pieces.append(text[start:end])
        start = end
    options = dict.fromkeys(("add_special_tokens", "return_attention_mask", "return_token_type_ids", "verbose"), False)
    parts, count = [], 0
    while pieces and (most is None or count < most * length):
        batch, pieces = pieces[:PIECES], pieces[PIECES:]
        parts += [torch.tensor(ids, dtype=torch.long) for ids in tokenizer(batch, **options)["input_ids"]]
        count = sum(map(len, parts))
    ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
    if len(ids) < length:
        raise ConversionError(f"{name} has {len(ids)} tokens: expected at least one window of {length}")
    return ids[: len(ids) // length * length].view(-1, length)[:most]


def evenly_spaced(windows: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many of the windows [n, length], spread over all of them."""
    return windows[torch.linspace(0, len(windows) - 1, min(len(windows), most), device=windows.device).long()]


def is_windows(path: Path) -> bool:
    """Whether a file is to hold windows of token ids, not text."""
    return path.suffix == ".npy"


def read_windows(path: Path, length: int) -> torch.Tensor:
    """
    The token ids [n, length] of a NumPy file.

    Raises:
        ConversionError: if it holds anything else.
    """
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ConversionError(f"{path} is no NumPy file: {error}") from error
    if ids.ndim != 2 or ids.shape[1] != length or not len(ids) or ids.dtype.kind not in "iu":
        raise ConversionError(
            f"{path} holds {ids.dtype} {list(ids.shape)}: expected token ids [n, {length}], the tokens of a window"
        )
    if ids.min() < 0:
        raise ConversionError(f"{path} holds {ids.min()}: expected token ids, of 0 and more")
    return torch.from_numpy(ids.astype(np.int64))
