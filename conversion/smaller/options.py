"""What the command line can ask of a smaller cache. Imports nothing that takes time: `--help` is to come at once."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from ..files.errors import ConversionError


METHODS = ("fit", "mean-pool")
RECONSTRUCT_STEPS = {"fit": 500, "mean-pool": 0}  # the GQA paper's recipe has none
LEARNING_RATES = {"fit": 1e-4, "mean-pool": 3e-4}  # docs/compression.md has others
# Options that act on a smaller cache alone, and on healing alone, with their defaults: `None` is none, or depends on others.
SMALLER = {
    "calibration": None, "calibration_tokens": 131072, "method": "fit", "reconstruct_steps": None, "held_out": None, "cache_dtype": None,
    "retrieval_samples": 4, "window": None, "device": None, "batch_size": 8, "compute_dtype": "float32", "seed": 0, "heal": None,
    "heal_steps": None,
}  # fmt: skip
HEALING = {
    "heal_accumulation": 1, "heal_tokens": None, "heal_optimizer": "adamw", "heal_learning_rate": None, "heal_cross_entropy": 0.0
}  # fmt: skip


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
        return checked(kind, "positive", lambda number: 0 < number < float("inf"))

    def not_negative(kind):
        return checked(kind, "non-negative", lambda number: 0 <= number < float("inf"))

    def ranks(value: str) -> list[int]:
        return [int(rank) for rank in value.split(",")]

    group = parser.add_argument_group("a smaller cache", "below the source's number of key/value heads")
    group.add_argument("--k-rank", type=ranks, metavar="N[,N...]", help="rank of the keys, of all layers or of each")
    group.add_argument("--v-rank", type=ranks, metavar="N[,N...]", help="rank of the values, of all layers or of each")
    group.add_argument(
        "--cache-ratio", type=positive(float), metavar="X",
        help="X times smaller in all, with ranks by layer, and rows of 8 or 4 bits, where that loses less",
    )  # fmt: skip
    group.add_argument(
        "--cache-dtype", choices=("model", "float8_e4m3fn", "int4"),
        help="of the cache's rows (model; with --cache-ratio that with which it loses least)",
    )  # fmt: skip
    group.add_argument(
        "--calibration", type=Path, metavar="TEXT", help="a UTF-8 file on whose activations to lose least"
    )
    group.add_argument(
        "--calibration-tokens", type=positive(int), metavar="N", help=f"read of it ({SMALLER['calibration_tokens']})"
    )
    group.add_argument("--method", choices=METHODS, help=f"mean-pool: the GQA paper's ({SMALLER['method']})")
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
        "--retrieval-samples", type=not_negative(int), metavar="N",
        help="of each task, in which source and result look for facts in texts as long as a window and as the context, "
        f"at most 8192 tokens ({SMALLER['retrieval_samples']}; 0: none)",
    )  # fmt: skip
    group.add_argument(
        "--window", type=positive(int), metavar="N", help="tokens of a window of text (1024, or the context)"
    )
    group.add_argument("--device", help="(cuda if there is one, else cpu)")
    group.add_argument(
        "--batch-size", type=positive(int), metavar="N", help=f"windows of text at a time ({SMALLER['batch_size']})"
    )
    group.add_argument(
        "--compute-dtype", choices=("float32", "bfloat16"),
        help=f"in which models are calibrated and measured; that of the weights, or wider ({SMALLER['compute_dtype']})",
    )  # fmt: skip
    group = parser.add_argument_group("healing", "a compressed model learns the source's predictions")
    group.add_argument(
        "--heal",
        type=Path,
        metavar="TEXT",
        help="a UTF-8 file, or windows of token ids, integers [n, window] in a .npy file",
    )
    group.add_argument("--heal-steps", type=positive(int), metavar="N")
    group.add_argument(
        "--heal-accumulation", type=positive(int), metavar="N", help=f"batches a step ({HEALING['heal_accumulation']})"
    )
    group.add_argument(
        "--heal-tokens",
        type=positive(int),
        metavar="N",
        help="read of it, again and again if need be (all; questions take the place of a text's last quarter)",
    )
    group.add_argument(
        "--heal-optimizer", choices=("adamw", "muon"),
        help=f"muon: for the weights of linear layers ({HEALING['heal_optimizer']})",
    )  # fmt: skip
    group.add_argument(
        "--heal-learning-rate", type=positive(float), metavar="X",
        help="the highest, which is halved where the loss rises "
        f"({LEARNING_RATES['fit']:g}, mean-pool {LEARNING_RATES['mean-pool']:g}, three times that with muon)",
    )  # fmt: skip
    group.add_argument(
        "--heal-cross-entropy", type=not_negative(float), metavar="X",
        help=f"weight of the loss on the text itself beside the source's predictions ({HEALING['heal_cross_entropy']:g})",
    )  # fmt: skip
    seed = checked(int, "non-negative", lambda number: 0 <= number < 2**32 - 1)  # which NumPy takes, and the next
    group.add_argument("--seed", type=seed, metavar="N", help=f"({SMALLER['seed']})")


def set_defaults(args: argparse.Namespace) -> None:
    """Those of options that were not given. `args.given` then names those that were, and act on a smaller cache alone."""
    defaults = SMALLER | HEALING
    args.given = [name for name in defaults if getattr(args, name) is not None]
    vars(args).update({name: default for name, default in defaults.items() if name not in args.given})
    if args.reconstruct_steps is None:
        args.reconstruct_steps = RECONSTRUCT_STEPS[args.method]
    if args.heal_learning_rate is None:
        args.heal_learning_rate = LEARNING_RATES[args.method] * (3 if args.heal_optimizer == "muon" else 1)


def wants_smaller_cache(args: argparse.Namespace) -> bool:
    """Whether the cache is to be smaller. Raises a `ConversionError` for options that do not go together."""
    smaller = any(value is not None for value in (args.k_rank, args.v_rank, args.cache_ratio))
    if not smaller:
        for name in args.given:
            raise ConversionError(f"--{name.replace('_', '-')} needs --k-rank, --v-rank or --cache-ratio")
        return False
    if args.cache_ratio is not None and (args.k_rank, args.v_rank) != (None, None):
        raise ConversionError("--cache-ratio chooses the ranks itself: expected it, or --k-rank and --v-rank")
    if args.calibration is None:
        raise ConversionError("a smaller cache needs --calibration TEXT")
    if (args.heal is None) != (args.heal_steps is None):
        raise ConversionError("--heal and --heal-steps go together")
    if args.heal is None:
        for name in filter(HEALING.__contains__, args.given):
            raise ConversionError(f"--{name.replace('_', '-')} needs --heal")
    if args.method == "mean-pool" and args.cache_ratio is not None:
        raise ConversionError("--method mean-pool has one rank for all layers: expected --k-rank and --v-rank")
    for package in ["matplotlib"] + ["accelerate"] * (args.heal is not None):
        if find_spec(package) is None:
            raise ConversionError(f"a smaller cache needs {package}: pip install 't6-transformers[compress]'")
    return True
