"""
Turns checkpoints into T6 folders that `from_pretrained` loads.

    python -m conversion official SRC DST    a checkpoint of the paper's research code: its folder, or a ckpt.pt
    python -m conversion hf SRC DST          a Llama-shaped model of Transformers, exactly: a folder, or a name on the Hub

With ranks below the source's number of key/value heads, `hf` makes the cache smaller, and can heal what that costs:

    python -m conversion hf SRC DST --cache-ratio 4 --calibration TEXT --heal TEXT --heal-steps 500

What a model finds in long contexts, and what it loses against the one that it was made from:

    python -m conversion evaluate FOLDER --beside SOURCE
"""

import argparse
import sys
from pathlib import Path

from .evaluate.options import add_arguments as add_evaluation_arguments
from .evaluate.options import check_output
from .files.bars import hide_bars_of_transformers
from .files.errors import ConversionError
from .files.signals import Stopped, stoppable
from .files.sizes import shard_size
from .smaller.options import add_arguments, set_defaults, wants_smaller_cache
from .smaller.working import unfinished_folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m conversion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("official", "a checkpoint of the paper's research code"),
        ("hf", "a Llama-shaped model of Transformers, exactly or with a smaller cache"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("source", metavar="SRC")
        command.add_argument("target", metavar="DST", type=Path)
        command.add_argument(
            "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; as the source's"
        )
        command.add_argument("--max-shard-size", type=shard_size, default="5GB", help="default: %(default)s")
        command.add_argument("--overwrite", action="store_true", help="replace what DST holds")
        command.add_argument(
            "--verify",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="run source and result side by side, whole or layer by layer, and refuse to finish on a mismatch",
        )
        if name == "hf":
            command.add_argument("--revision", help="of a source on the Hub")
            add_arguments(command)
    text = "what a model finds in long contexts, and what a token gains from those far before it"
    add_evaluation_arguments(commands.add_parser("evaluate", help=text, description=text))
    args = parser.parse_args(argv)
    if args.command == "hf":
        set_defaults(args)
    args.words = sys.argv[1:] if argv is None else argv
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_args(argv)
    try:
        with stoppable():
            run(args)
    except Stopped as error:
        print(f"{error}: {what_is_left(args)}", file=sys.stderr)
        return error.code
    except (ConversionError, OSError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    smaller = args.command == "hf" and wants_smaller_cache(args)
    if args.command == "evaluate":
        check_output(args.output)
    # Here, since torch and transformers take long to import: `--help` and wrong options are answered without them.
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    hide_bars_of_transformers()
    try:
        if args.command == "evaluate":
            from .evaluate.evaluation import evaluate

            evaluate(args)
        else:
            from .convert import convert

            convert(args, smaller)
    except torch.OutOfMemoryError as error:
        size = "--lengths" if args.command == "evaluate" else "--window"
        raise ConversionError(f"the device has too little memory: a smaller --batch-size or {size} may fit") from error


def what_is_left(args: argparse.Namespace) -> str:
    """What a run that was stopped has left, and how it goes on."""
    if args.command == "evaluate":
        return "nothing of this run is left"
    folder = unfinished_folder(args.target)
    if not folder.exists():
        return "nothing of this run is left"
    again = "the same command" + " without --overwrite" * args.overwrite
    again += f", with {args.target} out of its way," * (args.overwrite and args.target.exists())
    return f"{again} goes on from what {folder} holds"


if __name__ == "__main__":
    sys.exit(main())
