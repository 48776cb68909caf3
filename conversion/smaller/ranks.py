"""Which ranks a model can have, and which are worth their bytes."""

from modeling_t6 import T6Config

from ..files.errors import ConversionError


Ranks = list[int] | None


def choose_ranks(costs: list[dict[int, float]], budget: int) -> list[int]:
    """
    A rank for each part of the cache, their sum at most `budget`, for little total cost.

    Args:
        costs: of each part, the cost of each rank that it may have.
    """
    ranks = [max(cost) for cost in costs]
    while sum(ranks) > budget:
        moves = [
            ((cost[lower] - cost[rank]) / (rank - lower), part, lower)
            for part, (rank, cost) in enumerate(zip(ranks, costs))
            for lower in cost
            if lower < rank
        ]
        if not moves:
            raise ConversionError(f"no ranks are small enough: their sum is at least {sum(ranks)}, over {budget}")
        _, part, lower = min(moves)
        ranks[part] = lower
    while True:  # what the last step left over
        moves = [
            ((cost[rank] - cost[higher]) / (higher - rank), part, higher)
            for part, (rank, cost) in enumerate(zip(ranks, costs))
            for higher in cost
            if higher > rank and sum(ranks) - rank + higher <= budget and cost[higher] < cost[rank]
        ]
        if not moves:
            return ranks
        _, part, higher = max(moves)
        ranks[part] = higher


def check_options(config: T6Config, k_ranks: Ranks, v_ranks: Ranks, cache_ratio: float | None) -> None:
    """Raises a `ConversionError` for ranks that the model cannot have."""
    for option, ranks, full in (("--k-rank", k_ranks, config.k_rank), ("--v-rank", v_ranks, config.v_rank)):
        if ranks is not None and len(ranks) not in (1, config.num_hidden_layers):
            raise ConversionError(
                f"{option} has {len(ranks)} ranks: expected 1, or {config.num_hidden_layers} for the layers"
            )
        for rank in ranks or ():
            if not 1 <= rank <= full:
                raise ConversionError(f"{option} {rank}: expected 1 to {full}, the source's number of key/value heads")
    if config.qk_norm and k_ranks is not None and set(k_ranks) != {config.k_rank}:
        raise ConversionError(
            "--k-rank: this model normalises each key, which does not commute with mixing heads; its values "
            "alone can be compressed, by --v-rank"
        )
    if cache_ratio is not None:
        full, least = config.k_rank + config.v_rank, (config.k_rank if config.qk_norm else 1) + 1
        most = 2 * full / least  # with rows of 8 bits in place of 16
        if not 1 <= cache_ratio <= most:
            raise ConversionError(f"--cache-ratio {cache_ratio:g}: expected 1 to {most:g} for this model")
