"""How much a disk has room for."""

import shutil
from pathlib import Path

from .errors import ConversionError


def check_space(folder: Path, needed: int) -> None:
    """Raises a `ConversionError` if the disk of `folder` has no `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConversionError(
            f"the weights take {needed / 1e9:,.1f} GB, the disk of {folder.parent} has {free / 1e9:,.1f} GB free"
        )
