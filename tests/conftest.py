"""Settings of every test process, made before torch is imported."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


# Each of the suite's processes computes on one core: with torch's default, a thread for each core in each process,
# they spend most of their time waiting for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU to test on, Triton's kernels are interpreted. Triton reads this when a kernel is defined.
if os.environ.get("T6_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def path_of_other_processes() -> None:
    """Not the repository: what is to see it is told so. Not set earlier, as it is not for the suite's own processes."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent / "other_processes")


@pytest.fixture
def signals_of_a_terminal() -> Iterator[None]:
    """What ends a process ends this one, too: started in the background or by nohup, it would ignore Ctrl-C or SIGHUP."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)
