"""Links in a folder that may come from anyone: one of them may lead to a private key."""

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from .errors import ConversionError


def leads_out(path: Path, folder: Path) -> bool:
    """
    Whether a link leads to a file that is not the folder's. The Hub's cache keeps the files of `snapshots/COMMIT` in
    `blobs`.
    """
    root, target = folder.resolve(), Path(os.path.realpath(path))  # which ends for links in a circle, too
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    return not any(target.is_relative_to(root) for root in roots)


def check_files(folder: Path, patterns: Iterable[str]) -> None:
    """
    Raises:
        ConversionError: naming a file or folder at the top of `folder`, with a name of one of `patterns`, that leads out
            of it, leads nowhere, or is neither (reading a pipe may never end).
    """
    for path in sorted(folder.iterdir()):
        if not any(fnmatch(path.name, pattern.split("/")[0]) for pattern in patterns):
            continue
        for file in (path, *(sorted(path.rglob("*")) if path.is_dir() else ())):
            if leads_out(file, folder):
                raise ConversionError(
                    f"{file} is a link to {os.path.realpath(file)}, outside of the folder, and is not followed: "
                    "expected the file itself"
                )
            if not file.exists():
                raise ConversionError(f"{file} is a link to {os.path.realpath(file)}, which is not there")
            if not file.is_file() and not file.is_dir():
                raise ConversionError(f"{file} is no regular file")
