"""From an exact T6 model to one with a smaller cache: compression, healing, and the measurement of both."""

import argparse
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from modeling_t6 import T6Cache, T6Config, T6ForCausalLM

from . import text
from .compress import METHODS, compress
from .errors import ConversionError
from .folders import new_folder
from .heal import heal
from .reconstruct import reconstruct
from .report import Row
from .stages import stage
from .verify import cache_bytes_per_token


RECONSTRUCT_STEPS = {"fit": 500, "mean-pool": 0}  # the GQA paper's recipe has none
LEARNING_RATES = {"fit": 1e-4, "mean-pool": 3e-4}  # docs/compression.md has others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def checked(kind, adjective: str, accepts):
        def convert(value: str):
            number = kind(value)
            if not accepts(number):
                raise ValueError
            return number

        convert.__name__ = f"{adjective} {kind.__name__}"  # argparse's message names the type
        return convert

    def positive(kind):
        return checked(kind, "positive", lambda number: number > 0)

    def not_negative(kind):
        return checked(kind, "non-negative", lambda number: 0 <= number < float("inf"))

    def ranks(value: str) -> list[int]:
        return [int(rank) for rank in value.split(",")]

    group = parser.add_argument_group("a smaller cache", "below the source's number of key/value heads")
    group.add_argument("--k-rank", type=ranks, metavar="N[,N...]", help="rank of the keys, of all layers or of each")
    group.add_argument("--v-rank", type=ranks, metavar="N[,N...]", help="rank of the values, of all layers or of each")
    group.add_argument(
        "--cache-ratio", type=positive(float), metavar="X",
        help="X times smaller in all, with ranks by layer where that loses less",
    )  # fmt: skip
    group.add_argument(
        "--calibration", type=Path, metavar="TEXT", help="a UTF-8 file on whose activations to lose least"
    )
    group.add_argument(
        "--calibration-tokens", type=positive(int), default=131072, metavar="N", help="read of it (%(default)s)"
    )
    group.add_argument("--method", choices=METHODS, default="fit", help="mean-pool: the GQA paper's (%(default)s)")
    group.add_argument(
        "--reconstruct-steps", type=not_negative(int), metavar="N",
        help="in which each attention learns its source's output on the calibration text "
        f"({RECONSTRUCT_STEPS['fit']}, mean-pool {RECONSTRUCT_STEPS['mean-pool']})",
    )  # fmt: skip
    group.add_argument(
        "--held-out", type=Path, metavar="TEXT",
        help="for perplexity (the last tenth of the calibration text; a tenth of the healing text is left out, too)",
    )  # fmt: skip
    group.add_argument(
        "--window", type=positive(int), metavar="N", help="tokens of a window of text (1024, or the context)"
    )
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    group.add_argument(
        "--batch-size", type=positive(int), default=8, metavar="N", help="windows of text at a time (%(default)s)"
    )
    group.add_argument(
        "--compute-dtype", choices=("float32", "bfloat16"), default="float32",
        help="in which models are calibrated and measured (%(default)s)",
    )  # fmt: skip
    group = parser.add_argument_group("healing", "a compressed model learns the source's predictions")
    group.add_argument("--heal", type=Path, metavar="TEXT", help="a UTF-8 file")
    group.add_argument("--heal-steps", type=positive(int), metavar="N")
    group.add_argument("--heal-accumulation", type=positive(int), default=1, metavar="N", help="batches a step (1)")
    group.add_argument(
        "--heal-tokens", type=positive(int), metavar="N", help="read of it, again and again if need be (all)"
    )
    group.add_argument(
        "--heal-optimizer", choices=("adamw", "muon"), default="adamw",
        help="muon: for the weights of linear layers (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--heal-learning-rate", type=positive(float), metavar="X",
        help=f"({LEARNING_RATES['fit']:g}, mean-pool {LEARNING_RATES['mean-pool']:g}, three times that with muon)",
    )  # fmt: skip
    group.add_argument(
        "--heal-cross-entropy", type=not_negative(float), default=0.0, metavar="X",
        help="weight of the loss on the text itself beside the source's predictions (%(default)s)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")


def set_defaults(args: argparse.Namespace) -> None:
    """Those of options that depend on others."""
    if args.reconstruct_steps is None:
        args.reconstruct_steps = RECONSTRUCT_STEPS[args.method]
    if args.heal_learning_rate is None:
        args.heal_learning_rate = LEARNING_RATES[args.method] * (3 if args.heal_optimizer == "muon" else 1)


def wanted(args: argparse.Namespace) -> bool:
    """Whether the cache is to be smaller. Raises a `ConversionError` for options that do not go together."""
    smaller = any(value is not None for value in (args.k_rank, args.v_rank, args.cache_ratio))
    for option in ("calibration", "heal", "held_out"):
        if getattr(args, option) is not None and not smaller:
            raise ConversionError(f"--{option.replace('_', '-')} needs --k-rank, --v-rank or --cache-ratio")
    if not smaller:
        return False
    if args.cache_ratio is not None and (args.k_rank, args.v_rank) != (None, None):
        raise ConversionError("--cache-ratio chooses the ranks itself: expected it, or --k-rank and --v-rank")
    if args.calibration is None:
        raise ConversionError("a smaller cache needs --calibration TEXT")
    if (args.heal is None) != (args.heal_steps is None):
        raise ConversionError("--heal and --heal-steps go together")
    if args.method == "mean-pool" and args.cache_ratio is not None:
        raise ConversionError("--method mean-pool has one rank for all layers: expected --k-rank and --v-rank")
    for package in ["matplotlib"] + ["accelerate"] * (args.heal is not None):
        if find_spec(package) is None:
            raise ConversionError(f"a smaller cache needs {package}: pip install 't6-transformers[compress]'")
    return True


class Texts:
    """The token windows of all texts that a run reads; a text that cannot be used is found before any work."""

    def __init__(self, args: argparse.Namespace, source: Path, config: T6Config):
        tokenizer = text.load_tokenizer(source)
        length = args.window or min(1024, config.max_position_embeddings)
        if not 2 <= length <= config.max_position_embeddings:
            raise ConversionError(f"--window {length}: expected 2 to {config.max_position_embeddings}")
        calibration = text.read_text(args.calibration)
        if args.held_out is not None:
            held_out, name = text.read_text(args.held_out), str(args.held_out)
        else:
            (calibration, held_out), name = text.split_held_out(calibration), f"the last tenth of {args.calibration}"
        self.held_out = text.windows(tokenizer, held_out, length, name)
        whole = text.windows(tokenizer, calibration, length, str(args.calibration))
        count = min(len(whole), max(1, args.calibration_tokens // length))
        self.calibration = whole[torch.linspace(0, len(whole) - 1, count).long()]
        self.healing = None
        most = None if args.heal_tokens is None else max(1, args.heal_tokens // length)
        if args.heal is not None and args.heal.resolve() == args.calibration.resolve():
            self.healing = whole[:most]  # a long text takes long to tokenise
        elif args.heal is not None:
            healing = text.read_text(args.heal)
            if args.held_out is None:
                healing = text.split_held_out(healing)[0]
            self.healing = text.windows(tokenizer, healing, length, str(args.heal), most)


def settings(args: argparse.Namespace) -> dict:
    """What a run must have in common with the interrupted one that it continues."""
    names = (
        "source", "revision", "k_rank", "v_rank", "cache_ratio", "calibration", "calibration_tokens", "method",
        "reconstruct_steps", "held_out", "window", "compute_dtype", "heal", "heal_steps", "heal_tokens", "batch_size",
        "heal_accumulation", "heal_optimizer", "heal_learning_rate", "heal_cross_entropy", "seed",
    )  # fmt: skip
    return {name: str(value) if isinstance(value := getattr(args, name), Path) else value for name in names}


def working_folder(args: argparse.Namespace) -> Path:
    """The folder beside DST from which an interrupted run goes on."""
    target = args.target.absolute()
    folder = target.with_name(f".{target.name}.unfinished")
    new = settings(args)
    if (folder / "settings.json").exists():
        old = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        changed = [name for name in new if old.get(name) != new[name]]
        if not changed:
            return folder
        if not args.overwrite:
            option = changed[0].replace("_", "-")
            raise ConversionError(
                f"{folder} is an unfinished run with --{option} {old.get(changed[0])}, this one has {new[changed[0]]}: "
                "--overwrite starts anew"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConversionError(f"cannot write {folder}: {error}") from error
    return folder


def make_smaller(
    args: argparse.Namespace,
    source: Path,
    exact_folder: Path,
    working: Path,
    texts: Texts,
    folder: Path,
    dtype: torch.dtype,
) -> list[Row]:
    """
    Compresses and heals the exact model in `exact_folder`, and saves the result in `folder`, its weights in `dtype`.
    What is finished in `working` is not done again.

    Returns:
        Cache size and perplexity of the source, the exact, the compressed and the healed model, each as it is saved.
    """
    compute_dtype = getattr(torch, args.compute_dtype)
    rows: list[Row] = []

    def load(cls, path: Path) -> PreTrainedModel:
        return cls.from_pretrained(path, dtype=compute_dtype).eval().to(args.device)

    def measure(name: str, model: PreTrainedModel) -> PreTrainedModel:
        cache_class = T6Cache if isinstance(model, T6ForCausalLM) else DynamicCache
        size = cache_bytes_per_token(model, cache_class(config=model.config), dtype.itemsize)
        with stage("measuring"):
            perplexity = text.perplexity(model, texts.held_out, args.batch_size, name)
        print(f"perplexity, {name}: {perplexity:.4f}", flush=True)
        rows.append(Row(name, size, perplexity))
        return model

    def save(model: T6ForCausalLM, path: Path) -> None:
        model.to(dtype).save_pretrained(path, max_shard_size=args.max_shard_size)

    source_model = measure("source", load(AutoModelForCausalLM, source))
    compressed_folder = working / "compressed"
    exact_model = measure("exact", load(T6ForCausalLM, exact_folder))
    if not compressed_folder.exists():
        calibration = texts.calibration.to(args.device)
        ranks = args.k_rank, args.v_rank, args.cache_ratio
        model = compress(exact_model, calibration, *ranks, args.method, args.batch_size)
        if args.reconstruct_steps > 0:
            found = reconstruct(model, exact_model, calibration, args.reconstruct_steps, args.seed)
            print(
                "error of each attention's output, of its power: "
                + ", ".join(f"{old:.2%} to {new:.2%}" for old, new in found)
            )
        with new_folder(compressed_folder) as new:
            save(model, new)
    del exact_model
    model = measure("compressed", load(T6ForCausalLM, compressed_folder))
    print(f"ranks of the keys {model.config.k_rank}, of the values {model.config.v_rank}")
    if texts.healing is None:
        save(model, folder)
        return rows

    model = model.float()
    with stage("healing"):
        heal(
            model, source_model, texts.healing, working / "checkpoints", args.heal_steps, args.batch_size,
            args.heal_accumulation, args.heal_optimizer, args.heal_learning_rate, args.heal_cross_entropy, args.seed, args.device,
        )  # fmt: skip
    save(model, folder)
    measure("healed", load(T6ForCausalLM, folder))
    return rows
