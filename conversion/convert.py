"""The order of a conversion: source, plan, weights, verification, and a smaller cache if one is wanted."""

import argparse
import shutil
from pathlib import Path

import torch

from .evaluate.compressed import compare_retrieval, retrieval_samples
from .evaluate.report import retrieval_table
from .files.checkpoints import count_numbers
from .files.companions import write_companions, write_generation_config
from .files.errors import ConversionError
from .files.folders import new_folder, temporary_folder
from .files.space import check_space
from .files.targets import check_target
from .smaller import pipeline
from .smaller.ranks import check_options
from .smaller.report import PLOT, REPORT, provenance, table
from .smaller.report import write as write_report
from .smaller.stages import stage
from .smaller.working import EXACT_MODEL, describe, read_digests, unfinished_folder, working_folder
from .source import ResearchSource, TransformersSource, local_folder
from .write import loaded_dtype, write_model


Source = TransformersSource | ResearchSource


def weights_dtype(name: str | None, source: Source, inexact: bool) -> torch.dtype | None:
    """
    The dtype of all weights of the result, `None` for that of each of the source.

    Args:
        name: what `--dtype` says.
        inexact: whether the cache becomes smaller, beside which rounding does not matter.
    """
    if name is not None:
        return getattr(torch, name)
    dtypes = {info.dtype for info in source.checkpoint.tensors.values()}
    if source.plan.rounds and not inexact and dtypes != {torch.float32}:
        print("the weights are written in float32: what is folded into them would be rounded in half precision")
        return torch.float32
    return None


def rounds_weights(source: Source, dtype: torch.dtype | None) -> bool:
    """Whether the result's weights are rounded ones of the source, which a comparison must allow for."""
    pairs = {(info.dtype, dtype or info.dtype) for info in source.checkpoint.tensors.values()}
    return any(
        torch.promote_types(old, new) != new or (source.plan.rounds and new.itemsize == 2) for old, new in pairs
    )


def convert(args: argparse.Namespace, smaller: bool) -> None:
    """
    Writes the T6 folder `args.target`, with a `smaller` cache or as exact as the weights' dtype allows.

    Raises:
        ConversionError: naming what of the source, the texts or the target is not as it must be.
    """
    inputs = {"SRC": Path(args.source)}
    if args.command == "hf":
        inputs |= {f"--{name}": getattr(args, name.replace("-", "_")) for name in ("calibration", "held-out", "heal")}
    with (
        temporary_folder("t6-convert-") as temporary,
        new_folder(args.target, args.overwrite, inputs) as folder,
    ):
        result = write(args, smaller, inputs, folder, temporary)
    unfinished = unfinished_folder(args.target)
    if smaller:
        shutil.rmtree(unfinished)
    elif unfinished.exists():
        print(f"{unfinished} holds an unfinished run that was to make a smaller cache: if it is not wanted, remove it")
    print(result)


def write(args: argparse.Namespace, smaller: bool, inputs: dict[str, Path], folder: Path, temporary: Path) -> str:
    """
    Writes the T6 folder in `folder`; what costs little is checked before what costs much.

    Args:
        inputs: what the result is made from, by the names that errors give it; a source on the Hub is added.
        temporary: a folder for what is not to be kept.

    Returns:
        What there is to say of the result.
    """
    if smaller:
        device = pipeline.choose_device(args)
        text_digests = read_digests(args)
    hub_name = None if Path(args.source).exists() else args.source
    if args.command == "official":
        source = ResearchSource(inputs["SRC"], temporary)
    else:
        inputs["SRC"] = local_folder(args.source, args.revision)
        check_target(args.target, args.overwrite, inputs)
        source = TransformersSource(inputs["SRC"], temporary)
        if smaller:
            check_options(source.plan.config, args.k_rank, args.v_rank, args.cache_ratio, args.cache_dtype)
        source.check_companions(needs_tokenizer=smaller)
        if smaller:
            with stage("reading texts"):
                texts = pipeline.Texts(args, source.companions, source.plan.config)
                questions = retrieval_samples(args, source.companions, source.plan.config)
        source.load_weights(hub_name, args.max_shard_size)
    for note in source.plan.notes:
        print("note:", note)
    source.plan.check_names(set(source.checkpoint.tensors))

    dtype = weights_dtype(args.dtype, source, inexact=smaller)
    rounded = rounds_weights(source, dtype)
    report = provenance(args.words, args.source, source.model_type, hub_name)
    if args.command == "hf":  # what layers without windows cache, heads of keys and values in any dtype
        config = source.plan.config
        report["source_cache_numbers_per_token"] = (
            config.num_hidden_layers * config.head_dim * (config.k_rank + config.v_rank)
        )
    if not smaller:
        write_exact(args, source, dtype, rounded, folder)
        write_report(folder, report)
        return f"{args.target}: {count_numbers(source.checkpoint):,} weights"

    common, computed = loaded_dtype(source.plan, source.checkpoint, dtype), getattr(torch, args.compute_dtype)
    if torch.promote_types(common, computed) != computed:
        raise ConversionError(
            f"--compute-dtype {args.compute_dtype} would round the result's weights, which are {str(common).removeprefix('torch.')}: "
            f"expected a wider one, or --dtype {args.compute_dtype}"
        )
    digests = text_digests | {"source": describe(source.path, source.files)}
    with working_folder(args, digests) as working:
        exact_folder = working / EXACT_MODEL
        if not exact_folder.exists():
            check_space(folder, 2 * weights_nbytes(source, dtype))
            with stage("exact model"), new_folder(exact_folder) as new:
                write_exact(args, source, dtype, rounded, new)
        rows = pipeline.make_smaller(
            args, source.folder, working, folder, texts, dtype=common, device=device, rounded=rounded
        )
        found = compare_retrieval(args, source.folder, folder, questions, texts.held_out, device)
        write_companions(source.companions, folder)
        write_report(folder, report | found, rows)
    text = table(rows)
    if found:
        text += f"\n\nvalues found in long texts\n{retrieval_table(found['retrieval'])}"
    if "retrieval_warning" in found:
        text += f"\nwarning: {found['retrieval_warning']}"
    return f"{text}\n{args.target}: the table is in {REPORT} and {PLOT}, too"


def weights_nbytes(source: Source, dtype: torch.dtype | None) -> int:
    return source.checkpoint.nbytes if dtype is None else count_numbers(source.checkpoint) * dtype.itemsize


def write_exact(
    args: argparse.Namespace, source: Source, dtype: torch.dtype | None, rounded: bool, folder: Path
) -> None:
    """Writes the T6 model that computes what its source does, and compares the two unless `--no-verify` is given."""
    check_space(folder, weights_nbytes(source, dtype))
    write_model(source.plan, source.checkpoint, folder, dtype, args.max_shard_size)
    if source.companions.is_dir():
        write_companions(source.companions, folder)
    if args.command == "hf":
        write_generation_config(source.folder, folder)
    print(f"verified: {source.compare(folder, rounded)}" if args.verify else "not verified")
