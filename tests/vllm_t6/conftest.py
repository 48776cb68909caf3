"""
The plugin in a real vLLM: its CPU build, or any other on a machine without a GPU. These tests are a run of their own,
`pytest tests/vllm_t6`: vLLM reads its settings, and Triton its own, as they are imported.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext

import pytest


if find_spec("vllm") is None:
    collect_ignore_glob = ["*"]
else:
    # The layer in PyTorch, as users of the CPU build have it. test_kernels.py has the interpreted kernels.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engines in the process of the test
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "NUMBA_NUM_THREADS": "1",
        "NUMBA_DISABLE_JIT": "1",  # vLLM proposes tokens by it: compiling that takes longer than all that is proposed
    }


@pytest.fixture(scope="session")
def context_of_processes(path_of_other_processes) -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.vllm_t6.preloaded"])
    return context


@pytest.fixture(scope="session")
def processes(context_of_processes) -> Iterator[ProcessPoolExecutor]:
    """A process that has imported vLLM, and in which no engine has run. It does one thing, and another takes its place."""
    with ProcessPoolExecutor(1, mp_context=context_of_processes, max_tasks_per_child=1) as pool:
        yield pool
