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
import os
import queue
import statistics
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

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
WEIGHT_DECAY = 0.1
HELD_OUT_WINDOWS = 64  # evenly spaced in the held-out text
COPIED = 64  # tokens, which a sequence has twice


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
import torch.multiprocessing as multiprocessing
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import ablations
from captured import CapturedTraining, batch_starts, read_tokens
from configuration.make_configs import cache_numbers
from pretraining_data import open_prepared
from results import NO_TIME, end_with_parent, open_results, read_results


class Run(NamedTuple):
    variant: str
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.variant} lr {self.learning_rate:g} seed {self.seed}"


# Measurements


class Measured:
    """
    An attention function, `sdpa` that looks at what it is given. While `layers` is a list, each call adds to it the
    mean entropy of attention, in nats; the roots of the mean square of queries, keys and values; the directions that the
    keys and the values of all heads use together, tr(C)^2 / tr(C^2) of their covariance C; and of the head that has most of
    it, the attention to the token before, and to the one after the token's last occurrence `COPIED` tokens ago.
    """

    def __init__(self):
        self.layers = None

    def __call__(self, module: nn.Module, query, key, value, attention_mask, **kwargs):
        if self.layers is not None:
            self.layers.append(self.look(query.float(), key.float(), value.float(), kwargs.get("scaling")))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    @staticmethod
    def look(query, key, value, scaling) -> dict[str, float]:
        groups, length = query.shape[1] // key.shape[1], query.shape[2]
        scores = query @ key.repeat_interleave(groups, 1).mT * (scaling or query.shape[-1] ** -0.5)
        hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        entropy = -(shares * shares.clamp(min=1e-30).log()).sum(-1)
        by_head = {
            "to_previous": shares.diagonal(-1, -2, -1).mean((0, 2)).max(),
            "to_copied": shares.diagonal(1 - COPIED, -2, -1)[..., 1:].mean((0, 2)).max(),
        }

        def directions(x: torch.Tensor) -> torch.Tensor:
            x = x.transpose(1, 2).flatten(0, 1).flatten(1)
            covariance = x.mT @ x
            return covariance.trace() ** 2 / covariance.square().sum()

        numbers = {
            "entropy": entropy.mean(),
            **by_head,
            **{name: x.square().mean().sqrt() for name, x in (("q", query), ("k", key), ("v", value))},
            "k_directions": directions(key),
            "v_directions": directions(value),
        }
        return {name: round(number.item(), 4) for name, number in numbers.items()}


measured = Measured()
AttentionInterface.register("measured", measured)
AttentionMaskInterface.register("measured", lambda *args, **kwargs: None)  # windows are full: causal, and nothing else


def norms(tensors: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """Of each part, the root of the mean square."""
    total = {part: sum(x.float().square().sum() for x in of) for part, of in tensors.items()}
    return {part: (total[part] / sum(x.numel() for x in of)).sqrt().item() for part, of in tensors.items()}


# Training


class Training(CapturedTraining):
    """A run that is measured as it goes."""

    def __init__(self, run: Run, configurations: ablations.Configurations, tokens: dict, device: torch.device):
        self.run, self.settings = run, configurations.settings
        settings, tokenizer, length = self.settings, configurations.tokenizer, self.settings["block_length"]
        ablation = ablations.ablations()[run.variant]
        self.config = configurations.of(ablation)
        torch.manual_seed(run.seed)
        model = ablations.make_model(ablation, self.config, "measured").to(device)
        model.config.use_cache = False
        optimizer = ablations.make_optimizer(ablation, model, run.learning_rate, WEIGHT_DECAY)
        starts = batch_starts(len(tokens["train"]), settings, 0)
        warmup = max(1, round(settings["warmup_steps"] * ablation.warmup))
        super().__init__(model, optimizer, tokens["train"], starts, length, warmup)
        windows = tokens["held_out"].unfold(0, length, length)
        chosen = torch.linspace(0, len(windows) - 1, min(HELD_OUT_WINDOWS, len(windows)), device=device).long()
        self.held_out = windows[chosen].long()
        generator = torch.Generator().manual_seed(0)
        random = torch.randint(len(tokenizer) // 2, len(tokenizer), (16, COPIED), generator=generator)
        self.copied = random.repeat(1, 2).to(device)
        self.parts = {}
        for name, parameter in self.model.named_parameters():
            self.parts.setdefault(ablations.part_of(name), []).append(parameter)

    def losses(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, seq - 1], in nats."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(ids[:, :-1]).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")

    def loss_of(self, ids: torch.Tensor) -> torch.Tensor:
        return self.losses(ids).mean()

    @torch.no_grad()
    def evaluate(self) -> dict:
        self.model.eval()
        held_out = self.losses(self.held_out).mean()
        copying = self.losses(self.copied).view(len(self.copied), -1)
        self.model.train()
        # The first tokens of the second half have little before them that says where they are copied from.
        first, second = copying[:, 8 : COPIED - 1].mean(), copying[:, COPIED + 8 :].mean()
        return {"loss": held_out.item(), "new": first.item(), "copied": second.item()}

    @torch.no_grad()
    def measure(self) -> dict:
        """What `Measured` sees, of held-out text, and of the attention to what is copied, in copied text."""
        numbers = {}
        for name, ids in (("text", self.held_out[:4]), ("copied", self.copied)):
            measured.layers = []
            self.losses(ids)
            layers, measured.layers = measured.layers, None
            if name == "text":
                numbers = {field: [layer[field] for layer in layers] for field in layers[0] if field != "to_copied"}
            else:
                numbers["to_copied"] = [layer["to_copied"] for layer in layers]
        return numbers

    def train(self, graphs: bool) -> dict:
        settings, start = self.settings, time.monotonic()
        step = self.captured().replay if graphs else self.step
        curve, changes, looks, training = [], [], [], []
        ready = time.monotonic()
        for index in range(settings["max_steps"]):
            if index % settings["eval_steps"] == 0:
                curve.append({"step": index, **self.evaluate()})
            if is_measured := index % settings["measure_steps"] == 0:
                looks.append({"step": index, **self.measure()})
                before = {part: [x.detach().clone() for x in of] for part, of in self.parts.items()}
            self.load(index)
            step()
            if is_measured:
                moved = {p: [x.detach() - y for x, y in zip(self.parts[p], of)] for p, of in before.items()}
                gradients = {part: [x.grad for x in of] for part, of in self.parts.items()}
                for name, of in (("gradient", gradients), ("update", moved), ("weight", before)):
                    rounded = {part: float(f"{value:.3g}") for part, value in norms(of).items()}
                    changes.append({"step": index, "of": name, **rounded})
                training.append(round(self.loss.item(), 4))
        curve.append({"step": settings["max_steps"], **self.evaluate()})
        looks.append({"step": settings["max_steps"], **self.measure()})
        embedding = self.model.get_input_embeddings().weight.numel()
        return {
            "variant": self.run.variant,
            "learning_rate": self.run.learning_rate,
            "seed": self.run.seed,
            "loss": curve[-1]["loss"],
            "parameters": self.model.num_parameters() - embedding,
            "heads": self.config.num_attention_heads,
            "key_value_heads": self.config.num_key_value_heads,
            "cache_bytes_per_token": 2 * cache_numbers(self.config)[1],
            "seconds": round(time.monotonic() - start, 2),
            "ms_per_step": round(1e3 * (time.monotonic() - ready) / settings["max_steps"], 3),
            "graphs": graphs,
            "curve": [{name: round(value, 4) for name, value in entry.items()} for entry in curve],
            "looks": looks,
            "norms": changes,
            "training": training,
        }


# Running


Outcome = tuple[Run, dict | None, str | None]  # the result, or why there is none: NO_TIME or a traceback


def do_runs(
    args: argparse.Namespace, settings: dict, runs: Iterable[Run], deadline: float, index: int = 0
) -> Iterator[Outcome]:
    """Does runs on one device, but none that would not end in time if it took as long as the longest before it."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if torch.cuda.is_available() and not args.cpu:
        device = torch.device("cuda", index % torch.cuda.device_count())
        torch.cuda.set_device(device)
    tokenizer, tokens = read_tokens(args.data, device)
    configurations = ablations.Configurations(settings, tokenizer)
    graphs, longest = device.type == "cuda" and not args.no_graphs, 0.0
    for run in runs:
        start = time.time()
        if start + longest > deadline:
            yield run, None, NO_TIME
            continue
        try:
            try:
                result = Training(run, configurations, tokens, device).train(graphs)
            except RuntimeError as error:
                if not graphs or isinstance(error, torch.OutOfMemoryError):
                    raise
                print(f"{run.key}: no CUDA graph\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                graphs = False
                torch.cuda.synchronize()
                result = Training(run, configurations, tokens, device).train(False)
            yield run, result, None
        except Exception:  # the others go on
            yield run, None, traceback.format_exc()
        longest = max(longest, time.time() - start)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def work(args: argparse.Namespace, settings: dict, todo, done, deadline: float, index: int) -> None:
    """A process of several: takes runs from one queue until it finds `None`, and puts outcomes into another."""
    end_with_parent()
    for outcome in do_runs(args, settings, iter(todo.get, None), deadline, index):
        done.put(outcome)


def do_runs_in_parallel(
    args: argparse.Namespace, settings: dict, runs: list[Run], deadline: float
) -> Iterator[Outcome]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    number = min(args.parallel, len(runs))
    for run in [*runs, *[None] * number]:
        todo.put(run)
    processes = [
        context.Process(target=work, args=(args, settings, todo, done, deadline, index), daemon=True)
        for index in range(number)
    ]
    for process in processes:
        process.start()
    for _ in runs:
        while True:
            try:
                yield done.get(timeout=1.0)
                break
            except queue.Empty:
                if not any(process.is_alive() for process in processes) and done.empty():
                    raise InputError("the processes ended before their runs") from None
    for process in processes:
        process.join()


def planned(args: argparse.Namespace) -> list[Run]:
    known, chosen = ablations.ablations(), []
    for text in args.variants or known:
        name, _, rate = text.partition("@")
        if name not in known:
            raise InputError(f"--variants: there is no {name!r}; there are {'; '.join(known)}")
        try:
            chosen.append((name, float(rate) if rate else args.learning_rate * known[name].rate))
        except ValueError:
            raise InputError(f"--variants {text}: expected a number as its rate") from None
    return list(dict.fromkeys(Run(name, rate, seed) for seed in args.seeds for name, rate in chosen))


def run_all(args: argparse.Namespace) -> None:
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
    todo = [run for run in planned(args) if run.key not in results["runs"]]
    print(f"{len(todo)} runs to do", flush=True)

    do = do_runs if min(args.parallel, len(todo)) < 2 else do_runs_in_parallel
    failures, late = [], []
    for run, result, error in do(args, settings, todo, deadline):
        if result is not None:
            results["runs"][run.key] = result
            write_json(args.results, results, indent=None)
            print(
                f"{run.key}: {result['loss']:.4f}, {result['seconds']:.1f} s, {result['ms_per_step']:.2f} ms a step",
                flush=True,
            )
        elif error == NO_TIME:
            late.append(run)
        else:
            failures.append(f"{run.key}: {error}")
            print(failures[-1], file=sys.stderr, flush=True)
    print(f"{len(results['runs'])} runs done, {len(late)} left for another call, {len(failures)} failed")
    if failures:
        raise InputError(f"{len(failures)} runs failed: {failures[0].splitlines()[-1]}")


# Report


def fall(run: dict, level: float) -> float:
    """The step at which the loss goes below a level, between two evaluations by a straight line; infinity if it never does."""
    for before, after in zip(run["curve"], run["curve"][1:]):
        if after["loss"] < level <= before["loss"]:
            part = (before["loss"] - level) / (before["loss"] - after["loss"])
            return before["step"] + part * (after["step"] - before["step"])
    return float("inf")


def report(args: argparse.Namespace) -> str:
    results = read_results(args.results, "diagnose.py")
    rows = {}
    for run in results["runs"].values():
        rows.setdefault((run["variant"], run["learning_rate"]), []).append(run)
    if not (first := [runs for (name, _), runs in rows.items() if name == args.first]):
        raise InputError(f"{args.results} has no run of {args.first}")
    base = {run["seed"]: run["loss"] for run in min(first, key=lambda runs: statistics.mean(r["loss"] for r in runs))}
    lines = [
        f"| variant | rate | heads (KV) | cache, bytes | runs | held-out loss | against {args.first} "
        f"| {args.level:g} nats at step | to the token before | to what is copied |",
        f"| --- |{' --: |' * 9}",
    ]
    for (name, rate), runs in rows.items():
        losses = [run["loss"] for run in runs]
        differences = [run["loss"] - base[run["seed"]] for run in runs if run["seed"] in base]
        half = (max(losses) - min(losses)) / 2
        steps = statistics.mean(fall(run, args.level) for run in runs)
        # The first half way, where some are late and others are not; the second, which needs it, at the end.
        previous = statistics.mean(max(run["looks"][len(run["looks"]) // 2]["to_previous"]) for run in runs)
        copied = statistics.mean(max(run["looks"][-1]["to_copied"]) for run in runs)
        kv = runs[0]["key_value_heads"]
        lines.append(
            f"| {name} | {rate:g} | {runs[0]['heads']} ({kv}) | {runs[0]['cache_bytes_per_token']:,} | {len(runs)} "
            f"| {statistics.mean(losses):.4f} ± {half:.4f} | {statistics.mean(differences or [float('nan')]):+.4f} "
            f"| {'never' if steps == float('inf') else format(steps, '.0f')} | {previous:.2f} | {copied:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with input_errors("diagnose.py"):
        if args.command == "run":
            run_all(args)
        else:
            print(report(args), end="")


if __name__ == "__main__":
    main()
