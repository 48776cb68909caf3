"""Runs side by side: their order, turns, faults and time, and processes that do not outlive the one that started them."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest

import scheduler
from command_line import InputError


class Run(NamedTuple):
    key: str


NUMBERS = {"loss": 2.0, "seconds": 1.0, "ms_per_step": 40.0}

ORPHAN = """
import multiprocessing, os
context = multiprocessing.get_context("spawn")
ready = context.Event()
code = "import scheduler, time; scheduler.end_with_parent(); ready.set(); time.sleep(600)"
context.Process(target=exec, args=(code, {"ready": ready})).start()
ready.wait()
os.kill(os.getpid(), 9)
"""


def all_runs(names: list[str], done: dict, do: Callable, places: list[str | None]) -> None:
    """The results of runs of these names go into `done`; `do` is called with the device, the turn and the name of each."""

    def to_do(left: float) -> list[Run]:
        assert left <= 1e6 or left == math.inf
        return [Run(name) for name in names if name not in done]

    def new_worker(device, turn):
        return SimpleNamespace(do=lambda run: do(device, turn, run.key))

    for run, result in scheduler.do_runs(to_do, new_worker, places, time.time() + 1e6):
        done[run.key] = result


def test_next_run_depends_on_results(threads):
    """Two at once, each with its turn alone; the third is known when one of them has ended."""
    names, done, at_once, in_turn, most = ["a", "b"], {}, [], [], []

    def do(device, turn, name: str) -> dict:
        assert device.type == "cpu"
        at_once.append(name)
        while len(at_once) < 2:
            time.sleep(0.001)
        with turn:
            in_turn.append(name)
            most.append(len(in_turn))
            time.sleep(0.01)
            in_turn.remove(name)
        if "c" not in names:
            names.append("c")
        return NUMBERS | {"name": name}

    all_runs(names, done, do, [None, None])
    assert {name: result["name"] for name, result in done.items()} == {"a": "a", "b": "b", "c": "c"}
    assert list(done)[0] != "c" and most == [1, 1, 1]


def test_faults(threads, monkeypatch, capsys):
    """One that fails, one that time runs out for and one whose GPU is lost are not tried again; the others are done where there are GPUs."""
    names, done, tried, lost = ["fails", "late", "lost", *"abc"], {}, [], []

    def do(device, turn, name: str) -> dict | None:
        tried.append(name)
        if name == "lost":
            lost.append(threading.get_ident())
        if name in ("fails", "lost"):
            raise ValueError(f"no {name}")
        return None if name == "late" else NUMBERS

    def synchronize() -> None:
        if threading.get_ident() in lost:
            raise RuntimeError("the GPU is lost")

    monkeypatch.setattr(scheduler.torch.cuda, "synchronize", synchronize)
    with pytest.raises(InputError, match="^2 runs failed: fails: ValueError: no fails$"):
        all_runs(names, done, do, ["0", "1"])
    assert sorted(tried) == sorted(names) and sorted(done) == [*"abc"]
    output = capsys.readouterr()
    assert "ValueError: no fails" in output.err and "lost: its process ended before it did" in output.err
    assert "late: no time\n" in output.out and "\n3 of the runs known to be needed are left" in output.out
    with pytest.raises(InputError, match="^1 runs failed: lost: its process ended before it did"):
        all_runs(["lost", "a"], {}, do, ["0"])


@pytest.mark.once
def test_processes(monkeypatch, capsys):
    """Each sees its GPU alone. One that is killed ends all, for it may hold the turn of its GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr(scheduler.torch.cuda, "is_available", lambda: True)
    places = 2 * scheduler.visible_gpus(False)
    assert places == ["5", "7", "5", "7"] and scheduler.visible_gpus(True) == []

    done = {}

    def to_do(left: float) -> list[Run]:
        return [Run(name) for name in "ab" if name not in done] or [Run("killed")]

    with pytest.raises(InputError, match="^killed: its process was killed by signal 9$"):
        for run, result in scheduler.do_runs(to_do, Seeing, places[:2], time.time() + 1e6):
            done[run.key] = result["visible"]
    assert done == {"a": "5", "b": "7"} and os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert "a: 2.0000, 1.0 s, 40.00 ms a step\n" in capsys.readouterr().out


class Seeing:
    def __init__(self, device, turn):
        pass

    def do(self, run: Run) -> dict:
        if run.key == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
        return NUMBERS | {"visible": os.environ["CUDA_VISIBLE_DEVICES"]}


@pytest.mark.once
def test_processes_end_with_their_parent():
    """Who waits for what they print would wait for them, too."""
    path = f"import sys; sys.path[:] = {sys.path}\n"
    result = subprocess.run([sys.executable, "-c", path + ORPHAN], stdout=subprocess.PIPE, timeout=60)
    assert result.returncode == -9
