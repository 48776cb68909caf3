"""Many random cases of kernels on a GPU, in as many processes as cores: what `python -m tests.modeling_t6.*_cases FIRST LAST` runs."""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch


def run_cases(
    run: Callable[[int], tuple[str, object, float, float]], chunksize: int = 1, processes: int | None = None
) -> None:
    """
    Runs the seeds that the command line names, in so many processes if it has a third number; exits with 1 if any failed.

    Args:
        run: a function of a module, which is pickled: from a seed to the name of its kind, the case, its error, and the largest allowed.
        processes: instead of the third number; 0 is this process alone, which compute-sanitizer follows.
    """
    first, last = int(sys.argv[1]), int(sys.argv[2])
    if processes is None and len(sys.argv) > 3:
        processes = int(sys.argv[3])
    worst, failures = {}, 0
    with nullcontext() if processes == 0 else torch.multiprocessing.get_context("spawn").Pool(processes) as pool:
        seeds = range(first, last)
        results = map(run, seeds) if pool is None else pool.imap_unordered(run, seeds, chunksize=chunksize)
        for name, case, error, limit in results:
            error = math.inf if math.isnan(error) else error  # which a maximum would hide
            worst[name] = max(worst.get(name, 0.0), error)
            if not error <= limit:
                failures += 1
                print(f"error {error:.2e}: {name}: {case}", flush=True)
    print(f"{last - first} random cases, {failures} failures; worst errors {worst}")
    sys.exit(failures > 0)
