"""A model with a smaller cache: its moments, the ranks, the fits, and the weights that come of them."""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from modeling_t6 import T6ForCausalLM

from ..files.errors import ConversionError
from .fits import HeadFits
from .key_fits import KEY_ITERATIONS, KeyFit
from .moments import collect_moments
from .normed_heads import with_normed_heads
from .probe import Probe
from .questions import Questions
from .ranks import Ranks, check_options, choose_ranks, row_bytes
from .stages import stage
from .value_fits import VALUE_ITERATIONS, ValueFit
from .weights import balance, compressed_attention, compressed_model


TRIAL_ITERATIONS = 30  # enough to compare ranks
NEAR = 1.5  # times the least cost: costs add up only roughly, and what costs more than this is not built
CANDIDATE_RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)


class Compression:
    """
    Makes models of other ranks from one with constant A, all of them by the same pass over the calibration.

    Args:
        model: with full ranks.
        batches: token ids [batch, seq] each, of which a `"fit"` loses little.
    """

    def __init__(self, model: T6ForCausalLM, method: str, batches: Sequence[torch.Tensor], quiet: bool):
        self.model, self.method, self.quiet = model, method, quiet
        self.attentions = [layer.self_attn for layer in model.model.layers]
        self.parts = [(layer, side) for layer in range(len(self.attentions)) for side in "kv"]
        self.full = [getattr(model.config, f"{side}_rank") for _, side in self.parts]
        self.fits = HeadFits(self.attentions, method)
        self.known: dict[tuple[int, str, int], KeyFit | ValueFit | None] = {}  # by layer, side and rank
        if method == "fit":
            with stage("calibrating", quiet):
                self.fits.use(collect_moments(model, tqdm(batches, desc="calibrating", unit="batch", disable=quiet)))

    def build(self, ranks: list[int], cache_dtype: str | None) -> T6ForCausalLM:
        """A model with a rank for each of `parts`, its caches' rows in `cache_dtype`."""
        missing = defaultdict(list)  # layers by side and rank
        for (layer, side), rank in zip(self.parts, ranks):
            if (layer, side, rank) not in self.known:
                missing[side, rank].append(layer)
        with stage("fitting", self.quiet):
            for (side, rank), layers in tqdm(missing.items(), desc="fitting", unit="rank", disable=self.quiet):
                iterations = KEY_ITERATIONS if side == "k" else VALUE_ITERATIONS
                fits = self.fits(side, rank, iterations, layers)
                self.known |= {(layer, side, rank): fit for layer, fit in zip(layers, fits)}
        fits = [self.known[(*part, rank)] for part, rank in zip(self.parts, ranks)]
        pairs = list(zip(fits[::2], fits[1::2]))  # of each layer, keys and values
        result = compressed_model(self.model, pairs)
        if self.method == "fit":
            for (_, values), layer in zip(pairs, result.model.layers):
                balance(layer.self_attn, values is not None, layer.input_layernorm.weight.double())
        result.config.cache_dtype = cache_dtype
        return result

    def costs(self, probe: Probe) -> list[dict[int, float]]:
        """The divergence that each candidate rank of each of `parts` causes by itself, all else as in the model."""
        candidates = [
            [full]
            if side == "k" and self.model.config.qk_norm is True
            else [rank for rank in CANDIDATE_RANKS if rank < full] + [full]
            for (_, side), full in zip(self.parts, self.full)
        ]
        costs: list[dict[int, torch.Tensor | float]] = [{} for _ in self.parts]
        with (
            stage("trying ranks", self.quiet),
            tqdm(total=sum(map(len, candidates)), desc="trying ranks", unit="rank", disable=self.quiet) as progress,
        ):
            for side, rank in sorted(
                {(part[1], rank) for part, ranks in zip(self.parts, candidates) for rank in ranks}
            ):
                places = [place for place, part in enumerate(self.parts) if part[1] == side]
                for place, fitted in zip(places, self.fits(side, rank, TRIAL_ITERATIONS)):
                    layer = self.parts[place][0]
                    if fitted is None:
                        costs[place][rank] = 0.0
                    else:
                        pair = (fitted, None) if side == "k" else (None, fitted)
                        module = self.model.model.layers[layer]
                        module.self_attn = compressed_attention(self.attentions[layer], *pair)
                        costs[place][rank] = probe.divergence(self.model, first=layer)
                        module.self_attn = self.attentions[layer]
                    progress.update()
        return [{rank: float(cost) for rank, cost in part.items()} for part in costs]

    def choices(
        self, probe: Probe, budget: int, itemsize: int, cache_dtypes: Sequence[str | None]
    ) -> list[tuple[float, list[int], str | None]]:
        """
        For rows of at most `budget` bytes in all: the cost, if costs add up, the ranks and the dtype, of the best ranks for each of
        `cache_dtypes`, and of equal ranks where they take as many.
        """
        costs = self.costs(probe)
        unchanged = self.build(self.full, None)  # balanced, as rounding will meet it
        found = []
        for name in cache_dtypes:
            size = self.size_in(name, itemsize)
            if budget < sum(size(min(cost)) for cost in costs):
                continue
            ranks = choose_ranks(costs, budget, size)
            rounding = 0.0 if name is None else probe.divergence(unchanged, name).item()
            found.append((rounding + sum(cost[rank] for cost, rank in zip(costs, ranks)), ranks, name))
            equal = [min(most, sum(ranks) // len(self.parts)) for most in self.full]
            known = all(rank in cost for rank, cost in zip(equal, costs))
            # Rows of odd ranks may be padded, so that as many ranks may take more bytes.
            if equal != ranks and known and sum(equal) == sum(ranks) and sum(map(size, equal)) <= budget:
                found.append((found[-1][0], equal, name))
        return found

    def size_in(self, cache_dtype: str | None, itemsize: int) -> Callable[[int], int]:
        """Bytes of a row of a rank."""
        config = self.model.config
        num_heads = 0 if config.noncontextual_a else config.num_key_value_heads
        return functools.partial(
            row_bytes, head_dim=config.head_dim, itemsize=itemsize, cache_dtype=cache_dtype, num_heads=num_heads
        )


@torch.no_grad()
def compress(
    model: T6ForCausalLM,
    calibration: torch.Tensor,
    k_ranks: Ranks = None,
    v_ranks: Ranks = None,
    *,
    cache_ratio: float | None = None,
    method: str = "fit",
    batch_size: int = 8,
    quiet: bool = False,
    questions: Questions | None = None,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtypes: Sequence[str | None] = (None,),
) -> T6ForCausalLM:
    """
    A copy of a converted model whose cache is smaller. If the model normalises its keys and their ranks become lower, the copy
    normalises formed heads (`normed_heads`).

    Args:
        model: with constant A factors and queries of full rank, as `python -m conversion hf` makes them.
        calibration: token ids [n, seq] of the text on whose activations little is to be lost.
        k_ranks, v_ranks: one for all layers or one for each; `None` keeps the model's.
        cache_ratio: how many times smaller the cache is to be, instead of ranks. Ranks are then chosen by layer, and for keys and
            values apart, where that changes predictions less than equal ranks.
        batch_size: rows of `calibration` that go through the model at a time.
        questions: a further part of the calibration; the ranks of a `cache_ratio` are to keep its answers.
        dtype: in which the model will be used, and of its cache's rows if their dtype is `None`.
        cache_dtypes: candidates for the `cache_dtype` of the result. With given ranks the first is taken, with a `cache_ratio` the
            one that costs least: in the same bytes, rows of 8 bits have twice the ranks of rows of 16.
        method: `"fit"`, or `"mean-pool"` for the GQA paper's recipe.

    Raises:
        ConversionError: for ranks that the model cannot have.
    """
    config = model.config
    check_options(config, k_ranks, v_ranks, cache_ratio)
    batches = calibration.split(batch_size)
    if questions is not None:
        batches += questions.ids.split(max(1, batch_size * calibration.shape[1] // questions.ids.shape[1]))

    if cache_ratio is None:
        if config.qk_norm is True and set(k_ranks or [config.k_rank]) != {config.k_rank}:
            model = with_normed_heads(model)
        compression = Compression(model, method, batches, quiet)
        chosen = []
        for layer, side in compression.parts:
            ranks = (k_ranks if side == "k" else v_ranks) or [getattr(config, f"{side}_rank")]
            chosen.append(ranks[layer] if len(ranks) > 1 else ranks[0])
        return compression.build(chosen, cache_dtypes[0])

    probe = Probe(model, calibration, questions)
    budget = int(
        config.num_hidden_layers
        * (config.k_rank + config.v_rank)
        * config.head_dim
        * dtype.itemsize
        / cache_ratio
        * (1 + 1e-12)
    )
    choices = []
    for form in [model, with_normed_heads(model)] if config.qk_norm is True else [model]:
        compression = Compression(form, method, batches, quiet)
        found = compression.choices(probe, budget, dtype.itemsize, cache_dtypes)
        choices += [(cost, compression, ranks, name) for cost, ranks, name in found]
    if not choices:
        raise ConversionError(f"--cache-ratio {cache_ratio:g}: no ranks are small enough for this model")
    least = min(cost for cost, *_ in choices)
    near = max(least, NEAR * least)  # where nothing is lost, rounding may make a cost of less than nothing
    models = (compression.build(ranks, name) for cost, compression, ranks, name in choices if cost <= near)
    return min(models, key=lambda trial: probe.divergence(trial, trial.config.cache_dtype).item())
