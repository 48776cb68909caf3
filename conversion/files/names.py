"""Names of files in a folder: which ones match patterns, and how errors list many."""

import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is of a file's path in its folder; one without a folder is of files at the top."""
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)


def matching_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of the folder, and of folders in it, whose paths match, sorted by these."""
    paths = [path for path in [*folder.iterdir(), *folder.glob("*/*")] if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return [names[name] for name in sorted(names) if matches(name, patterns)]


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    for path in matching_files(source, patterns):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def listed(names: Iterable[str]) -> str:
    """The first of many names, for an error that stays one line."""
    names = sorted(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
