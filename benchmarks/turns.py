"""Processes that start side by side, as starting takes long, and measure one at a time."""

import concurrent.futures
import contextlib
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator


def alone(function: Callable, *arguments):
    """The result of a function in a process of its own, with whose end all memory is free again."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


class Turns:
    """Of processes that start together: nobody's turn comes before all have started, and then one at a time."""

    def __init__(self, manager, parties: int):
        self.started, self.turn = manager.Barrier(parties), manager.Lock()

    @contextlib.contextmanager
    def mine(self) -> Iterator[None]:
        self.started.wait()
        with self.turn:
            yield

    def alone(self, function: Callable, *arguments):
        """What `alone` does; if it fails, the others do not wait for it."""
        try:
            return alone(function, self, *arguments)
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                print(f"{function.__name__}{arguments[:1]}: {error!r}", file=sys.stderr, flush=True)
            self.started.abort()
            raise
