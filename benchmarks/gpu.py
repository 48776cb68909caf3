"""What the GPU benchmarks share: timing by CUDA graph, the copy bandwidth, random caches, a line that says what ran."""

import gc
import statistics
from collections.abc import Callable

import torch
from shapes import CacheShape

from modeling_t6.cache_t6 import FactorLayout


LARGER_THAN_L2 = 256 * 2**20  # bytes


def copies_larger_than_l2(num_bytes: int) -> int:
    """As many caches of `num_bytes` as the L2 cache does not hold together, at most 16."""
    return min(16, -(-LARGER_THAN_L2 // num_bytes))


def random_cache(shape: CacheShape, copies: int = 1) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A query [batch, 1, heads, head_dim], and rows of keys and of values [batch, 1, tokens, width] for each copy."""
    batch, tokens, heads, head_dim, rank, dtype, groups = shape
    layout = FactorLayout(rank, heads // groups, head_dim)

    def random(sequences: int) -> torch.Tensor:
        return torch.randn(sequences, 1, tokens, layout.width, device="cuda", dtype=torch.bfloat16)

    def rows() -> torch.Tensor:
        if dtype == "int4":  # a sequence at a time, as what they are made of takes more room
            return torch.cat([layout.quantized.pack(*layout.unpack(random(1))) for _ in range(batch)])
        return random(batch).to(getattr(torch, dtype))

    query = torch.randn(batch, 1, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    return query, [(rows(), rows()) for _ in range(copies)]


def event_seconds(call: Callable) -> float:
    """Seconds of one call on the current stream, as the GPU counts them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def graph_seconds(calls: list[Callable], repeats: int = 7) -> float:
    """
    Median seconds of one call, out of replays of a graph of all `calls`. Calls should read different data, together
    more than the L2 cache holds, as the layers of a model do.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still be filling what the calls read
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        times = [event_seconds(graph.replay) / len(calls) for _ in range(repeats)]
    return statistics.median(times)


def copy_bandwidth(num_bytes: int = 2**32, repeats: int = 10) -> float:
    """Bytes read and written each second by copies between two tensors of `num_bytes`."""
    source = torch.randint(0, 2**62, (num_bytes // 8,), device="cuda")
    target = torch.empty_like(source)
    times = [event_seconds(lambda: target.copy_(source)) for _ in range(repeats)]
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
