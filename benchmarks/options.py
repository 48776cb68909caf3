"""
What the benchmarks share, none of which waits for torch: the checkout on the path, options, tables, and the JSON that is written
and drawn.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path


ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(1, str(ROOT))  # behind this folder


def describe(doc: str | None) -> argparse.ArgumentParser:
    """A parser of the options of the benchmark with that docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_output(parser: argparse.ArgumentParser, plots: bool = True) -> None:
    parser.add_argument("--output", type=Path, metavar="JSON", help="file to write")
    if plots:
        parser.add_argument("--plot", nargs=2, metavar=("JSON", "PNG"), help="draw what an earlier run wrote")


def batch_and_tokens(text: str) -> tuple[int, int]:
    """An argparse type: BATCHxTOKENS."""
    batch, tokens = text.split("x")
    return int(batch), int(tokens)


def table_row(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table_head(*columns: str, words: int = 1) -> str:
    """The first lines of a Markdown table, whose first columns hold `words`, the others numbers."""
    rules = ["---" if index < words else "---:" for index in range(len(columns))]
    return f"{table_row(*columns)}\n{table_row(*rules)}"


def save(data: dict, path: Path | None) -> None:
    if path is not None:
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)


def draw(plot: Callable, files: tuple[str, str], size: tuple[float, float]) -> None:
    """
    A picture of a JSON file.

    Args:
        plot: draws what the file holds into a figure of matplotlib.
        files: the JSON file, and the picture to write.
        size: of the picture, in inches.
    """
    from matplotlib.figure import Figure

    try:
        data = json.loads(Path(files[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"--plot: cannot read {files[0]}: {error}; --output writes such a file")
    figure = Figure(figsize=size, layout="constrained")
    plot(data, figure)
    figure.savefig(files[1], dpi=130)


def draw_bar_panels(figure, panels: tuple[tuple[str, str, list[float]], ...], places: list, colors: list[str]) -> list:
    """
    Panels side by side in a figure of matplotlib, a bar for each of `places`. Returns the axes.

    Args:
        panels: title, format of what is written at a bar, and values.
        places: of the bars, numbers or names.
    """
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, form, values) in zip(axes, panels):
        bars = axis.barh(places, values, 0.8, color=colors)
        axis.bar_label(bars, fmt=form, fontsize=9, padding=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 1.2 * max(values))
        axis.xaxis.set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].invert_yaxis()
    return axes
