"""Folders that appear whole or not at all, and the JSON in them."""

import contextlib
import glob
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from .errors import ConversionError, unwritten
from .exchange import exchange
from .locks import release, take_lock
from .targets import MODEL, Kind, check_target, is_empty


def read_json(path: Path) -> dict:
    """The object in a JSON file, with or without a byte order mark, or a `ConversionError` that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing") from error
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


@contextlib.contextmanager
def new_folder(
    target: Path, overwrite: bool = False, inputs: Mapping[str, Path | None] = MappingProxyType({}), kind: Kind = MODEL
) -> Iterator[Path]:
    """
    A temporary folder beside `target` that takes its place when the block ends, and is removed when it fails. What runs
    that were killed have left beside `target` is removed first.

    Args:
        overwrite, inputs, kind: see `check_target`, which is asked at the start and again at the end.

    Raises:
        ConversionError: if `target` must not be replaced, or cannot be written.
    """
    shown, target = target, Path(os.path.realpath(target))
    remove_leftovers(target)
    check_target(shown, overwrite, inputs, kind)
    before = identity(target)
    made = [parent for parent in target.parents if not parent.exists()]
    folder, lock, whole = None, None, False
    # An open folder keeps its number, which otherwise goes to the next that is made when it is removed.
    opened = os.open(target, os.O_RDONLY) if before is not None and os.name == "posix" else None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder, lock = locked_folder(lambda: beside(target))
        yield folder
        follow_umask(folder)
        check_target(shown, overwrite, inputs, kind)
        if identity(target) != before:
            raise ConversionError(
                f"{shown} is no longer what it was when this run began: another has written there, which is not replaced"
            )
        replace_folder(folder, target)
        whole = True
    except OSError as error:
        if error.filename is not None:
            written = error.filename if error.filename2 is None else error.filename2  # of a copy
            place = Path(os.path.abspath(os.fsdecode(written)))
            if place not in target.parents and not any(place.is_relative_to(p) for p in (target, folder or target)):
                raise ConversionError(f"{place}: {error.strerror}") from error
        raise ConversionError(f"cannot write {shown}: {error.strerror or error}") from error
    except Exception as error:
        if (why := unwritten(error)) is None:
            raise
        raise ConversionError(f"cannot write {shown}: {why}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        release(lock)
        release(opened)
        with contextlib.suppress(OSError):  # one that holds something stays
            for parent in () if whole else made:
                parent.rmdir()


def identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from others that were in its place, and nothing of one that is not there or empty."""
    if not folder.is_dir() or is_empty(folder):
        return None
    status = folder.stat()
    return status.st_dev, status.st_ino


def beside(target: Path) -> Path:
    """A new folder beside `target`, with the permissions that the umask leaves."""
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    folder.mkdir()
    return folder


def locked_folder(make: Callable[[], Path]) -> tuple[Path, int | None]:
    """A new folder, and the lock on it."""
    while True:
        folder = make()
        try:
            lock = take_lock(folder)
        except (BlockingIOError, FileNotFoundError):  # in this moment, another run took it for a dead one's
            continue
        if folder.exists():
            return folder, lock
        release(lock)


def follow_umask(folder: Path) -> None:
    """Gives all in `folder`, some of it copied with permissions from elsewhere, those that the umask left `folder`."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o777
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


def remove_leftovers(target: Path) -> None:
    """Removes what runs that were killed left beside `target`, or puts back what one had taken from its place."""
    if not target.parent.is_dir():
        return
    begins = glob.escape(f".{target.name}.")
    for old in target.parent.glob(f"{begins}????????.old"):
        if not os.path.lexists(target):
            old.rename(target)
            print(f"{target} is put back: a run was killed while it replaced it", flush=True)
    for kind in ("partial", "old"):
        remove_dead(sorted(target.parent.glob(f"{begins}????????.{kind}")))


def remove_dead(folders: list[Path]) -> None:
    """Removes those that no run holds the lock on, and says so."""
    for folder in folders:
        try:
            lock = take_lock(folder)
        except (BlockingIOError, FileNotFoundError):  # of a run that is alive, or has just ended
            continue
        except OSError as error:
            print(f"{folder} is left from a run that was killed, and cannot be removed: {error.strerror}", flush=True)
            continue
        if lock is None:
            print(f"{folder} is left from another run: remove it if that is not alive", flush=True)
            continue
        shutil.rmtree(folder, ignore_errors=True)
        release(lock)
        print(f"{folder} is removed: a run that was killed had left it", flush=True)


@contextlib.contextmanager
def temporary_folder(prefix: str, place: Path | None = None) -> Iterator[Path]:
    """
    A folder in `place`, or where the system has temporary files, for what is not to be kept. Those with the same prefix
    that killed runs of the same user left there are removed first: by a name that nobody gives to what is to stay.
    """
    place = Path(tempfile.gettempdir() if place is None else place)
    if hasattr(os, "getuid"):  # there are no users on Windows
        left = []
        for path in place.glob(f"{glob.escape(prefix)}????????.tmp"):
            with contextlib.suppress(FileNotFoundError):  # of a run that has ended in this moment
                if path.lstat().st_uid == os.getuid() and path.is_dir() and not path.is_symlink():
                    left.append(path)
        remove_dead(left)
    folder, lock = locked_folder(lambda: Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=place)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        release(lock)


def replace_folder(new: Path, target: Path) -> None:
    """
    Puts the complete folder `new` in the place of `target`, or leaves `target` as it was. A kill at any moment leaves
    there the old or the new; without `exchange`, a kill between two renames leaves the old beside it, under a name by which
    `remove_leftovers` puts it back.
    """
    if identity(target) is None:
        new.rename(target)  # over nothing or an empty folder only: it fails if the folder was filled in this moment
        return
    if exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)
        return
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """A file that a killed run leaves as it was, or new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint: `trainer_state.json` is the file that Trainer writes last, and in its place."""
    checkpoints = {}
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):  # a killed run left the beginning of the file
            json.loads(path.read_text(encoding="utf-8"))
            checkpoints[int(path.parent.name.removeprefix("checkpoint-"))] = path.parent
    return checkpoints[max(checkpoints)] if checkpoints else None
