"""The time of a run's stages, and the precision of a GPU's products in them."""

import contextlib
import time
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def stage(name: str, quiet: bool = False) -> Iterator[None]:
    """Prints, when the block has ended, the seconds that it took: `name: 1.2 s`."""
    start = time.perf_counter()
    yield
    if not quiet:
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """In the block, a GPU multiplies float32 matrices in TF32: enough for what is fitted and compared, not for what is reported."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
