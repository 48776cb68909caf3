"""Folders that appear whole or not at all, and the JSON in them."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import ConversionError


def read_json(path: Path) -> dict:
    """The object in a JSON file, or a `ConversionError` that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


@contextlib.contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """
    A temporary folder beside `target` that takes its place when the block ends, and is removed when it fails.

    Raises:
        ConversionError: if `target` holds something and is not to be overwritten, or cannot be written.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file: the output is a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ConversionError(f"{target} is not empty: --overwrite replaces it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise ConversionError(f"cannot write beside {target}: {error}") from error
    try:
        yield folder
        folder.chmod(0o755)  # `mkdtemp` makes folders that only their owner reads
        replace_folder(folder, target)
    except OSError as error:
        raise ConversionError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Puts the complete folder `new` in the place of `target`, or leaves `target` as it was."""
    if not target.exists():
        new.rename(target)
        return
    # Two renames, since a folder that is not empty cannot be renamed over.
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint: `trainer_state.json` is the file that Trainer writes last, and in its place."""
    checkpoints = {}
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):  # a killed run left the beginning of the file
            json.loads(path.read_text(encoding="utf-8"))
            checkpoints[int(path.parent.name.removeprefix("checkpoint-"))] = path.parent
    return checkpoints[max(checkpoints)] if checkpoints else None
