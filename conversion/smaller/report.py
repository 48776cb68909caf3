"""What a conversion reports: the provenance, the table of perplexity against cache size, and its picture."""

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers


REPORT = "conversion.json"
PLOT = "conversion.png"


@dataclass
class Row:
    model: str
    cache_bytes_per_token: float
    perplexity: float


def shown_command(words: list[str], on_hub: str | None = None) -> str:
    """
    A command without the folders in which files lie: a report is made to be published.

    Args:
        words: behind `python -m conversion`.
        on_hub: the one among them that is a name on the Hub, if there is one.
    """

    def shown(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return option + equals + (Path(value).name if "/" in value and value != on_hub else value)

    return " ".join(["python -m conversion", *map(shown, words)])


def provenance(command: list[str], source: str, model_type: str, base_model: str | None) -> dict:
    """Where a converted model comes from."""
    return {
        "command": shown_command(command, base_model),
        "source": base_model or Path(source).resolve().name,
        "source_model_type": model_type,
        "base_model": base_model,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def table(rows: list[Row]) -> str:
    """The rows as text, with what each loses against the first."""
    first = rows[0]
    lines = [f"{'':<12}{'cache, bytes per token':>24}{'':>10}{'perplexity':>12}"]
    for row in rows:
        smaller = f"1/{first.cache_bytes_per_token / row.cache_bytes_per_token:.3g}"
        change = 100 * (row.perplexity / first.perplexity - 1)
        lines.append(
            f"{row.model:<12}{row.cache_bytes_per_token:>24,.0f}{smaller:>10}{row.perplexity:>12.4f}{change:>+9.2f}%"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path, found: list[dict] | None = None) -> None:
    """
    A picture of perplexity against cache size.

    Args:
        found: of source and result, what they find in long texts, and their loss by position: two panels more.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14 if found else 6, 4), layout="constrained")
    all_axes = figure.subplots(1, 3 if found else 1, squeeze=False)[0]
    axes = all_axes[0]
    for row, marker in zip(rows, "osv^"):
        label = f"{row.model}: {row.perplexity:,.4f}"
        axes.plot(
            row.cache_bytes_per_token, row.perplexity, marker, markersize=9, fillstyle="none", mew=2, label=label
        )
    low, high = (f(row.perplexity for row in rows) for f in (min, max))
    if high > 4 * low:
        axes.set_yscale("log", base=2)
        axes.set_ylim(low / 1.3, high * 1.3)
    else:  # at least a hundredth, so that what is nearly equal looks so
        margin = max(0.1 * (high - low), 0.005 * low)
        axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_formatter("{x:.6g}")  # whole numbers, without an offset that stands apart
    axes.set_ylabel("perplexity on held-out text")
    if found:
        for row, marker in zip(found, "o^"):
            place, label = row["cache_bytes_per_token"], f"{row['model']}: {row['found']:.1%}"
            all_axes[1].plot(place, 100 * row["found"], marker, markersize=9, fillstyle="none", mew=2, label=label)
            before = [bucket["first"] for bucket in row["loss_by_position"]]
            losses = [bucket["loss"] for bucket in row["loss_by_position"]]
            all_axes[2].plot(before, losses, f"{marker}-", fillstyle="none", mew=2, label=row["model"])
        all_axes[1].set_ylim(-5, 105)
        all_axes[1].set_ylabel("values found in long texts, %")
        all_axes[2].set_xscale("log", base=2)
        all_axes[2].set_xticks(before, [f"{count:,}" for count in before])
        all_axes[2].set_xlabel("tokens before, at least")
        all_axes[2].set_ylabel("loss on held-out text, nats")
    ticks = sorted({row.cache_bytes_per_token for row in rows})
    for axes in all_axes[:2]:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("cache, bytes per token")
    for axes in all_axes:
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def write(folder: Path, content: dict, rows: list[Row] | None = None) -> None:
    """Writes the report, and the picture if there are rows, into a model folder."""
    if rows is not None:
        content = content | {"perplexity": [asdict(row) for row in rows]}
        plot(rows, folder / PLOT, content.get("retrieval"))
    (folder / REPORT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
