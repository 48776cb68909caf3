"""How the benchmarks time calls by the clock; `gpu.graph_seconds` times those that a CUDA graph holds."""

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def call_seconds(call: Callable, device: str = "cpu") -> float:
    """Seconds until the device has done what a call asks of it."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(calls: dict[str, Callable], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each call. They take turns, so that their ratios hold whatever else the machine does."""
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(call_seconds(call, device))
    return {name: statistics.median(seconds) for name, seconds in times.items()}
