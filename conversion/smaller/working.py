"""
The folder beside DST from which an interrupted run goes on, if it is given the same inputs and options.

Inputs are told apart by their resolved paths and their content, all of it: SHA-256 over a model takes a second or so for
each gigabyte, which is little beside the hours that an interrupted run has worth keeping, and shapes, sizes or dates are
those of another training of the same model, too.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..files.errors import ConversionError
from ..files.folders import last_checkpoint, read_json, write_whole
from ..files.locks import release, take_lock


SETTINGS = "settings.json"
TEXTS = ("calibration", "held_out", "heal")
# Options that the result depends on, beside the inputs.
OPTIONS = (
    "revision", "dtype", "verify", "k_rank", "v_rank", "cache_ratio", "cache_dtype", "calibration_tokens", "method", "reconstruct_steps",
    "window", "compute_dtype", "heal_steps", "heal_tokens", "batch_size", "heal_accumulation", "heal_optimizer",
    "heal_learning_rate", "heal_cross_entropy", "seed",
)  # fmt: skip
NOTHING = "nothing of it is finished"
# What the folder holds, beside the settings.
EXACT_MODEL, COMPRESSED_MODEL, CHECKPOINTS = "exact", "compressed", "checkpoints"


def unfinished_folder(target: Path) -> Path:
    target = Path(os.path.realpath(target))
    return target.with_name(f".{target.name}.unfinished")


def describe(place: Path, files: list[Path]) -> dict[str, str]:
    """Where an input lies, and the digest of its files, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return {"path": os.path.realpath(place), "sha256": digest.hexdigest()}


def read_digests(args: argparse.Namespace) -> dict[str, dict[str, str] | None]:
    """
    The descriptions of the texts.

    Raises:
        ConversionError: naming a text that is not there, not in UTF-8, or empty.
    """
    from .text import is_windows, read_text

    digests = {}
    for name in TEXTS:
        path = getattr(args, name)
        if path is not None and not (name == "heal" and is_windows(path)):
            read_text(path)
        digests[name] = None if path is None else describe(path, [path])
    return digests


@contextlib.contextmanager
def working_folder(args: argparse.Namespace, inputs: dict[str, dict[str, str] | None]) -> Iterator[Path]:
    """
    The folder of an unfinished run that is gone on with, or a new one. It stays if something worth keeping is in it.

    Args:
        inputs: the descriptions of source and texts.

    Raises:
        ConversionError: if the unfinished run had other inputs or options, or is alive.
    """
    folder = unfinished_folder(args.target)
    new = {name: getattr(args, name) for name in OPTIONS} | inputs
    try:
        folder.mkdir(exist_ok=True)
        lock = take_lock(folder)
    except BlockingIOError as error:
        raise ConversionError(f"another run is making {args.target}: it is at work in {folder}") from error
    except OSError as error:
        raise ConversionError(f"cannot write {folder}: {error.strerror}") from error
    try:
        done = progress(folder)
        if args.overwrite or done == NOTHING:
            if done != NOTHING:
                print(f"--overwrite: the unfinished run in {folder} is removed, and this one begins anew", flush=True)
            for path in folder.iterdir():
                path.unlink() if path.is_file() else shutil.rmtree(path)
            write_whole(folder / SETTINGS, json.dumps(new, indent=2) + "\n")
        else:
            check_same(folder, read_json(folder / SETTINGS), new)
            print(f"the unfinished run in {folder} goes on: {done}", flush=True)
        yield folder
    finally:
        if progress(folder) == NOTHING:
            shutil.rmtree(folder, ignore_errors=True)
        release(lock)


def progress(folder: Path) -> str:
    """What of a run is finished."""
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    parts = [f"the {name} model is there" for name in (EXACT_MODEL, COMPRESSED_MODEL) if (folder / name).is_dir()]
    parts += [] if checkpoint is None else [f"healing is at step {checkpoint.name.removeprefix('checkpoint-')}"]
    return ", ".join(parts) or NOTHING


def check_same(folder: Path, old: dict, new: dict) -> None:
    """Raises a `ConversionError` that names the first input or option in which two runs differ."""
    anew = "--overwrite begins anew"
    if old.keys() != new.keys():  # what it has made may be what this one would not
        raise ConversionError(f"{folder} is an unfinished run of another version of this program: {anew}")
    for name in new:
        if old.get(name) == new[name]:
            continue
        option = "SRC" if name == "source" else f"--{name.replace('_', '-')}"
        before, now = old.get(name), new[name]
        if isinstance(before, dict) and isinstance(now, dict):
            if before.get("path") == now["path"]:
                raise ConversionError(
                    f"{folder} is an unfinished run, and {option}, {now['path']}, has changed since: {anew}"
                )
            before, now = before.get("path"), now["path"]
        elif isinstance(now, dict):
            now = now["path"]
        raise ConversionError(f"{folder} is an unfinished run with {option} {before}, this one has {now}: {anew}")
