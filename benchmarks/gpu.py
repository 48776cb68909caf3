"""What the GPU benchmarks share: timing by CUDA graph, the copy bandwidth, and a line that says what ran."""

import statistics
from collections.abc import Callable

import torch


LARGER_THAN_L2 = 256 * 2**20  # bytes


def graph_seconds(calls: list[Callable], repeats: int = 7) -> float:
    """
    Median seconds of one call, out of replays of a graph of all `calls`. Calls should read different data, together
    more than the L2 cache holds, as the layers of a model do.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(times)


def copy_bandwidth(num_bytes: int = 2**32, repeats: int = 10) -> float:
    """Bytes read and written each second by copies between two tensors of `num_bytes`."""
    source = torch.randint(0, 2**62, (num_bytes // 8,), device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * num_bytes / statistics.median(times)


def machine() -> str:
    """The GPU and the versions, for the head of a table."""
    import transformers
    import triton

    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"Transformers {transformers.__version__}"
    )
