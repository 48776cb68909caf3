"""Runs in threads in place of processes."""

import queue
import threading
import traceback
from types import SimpleNamespace

import pytest

import scheduler


class Thread(threading.Thread):
    """In place of a process: it ends with code 1 where what it does raises."""

    exitcode = 0

    def run(self) -> None:
        try:
            super().run()
        except Exception:
            traceback.print_exc()
            self.exitcode = 1


@pytest.fixture
def threads(monkeypatch) -> None:
    """What the scheduler starts shares the memory of the test, and starts at once."""
    context = SimpleNamespace(Process=Thread, Queue=queue.Queue, Lock=threading.Lock)
    monkeypatch.setattr(scheduler.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(scheduler, "end_with_parent", lambda: None)
    monkeypatch.setattr(scheduler.gc, "collect", lambda: 0)  # which takes long in a process of tests
