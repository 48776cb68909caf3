"""A model with a smaller cache: its moments, the ranks, the fits, and the weights that come of them."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from modeling_t6 import T6ForCausalLM

from ..files.errors import ConversionError
from .fits import HeadFits
from .key_fits import KEY_ITERATIONS
from .moments import collect_moments
from .probe import Probe
from .questions import Questions
from .ranks import Ranks, check_options, choose_ranks, row_bytes
from .stages import stage
from .value_fits import VALUE_ITERATIONS
from .weights import balance, compressed_attention, compressed_model


TRIAL_ITERATIONS = 30  # enough to compare ranks
NEAR = 1.5  # times the least cost: costs add up about so well, and what costs more is not tried
CANDIDATE_RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)


@torch.no_grad()
def compress(
    model: T6ForCausalLM,
    calibration: torch.Tensor,
    k_ranks: Ranks = None,
    v_ranks: Ranks = None,
    cache_ratio: float | None = None,
    method: str = "fit",
    batch_size: int = 8,
    quiet: bool = False,
    questions: Questions | None = None,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtypes: Sequence[str | None] = (None,),
) -> T6ForCausalLM:
    """
    A copy of a converted model whose cache is smaller.

    Args:
        model: with constant A factors and queries of full rank, as `python -m conversion hf` makes them.
        calibration: token ids [n, seq] of the text on whose activations little is to be lost.
        k_ranks, v_ranks: one for all layers or one for each; `None` keeps the model's.
        cache_ratio: in place of ranks, how many times smaller the cache is to be; the ranks then differ from layer to
            layer, and between keys and values, where the predictions change less so than with equal ranks.
        batch_size: rows of `calibration` that go through the model at a time.
        questions: text that is part of the calibration, and whose answers the ranks of a `cache_ratio` are to keep.
        dtype: in which the model will be used, as the rows of its cache are if their dtype is `None`.
        cache_dtypes: what the `cache_dtype` of the result may be, the first if ranks are given. Of several, that is taken with which
            a `cache_ratio` costs least: rows of 8 bits may have twice the ranks of rows of 16.
        method: `"fit"`, or `"mean-pool"` for the GQA paper's recipe.

    Raises:
        ConversionError: for ranks that the model cannot have.
    """
    check_options(model.config, k_ranks, v_ranks, cache_ratio)
    attentions = [layer.self_attn for layer in model.model.layers]
    fits = HeadFits(attentions, method)
    if method == "fit":
        batches = calibration.split(batch_size)
        if questions is not None:
            batches += questions.ids.split(max(1, batch_size * calibration.shape[1] // questions.ids.shape[1]))
        with stage("calibrating", quiet):
            fits.use(collect_moments(model, tqdm(batches, desc="calibrating", unit="batch", disable=quiet)))

    parts = [(layer, side) for layer in range(len(attentions)) for side in "kv"]
    full = [getattr(model.config, f"{side}_rank") for _, side in parts]

    def build(ranks: list[int], cache_dtype: str | None) -> T6ForCausalLM:
        layers = defaultdict(list)  # of each side and rank
        for (layer, side), rank in zip(parts, ranks):
            layers[side, rank].append(layer)
        found = {}
        with stage("fitting", quiet):
            for (side, rank), some in tqdm(layers.items(), desc="fitting", unit="rank", disable=quiet):
                iterations = KEY_ITERATIONS if side == "k" else VALUE_ITERATIONS
                found |= {(layer, side): fit for layer, fit in zip(some, fits(side, rank, iterations, some))}
        result = compressed_model(model, [(found[layer, "k"], found[layer, "v"]) for layer in range(len(attentions))])
        if method == "fit":
            for index, layer in enumerate(result.model.layers):
                balance(layer.self_attn, values=found[index, "v"] is not None)
        result.config.cache_dtype = cache_dtype
        return result

    if cache_ratio is None:
        chosen = []
        for layer, side in parts:
            ranks = (k_ranks if side == "k" else v_ranks) or [getattr(model.config, f"{side}_rank")]
            chosen.append(ranks[layer] if len(ranks) > 1 else ranks[0])
        return build(chosen, cache_dtypes[0])

    probe = Probe(model, calibration, questions)
    candidates = [
        [whole]
        if side == "k" and model.config.qk_norm
        else [rank for rank in CANDIDATE_RANKS if rank < whole] + [whole]
        for (_, side), whole in zip(parts, full)
    ]
    costs: list[dict[int, torch.Tensor | float]] = [{} for _ in parts]
    count = sum(map(len, candidates))
    with (
        stage("trying ranks", quiet),
        tqdm(total=count, desc="trying ranks", unit="rank", disable=quiet) as progress,
    ):
        for side, rank in sorted({(side, rank) for (_, side), ranks in zip(parts, candidates) for rank in ranks}):
            places = [place for place, part in enumerate(parts) if part[1] == side]
            for place, fitted in zip(places, fits(side, rank, TRIAL_ITERATIONS)):
                layer = parts[place][0]
                if fitted is None:
                    costs[place][rank] = 0.0
                else:
                    pair = (fitted, None) if side == "k" else (None, fitted)
                    module = model.model.layers[layer]
                    module.self_attn = compressed_attention(attentions[layer], *pair)
                    costs[place][rank] = probe.divergence(model, first=layer)
                    module.self_attn = attentions[layer]
                progress.update()
    costs = [{rank: float(cost) for rank, cost in part.items()} for part in costs]

    whole = build(full, None)  # balanced, as rounding will meet it
    budget = int(sum(full) * model.config.head_dim * dtype.itemsize / cache_ratio * (1 + 1e-12))

    def size_in(cache_dtype: str | None) -> Callable[[int], int]:
        return functools.partial(
            row_bytes, head_dim=model.config.head_dim, itemsize=dtype.itemsize, cache_dtype=cache_dtype
        )

    def choose(cache_dtype: str | None, whole: T6ForCausalLM) -> tuple[float, list[int], str | None]:
        """What the best ranks of rows of a dtype cost, if costs add up, and these."""
        size = size_in(cache_dtype)
        if budget < sum(size(min(cost)) for cost in costs):
            return math.inf, [], cache_dtype
        ranks = choose_ranks(costs, budget, size)
        rounding = 0.0 if cache_dtype is None else probe.divergence(whole, cache_dtype).item()
        return rounding + sum(cost[rank] for cost, rank in zip(costs, ranks)), ranks, cache_dtype

    chosen = [choose(name, whole) for name in cache_dtypes]
    del whole  # as large as the model
    least = min(cost for cost, _, _ in chosen)
    if least == math.inf:
        raise ConversionError(f"--cache-ratio {cache_ratio:g}: no ranks are small enough for this model")
    trials = []
    for total, ranks, cache_dtype in chosen:
        if total > NEAR * least:
            continue
        trials.append((ranks, cache_dtype))
        equal = [min(most, sum(ranks) // len(parts)) for most in full]
        known = all(rank in cost for rank, cost in zip(equal, costs))
        # Rows of odd ranks may be padded, so that as many ranks may take more bytes.
        if equal != ranks and known and sum(equal) == sum(ranks) and sum(map(size_in(cache_dtype), equal)) <= budget:
            trials.append((equal, cache_dtype))
    models = (build(*trial) for trial in trials)
    return min(models, key=lambda trial: probe.divergence(trial, trial.config.cache_dtype).item())
