"""
Trains T6 beside MHA, MQA, GQA and MLA ("twins"), and compares held-out losses in four tables: at equal parameters, equal heads, equal
bytes of cache, and equal training time.

    python examples/prepare.py --text PATHS --vocab-size 8192 --output-dir runs/tokens
    python examples/compare.py run --data runs/tokens --results runs/comparison.json --minutes 30
    python examples/compare.py report --results runs/comparison.json --output runs/comparison.md

All see the same batches in the same order. T6 is initialised by `recipe.py`; twins are tried with QK norm and without.
`comparison/plan.py` says which runs are made, and in which order.

`run` uses all GPUs, with two processes each: one compiles the next model while the other trains. It starts no run that would not end
within --minutes, writes results as runs end, and may be called again. A run that is out of time leaves a checkpoint in WORK_DIR.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from command_line import InputError, input_errors, number, only_call, write_json


# What the runs have in common; a later call must have the same.
SETTINGS = {
    "hidden_size": 512,
    "intermediate_size": 1408,  # of MHA
    "num_layers": 8,
    "head_dim": 64,
    "block_length": 1024,
    "sequences_per_step": 64,
    "max_steps": 1540,
    "warmup_steps": 100,
    "eval_steps": 110,
}
LEARNING_RATE = 2e-3  # the first that is tried: three of the four models that were tried at several were lowest at it


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    count = number(int, 1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the runs that the results lack")
    plan = commands.add_parser("plan", help="list the runs that are known to be needed")
    for command in (run, plan):
        command.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder of prepare.py")
        command.add_argument(
            "--learning-rate", type=number(float, 1e-9), default=LEARNING_RATE, metavar="X", help="(%(default)s)"
        )
        command.add_argument("--models", nargs="+", metavar="NAME", help="in this order (all)")
        for name, default in SETTINGS.items():
            command.add_argument(f"--{name.replace('_', '-')}", type=count, default=default, help="(%(default)s)")
    run.add_argument("--work-dir", type=Path, default=Path("runs/comparison"), metavar="DIR", help="(%(default)s)")
    run.add_argument("--minutes", type=number(float, 0), default=1e6, metavar="X", help="start no run that ends later")
    run.add_argument("--no-compile", action="store_true", help="do not compile layers with torch.compile")
    run.add_argument("--cpu", action="store_true", help="do not use GPUs")
    report = commands.add_parser("report", help="tables and plot")
    report.add_argument("--output", type=Path, default=Path("runs/comparison.md"), metavar="MD", help="(%(default)s)")
    for command in (run, plan, report):
        command.add_argument("--results", type=Path, required=True, metavar="JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

from comparison.plan import Run, models, needed_runs, step_seconds
from comparison.report import write_report
from comparison.training import Worker, checkpoint_of
from pretraining_data import kinds_of, open_prepared
from results import open_results, read_results
from scheduler import do_runs, visible_gpus


def opened(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """The results so far, checked to be of the same settings and data, and the names of the models to compare."""
    _, facts = open_prepared(args.data)
    settings = {name: getattr(args, name) for name in SETTINGS}
    header = {"settings": settings, "learning_rate": args.learning_rate, "data": facts["sha256"]}
    results = open_results(args.results, "compare.py", header)
    results.setdefault("text", facts.get("kinds"))
    names = list(models(settings))
    if unknown := set(args.models or ()) - set(names):
        raise InputError(f"--models: there is no {', '.join(sorted(unknown))}; there are {'; '.join(names)}")
    if args.hidden_size % (4 * args.head_dim):
        raise InputError(
            f"--hidden-size {args.hidden_size}: expected a multiple of 4 heads of --head-dim {args.head_dim}"
        )
    held_out = max(kind["held_out_tokens"] for kind in kinds_of(facts).values())
    for name, tokens, least in (
        ("training", facts["train_tokens"], 2 * args.block_length),
        ("held-out", held_out, args.block_length + 1),
    ):
        if tokens < least:
            raise InputError(
                f"{args.data} has {tokens} {name} tokens of a kind: expected {least}, or less --block-length"
            )
    return results, args.models or names


def do_missing_runs(args: argparse.Namespace) -> None:
    deadline = time.time() + 60 * args.minutes
    results, names = opened(args)
    # Checkpoints of other settings or data must not be taken for those of this comparison.
    header = json.dumps([results[name] for name in ("settings", "data")])
    checkpoints = args.work_dir / hashlib.sha256(header.encode()).hexdigest()[:12]

    def to_do(seconds: float) -> Iterator[Run]:
        seconds_of = step_seconds(results)
        for run in needed_runs(results, names):
            needed = run.steps * seconds_of.get(run.model, 0)
            if checkpoint_of(run, checkpoints).exists():
                needed = 0  # part of it is done, and it stops by itself
            if run.key not in results["runs"] and needed < seconds:
                yield run

    new_worker = partial(Worker, args.data, results["settings"], not args.no_compile, checkpoints, deadline)
    places = 2 * visible_gpus(args.cpu) or [None]  # the first process of each GPU before the second
    for run, result in do_runs(to_do, new_worker, places, deadline):
        results["runs"][run.key] = result
        write_json(args.results, results, indent=1)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with input_errors("compare.py"):
        if args.command == "run":
            with only_call(args.work_dir):
                do_missing_runs(args)
        elif args.command == "report":
            results = read_results(args.results, "compare.py", ("settings", "learning_rate", "data"))
            if not results["runs"]:
                raise InputError(f"{args.results} has no runs yet: there is nothing to compare")
            print(write_report(results, args.output), end="")
        else:
            results, names = opened(args)
            for run in needed_runs(results, names):
                print(f"{'done' if run.key in results['runs'] else 'to do'}  {run.key}")


if __name__ == "__main__":
    main()
