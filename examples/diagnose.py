# Copyright 2026 The T6 for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Why a T6 learns late what its twins learn early: many small runs, each with one thing changed.

    python examples/prepare.py --text PATHS --vocab-size 4096 --output-dir runs/tokens
    python examples/diagnose.py run --data runs/tokens --results runs/diagnosis.json --parallel 4 --minutes 5
    python examples/diagnose.py report --results runs/diagnosis.json

All runs see the same batches in the same order; a seed is that of the weights. `run` does those that the results lack, the
first seed's first, several side by side, and starts none that would not end in time; `--variants` chooses among those of
`ablations.py`. Each run logs held-out loss; how well text of random tokens is copied that has been there before, which takes
heads that look for the token after the last one like this (induction heads), and those need heads that look at the token before;
gradients (clipped), updates and weights by part; entropies of attention, and how many directions keys and values use.
"""

import argparse
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from command_line import InputError, input_errors, number, write_json


# What the runs have in common; a later call must have the same. A learning rate that is not named is this.
SETTINGS = {
    "hidden_size": 256,
    "num_layers": 4,
    "head_dim": 32,
    "block_length": 512,
    "sequences_per_step": 32,
    "max_steps": 800,
    "warmup_steps": 50,
    "eval_steps": 25,
    "measure_steps": 100,
}
LEARNING_RATE = 2e-3


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    count = number(int, 1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the runs that the results lack")
    run.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder of prepare.py")
    run.add_argument(
        "--variants", nargs="+", metavar="NAME", help="of ablations.py, NAME@RATE for a rate of its own (all)"
    )
    run.add_argument("--seeds", nargs="+", type=number(int, 0), default=[0, 1], metavar="N", help="(0 1)")
    run.add_argument(
        "--learning-rate", type=number(float, 1e-9), default=LEARNING_RATE, metavar="X", help="(%(default)s)"
    )
    run.add_argument("--parallel", type=count, default=1, metavar="N", help="processes, on all GPUs (%(default)s)")
    run.add_argument("--minutes", type=number(float, 0), default=1e6, metavar="X", help="start no run that ends later")
    run.add_argument("--no-graphs", action="store_true", help="do not capture a step as a CUDA graph")
    run.add_argument("--cpu", action="store_true", help="do not use a GPU")
    for name, default in SETTINGS.items():
        run.add_argument(f"--{name.replace('_', '-')}", type=count, default=default, help="(%(default)s)")
    report = commands.add_parser("report", help="a table")
    report.add_argument(
        "--first", default="MHA", metavar="NAME", help="which the others are compared with (%(default)s)"
    )
    report.add_argument(
        "--level", type=number(float, 0), default=4.0, metavar="X", help="a loss that the fall passes (%(default)s)"
    )
    for command in (run, report):
        command.add_argument("--results", type=Path, required=True, metavar="JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import torch

from ablations import ablations
from diagnosis.report import report
from diagnosis.training import Run, Worker
from pretraining_data import open_prepared
from results import open_results, read_results
from scheduler import do_runs, visible_gpus


def planned(args: argparse.Namespace) -> list[Run]:
    known, chosen = ablations(), []
    for text in args.variants or known:
        name, _, rate = text.partition("@")
        if name not in known:
            raise InputError(f"--variants: there is no {name!r}; there are {'; '.join(known)}")
        try:
            chosen.append((name, float(rate) if rate else args.learning_rate * known[name].rate))
        except ValueError:
            raise InputError(f"--variants {text}: expected a number as its rate") from None
    return list(dict.fromkeys(Run(name, rate, seed) for seed in args.seeds for name, rate in chosen))


def do_missing_runs(args: argparse.Namespace) -> None:
    deadline = time.time() + 60 * args.minutes
    settings = {name: getattr(args, name) for name in SETTINGS}
    _, facts = open_prepared(args.data)
    for name, windows in (("train", 2), ("held_out", 1)):
        if facts[f"{name}_tokens"] < (least := windows * args.block_length):
            raise InputError(
                f"{args.data} has {name}_tokens={facts[f'{name}_tokens']}: expected at least {least}, or a smaller --block-length"
            )
    if args.hidden_size % args.head_dim:
        raise InputError(f"--hidden-size {args.hidden_size}: expected a multiple of --head-dim {args.head_dim}")
    results = open_results(args.results, "diagnose.py", {"settings": settings, "data": facts["sha256"]})
    results.setdefault("torch", torch.__version__)
    runs = planned(args)

    def to_do(seconds: float) -> list[Run]:
        longest = max((result["seconds"] for result in results["runs"].values()), default=0.0)
        return [run for run in runs if run.key not in results["runs"] and longest < seconds]

    new_worker = partial(Worker, args.data, settings, not args.no_graphs)
    places = list(islice(cycle(visible_gpus(args.cpu) or [None]), args.parallel))
    for run, result in do_runs(to_do, new_worker, places, deadline):
        results["runs"][run.key] = result
        write_json(args.results, results, indent=None)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with input_errors("diagnose.py"):
        if args.command == "run":
            do_missing_runs(args)
        else:
            print(report(read_results(args.results, "diagnose.py"), args.first, args.level), end="")


if __name__ == "__main__":
    main()
