"""The files that belong to a model beside its weights."""

import codecs
import shutil
from fnmatch import fnmatch
from pathlib import Path

from .folders import read_json


# What comes along beside the weights.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model",
    "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def copy_companions(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(path, target / path.name)


def without_marks(source: Path, patterns: tuple[str, ...], folder: Path) -> Path:
    """
    The folder `source`, or, if JSON in it begins with a byte order mark, which Transformers does not read, `folder` with
    links to all of its files and those files without the mark.
    """
    files = [path for path in sorted(source.iterdir()) if any(fnmatch(path.name, pattern) for pattern in patterns)]
    marked = set()
    for path in files:
        if path.suffix == ".json" and path.is_file():
            with path.open("rb") as file:
                if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
                    marked.add(path)
    if not marked:
        return source
    for path in files:
        if path in marked:
            (folder / path.name).write_bytes(path.read_bytes().removeprefix(codecs.BOM_UTF8))
        else:
            (folder / path.name).symlink_to(path.resolve())
    return folder


def check_json(source: Path) -> None:
    """Raises a `ConversionError` that names a companion in JSON that is damaged, or holds something else than an object."""
    for path in sorted(source.iterdir()):
        if path.suffix == ".json" and any(fnmatch(path.name, pattern) for pattern in COMPANIONS):
            read_json(path)
