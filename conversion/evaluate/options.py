"""What the command line can ask of an evaluation. Imports nothing that takes time: `--help` is to come at once."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from ..files.errors import ConversionError


# Those of `TASKS` in tasks.py, and of `T6Cache`.
TASK_NAMES = ("needle", "keys", "values", "variables", "copying")
CACHE_DTYPES = ("model", "float8_e4m3fn", "int4")
SHORTEST = 1024  # length that others double, by default


def positive(value: str) -> int:
    if (number := int(value)) <= 0:
        raise ValueError
    return number


positive.__name__ = "positive int"  # argparse's message names the type


def lengths(value: str) -> list[int]:
    return sorted({positive(part) for part in value.split(",")})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def names(known: tuple[str, ...]):
        def convert(value: str) -> list[str]:
            chosen = list(dict.fromkeys(value.split(",")))
            if wrong := [name for name in chosen if name not in known]:
                raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
            return chosen

        return convert

    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a model, T6 or another of Transformers")
    parser.add_argument(
        "--beside", type=Path, metavar="SOURCE",
        help="the folder of the model that FOLDER was made from; it is measured with a cache in 8 and in 4 bits, too",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=lengths, metavar="N[,N...]", help=f"tokens ({SHORTEST}, doubled up to the context)"
    )
    parser.add_argument("--samples", type=positive, default=20, metavar="N", help="of a task and length (%(default)s)")
    parser.add_argument(
        "--tasks", type=names(TASK_NAMES), default=list(TASK_NAMES), metavar="NAME[,NAME...]",
        help=f"({','.join(TASK_NAMES)})",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8, for windows and between facts (sentences by chance)"
    )
    parser.add_argument(
        "--windows", type=positive, default=8, metavar="N", help="of the greatest length, for losses (%(default)s)"
    )
    parser.add_argument(
        "--cache-dtypes", type=names(CACHE_DTYPES), default=["model"], metavar="NAME[,NAME...]",
        help=f"of a T6Cache: {', '.join(CACHE_DTYPES)} (model)",
    )  # fmt: skip
    parser.add_argument("--device", help="(cuda if there is one, else cpu)")
    parser.add_argument("--batch-size", type=positive, default=4, metavar="N", help="(%(default)s)")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32", help="(%(default)s)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the figures there, and a picture beside it")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")


def check_output(output: Path | None) -> None:
    """Raises a `ConversionError` if `--output` cannot be what is asked for."""
    if output is None:
        return
    if output.suffix != ".json":
        raise ConversionError(f"--output {output}: expected a name that ends in .json")
    if output.is_dir() or not output.parent.is_dir():
        raise ConversionError(f"--output {output}: expected a file in a folder that is there")
    if find_spec("matplotlib") is None:
        raise ConversionError("--output needs matplotlib: pip install 't6-transformers[compress]'")
