"""
Which models the comparison trains, and in which order.

Each model has its own learning rate: rates are doubled and halved until the best one has a worse one on either side. The order of runs:

1. the first models once, at one rate;
2. other rates and a second seed of the finalists, the lowest T6 and the lowest twin of each table, and a run of equal time of those with
   MHA's heads and steps about as long as MHA's;
3. the other models once;
4. further seeds of the finalists, at equal tokens and at equal time;
5. rates of all others.
"""

import math
import statistics
from typing import NamedTuple

import recipe
from ablations import Ablation


SEEDS = (0, 1, 2, 3)
FIRST_MODELS = 8  # that are all tried before rates and seeds of the best of them
MAX_RATE_FACTOR = 4  # a rate that is tried is at most so many times the first, or one of so many parts
SAME_TIME = 0.02  # times that differ by less, of the longer, are equal
MAX_STEP = 1.1  # steps that take longer, as a multiple of the lowest twin's, are not compared at equal time: what they lose is known before


class Run(NamedTuple):
    model: str
    learning_rate: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        return f"{self.model} lr {self.learning_rate:g} seed {self.seed} steps {self.steps}"


def models(settings: dict) -> dict[str, Ablation]:
    """
    Every model by its name in the results, the most informative first. Models named after the mechanism alone have MHA's number of heads,
    and an MLP so much wider that their parameters equal MHA's; those with "more heads" reach that by heads, as in the paper.
    """
    dim, norm = settings["head_dim"], {"qk_norm": True}

    def widened(base: str, fields: dict, **more) -> Ablation:
        return Ablation(base, fields, widened=True, **more)

    def t6(base: str = "TPA", groups: int = 1, **fields) -> Ablation:
        return widened(base, recipe.BIASES | fields, prepare=recipe.start, groups=groups)

    return {
        "MHA, QK norm": Ablation("MHA", norm),
        "T6": t6(),
        "GQA, QK norm": widened("GQA", norm),
        "T6, QK norm": t6(qk_norm="heads"),
        "T6, ranks 2 and 1, QK norm": t6(k_rank=2, v_rank=1, qk_norm="heads"),
        # A latent for which MLA caches as much as GQA.
        "MLA": widened("MLA", {"kv_lora_rank": 4 * dim - dim // 2}),
        "T6, more heads": Ablation("TPA", recipe.BIASES, prepare=recipe.start),
        "GQA": widened("GQA", {}),
        "T6-KVonly, QK norm": t6("TPA-KVonly", qk_norm="heads"),
        "MQA, QK norm": widened("MQA", norm),
        "T6, rank 1, QK norm": t6(k_rank=1, v_rank=1, qk_norm="heads"),
        "T6, ranks 2 and 1": t6(k_rank=2, v_rank=1),
        "T6, more heads, QK norm": Ablation("TPA", recipe.BIASES | {"qk_norm": "heads"}, prepare=recipe.start),
        "GQA, more heads": Ablation("GQA"),
        "MQA": widened("MQA", {}),
        "T6, rank 1": t6(k_rank=1, v_rank=1),
        "MHA": Ablation("MHA"),
        "MQA, more heads": Ablation("MQA"),
        "T6 of the paper": Ablation("TPA"),
        "T6, 4 to a KV head": t6(groups=4),
        "T6-KVonly": t6("TPA-KVonly"),
    }


def is_t6(name: str) -> bool:
    return name.startswith("T6")


def losses_by_rate(results: dict, name: str) -> dict[float, float]:
    """Held-out losses of the first seed after `max_steps`."""
    runs = [run for run in results["runs"].values() if run["name"] == name and run["seed"] == SEEDS[0]]
    return {run["learning_rate"]: run["loss"] for run in runs if run["steps"] == results["settings"]["max_steps"]}


def best_rate(results: dict, name: str) -> float:
    """Of those tried so far; the first if there are none."""
    losses = losses_by_rate(results, name)
    return min(losses, key=losses.get, default=results["learning_rate"])


def rates_to_try(results: dict, name: str) -> list[float]:
    """Twice the best rate so far and half of it, unless they are tried or too far from the first."""
    first, best = results["learning_rate"], best_rate(results, name)
    tried = losses_by_rate(results, name)
    near = [rate for rate in (2 * best, best / 2) if first / MAX_RATE_FACTOR <= rate <= first * MAX_RATE_FACTOR]
    return [rate for rate in near if not any(math.isclose(rate, other) for other in tried)]


def step_seconds(results: dict) -> dict[str, float]:
    """
    Seconds of a step of each model that has run, as on one GPU, the one that ran the most models: GPUs of one kind differ by some percent, by
    the median over models that both ran. The minimum over runs, as other work on the machine makes steps slower, never faster.
    """
    on: dict[str | None, dict[str, float]] = {}
    for run in results["runs"].values():
        seconds = on.setdefault(run.get("gpu"), {})
        seconds[run["name"]] = min(seconds.get(run["name"], math.inf), run["ms_per_step"] / 1e3)
    first, found = max(on.values(), key=len, default={}), {}
    for seconds in on.values():
        scale = statistics.median([first[name] / seconds[name] for name in seconds if name in first] or [1.0])
        for name, of in seconds.items():
            found[name] = min(found.get(name, math.inf), scale * of)
    return found


def cache_limit(results: dict) -> float:
    """GQA's bytes a token, which the table of equal bytes allows; infinity as long as no GQA has run."""
    runs = [run for run in results["runs"].values() if run["name"].startswith("GQA")]
    return max((run["cache_bytes_per_token"] for run in runs), default=math.inf)


def heads_of_mha(settings: dict) -> int:
    return settings["hidden_size"] // settings["head_dim"]


def with_heads_of_mha(results: dict, names: list[str]) -> list[str]:
    """Of `names`, which have runs, those with as many heads as MHA."""
    heads = heads_of_mha(results["settings"])
    having = {run["name"] for run in results["runs"].values() if run["heads"] == heads}
    return [name for name in names if name in having]


def lowest_losses(results: dict, names: list[str]) -> dict[str, float]:
    """Held-out losses at the best rates, of those of `names` that have a run."""
    return {name: min(losses.values()) for name in names if (losses := losses_by_rate(results, name))}


def finalists(results: dict, names: list[str]) -> list[str]:
    """
    By their best runs of the first seed the lowest T6 and the lowest twin of all, of those with MHA's heads, and of those that cache no
    more than GQA; and at least two twins.
    """
    best = lowest_losses(results, names)
    caches = {run["name"]: run["cache_bytes_per_token"] for run in results["runs"].values()}
    ranked, limit = sorted(best, key=best.get), cache_limit(results)

    def lowest(of: list[str]) -> list[str]:
        small = [name for name in of if caches[name] <= limit]
        return list(dict.fromkeys([*of[:1], *with_heads_of_mha(results, of)[:1], *small[:1]]))

    twins = [name for name in ranked if not is_t6(name)]
    chosen = lowest(twins)
    return lowest([name for name in ranked if is_t6(name)]) + (chosen if len(chosen) > 1 else twins[:2])


def timed_finalists(results: dict, names: list[str]) -> list[str]:
    """The finalists of those with MHA's heads whose steps take not much longer than those of the lowest twin among them."""
    names, seconds = with_heads_of_mha(results, names), step_seconds(results)
    twins = lowest_losses(results, [name for name in names if not is_t6(name)])
    longest = MAX_STEP * seconds[min(twins, key=twins.get)] if twins else math.inf
    return finalists(results, [name for name in names if seconds[name] <= longest])


def steps_of_equal_time(results: dict, names: list[str]) -> dict[str, int]:
    """
    The number of steps with which each of `names` takes as long as the slowest of them does for its `max_steps`; empty if one has not run yet.
    Times change a little as runs are added, so a number of steps that a model already has runs of is taken if it is close.
    """
    seconds = step_seconds(results)
    if not seconds.keys() >= set(names):
        return {}
    slowest, steps, chosen = max((seconds[name] for name in names), default=0.0), results["settings"]["max_steps"], {}
    for name in names:
        wanted = steps * slowest / seconds[name]
        had = {steps, *(run["steps"] for run in results["runs"].values() if run["name"] == name)}
        nearest = min(had, key=lambda number: abs(number - wanted))
        chosen[name] = nearest if abs(nearest - wanted) < SAME_TIME * wanted else max(10, round(wanted / 10) * 10)
    return chosen


def needed_runs(results: dict, names: list[str]) -> list[Run]:
    """All runs that are known to be needed so far, done or not, in the order in which they are to be done."""
    steps = results["settings"]["max_steps"]

    def first_runs(chosen: list[str]) -> list[Run]:
        return [Run(name, results["learning_rate"], SEEDS[0], steps) for name in chosen]

    def rates(chosen: list[str], higher: bool) -> list[Run]:
        wanted = [(name, rate) for name in chosen for rate in rates_to_try(results, name)]
        return [
            Run(name, rate, SEEDS[0], steps) for name, rate in wanted if (rate > best_rate(results, name)) == higher
        ]

    def seeds(steps: dict[str, int], *of: int) -> list[Run]:
        return [Run(name, best_rate(results, name), seed, steps[name]) for seed in of for name in steps]

    first = first_runs(names[:FIRST_MODELS])
    if any(run.key not in results["runs"] for run in first[:3]):
        return first_runs(names)  # among which there are no finalists yet
    best = finalists(results, names)
    others = [name for name in names if name not in best and losses_by_rate(results, name)]
    equal_tokens = dict.fromkeys(best, steps)
    equal_time = steps_of_equal_time(results, timed_finalists(results, names))
    runs = [
        *first,
        *rates(best, higher=True),
        *seeds(equal_tokens, *SEEDS[:2]),
        *rates(best, higher=False),
        *seeds(equal_time, SEEDS[0]),
        *first_runs(names),
        *seeds(equal_tokens, *SEEDS),
        *seeds(equal_time, *SEEDS),
        *rates(others, higher=True),
        *rates(others, higher=False),
    ]
    return list(dict.fromkeys(runs))
