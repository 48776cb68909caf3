"""What the runs of the comparison show: tables in Markdown, and a plot."""

import itertools
import math
import statistics
from pathlib import Path

from results import markdown_table, spread, three_panels

from . import plan


Rows = dict[str, list[dict]]  # of each model its runs at the rate that is best for it, one of each seed


def best_runs(results: dict, steps: dict[str, int]) -> Rows:
    """Of the models that `steps` names, the runs of so many steps; without those that have none."""
    rows = {}
    for name, count in steps.items():
        keys = [plan.Run(name, plan.best_rate(results, name), seed, count).key for seed in plan.SEEDS]
        rows[name] = [results["runs"][key] for key in keys if key in results["runs"]]
    return {name: runs for name, runs in rows.items() if runs}


def mean_loss(runs: list[dict]) -> float:
    return statistics.mean(run["loss"] for run in runs)


def lowest(rows: Rows) -> str:
    """Of those of several seeds, if there are any: the lowest of many that have one each is low by chance, too."""
    several = [name for name, runs in rows.items() if len(runs) > 1]
    return min(several or rows, key=lambda name: mean_loss(rows[name]))


def twins_of(rows: Rows) -> Rows:
    return {name: runs for name, runs in rows.items() if not plan.is_t6(name)}


# Text


COLUMNS = (
    "rate", "heads (KV)", "MLP", "parameters without embedding", "runs", "held-out loss", "against the best twin",
    "cache, bytes a token", "tokens, million", "ms a step", "seconds",
)  # fmt: skip


def table(rows: Rows, seconds: dict[str, float]) -> list[str]:
    """Lowest loss first; `seconds` are those of a step, by model."""
    cells, twins = {}, twins_of(rows)
    best = mean_loss(twins[lowest(twins)]) if twins else math.nan
    for name, runs in sorted(rows.items(), key=lambda row: mean_loss(row[1])):
        one = runs[0]
        kv = f" ({one['key_value_heads']})" if one["key_value_heads"] != one["heads"] else ""
        cells[name] = [
            f"{one['learning_rate']:g}", f"{one['heads']}{kv}", f"{one['intermediate_size']:,}",
            f"{one['non_embedding_parameters']:,}", f"{len(runs)}", spread([run["loss"] for run in runs]),
            f"{mean_loss(runs) - best:+.4f}" if twins else "-", f"{one['cache_bytes_per_token']:,}",
            f"{one['tokens'] / 1e6:.1f}", f"{1e3 * seconds[name]:.1f}", f"{seconds[name] * one['steps']:.0f}",
        ]  # fmt: skip
    return markdown_table(COLUMNS, cells)


def verdict(rows: Rows) -> str:
    """Which is lowest, the best T6 or the best twin, and whether by more than seeds differ."""
    twins = twins_of(rows)
    t6 = {name: runs for name, runs in rows.items() if name not in twins}
    if not t6 or not twins:
        return "There are not yet a T6 and a twin here to compare."
    ours, theirs = lowest(t6), lowest(twins)
    lower, higher = sorted((theirs, ours), key=lambda name: mean_loss(rows[name]))
    low, high = ([run["loss"] for run in rows[name]] for name in (lower, higher))
    text = f"**{lower} is lowest**, {mean_loss(rows[higher]) - mean_loss(rows[lower]):.4f} below {higher}: "
    if min(len(low), len(high)) < 2:
        return text + "of one seed of at least one of them, which does not tell what seeds do."
    if max(low) < min(high):
        return text + f"every seed of the one ({len(low)}) is below every seed of the other ({len(high)})."
    return text + f"but their seeds overlap ({spread(low)} and {spread(high)}), so neither is told from the other."


def four_tables(results: dict, rows: Rows) -> list[str]:
    settings, limit = results["settings"], plan.cache_limit(results)
    heads, seconds, lines = plan.heads_of_mha(settings), plan.step_seconds(results), []
    timed = plan.timed_finalists(results, list(plan.models(settings)))
    for title, said, chosen in (
        ("Equal parameters", "Parameters are MHA's to within 1%, by more heads or by a wider MLP.", rows),
        (
            "Equal heads",
            f"Those with MHA's {heads} heads; their parameters are MHA's, too, by the width of the MLP.",
            {name: rows[name] for name in plan.with_heads_of_mha(results, list(rows))},
        ),
        (
            "Equal bytes of cache",
            f"Those whose cache has no more than GQA's {limit:,} bytes a token, in bfloat16 as it is stored.",
            {name: runs for name, runs in rows.items() if runs[0]["cache_bytes_per_token"] <= limit},
        ),
        (
            "Equal training time",
            f"Of those with {heads} heads and steps of at most {plan.MAX_STEP:g} times the lowest twin's, the lowest at equal tokens and "
            "the lowest with a cache no larger than GQA's, each trained for as long as the slowest of them takes.",
            best_runs(results, plan.steps_of_equal_time(results, timed)),
        ),
    ):
        lines += ["", f"## {title}", "", said, ""]
        lines += [*table(chosen, seconds), "", verdict(chosen)] if chosen else ["No runs yet."]
    return lines


def describe(results: dict, rows: Rows, picture: str) -> str:
    """All in Markdown, with a link to the plot."""
    settings, names, one = results["settings"], list(plan.models(results["settings"])), next(iter(rows.values()))[0]
    places = {
        f"{run['device']}, torch {run['torch']}, steps {'' if run['is_compiled'] else 'not '}compiled and "
        f"{'' if run['is_captured'] else 'not '}captured"
        for run in results["runs"].values()
    }
    losses = {name: plan.losses_by_rate(results, name) for name in rows}
    rates = sorted({rate for of in losses.values() for rate in of})
    by_rate = {name: [f"{of[rate]:.4f}" if rate in of else "-" for rate in rates] for name, of in losses.items()}
    kinds = list(one["loss_by_kind"])
    by_kind = {
        name: [spread([run["loss_by_kind"][kind] for run in runs]) for kind in kinds] for name, runs in rows.items()
    }
    left = [run.key for run in plan.needed_runs(results, names) if run.key not in results["runs"]]
    lines = [
        "# T6 beside MHA, MQA, GQA and MLA",
        "",
        "Made by `python examples/compare.py report` from the runs of `python examples/compare.py run`.",
        "",
        f"{settings['num_layers']} layers of hidden size {settings['hidden_size']}, heads of size {settings['head_dim']}, "
        f"{settings['max_steps']:,} steps of {settings['sequences_per_step']} sequences of {settings['block_length']}: "
        f"{one['tokens'] / 1e6:.1f} million tokens. Losses are nats a token on held-out text, mean and half of the range over "
        f"seeds, each model at the best of its own learning rates; the lowest is looked for among those of several seeds, if there "
        f"are any. `examples/recipe.py` starts each T6 but the paper's; a new one has QK norm and MHA's number of heads. "
        f"{'; '.join(sorted(places))}. Tokens {results['data'][:16]}.",
        "",
        f"![Held-out loss]({picture})",
        *four_tables(results, rows),
        *["", "## Learning rates", "", f"Held-out loss of seed {plan.SEEDS[0]}.", ""],
        *markdown_table([f"{rate:g}" for rate in rates], by_rate),
        *["", "## Kinds of text", ""],
        *markdown_table(kinds, by_kind),
        *["", "## Not run yet", ""],
        *([f"* {key}" for key in left] or ["All runs that are known to be needed are here."]),
    ]
    return "\n".join(lines) + "\n"


# Plot


def plot(rows: Rows, settings: dict, path: Path) -> None:
    """
    Curves of the held-out loss, their last part, of the models of several seeds, if there are any; of all the final loss against the size
    of the cache.
    """
    from matplotlib import colormaps  # which `three_panels` has found

    tokens_per_step = settings["sequences_per_step"] * settings["block_length"]
    figure, (whole, end, cache) = three_panels()
    markers, colors = itertools.cycle("osD^v*Ph<>dX"), colormaps["tab20"].colors
    colors = itertools.cycle(colors[::2] + colors[1::2])  # the dark ones first
    several = [name for name, runs in rows.items() if len(runs) > 1] or list(rows)
    for (name, runs), color in zip(rows.items(), colors):
        style = "-" if plan.is_t6(name) else "--"
        tokens = [entry["step"] * tokens_per_step / 1e6 for entry in runs[0]["curve"]]
        curves = [[entry["loss"] for entry in run["curve"]] for run in runs]
        mean = [statistics.mean(values) for values in zip(*curves)]
        for axes, start in ((whole, 0), (end, len(mean) * 2 // 3)) if name in several else ():
            axes.plot(tokens[start:], mean[start:], style, color=color, linewidth=1.2, label=name)
            lows, highs = ([f(values) for values in zip(*curves)][start:] for f in (min, max))
            axes.fill_between(tokens[start:], lows, highs, color=color, alpha=0.15, linewidth=0)
        losses, middle = [run["loss"] for run in runs], mean_loss(runs)
        error = [[middle - min(losses)], [max(losses) - middle]]
        filled = {} if plan.is_t6(name) else {"markerfacecolor": "none"}
        cache.errorbar(
            runs[0]["cache_bytes_per_token"], middle, yerr=error, marker=next(markers), color=color, capsize=3,
            linestyle="none", label=name, **filled,
        )  # fmt: skip
    for axes in (whole, end):
        axes.set(xlabel="million tokens", ylabel="held-out loss, nats a token")
    whole.legend(fontsize="small")
    cache.set(xlabel="cache, bytes a token (bfloat16)", ylabel="final held-out loss")
    cache.set_xscale("log", base=2)
    cache.xaxis.set_major_formatter("{x:,.0f}")
    cache.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def write_report(results: dict, output: Path) -> str:
    """
    Writes the tables as Markdown, which is returned, and the plot beside them.

    Raises:
        InputError: there is no matplotlib.
    """
    settings = results["settings"]
    rows = best_runs(results, dict.fromkeys(plan.models(settings), settings["max_steps"]))
    picture = output.with_suffix(".png")
    text = describe(results, rows, picture.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    plot(rows, settings, picture)
    output.write_text(text, encoding="utf-8")
    return text
