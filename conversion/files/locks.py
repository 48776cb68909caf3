"""Which folders belong to a run that is alive: it holds a lock on them, which ends with its process, however that ends."""

import os
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def take_lock(folder: Path) -> int | None:
    """
    A descriptor that holds the lock on `folder` until it is closed, or `None` where the system or its file system has no
    locks.

    Raises:
        BlockingIOError: if the lock is held already.
        FileNotFoundError: if there is no such folder.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def release(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
