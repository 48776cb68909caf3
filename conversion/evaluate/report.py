"""What an evaluation reports: a row for each model and cache, as a table, JSON and a picture."""

import contextlib
import json
import math
import os
import secrets
import statistics
from collections.abc import Callable
from pathlib import Path

from ..files.errors import ConversionError


FALLS = 0.1  # part of the source's retrieval, beyond which a loss is warned of


def mean(scores: list[dict], name: str) -> float:
    return sum(score[name] for score in scores) / len(scores)


def by_task(row: dict) -> dict[str, float]:
    """The part of each task's values that is found, over all lengths."""
    tasks = dict.fromkeys(score["task"] for score in row["scores"])
    return {task: mean([score for score in row["scores"] if score["task"] == task], "found") for task in tasks}


def table(rows: list[dict]) -> str:
    """The rows as text: what is found of each task's values in percent, and what else was measured."""
    tasks = by_task(rows[0])
    width = max(len(row["model"]) for row in rows)
    columns = ["bytes/token", "found", "log-prob.", *tasks]
    others = [name for name in ("perplexity", "kl", "first_choice") if any(name in row for row in rows)]
    heads = {"perplexity": "perplexity", "kl": "KL", "first_choice": "same choice"}
    lines = [" ".join([f"{'':<{width}}", *(f"{column:>11}" for column in [*columns, *(heads[n] for n in others)])])]
    for row in rows:
        cells = [f"{row['cache_bytes_per_token']:,.0f}", f"{row['found']:.1%}", f"{row['log_probability']:.3f}"]
        cells += [f"{value:.1%}" for value in by_task(row).values()]
        for name in others:
            cells.append(
                "" if name not in row else f"{row[name]:.1%}" if name == "first_choice" else f"{row[name]:.4f}"
            )
        lines.append(" ".join([f"{row['model']:<{width}}", *(f"{cell:>11}" for cell in cells)]))
    lengths = sorted({score["length"] for score in rows[0]["scores"]})
    if len(lengths) > 1:
        lines.append("\nfound, by tokens" + "".join(f"{length:>11,}" for length in lengths))
        for row in rows:
            parts = [mean([s for s in row["scores"] if s["length"] == length], "found") for length in lengths]
            lines.append(f"{row['model']:<16}" + "".join(f"{part:>11.1%}" for part in parts))
    lines.append("\nlog-prob., by tokens" + "".join(f"{length:>24,}" for length in lengths))
    for row in rows:
        cells = [log_probability_cell(row, rows[0], length) for length in lengths]
        lines.append(f"{row['model']:<20}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join([*lines, *position_lines(rows)])


def log_probability_cell(row: dict, first: dict, length: int) -> str:
    """
    The log-probability of an answer's token at a length, the mean over tasks, and its difference from the first row's, with the standard
    error of that, where both were asked the same and say what each answer has. It is finer than what is found, which says of an
    answer only whether all its tokens were likely.
    """
    own, others = ([score for score in x["scores"] if score["length"] == length] for x in (row, first))
    text = f"{mean(own, 'log_probability'):.3f}"
    asked, others_asked = (
        [(score["task"], len(score.get("log_probabilities", ()))) for score in scores] for scores in (own, others)
    )
    if row is first or asked != others_asked or not all(count for _, count in asked):
        return text
    pairs = list(zip(own, others))
    mean_difference = variance = 0.0
    for score, other in pairs:
        differences = [new - old for new, old in zip(score["log_probabilities"], other["log_probabilities"])]
        mean_difference += statistics.fmean(differences) / len(pairs)
        spread = statistics.variance(differences) if len(differences) > 1 else math.inf
        variance += spread / len(differences) / len(pairs) ** 2
    return f"{text} ({mean_difference:+.3f} ± {math.sqrt(variance):.3f})"


def position_lines(rows: list[dict]) -> list[str]:
    """The loss by position of rows that have it, as lines of text."""
    if "loss_by_position" not in rows[0]:
        return []
    lines = ["\nloss, by tokens before" + "".join(f"{b['first']:>8,}-" for b in rows[0]["loss_by_position"])]
    for row in rows:
        lines.append(f"{row['model']:<22}" + "".join(f"{b['loss']:>9.3f}" for b in row["loss_by_position"]))
    return lines


def retrieval_table(rows: list[dict]) -> str:
    """What is found of each task's values, and the loss by position, as text."""
    heads = ["found", "log-prob.", *by_task(rows[0])]
    lines = [" ".join([f"{'':<12}", *(f"{head:>11}" for head in heads)])]
    for row in rows:
        cells = [
            f"{row['found']:.1%}",
            f"{row['log_probability']:.3f}",
            *(f"{part:.1%}" for part in by_task(row).values()),
        ]
        lines.append(" ".join([f"{row['model']:<12}", *(f"{cell:>11}" for cell in cells)]))
    return "\n".join([*lines, *position_lines(rows)])


def plot(rows: list[dict], path: Path) -> None:
    """A picture: what is found, and its log-probability, against the cache's bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = (("found", "values found"), ("log_probability", "log-probability of an answer's token, nats"))
    for axes, (name, label) in zip(figure.subplots(1, 2), panels):
        for row, marker in zip(rows, "osv^Dpx+" * len(rows)):
            axes.plot(
                row["cache_bytes_per_token"],
                row[name],
                marker,
                markersize=9,
                fillstyle="none",
                mew=2,
                label=row["model"],
            )
        axes.set_xscale("log", base=2)
        ticks = sorted({row["cache_bytes_per_token"] for row in rows})
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], rotation=30)
        axes.minorticks_off()
        axes.set_xlabel("cache, bytes per token")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if name == "found":
            axes.set_ylim(-0.05, 1.05)
    figure.axes[0].legend()
    figure.savefig(path, dpi=150, format="png")


def write(output: Path, content: dict) -> None:
    """
    Writes the report `output`, and the picture of its name beside it. A run that is killed meanwhile leaves the old ones.

    Raises:
        ConversionError: if they cannot be written.
    """

    def write_text(path: Path) -> None:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    try:
        with contextlib.ExitStack() as stack:
            moves = []
            for path, make in (
                (output.with_suffix(".png"), lambda path: plot(content["models"], path)),
                (output, write_text),
            ):
                moves.append((make_beside(path, make, stack), path))
            for new, path in moves:
                new.replace(path)
    except OSError as error:
        raise ConversionError(f"cannot write {output}: {error.strerror}") from error


def make_beside(path: Path, make: Callable[[Path], None], stack: contextlib.ExitStack) -> Path:
    """A whole file beside `path`, synced to the disk; the stack removes it if it is still there."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    stack.callback(new.unlink, missing_ok=True)
    make(new)
    with new.open("rb") as file:
        os.fsync(file.fileno())
    return new


def warning(source: dict, result: dict) -> str | None:
    """In plain words, that the result finds less than the source by more than a tenth of it."""
    if result["found"] >= (1 - FALLS) * source["found"]:
        return None
    return (
        f"of the values hidden in long texts, the source finds {source['found']:.0%} and this model {result['found']:.0%}: "
        "with this cache it no longer uses what it has read as the source does, whatever its perplexity says"
    )
