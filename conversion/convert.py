"""The order of a conversion: source, plan, weights, verification, and a smaller cache if one is wanted."""

import argparse
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig

from . import verify
from .files.checkpoints import Checkpoint
from .files.companions import COMPANIONS, write_companions, write_generation_config
from .files.errors import ConversionError, reason
from .files.folders import new_folder, read_json
from .layerwise import compare_layers
from .smaller import order
from .smaller.ranks import check_options
from .smaller.report import PLOT, REPORT, provenance, table
from .smaller.report import write as write_report
from .smaller.stages import stage
from .sources import families, official
from .sources.plan import Plan
from .verify import Comparison
from .write import loaded_dtype, write_model


def local_folder(source: str, revision: str | None) -> Path:
    """The folder `source`, or a copy of the repository of that name on the Hub."""
    if Path(source).exists():
        if not Path(source).is_dir():
            raise ConversionError(f"{source} is a file: expected a folder, or a name on the Hub")
        return Path(source)
    try:
        patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", *COMPANIONS]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"{source} is no folder here, and could not be had from the Hub: {reason(error)}"
        ) from error


def weights_dtype(args: argparse.Namespace, plan: Plan, checkpoint: Checkpoint, inexact: bool) -> torch.dtype | None:
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    if args.dtype is not None:
        return getattr(torch, args.dtype)
    if plan.rounds and not inexact and dtypes != {torch.float32}:
        print("the weights are written in float32: what is folded into them would be rounded in half precision")
        return torch.float32
    return None


def convert(args: argparse.Namespace, smaller: bool) -> None:
    """
    Writes the T6 folder `args.target`, with a `smaller` cache or as exact as the weights' dtype allows.

    Raises:
        ConversionError: naming what of the source, the texts or the target is not as it must be.
    """
    if args.command == "hf":
        source = local_folder(args.source, args.revision)
        read_json(source / "config.json")
        try:
            config = AutoConfig.from_pretrained(source)
            families.make_plan(config)  # what cannot be is refused before weights are looked for
        except ConversionError:
            raise
        except Exception as error:  # whatever a configuration's validation raises
            raise ConversionError(f"{source / 'config.json'}: {reason(error)}") from error
        checkpoint = Checkpoint(source)
        plan = families.plan_as_loaded(config, checkpoint)
    else:
        source = Path(args.source)
        arguments, checkpoint = official.load(source)
        plan = official.make_plan(arguments, checkpoint)
    for note in plan.notes:
        print("note:", note)
    dtype = weights_dtype(args, plan, checkpoint, smaller)
    rounded = any(
        torch.promote_types(info.dtype, dtype or info.dtype) != (dtype or info.dtype)
        for info in checkpoint.tensors.values()
    )
    rounded |= plan.rounds and any((dtype or info.dtype).itemsize == 2 for info in checkpoint.tensors.values())
    numbers = sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())
    report = provenance(
        args.words, args.source, "t6" if args.command == "official" else config.model_type,
        None if Path(args.source).exists() else args.source,
    )  # fmt: skip

    def compare(folder: Path) -> Comparison:
        if args.command == "official":
            if not verify.fits_in_memory(numbers):
                raise ConversionError(
                    "source and result cannot be compared: they do not fit into memory together; --no-verify writes a model "
                    "that nothing has verified"
                )
            return verify.compare_with_research_code(arguments, checkpoint, folder, rounded)
        if verify.fits_in_memory(numbers, verify.cache_numbers(plan.config)):
            return verify.compare_with_transformers(source, folder, rounded)
        print("source and result do not fit into memory together: they are compared layer by layer")
        return compare_layers(source, config, checkpoint, folder, rounded)

    def write_exact(folder: Path) -> None:
        write_model(plan, checkpoint, folder, dtype, args.max_shard_size)
        if source.is_dir():
            write_companions(source, folder)
        if args.command == "hf":
            write_generation_config(source, folder)
        print(f"verified: {compare(folder)}" if args.verify else "not verified")

    if not smaller:
        with new_folder(args.target, args.overwrite) as folder:
            write_exact(folder)
            write_report(folder, report)
        print(f"{args.target}: {numbers:,} weights")
        return

    check_options(plan.config, args.k_rank, args.v_rank, args.cache_ratio)
    with stage("reading texts"):
        texts = order.Texts(args, source, plan.config)
    with new_folder(args.target, args.overwrite) as folder:
        working = order.working_folder(args)
        exact_folder = working / "exact"
        if not exact_folder.exists():
            with stage("exact model"), new_folder(exact_folder) as new:
                write_exact(new)
        common = loaded_dtype(plan, checkpoint, dtype)
        rows = order.make_smaller(args, source, exact_folder, working, texts, folder, common)
        write_companions(source, folder)
        write_report(folder, report, rows)
    shutil.rmtree(working)
    print(table(rows))
    print(f"{args.target}: the table is in {REPORT} and {PLOT}, too")
