"""Which ranks a model can have, and which are worth their bytes."""

from collections.abc import Callable

from modeling_t6 import T6Config
from modeling_t6.cache_t6 import CACHE_DTYPES, FactorLayout

from ..files.errors import ConversionError


Ranks = list[int] | None


def row_bytes(rank: int, head_dim: int, itemsize: int, cache_dtype: str | None, num_heads: int = 0) -> int:
    """Bytes of a token's row of A [rank, num_heads] and B [rank, head_dim]: of numbers of `itemsize` bytes, or of a `cache_dtype`."""
    layout = FactorLayout(rank, num_heads, head_dim)
    if cache_dtype == "int4":
        return layout.quantized.width
    return layout.width * (itemsize if cache_dtype is None else CACHE_DTYPES[cache_dtype].itemsize)


def choose_ranks(
    costs: list[dict[int, float]], budget: int, size: Callable[[int], int] = lambda rank: rank
) -> list[int]:
    """
    A rank for each part of the cache, their sizes at most `budget` in all, for little total cost.

    Args:
        costs: of each part, the cost of each rank that it may have.
        size: of a rank; no less for a greater one.
    """
    ranks = [max(cost) for cost in costs]

    def total() -> int:
        return sum(map(size, ranks))

    while total() > budget:
        moves = [
            ((cost[lower] - cost[rank]) / (size(rank) - size(lower)), part, lower)
            for part, (rank, cost) in enumerate(zip(ranks, costs))
            for lower in cost
            if size(lower) < size(rank)
        ]
        if not moves:
            raise ConversionError(f"no ranks are small enough: their sizes are at least {total()}, over {budget}")
        _, part, lower = min(moves)
        ranks[part] = lower
    while True:  # what the last step left over
        moves = [
            ((cost[rank] - cost[higher]) / max(size(higher) - size(rank), 1e-9), part, higher)
            for part, (rank, cost) in enumerate(zip(ranks, costs))
            for higher in cost
            if higher > rank and total() - size(rank) + size(higher) <= budget and cost[higher] < cost[rank]
        ]
        if not moves:
            return ranks
        _, part, higher = max(moves)
        ranks[part] = higher


def check_options(
    config: T6Config, k_ranks: Ranks, v_ranks: Ranks, cache_ratio: float | None, cache_dtype: str | None = None
) -> None:
    """
    Raises a `ConversionError` for ranks that the model cannot have, with rows of a `cache_dtype`: `"model"` for those of its own,
    `None` for any.
    """
    for option, ranks, full in (("--k-rank", k_ranks, config.k_rank), ("--v-rank", v_ranks, config.v_rank)):
        if ranks is not None and len(ranks) not in (1, config.num_hidden_layers):
            raise ConversionError(
                f"{option} has {len(ranks)} ranks: expected 1, or {config.num_hidden_layers} for the layers"
            )
        for rank in ranks or ():
            if not 1 <= rank <= full:
                raise ConversionError(f"{option} {rank}: expected 1 to {full}, the source's number of key/value heads")
    if cache_dtype == "int4" and config.head_dim % 2:
        raise ConversionError(f"--cache-dtype int4 needs an even head_dim, this model has {config.head_dim}")
    if cache_ratio is not None:
        smallest = cache_dtype or ("float8_e4m3fn" if config.head_dim % 2 else "int4")

        def least(k_rank: int, num_heads: int) -> int:
            rows = None if smallest == "model" else smallest
            return sum(row_bytes(rank, config.head_dim, 2, rows, num_heads) for rank in (k_rank, 1))

        size = least(1, 0) if not config.qk_norm else min(least(config.k_rank, 0), least(1, config.k_rank))
        most = 2 * (config.k_rank + config.v_rank) * config.head_dim / size  # beside 16 bits
        if not 1 <= cache_ratio <= most:
            rows = "" if cache_dtype is None else f" with --cache-dtype {cache_dtype}"
            raise ConversionError(f"--cache-ratio {cache_ratio:g}: expected 1 to {most:g} for this model{rows}")
