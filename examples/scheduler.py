"""
Runs side by side, each in one of several processes on all GPUs. Which is next is asked anew whenever a process is idle, so that it may
depend on the results so far; a run that fails leaves the others.
"""

import gc
import multiprocessing
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from command_line import InputError


Run = Any  # a named tuple, whose `key` is its name in the results


def visible_gpus(is_on_cpu: bool) -> list[str]:
    """As `CUDA_VISIBLE_DEVICES` names them; none where the CPU is asked for."""
    if is_on_cpu or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def do_runs(
    to_do: Callable[[float], Iterable[Run]], new_worker: Callable, places: list[str | None], deadline: float
) -> Iterator[tuple[Run, dict]]:
    """
    Does runs until there are none left, or no time; yields each with its result when it has ended.

    Args:
        to_do: given the seconds that are left, the runs that the results lack and that would end in time, in the order in which they
            are wanted.
        new_worker: called in each process with its device and a lock of its GPU, which is held while a run must be alone on the GPU.
            Returns an object whose `do(run)` returns the result, at least "loss", "seconds" and "ms_per_step", or `None` where time ran
            out. `new_worker` and runs are pickled.
        places: the GPU of each process, or `None` for the CPU.
        deadline: as `time.time()`.

    Raises:
        InputError: runs failed, and the others have been done; or a process was killed.
    """
    processes, late, failures = Processes(new_worker, places), set(), {}

    def next_run() -> Run | None:
        skipped = {*late, *failures, *(run.key for run in processes.running.values())}
        return next((run for run in to_do(deadline - time.time()) if run.key not in skipped), None)

    while True:
        for index in processes.idle():
            if (run := next_run()) is None:
                break  # there may be one when others have ended
            processes.give(index, run)
        if not processes.running:
            break
        for run, result, error in processes.wait():
            if result is not None:
                numbers = f"{result['loss']:.4f}, {result['seconds']:.1f} s, {result['ms_per_step']:.2f} ms a step"
                print(f"{run.key}: {numbers}", flush=True)
                yield run, result
            elif error is None:
                late.add(run.key)
                print(f"{run.key}: no time", flush=True)
            else:
                failures[run.key] = error
                print(f"{run.key}: {error}", file=sys.stderr, flush=True)
    processes.end()
    print(f"{len(list(to_do(float('inf'))))} of the runs known to be needed are left")
    if failures:
        key, error = next(iter(failures.items()))
        raise InputError(f"{len(failures)} runs failed: {key}: {error.strip().splitlines()[-1]}")


class Processes:
    """A process for each place, started when it is given its first run; processes are known by the index of their place."""

    def __init__(self, new_worker: Callable, places: list[str | None]):
        self.new_worker, self.places = new_worker, places
        self.context = multiprocessing.get_context("spawn")
        self.turns = {gpu: self.context.Lock() for gpu in places}
        self.todo, self.done = [self.context.Queue() for _ in places], self.context.Queue()
        self.processes, self.running = {}, {}  # by index

    def lost(self) -> list[int]:
        return [index for index, process in self.processes.items() if not process.is_alive()]

    def idle(self) -> list[int]:
        return [index for index in range(len(self.places)) if index not in (*self.running, *self.lost())]

    def give(self, index: int, run: Run) -> None:
        if index not in self.processes:
            self._start(index)
        self.running[index] = run
        self.todo[index].put(run)

    def _start(self, index: int) -> None:
        gpu, before = self.places[index], os.environ.get("CUDA_VISIBLE_DEVICES")
        arguments = self.new_worker, gpu, self.turns[gpu], self.todo[index], self.done, index
        self.processes[index] = self.context.Process(target=work, args=arguments, daemon=True)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if gpu is not None:  # each sees one, the first: what is compiled for one is for all
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        self.processes[index].start()
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        else:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)

    def wait(self) -> list[tuple[Run, dict | None, str | None]]:
        """
        Waits up to a second for runs to end; each with its result, a traceback, or neither if it was out of time.

        Raises:
            InputError: a process was killed, with the turn of its GPU, perhaps.
        """
        try:
            index, *outcome = self.done.get(timeout=1.0)
            return [(self.running.pop(index), *outcome)]
        except queue.Empty:
            ended = []
        for index in self.running.keys() & self.lost():
            run, code = self.running.pop(index), self.processes[index].exitcode
            if code < 0:
                raise InputError(f"{run.key}: its process was killed by signal {-code}")
            ended.append((run, None, "its process ended before it did"))
        return ended

    def end(self) -> None:
        for index in self.processes:
            self.todo[index].put(None)
        for process in self.processes.values():
            process.join()


def work(new_worker: Callable, gpu: str | None, turn: AbstractContextManager, todo, done, index: int) -> None:
    """The main function of a process: does the runs that it is given until it is given `None`."""
    end_with_parent()
    worker = new_worker(torch.device("cpu" if gpu is None else "cuda"), turn)
    for run in iter(todo.get, None):
        result = error = None
        try:
            result = worker.do(run)
        except Exception:  # the others go on
            error = traceback.format_exc()
            if gpu is not None:
                torch.cuda.synchronize()  # ends this process where the GPU is lost, for all other runs would fail, too
        gc.collect()
        if gpu is not None:
            torch.cuda.empty_cache()
        done.put((index, result, error))


def end_with_parent() -> None:
    """Ends this process when its parent is gone, however that ended, instead of training on."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
