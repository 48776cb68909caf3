"""
What the GPU benchmarks share: timing by CUDA graph, the copy bandwidth, a line that says what ran, and the options of those
that write JSON and draw it.
"""

import argparse
import gc
import json
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


def release_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def parse_args(parser: argparse.ArgumentParser, plot: Callable[[dict, str], None]) -> argparse.Namespace:
    """With `--output` and `--plot`; if a picture is asked for, it is drawn, and the program ends."""
    parser.add_argument("--output", metavar="JSON")
    parser.add_argument("--plot", nargs=2, metavar=("JSON", "PNG"), help="draw what an earlier run wrote")
    args = parser.parse_args()
    if args.plot:
        with open(args.plot[0]) as file:
            plot(json.load(file), args.plot[1])
        raise SystemExit
    return args


def save(data: dict, path: str | None) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(data, file, indent=1)
