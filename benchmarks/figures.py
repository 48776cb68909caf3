"""
One picture of T6 beside its twin of the same number of parameters, wins and losses alike, from what the benchmarks wrote.

    python benchmarks/figures.py docs/*.json --output docs/beside_twin.png

Every panel shows what T6 takes, in time or bytes, as a multiple of what its twin takes in the same run: below 1 T6 takes less.
Files that hold nothing of this are passed over, and so is T6 without its fused ways. These are drawn:

    python benchmarks/generate_gpu.py --output docs/generate.json
    python benchmarks/generate_gpu.py --short --output docs/decoding.json --runs 1x1024 1x8192 1x32768 1x131072
    python benchmarks/beside_twin.py --output docs/training.json --layers 2 --prefill xl:1x1024 xl:1x8192 xl:1x32768 xl:1x131072
    python benchmarks/serve_vllm.py throughput --output docs/serving.json
    python benchmarks/serve_vllm.py latency --output docs/latency.json
    python benchmarks/decode_attention.py --output docs/cpu.json
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from options import describe


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    return parser.parse_args()


# Models of a decoding step, what each is held against, and how they are called in the picture.
DECODING = {
    "t6-xl": ("llama-mha-xl", "t6-xl to MHA"),
    "T6 8B (16, 2, 2)": ("Llama 8B, GQA-8", "8B, rank 2, to GQA-8"),
    "T6 8B (8, 1, 1)": ("Llama 8B, GQA-8", "8B, rank 1, to GQA-8"),
}
SERVED = "t6-small", "llama-mha-small"
TRAINED = "t6", "llama-mha"
CPU = "factor space", "cached MHA"
# Okabe and Ito's colours, which all eyes tell apart, with a marker each.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"))
LESS, MORE = "#0072B2", "#D55E00"


class Point(NamedTuple):
    """Of a line: a context in tokens, how many sequences, and what T6 takes of what its twin takes."""

    context: int
    batch: int
    ratio: float


class Figures(NamedTuple):
    """What the panels show: lines of points by name, or ratios by name."""

    decoding: dict[str, list[Point]]
    prefill: dict[str, list[Point]]
    cpu: dict[str, list[Point]]
    training: dict[str, float]
    cache: dict[str, float]
    serving: dict[str, float]


def read_figures(contents: list[dict]) -> Figures:
    """Ratios of the runs that the files hold."""
    figures = Figures({}, {}, {}, {}, {}, {})
    # Last, and in place of others, come the steps that have a run of their own.
    for data in sorted(contents, key=lambda data: "short" in data):
        rows = data.get("results")
        if data.get("command") == "throughput":
            figures.serving["512 requests at once"] = 1 / ratio(data["models"], SERVED, "tokens_per_second")
            figures.cache["t6-small to MHA"] = ratio(data["models"], SERVED, "bytes_per_token")
        elif data.get("command") == "latency":
            add_latency(figures.serving, data["models"])
        elif "attention" in data and data.get("device") == "cpu":
            name = f"{data['num_heads']} heads, {data['dtype']}"
            figures.cpu[name] = [Point(row["tokens"], 1, row[CPU[0]] / row[CPU[1]]) for row in data["attention"]]
        elif isinstance(rows, dict) and all("sums" in row for row in rows.values()):
            add_twins(figures, rows)
        elif "short" in data or "largest" in data:
            add_steps(figures, data.get("short", rows), data.get("largest", ()))
    return figures


def add_steps(figures: Figures, rows: list[dict], largest: list[dict]) -> None:
    steps = {(row["model"], row["context"], row["batch"]): row for row in rows if row.get("fused") is not False}
    cache = {row["model"]: row["cache_bytes"] / row["tokens"] for row in largest}
    for name, (twin, label) in DECODING.items():
        for model, context, batch in steps:
            if model == name and (twin, context, batch) in steps:
                own, other = (steps[each, context, batch]["seconds"] for each in (name, twin))
                add_point(figures.decoding.setdefault(label, []), Point(context, batch, own / other))
        if name in cache and twin in cache:
            figures.cache[label] = cache[name] / cache[twin]


def add_point(points: list[Point], point: Point) -> None:
    """In place of one that is there already, and in order."""
    points[:] = sorted([x for x in points if x[:2] != point[:2]] + [point])


def ratio(rows: dict, names: tuple[str, str], key: str) -> float:
    own, twin = (rows[name][key] for name in names)
    return own / twin


def add_latency(serving: dict[str, float], models: dict) -> None:
    own, twin = ({row["rate"]: row for row in models[name]["rates"]} for name in SERVED)
    for key, label in (("first_token_median", "first token"), ("between_median", "between tokens")):
        for rate in sorted(own.keys() & twin.keys()):
            serving[f"{label}, {rate:g} requests/s"] = own[rate][key] / twin[rate][key]


def add_twins(figures: Figures, rows: dict) -> None:
    """Of titles such as "small, 16 x 1024, compiled" and "xl, 1 x 32768, prefill"."""
    for title, row in rows.items():
        size, batch, length, way = re.fullmatch(r"(\w+), (\d+) x (\d+), (.*)", title).groups()
        ratios = {part: times[TRAINED[0]] / times[TRAINED[1]] for part, times in row["sums"].items()}
        if way != "prefill":
            figures.training[f"{size}, {batch} x {length}, {way.partition(',')[0]}"] = ratios["step"]
            continue
        for part, label in (
            ("kernels", "all"),
            ("all but attention", "all but attention"),
            ("attention", "attention"),
        ):
            points = figures.prefill.setdefault(f"t6-{size}, {label}", [])
            add_point(points, Point(int(length), int(batch), ratios[part]))


def draw_lines(axis, lines: dict[str, list[Point]]) -> None:
    """Over contexts. Points of one sequence are joined, those of more are hollow."""
    for (name, points), (color, marker) in zip(lines.items(), STYLES):
        for single, fill, line, label in ((True, color, "-", name), (False, "white", "", None)):
            shown = [point for point in points if (point.batch == 1) == single]
            contexts, ratios = [point.context for point in shown], [point.ratio for point in shown]
            axis.plot(contexts, ratios, color=color, marker=marker, markerfacecolor=fill, linestyle=line, label=label)
    points = [point for line in lines.values() for point in line]
    contexts = sorted({point.context for point in points})
    axis.set_xscale("log", base=2)
    axis.set_xlim(contexts[0] / 1.5, contexts[-1] * 1.5)
    axis.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
    axis.set_xlabel("tokens of context", fontsize=8)
    if any(point.batch > 1 for point in points):
        axis.plot([], [], "o", color="gray", markerfacecolor="white", label="several sequences")
    scale_ratios(axis, "y", [point.ratio for point in points], above=2.4)
    axis.axhline(1, color="black", linewidth=1)
    axis.legend(fontsize=8, frameon=False, loc="upper left")


def draw_bars(axis, bars: dict[str, float]) -> None:
    """To the right of 1, hatched, where T6 takes more, to the left where it takes less."""
    for place, value in enumerate(bars.values()):
        more = value > 1
        axis.barh(place, value - 1, 0.7, left=1, color=MORE if more else LESS, hatch="//" if more else "", alpha=0.85)
        axis.annotate(
            f"{value:.2f}", (value, place), (4 if more else -4, 0), textcoords="offset points",
            ha="left" if more else "right", va="center", fontsize=8,
        )  # fmt: skip
    axis.set_yticks(range(len(bars)), bars)
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    scale_ratios(axis, "x", list(bars.values()), above=1.5)
    axis.axvline(1, color="black", linewidth=1)


def scale_ratios(axes, name: str, ratios: list[float], above: float) -> None:
    """A logarithmic scale along x or y with 1 on it, and room for what is written `above`."""
    from matplotlib.ticker import FixedLocator, NullLocator

    limits = min(*ratios, 1) / 1.5, max(*ratios, 1) * above
    axes.set(**{f"{name}scale": "log", f"{name}lim": limits})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(FixedLocator([0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def draw_figures(figures: Figures, figure) -> None:
    """A panel each into a figure of matplotlib; what was not run has none."""
    panels = [
        ("a decoding step, time", draw_lines, figures.decoding),
        ("reading a prompt, time of kernels", draw_lines, figures.prefill),
        ("decoding attention on a CPU, time", draw_lines, figures.cpu),
        ("a training step, time, to MHA", draw_bars, figures.training),
        ("a token in the cache, bytes", draw_bars, figures.cache),
        ("t6-small in vLLM, time, to MHA", draw_bars, figures.serving),
    ]
    rows = [[panel for panel in panels if panel[1] is draw and panel[2]] for draw in (draw_lines, draw_bars)]
    rows = [row for row in rows if row]
    for part, row in zip(figure.subfigures(len(rows), squeeze=False).flatten(), rows):
        for axis, (title, draw, data) in zip(part.subplots(1, len(row), squeeze=False).flatten(), row):
            draw(axis, data)
            axis.set_title(title, fontsize=10)
            axis.tick_params(labelsize=8)
            axis.grid(axis="y" if draw is draw_lines else "x", alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("T6 as a multiple of its twin: below 1 T6 takes less", fontsize=11)


def main() -> None:
    args = parse_args()
    contents = []
    for path in args.files:
        try:
            contents.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            sys.exit(f"figures.py: cannot read {path}: {error}")
    figures = read_figures([data for data in contents if isinstance(data, dict)])
    if not any(figures):
        sys.exit(f"figures.py: none of the {len(contents)} files is of a benchmark that --help names")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained", facecolor="white")
    draw_figures(figures, figure)
    figure.savefig(args.output, dpi=130)


if __name__ == "__main__":
    main()
