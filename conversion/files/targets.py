"""Where an output may go: what is in its place must not be lost."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from .errors import ConversionError


WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
# What tools leave in any folder.
LEFT_OUT = ("__pycache__", ".cache", ".DS_Store", ".ipynb_checkpoints")


@dataclass(frozen=True)
class Kind:
    """
    A kind of folder that an output may replace: names of files, as patterns.

    Attributes:
        name: what errors call it.
        needed: of each of these, the folder must have one.
        known: what else may be there.
    """

    name: str
    needed: tuple[tuple[str, ...], ...]
    known: tuple[str, ...]

    def reason_against(self, folder: Path) -> str | None:
        """Why `folder` is not of this kind."""
        names = sorted(path.name for path in folder.iterdir())
        for patterns in self.needed:
            if not any(fnmatch(name, pattern) for name in names for pattern in patterns):
                return f"it has no {' and no '.join(patterns[:2])}"
        known = [pattern for patterns in self.needed for pattern in patterns] + [*self.known, *LEFT_OUT]
        strange = [name for name in names if not any(fnmatch(name, pattern) for pattern in known)]
        if strange:
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            return f"it holds {', '.join(strange[:3])}{more}"
        return None


TOKENIZER = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.model.v*",
    "*.tiktoken", "tekken.json", "chat_template*", "*.jinja", "additional_chat_templates",
)  # fmt: skip
# Of models; other code may be the user's.
CODE = ("*_t6.py", "configuration_*.py", "modeling_*.py", "tokenization_*.py")
TEXTS = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*", ".gitattributes")
MODEL = Kind(
    "a model",
    (("config.json",), WEIGHTS),
    (*TOKENIZER, *TEXTS, "generation_config.json", *CODE, "conversion.json", "conversion.png", "training_args.bin"),
)


def is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def check_target(target: Path, overwrite: bool, inputs: Mapping[str, Path | None], kind: Kind = MODEL) -> None:
    """
    Args:
        target: where a folder is to be.
        overwrite: whether it may replace one of `kind`.
        inputs: what the output is made from, by the names that errors give it.

    Raises:
        ConversionError: if `target` is, holds or lies in one of the inputs, is or holds the working directory, or has
            something in its place that is not to be replaced.
    """
    resolved = Path(os.path.realpath(target))
    for name, path in {"the working directory": Path.cwd(), **inputs}.items():
        if path is None or not path.exists():
            continue
        # What a link in a folder leads to is read, too.
        inner = [path, *(path.iterdir() if path.is_dir() and name in inputs else ())]
        if any(_holds(resolved, Path(os.path.realpath(file))) for file in inner):
            same = resolved == Path(os.path.realpath(path))
            raise ConversionError(f"{target} {'is' if same else 'holds'} {name}, {path}: expected another place")
        if name in inputs and _holds(Path(os.path.realpath(path)), resolved):
            raise ConversionError(f"{target} lies in {name}, {path}: expected another place")
    if not os.path.lexists(resolved):
        return
    if not resolved.is_dir():
        raise ConversionError(f"{target} is a file: the output is a folder")
    try:
        if is_empty(resolved):
            return
        if not overwrite:
            raise ConversionError(f"{target} is not empty: --overwrite replaces it")
        against = kind.reason_against(resolved)
    except OSError as error:
        raise ConversionError(f"cannot read {target}: {error.strerror}") from error
    if against is not None:
        raise ConversionError(f"{target} is not replaced, since it is not {kind.name} alone: {against}")


def _holds(outer: Path, inner: Path) -> bool:
    """Whether `inner` is `outer` or lies in it; both without links. Compared as files, since names differ by mounts."""
    if not outer.is_dir():
        return outer == inner
    return any(place.exists() and os.path.samefile(outer, place) for place in (inner, *inner.parents))
