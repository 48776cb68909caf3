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
"""
What the commands of this folder share, none of which waits for torch: arguments, errors of one line, files and folders.

A command's arguments are parsed before its other imports, which take seconds. Importing this module puts the checkout on
the path, so that an example runs without any installation.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(1, str(ROOT))  # behind this folder

from conversion.files.errors import ConversionError, one_line, unwritten
from conversion.files.folders import last_checkpoint, new_folder, replace_folder, temporary_folder, write_whole
from conversion.files.locks import release, take_lock
from conversion.files.signals import Stopped, stoppable
from conversion.files.targets import TOKENIZER, Kind, check_target


__all__ = [
    "DTYPES", "TOKENIZER", "InputError", "Kind", "MatchingPaths", "add_folder_arguments", "check_folders", "check_target", "complete_folders",
    "field_and_value", "input_errors", "inputs", "kind_and_path", "last_checkpoint", "loading", "new_folder", "number", "one_line", "only_call",
    "read_text", "remove_checkpoints", "replace_folder", "temporary_folder", "utf8", "write_json", "write_whole",
]  # fmt: skip


# In which a model is loaded; auto: as its checkpoint says.
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line."""


@contextlib.contextmanager
def input_errors(command: str) -> Iterator[None]:
    """Ends the process with one line where an `InputError` is raised or a file fails, or where it is told to stop."""
    try:
        with stoppable():
            yield
    except (InputError, ConversionError, OSError) as error:
        raise SystemExit(f"{command}: error: {one_line(error)}") from None
    except Exception as error:
        if (why := unwritten(error)) is None:
            raise
        raise SystemExit(f"{command}: error: {why}") from None
    except Stopped as error:
        print(f"{command}: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None


# Arguments


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], int | float]:
    """An argparse type: a number in a range."""

    def convert(text: str) -> int | float:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    convert.__name__ = f"{kind.__name__} in [{low}, {high}]"  # argparse's message names the type
    return convert


def utf8(text: str) -> str:
    """An argparse type: text that is not of bytes in another encoding, which Python passes on as characters that are none."""
    text.encode()
    return text


utf8.__name__ = "UTF-8"  # argparse's message names the type


def field_and_value(text: str) -> tuple[str, object]:
    """An argparse type: FIELD=VALUE, the value as JSON or else as it is."""
    field, value = text.split("=", 1)
    try:
        return field, json.loads(value)
    except json.JSONDecodeError:
        return field, value


def kind_and_path(text: str) -> tuple[str, Path]:
    """An argparse type: KIND=PATH, or PATH for text of no kind of its own."""
    kind, separator, path = text.partition("=")
    return (kind, Path(path)) if separator and not Path(text).exists() else ("text", Path(text))


class MatchingPaths(argparse.Action):
    """Of kinds and paths: patterns, which the shell leaves as they are behind `KIND=`, become the files that match."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        found = [(kind, path, [] if path.exists() else sorted(path.parent.glob(path.name))) for kind, path in values]
        setattr(namespace, self.dest, [(kind, match) for kind, path, matches in found for match in matches or [path]])


def add_folder_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="the model folder to write")
    parser.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="(OUTPUT_DIR-checkpoints)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model folder and any old checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")


def complete_folders(args: argparse.Namespace) -> None:
    """Makes the folders absolute, since checkpoints record where the best of them lies."""
    args.output_dir = Path(os.path.abspath(args.output_dir))
    default_checkpoint_dir = args.output_dir.with_name(f"{args.output_dir.name}-checkpoints")
    args.checkpoint_dir = Path(os.path.abspath(args.checkpoint_dir or default_checkpoint_dir))


# Files and folders


@contextlib.contextmanager
def loading(what: str, name: str | Path) -> Iterator[None]:
    """Says in one line why the model, tokenizer or data set `name`, a folder or a name on the Hub, could not be loaded."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever libraries make of files that are damaged
        reason = one_line(error)
        if not Path(name).exists():
            from huggingface_hub.utils import HFValidationError, validate_repo_id

            try:
                validate_repo_id(str(name))
                reason = f"it is no folder here, and could not be had from the Hub: {reason}"
            except HFValidationError:
                reason = "there is no such folder; names on the Hub are NAME or OWNER/NAME"
        raise InputError(f"cannot load the {what} {name}: {reason}") from error


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def write_json(path: Path, content: dict, indent: int = 2, default: Callable | None = None) -> None:
    """Writes a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=indent, default=default) + "\n")


@contextlib.contextmanager
def only_call(work_dir: Path) -> Iterator[int | None]:
    """
    The call of a command that works in this folder. Yields the descriptor that holds the lock, as long as one of the processes that
    have it lives; `None` where there are no locks.

    Raises:
        InputError: there is another.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(work_dir)
    except BlockingIOError:
        raise InputError(f"--work-dir {work_dir}: another call is at work with it") from None
    try:
        yield lock
    finally:
        release(lock)


def remove_checkpoints(folder: Path) -> None:
    """Those of an older run, which a new run does not go on from. What has another name than Trainer gives, someone has kept."""
    for path in folder.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name):
            shutil.rmtree(path)


def inputs(args: argparse.Namespace) -> dict[str, Path | None]:
    """What a run reads and must not replace, by the names that errors give it."""
    texts = {f"--text {path}": path for path in getattr(args, "text", None) or ()}
    return texts | {f"--{name}": getattr(args, name.replace("-", "_"), None) for name in ("data", "validation-text")}


def check_folders(args: argparse.Namespace) -> Path | None:
    """Refuses to overwrite unasked, or what is no model; returns the checkpoint to resume from, if that is asked for."""
    check_target(args.output_dir, args.overwrite, inputs(args))
    checkpoint = last_checkpoint(args.checkpoint_dir)
    if args.resume:
        if checkpoint is None:
            raise InputError(f"--resume: there is no checkpoint in {args.checkpoint_dir}")
        return checkpoint
    if checkpoint is not None and not args.overwrite:
        raise InputError(f"{args.checkpoint_dir} holds checkpoints: --resume goes on, --overwrite starts anew")
    return None
