"""
Turns checkpoints into T6 folders that `from_pretrained` loads.

    python -m conversion official SRC DST    a checkpoint of the paper's research code: its folder, or a ckpt.pt
    python -m conversion hf SRC DST          a Llama-shaped model of Transformers, exactly: a folder, or a name on the Hub

With ranks below the source's number of key/value heads, `hf` makes the cache smaller, and can heal what that costs:

    python -m conversion hf SRC DST --cache-ratio 4 --calibration TEXT --heal TEXT --heal-steps 500
"""

import argparse
import re
import shutil
import sys
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig
from transformers.utils import logging

from . import hf, official, smaller, verify
from .checkpoint import Checkpoint, read_json
from .compress import check_options
from .errors import ConversionError, reason
from .folders import new_folder
from .plan import Plan, write_model
from .report import PLOT, REPORT, provenance, table
from .report import write as write_report
from .stages import stage


# What comes along beside the weights.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model",
    "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def shard_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 5GB or 500MB, got {text!r}")
    return max(1, int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")))


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
            help="run source and result side by side and refuse to finish on a mismatch (default: if both fit in memory)",
        )
        if name == "hf":
            command.add_argument("--revision", help="of a source on the Hub")
            smaller.add_arguments(command)
    args = parser.parse_args(argv)
    if args.command == "hf":
        smaller.set_defaults(args)
    args.words = sys.argv[1:] if argv is None else argv
    return args


def local_folder(source: str, revision: str | None) -> Path:
    """The folder `source`, or a copy of the repository of that name on the Hub."""
    if Path(source).exists():
        if not Path(source).is_dir():
            raise ConversionError(f"{source} is a file: expected a folder, or a name on the Hub")
        return Path(source)
    try:
        patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", *COMPANIONS]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"{source} is no folder here, and could not be had from the Hub: {reason(error)}"
        ) from error


def copy_companions(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(path, target / path.name)


def weights_dtype(args: argparse.Namespace, plan: Plan, checkpoint: Checkpoint, inexact: bool) -> torch.dtype | None:
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    if args.dtype is not None:
        return getattr(torch, args.dtype)
    if plan.rounds and not inexact and dtypes != {torch.float32}:
        print("the weights are written in float32: what is folded into them would be rounded in half precision")
        return torch.float32
    return None


def convert(args: argparse.Namespace) -> None:
    smaller_wanted = args.command == "hf" and smaller.wanted(args)
    if args.command == "hf":
        source = local_folder(args.source, args.revision)
        read_json(source / "config.json")
        try:
            config = AutoConfig.from_pretrained(source)
            plan = hf.make_plan(config)
        except ConversionError:
            raise
        except Exception as error:  # whatever a configuration's validation raises
            raise ConversionError(f"{source / 'config.json'}: {reason(error)}") from error
        checkpoint = Checkpoint(source)
    else:
        source = Path(args.source)
        arguments, checkpoint = official.load(source)
        plan = official.make_plan(arguments, checkpoint)
    dtype = weights_dtype(args, plan, checkpoint, smaller_wanted)
    rounded = dtype is not None and any(info.dtype.itemsize > dtype.itemsize for info in checkpoint.tensors.values())
    rounded |= plan.rounds and dtype in (torch.bfloat16, torch.float16)
    numbers = sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())
    report = provenance(
        args.words, args.source, "t6" if args.command == "official" else config.model_type,
        None if Path(args.source).exists() else args.source,
    )  # fmt: skip

    def write_exact(folder: Path) -> None:
        write_model(plan, checkpoint, folder, dtype, args.max_shard_size)
        if source.is_dir():
            copy_companions(source, folder)
        if args.command == "hf":
            compare = partial(verify.compare_with_transformers, source, folder, rounded)
        else:
            compare = partial(verify.compare_with_research_code, arguments, checkpoint, folder, rounded)
        if args.verify or (args.verify is None and verify.fits_in_memory(numbers)):
            print("verified:", compare())
        else:
            print(
                "not verified" + ("" if args.verify is False else ": source and result do not fit in memory together")
            )

    if not smaller_wanted:
        with new_folder(args.target, args.overwrite) as folder:
            write_exact(folder)
            write_report(folder, report)
        print(f"{args.target}: {numbers:,} weights")
        return

    check_options(plan.config, args.k_rank, args.v_rank, args.cache_ratio)
    with stage("reading texts"):
        texts = smaller.Texts(args, source, plan.config)
    with new_folder(args.target, args.overwrite) as folder:
        working = smaller.working_folder(args)
        exact_folder = working / "exact"
        if not exact_folder.exists():
            with stage("exact model"), new_folder(exact_folder) as new:
                write_exact(new)
        common = dtype or next(iter(checkpoint.tensors.values())).dtype
        rows = smaller.make_smaller(args, source, exact_folder, working, texts, folder, common)
        copy_companions(source, folder)
        write_report(folder, report, rows)
    shutil.rmtree(working)
    print(table(rows))
    print(f"{args.target}: the table is in {REPORT} and {PLOT}, too")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.set_verbosity_error()
    try:
        convert(args)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
