"""How long the stages of a run take."""

import contextlib
import time
from collections.abc import Iterator


@contextlib.contextmanager
def stage(name: str, quiet: bool = False) -> Iterator[None]:
    """Prints, when the block has ended, the seconds that it took: `name: 1.2 s`."""
    start = time.perf_counter()
    yield
    if not quiet:
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
