"""Many random cases of kernels on a GPU, in as many processes as cores: what `python -m tests.modeling_t6.*_cases FIRST LAST` runs."""

import sys
from collections.abc import Callable

import torch


def run_cases(run: Callable[[int], tuple[str, object, float, float]], chunksize: int = 1) -> None:
    """
    Runs the seeds that the command line names, in so many processes if it has a third number; exits with 1 if any failed.

    Args:
        run: a function of a module, which is pickled: from a seed to the name of its kind, the case, its error, and the largest allowed.
    """
    first, last = int(sys.argv[1]), int(sys.argv[2])
    worst, failures = {}, 0
    with torch.multiprocessing.get_context("spawn").Pool(int(sys.argv[3]) if len(sys.argv) > 3 else None) as pool:
        for name, case, error, limit in pool.imap_unordered(run, range(first, last), chunksize=chunksize):
            worst[name] = max(worst.get(name, 0.0), error)
            if not error <= limit:
                failures += 1
                print(f"error {error:.2e}: {name}: {case}")
    print(f"{last - first} random shapes, {failures} failures; worst errors {worst}")
    sys.exit(failures > 0)
