"""What the runs of the diagnosis show: a table in Markdown."""

import statistics

from command_line import InputError
from results import spread


def fall(run: dict, level: float) -> float:
    """The step at which the loss goes below a level, between two evaluations by a straight line; infinity if it never does."""
    for before, after in zip(run["curve"], run["curve"][1:]):
        if after["loss"] < level <= before["loss"]:
            part = (before["loss"] - level) / (before["loss"] - after["loss"])
            return before["step"] + part * (after["step"] - before["step"])
    return float("inf")


def report(results: dict, first: str, level: float) -> str:
    """
    Args:
        first: the variant that others are compared with, at the rate at which it is best and seed by seed.
        level: a loss, that the fall passes.

    Raises:
        InputError: `first` has no run.
    """
    rows = {}
    for run in results["runs"].values():
        rows.setdefault((run["variant"], run["learning_rate"]), []).append(run)
    of_first = [runs for (name, _), runs in rows.items() if name == first]
    if not of_first:
        raise InputError(f"--first {first}: the results have no run of it")
    base = {
        run["seed"]: run["loss"] for run in min(of_first, key=lambda runs: statistics.mean(r["loss"] for r in runs))
    }
    lines = [
        f"| variant | rate | heads (KV) | cache, bytes | runs | held-out loss | against {first} "
        f"| {level:g} nats at step | to the token before | to what is copied |",
        f"| --- |{' --: |' * 9}",
    ]
    for (name, rate), runs in rows.items():
        losses = [run["loss"] for run in runs]
        differences = [run["loss"] - base[run["seed"]] for run in runs if run["seed"] in base]
        steps = statistics.mean(fall(run, level) for run in runs)
        # The first half way, where some are late and others are not; the second, which needs it, at the end.
        previous = statistics.mean(max(run["looks"][len(run["looks"]) // 2]["to_previous"]) for run in runs)
        copied = statistics.mean(max(run["looks"][-1]["to_copied"]) for run in runs)
        kv = runs[0]["key_value_heads"]
        lines.append(
            f"| {name} | {rate:g} | {runs[0]['heads']} ({kv}) | {runs[0]['cache_bytes_per_token']:,} | {len(runs)} "
            f"| {spread(losses)} | {statistics.mean(differences or [float('nan')]):+.4f} "
            f"| {'never' if steps == float('inf') else format(steps, '.0f')} | {previous:.2f} | {copied:.2f} |"
        )
    return "\n".join(lines) + "\n"
