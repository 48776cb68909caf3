"""The order of a conversion: source, plan, weights, verification, and a smaller cache if one is wanted."""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig

from . import verify
from .evaluate.compressed import compare_retrieval, retrieval_samples
from .evaluate.report import retrieval_table
from .files.checkpoints import Checkpoint
from .files.companions import check_json, generation_config, without_marks, write_companions, write_generation_config
from .files.errors import ConversionError, reason
from .files.folders import new_folder, read_json, temporary_folder
from .files.links import check_files
from .files.space import check_space
from .files.targets import check_target
from .files.tokenizer import check_tokenizer, files_like
from .layerwise import compare_layers
from .smaller import order
from .smaller.ranks import check_options
from .smaller.report import PLOT, REPORT, provenance, table
from .smaller.report import write as write_report
from .smaller.stages import stage
from .smaller.working import describe, read_digests, unfinished_folder, working_folder
from .source import DESCRIPTION, HF, READ, from_hub, local_folder, read_config
from .sources import families, official
from .sources.fields import check_fields
from .sources.gguf import GgufFile, is_gguf
from .sources.plan import Plan
from .verify import Comparison
from .write import loaded_dtype, write_model


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
        device = order.device_of(args)
        text_digests = read_digests(args)
    if args.command == "hf":
        source = inputs["SRC"] = local_folder(args.source, args.revision)
        check_target(args.target, args.overwrite, inputs)
        gguf, described = None, source / "config.json"
        if source.is_file():
            gguf, described, source = GgufFile(source), source, temporary / "source"
            for note in gguf.write_config(source):
                print("note:", note)
        content = read_config(source)
        check_files(source, READ)
        check_json(source)
        check_fields(content, str(described))
        if (settings := source / "generation_config.json").exists():
            check_fields(read_json(settings), str(settings))
        source = without_marks(source, READ, temporary)
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            plan = families.make_plan(config)  # what cannot be is refused before weights are looked for
        except ConversionError:
            raise
        except Exception as error:  # whatever a configuration's validation raises
            raise ConversionError(f"{described}: {reason(error)}") from error
        if smaller:
            check_options(plan.config, args.k_rank, args.v_rank, args.cache_ratio, args.cache_dtype)
        generation_config(source)
        if gguf is not None:
            companions = temporary / "tokenizer"
            gguf.write_tokenizer(companions)
        else:
            companions = source
        check_tokenizer(companions, smaller)
        if smaller:
            with stage("reading texts"):
                texts = order.Texts(args, companions, plan.config)
                questions = retrieval_samples(args, companions, plan.config)
        if not Path(args.source).exists():
            from_hub(args.source, inputs["SRC"].name, READ)  # the same commit, now with its weights
            check_files(inputs["SRC"], READ)
            source = companions = without_marks(inputs["SRC"], READ, temporary)
        if gguf is not None:
            gguf.write_weights(source, args.max_shard_size)
        checkpoint = Checkpoint(source)
        plan = families.plan_as_loaded(config, checkpoint)
    else:
        source = inputs["SRC"]
        if is_gguf(source):
            raise ConversionError(f"{source} is GGUF: `{HF} {source}` reads those")
        if source.is_dir():
            check_files(source, READ)
            check_json(source)
        arguments, checkpoint = official.load(source)
        plan = official.make_plan(arguments, checkpoint)
        if source.is_dir():
            source = without_marks(source, READ, temporary)
        companions = source
    for note in plan.notes:
        print("note:", note)
    plan.check_names(set(checkpoint.tensors))
    dtype = weights_dtype(args, plan, checkpoint, smaller)
    rounded = any(
        torch.promote_types(info.dtype, dtype or info.dtype) != (dtype or info.dtype)
        for info in checkpoint.tensors.values()
    )
    rounded |= plan.rounds and any((dtype or info.dtype).itemsize == 2 for info in checkpoint.tensors.values())
    numbers = sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())
    nbytes = checkpoint.nbytes if dtype is None else numbers * dtype.itemsize
    report = provenance(
        args.words, args.source, "t6" if args.command == "official" else config.model_type,
        None if Path(args.source).exists() else args.source,
    )  # fmt: skip
    if args.command == "hf":  # what layers without windows cache, heads of keys and values in any dtype
        report["source_cache_numbers_per_token"] = (
            plan.config.num_hidden_layers * plan.config.head_dim * (plan.config.k_rank + plan.config.v_rank)
        )

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
        check_space(folder, nbytes)
        write_model(plan, checkpoint, folder, dtype, args.max_shard_size)
        if companions.is_dir():
            write_companions(companions, folder)
        if args.command == "hf":
            write_generation_config(source, folder)
        print(f"verified: {compare(folder)}" if args.verify else "not verified")

    if not smaller:
        write_exact(folder)
        write_report(folder, report)
        return f"{args.target}: {numbers:,} weights"

    files = read_files(source, checkpoint) if gguf is None else [gguf.path]
    digests = text_digests | {"source": describe(inputs["SRC"], files)}
    with working_folder(args, digests) as working:
        exact_folder = working / "exact"
        if not exact_folder.exists():
            check_space(folder, 2 * nbytes)
            with stage("exact model"), new_folder(exact_folder) as new:
                write_exact(new)
        common = loaded_dtype(plan, checkpoint, dtype)
        rows = order.make_smaller(args, source, exact_folder, working, texts, folder, common, device, rounded)
        found = compare_retrieval(args, source, folder, questions, texts.held_out, device)
        write_companions(companions, folder)
        write_report(folder, report | found, rows)
    text = table(rows)
    if found:
        text += f"\n\nvalues found in long texts\n{retrieval_table(found['retrieval'])}"
    if "retrieval_warning" in found:
        text += f"\nwarning: {found['retrieval_warning']}"
    return f"{text}\n{args.target}: the table is in {REPORT} and {PLOT}, too"


def read_files(source: Path, checkpoint: Checkpoint) -> list[Path]:
    """The files of which the result is made: those of the weights that are loaded, and what describes the model."""
    return sorted({*files_like(source, DESCRIPTION), *checkpoint.files})
