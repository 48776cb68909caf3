"""
Trains T6 by the recipe beside MHA, MQA, GQA and MLA, and says in four tables which is lowest: at equal parameters, equal heads,
equal bytes of cache, and equal training time.

    python examples/prepare.py --text PATHS --vocab-size 8192 --output-dir runs/tokens
    python examples/compare.py run --data runs/tokens --results runs/comparison.json --minutes 30
    python examples/compare.py report --results runs/comparison.json --output runs/comparison.md

All see the same batches in the same order. T6 is started as `recipe.py` says; twins are tried with QK norm and without. Each model has
its own learning rate, doubled or halved until the best is not at the edge. Runs are done in this order:

1. the first models once, at one rate;
2. other rates, a second seed and a run of equal time of the finalists: the T6 and the twins that are lowest, and those that are lowest
   with no more cache than GQA's;
3. the other models once;
4. further seeds of the finalists, at equal tokens and at equal time;
5. rates and seeds of all others.

`run` uses all GPUs, two processes each: one compiles the next model while the other trains. It starts no run that would not end
within --minutes, writes results as runs end, and may be called again. A run that time runs out for leaves a checkpoint in WORK_DIR.
"""

import argparse
import gc
import hashlib
import itertools
import json
import math
import os
import queue
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from command_line import InputError, input_errors, number, write_json


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
LEARNING_RATE = 1e-3  # the first that is tried
WEIGHT_DECAY = 0.1
SEEDS = (0, 1, 2, 3)
FIRST_MODELS = 8  # that are all tried before rates and seeds of the best of them
FARTHEST = 4  # a rate that is tried is at most so many times the first, or one of so many parts
HELD_OUT_WINDOWS = 160  # of each kind of text, at the end; a quarter of them on the way
ALIKE = 0.02  # times that differ by less are equal
# Seconds: a run that would end so late after --minutes goes on; a step is timed by the first of a run.
GRACE = 10.0
TIMED_STEPS = 20


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

import torch
import torch.multiprocessing as multiprocessing
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import ablations
import recipe
from ablations import Ablation
from captured import CapturedTraining, batch_starts, read_tokens
from configuration.make_configs import cache_numbers
from conversion.files.locks import release, take_lock
from pretraining_data import open_prepared
from results import NO_TIME, end_with_parent, open_results, read_results


# What is compared


class Run(NamedTuple):
    model: str
    learning_rate: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        return f"{self.model} lr {self.learning_rate:g} seed {self.seed} steps {self.steps}"


def models(settings: dict) -> dict[str, Ablation]:
    """
    Every model by its name in the results, the most telling first. Those named after the mechanism alone have MHA's heads, and an MLP
    that is as much wider as brings the parameters to MHA's; the others get there by more heads, as in the paper.
    """
    dim, norm = settings["head_dim"], {"qk_norm": True}

    def widened(base: str, fields: dict, **more) -> Ablation:
        return Ablation(base, fields, widened=True, **more)

    def t6(groups: int = 1, **fields) -> Ablation:
        return widened("TPA", recipe.FIELDS | fields, prepare=recipe.start, groups=groups)

    return {
        "MHA, QK norm": Ablation("MHA", norm),
        "T6": t6(),
        "GQA": widened("GQA", {}),
        "T6, ranks 2 and 1": t6(k_rank=2, v_rank=1),
        "GQA, more heads": Ablation("GQA"),
        # A latent for which MLA caches as much as GQA.
        "MLA": widened("MLA", {"kv_lora_rank": 4 * dim - dim // 2}),
        "T6, more heads": Ablation("TPA", recipe.FIELDS, prepare=recipe.start),
        "GQA, QK norm": widened("GQA", norm),
        "MQA": widened("MQA", {}),
        "T6, rank 1": t6(k_rank=1, v_rank=1),
        "MHA": Ablation("MHA"),
        "MQA, more heads": Ablation("MQA"),
        "T6 of the paper": Ablation("TPA"),
        "T6, 4 to a KV head": t6(groups=4),
        "T6, QK norm": t6(qk_norm="heads"),
        "MQA, QK norm": widened("MQA", norm),
        "T6-KVonly": widened("TPA-KVonly", recipe.FIELDS, prepare=recipe.start),
    }


def is_t6(name: str) -> bool:
    return name.startswith("T6")


# Plan


def losses_by_rate(results: dict, name: str) -> dict[float, float]:
    """Of the first seed."""
    runs = [run for run in results["runs"].values() if run["name"] == name and run["seed"] == SEEDS[0]]
    return {run["learning_rate"]: run["loss"] for run in runs if run["steps"] == results["settings"]["max_steps"]}


def best_rate(results: dict, name: str) -> float:
    losses = losses_by_rate(results, name)
    return min(losses, key=losses.get, default=results["learning_rate"])


def rates_to_try(results: dict, name: str) -> list[float]:
    """Twice the best rate so far and half of it, unless they are tried or too far from the first."""
    first, best = results["learning_rate"], best_rate(results, name)
    tried = losses_by_rate(results, name)
    near = [rate for rate in (2 * best, best / 2) if first / FARTHEST <= rate <= first * FARTHEST]
    return [rate for rate in near if not any(math.isclose(rate, other) for other in tried)]


def step_seconds(results: dict, name: str) -> float | None:
    """The least of all its runs: what else the machine does makes steps slower, never faster."""
    runs = results["runs"].values()
    return min((run["ms_per_step"] / 1e3 for run in runs if run["name"] == name), default=None)


def cache_limit(results: dict) -> float:
    """GQA's bytes a token, which the table of equal bytes allows."""
    runs = [run for run in results["runs"].values() if run["name"].startswith("GQA")]
    return max((run["cache_bytes_per_token"] for run in runs), default=math.inf)


def finalists(results: dict, names: list[str]) -> list[str]:
    """
    By their best runs of the first seed the lowest T6 and the lowest twin, the lowest of each that caches no more than GQA, and at least
    two twins.
    """
    best = {name: min(losses.values()) for name in names if (losses := losses_by_rate(results, name))}
    caches = {run["name"]: run["cache_bytes_per_token"] for run in results["runs"].values()}
    chosen = []
    for of in (is_t6, lambda name: not is_t6(name)):
        ranked = sorted(filter(of, best), key=best.get)
        small = [name for name in ranked if caches[name] <= cache_limit(results)]
        found = dict.fromkeys([*ranked[:1], *small[:1]])
        chosen += found if of is is_t6 or len(found) > 1 else ranked[:2]
    return chosen


def timed_steps(results: dict, names: list[str]) -> dict[str, int]:
    """
    How many steps of each of `names` take as long as the slowest of them takes for its `max_steps`; of a number that runs have already
    and that is almost that, this one: times change a little as runs are added.
    """
    seconds = {name: step_seconds(results, name) for name in names}
    if None in seconds.values() or not seconds:
        return {}
    slowest, steps, chosen = max(seconds.values()), results["settings"]["max_steps"], {}
    for name, of in seconds.items():
        wanted = steps * slowest / of
        had = {steps, *(run["steps"] for run in results["runs"].values() if run["name"] == name)}
        nearest = min(had, key=lambda number: abs(number - wanted))
        chosen[name] = nearest if abs(nearest - wanted) < ALIKE * wanted else round(wanted / 10) * 10
    return chosen


def plan(results: dict, names: list[str]) -> list[Run]:
    """All runs that are known to be needed, in the order in which they are to be done."""
    steps = results["settings"]["max_steps"]

    def first_run(name: str) -> Run:
        return Run(name, results["learning_rate"], SEEDS[0], steps)

    def rates(chosen: list[str], higher: bool) -> list[Run]:
        wanted = [(name, rate) for name in chosen for rate in rates_to_try(results, name)]
        return [
            Run(name, rate, SEEDS[0], steps) for name, rate in wanted if (rate > best_rate(results, name)) == higher
        ]

    def seeds(chosen: list[str], *of: int) -> list[Run]:
        return [Run(name, best_rate(results, name), seed, steps) for seed in of for name in chosen]

    runs = [first_run(name) for name in names[:FIRST_MODELS]]
    if any(run.key not in results["runs"] for run in runs[:3]):
        return [first_run(name) for name in names]
    first = finalists(results, names)
    timed = timed_steps(results, first).items()
    runs += [*rates(first, higher=True), *seeds(first, *SEEDS[:2]), *rates(first, higher=False)]
    runs += [Run(name, best_rate(results, name), SEEDS[0], of) for name, of in timed]
    runs += [first_run(name) for name in names] + seeds(first, *SEEDS)
    runs += [Run(name, best_rate(results, name), seed, of) for seed in SEEDS for name, of in timed]
    others = [name for name in names if name not in first and losses_by_rate(results, name)]
    runs += [*rates(others, higher=True), *rates(others, higher=False), *seeds(others, *SEEDS)]
    return list(dict.fromkeys(runs))


# Training


AttentionInterface.register("causal", sdpa_attention_forward)
AttentionMaskInterface.register("causal", lambda *args, **kwargs: None)  # windows are full: causal, and nothing else


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[tokens], in nats."""
    logits = nn.functional.linear(hidden, weight).float()
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def kinds_of(facts: dict) -> dict[str, dict]:
    """What a folder of `prepare.py` has of each kind of text; one that an earlier version made does not tell kinds."""
    return facts.get("kinds") or {"text": facts}


def held_out_windows(folder: Path, tokens: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
    """Windows [number, length + 1] of each kind of text, which `prepare.py` writes one after the other, evenly spaced."""
    _, facts = open_prepared(folder)
    windows, start = {}, 0
    for kind, sizes in kinds_of(facts).items():
        of_kind = tokens[start : start + sizes["held_out_tokens"]]
        start += sizes["held_out_tokens"]
        if len(of_kind) > length:
            found = of_kind.unfold(0, length + 1, length)
            chosen = torch.linspace(0, len(found) - 1, min(HELD_OUT_WINDOWS, len(found)), device=tokens.device).long()
            windows[kind] = found[chosen].long()
    return windows


class Training(CapturedTraining):
    """A run of the comparison, in bfloat16 where the device is a GPU, with layers, norm and loss compiled."""

    def __init__(
        self,
        run: Run,
        configurations: ablations.Configurations,
        tokens: torch.Tensor,
        held_out: dict[str, torch.Tensor],
        is_compiled: bool,
    ):
        self.run, self.settings = run, configurations.settings | {"max_steps": run.steps}
        ablation = models(self.settings)[run.model]
        self.config = configurations.of(ablation)
        torch.manual_seed(run.seed)
        model = ablations.make_model(ablation, self.config, "causal").to(tokens.device).train()
        model.config.use_cache = False
        optimizer = ablations.make_optimizer(ablation, model, run.learning_rate, WEIGHT_DECAY)
        starts = batch_starts(len(tokens), self.settings, 0)
        super().__init__(
            model, optimizer, tokens, starts, self.settings["block_length"] + 1, self.settings["warmup_steps"]
        )
        self.held_out, self.head_loss = held_out, head_loss
        self.is_on_gpu, self.is_compiled = self.device.type == "cuda", is_compiled
        if is_compiled:
            torch._dynamo.reset()
            for module in (*model.model.layers, model.model.norm):
                module.compile(dynamic=False)
            self.head_loss = torch.compile(head_loss, dynamic=False)

    def losses(self, ids: torch.Tensor, loss_of_hidden=head_loss) -> torch.Tensor:
        """Of windows [batch, length + 1], [batch * length], in nats."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_on_gpu):
            hidden = self.model.model(ids[:, :-1]).last_hidden_state
            return loss_of_hidden(hidden.flatten(0, 1), self.model.lm_head.weight, ids[:, 1:].flatten())

    def loss_of(self, ids: torch.Tensor) -> torch.Tensor:
        return self.losses(ids, self.head_loss).mean()

    @torch.no_grad()
    def evaluate(self, every: int = 1) -> dict[str, float]:
        """The mean loss of each kind of text, of one in `every` window, and by its tokens of all. Nothing is compiled for it."""
        of_kind, size = {}, max(1, min(32, self.settings["sequences_per_step"]))
        with torch.compiler.set_stance("force_eager"):
            for kind, windows in self.held_out.items():
                parts = [self.losses(part).double().sum() for part in windows[::every].split(size)]
                of_kind[kind] = torch.stack(parts).sum(), windows[::every, 1:].numel()
        total = sum(nats for nats, _ in of_kind.values()) / sum(count for _, count in of_kind.values())
        found = {"loss": total} | {kind: nats / count for kind, (nats, count) in of_kind.items()}
        return {name: round(value.item(), 5) for name, value in found.items()}

    def prepare(self, is_captured: bool) -> None:
        """Compiles, and captures a step as a CUDA graph."""
        self.is_captured = is_captured
        if self.is_on_gpu:
            torch.cuda.reset_peak_memory_stats()
        if is_captured:
            self.take_step = self.captured().replay
        else:
            with self.undone():
                self.step()
            self.take_step = self.step

    def train(self, deadline: float, checkpoint: Path) -> dict | None:
        """Returns what was measured, or `None` if it would end too late: at once, or with a checkpoint."""
        started, index, curve, times = time.monotonic(), 0, [], []
        steps, eval_steps = self.run.steps, self.settings["eval_steps"]
        if checkpoint.exists():
            index, curve, spent, state = torch.load(checkpoint, map_location=self.device, weights_only=True)
            started -= spent
            with torch.no_grad():
                for old, new in zip(self.state(), state, strict=True):
                    old.copy_(new)
        first = index
        while index < steps:
            end = min((index // eval_steps + 1) * eval_steps, first + TIMED_STEPS if index == first else steps, steps)
            begin, count = time.monotonic(), index
            while index < end:
                self.load(index)
                self.take_step()
                index += 1
            if not math.isfinite(self.loss.item()):
                raise RuntimeError(f"the loss is {self.loss.item()} at step {index}")
            times.append((time.monotonic() - begin) / (index - count))
            if index % eval_steps == 0 and index < steps:
                curve.append({"step": index, **self.evaluate(every=4)})
            last = time.time() + statistics.median(times) * (steps - index)
            if index < steps and last > deadline + GRACE:
                if len(times) > 1 and time.time() < deadline:
                    continue  # it may yet be faster
                if len(times) > 1:
                    checkpoint.parent.mkdir(parents=True, exist_ok=True)
                    partial = checkpoint.with_suffix(".partial")
                    torch.save((index, curve, time.monotonic() - started, self.state()), partial)
                    partial.replace(checkpoint)
                return None
        checkpoint.unlink(missing_ok=True)
        curve.append({"step": steps, **self.evaluate(every=4)})
        final = self.evaluate()
        seconds = min(times[1:] or times)  # the process beside this one compiles now and then, and slows it
        embedding = self.model.get_input_embeddings().weight.numel()
        tokens_per_step = self.settings["block_length"] * self.settings["sequences_per_step"]
        return {
            "name": self.run.model,
            "learning_rate": self.run.learning_rate,
            "seed": self.run.seed,
            "steps": steps,
            "tokens": steps * tokens_per_step,
            "loss": final.pop("loss"),
            "loss_by_kind": final,
            "non_embedding_parameters": self.model.num_parameters() - embedding,
            "heads": self.config.num_attention_heads,
            "key_value_heads": self.config.num_key_value_heads,
            "intermediate_size": self.config.intermediate_size,
            "cache_bytes_per_token": 2 * cache_numbers(self.config)[1],
            "ms_per_step": round(1e3 * seconds, 3),
            "tokens_per_second": round(tokens_per_step / seconds),
            "seconds": round(time.monotonic() - started, 2),
            "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.is_on_gpu else None,
            "is_compiled": self.is_compiled,
            "is_captured": self.is_captured,
            "device": torch.cuda.get_device_name() if self.is_on_gpu else "cpu",
            "torch": torch.__version__,
            "curve": curve,
        }


# Running


def checkpoint_of(run: Run, folder: Path) -> Path:
    return folder / f"{run.key.replace(' ', '-').replace(',', '')}.pt"


class Worker:
    """A process of several, on one device."""

    def __init__(self, args: argparse.Namespace, settings: dict, folder: Path, gpu: str | None, lock, deadline: float):
        self.folder, self.lock, self.deadline = folder, lock, deadline
        device = torch.device("cpu" if gpu is None else "cuda")
        tokenizer, self.tokens = read_tokens(args.data, device)
        self.windows = held_out_windows(args.data, self.tokens["held_out"], settings["block_length"])
        self.configurations = ablations.Configurations(settings, tokenizer)
        # How a step is taken, whether compiled and whether captured. What a GPU cannot do is told, and not tried again.
        compiled = (False,) if args.no_compile else (True, False)
        captured = (False,) if gpu is None else (True, False)
        self.ways = list(itertools.product(compiled, captured))

    def prepared(self, run: Run) -> Training:
        while True:
            compiled, captured = self.ways[0]
            training = Training(run, self.configurations, self.tokens["train"], self.windows, compiled)
            try:
                training.prepare(captured)
                return training
            except RuntimeError as error:
                if len(self.ways) == 1 or isinstance(error, torch.OutOfMemoryError):
                    raise
                print(f"{run.key}, compiled: {compiled}, captured: {captured}", file=sys.stderr)
                traceback.print_exc()
                del training, self.ways[0]

    def do(self, run: Run) -> dict | None:
        training = self.prepared(run)
        try:
            with self.lock:  # of the GPU, so that times are those of one run alone
                return training.train(self.deadline, checkpoint_of(run, self.folder))
        finally:
            del training
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def work(
    args: argparse.Namespace,
    settings: dict,
    folder: Path,
    gpu: str | None,
    lock,
    deadline: float,
    todo,
    done,
    index: int,
) -> None:
    """Does the runs that it is given until that is `None`."""
    end_with_parent()
    if gpu is not None:
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    worker = Worker(args, settings, folder, gpu, lock, deadline)
    for run in iter(todo.get, None):
        try:
            result, error = worker.do(run), None
        except Exception:  # the others go on
            result, error = None, traceback.format_exc()
            if gpu is not None:
                torch.cuda.synchronize()  # ends this process where the GPU is lost, for all other runs would fail, too
        done.put((index, run, result, error or (NO_TIME if result is None else None)))


def opened(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """The results so far, of the same settings and data, and the names of what is compared."""
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


def visible_gpus(args: argparse.Namespace) -> list[str]:
    if args.cpu or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


class Scheduler:
    """Gives runs to processes, two for each GPU, until there are none left, or no time."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.deadline = args, time.time() + 60 * args.minutes
        self.results, self.names = opened(args)
        # Of checkpoints, which those of other settings or data are none for.
        header = json.dumps([self.results[name] for name in ("settings", "data")])
        self.folder = args.work_dir / hashlib.sha256(header.encode()).hexdigest()[:12]
        self.running, self.late, self.failures = {}, set(), {}

    def next_run(self) -> Run | None:
        skipped = {*self.results["runs"], *(run.key for run in self.running.values()), *self.late, *self.failures}
        for run in plan(self.results, self.names):
            seconds = (step_seconds(self.results, run.model) or 0) * run.steps
            if checkpoint_of(run, self.folder).exists():
                seconds = 0
            if run.key not in skipped and time.time() + seconds < self.deadline:
                return run
        return None

    def run(self) -> None:
        """
        Raises:
            InputError: a run failed; the others have been done.
        """
        gpus = visible_gpus(self.args)
        places = [gpu for gpu in gpus for _ in range(2)] or [None]
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        context, settings = multiprocessing.get_context("spawn"), self.results["settings"]
        locks, done = {gpu: context.Lock() for gpu in places}, context.Queue()
        todo = [context.Queue() for _ in places]
        processes = [
            context.Process(
                target=work,
                args=(self.args, settings, self.folder, gpu, locks[gpu], self.deadline, todo[index], done, index),
                daemon=True,
            )
            for index, gpu in enumerate(places)
        ]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        for gpu, process in zip(places, processes):
            if gpu is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = (
                    gpu  # each sees one, the first: what is compiled for one is for all
                )
            process.start()
        if visible is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        # The first process of each GPU before the second.
        idle = sorted(range(len(places)), key=lambda index: index % 2)
        while True:
            for index in [index for index in idle if processes[index].is_alive()]:
                if (run := self.next_run()) is None:
                    break  # there may be one when others have ended
                self.running[index] = run
                todo[index].put(run)
                idle.remove(index)
            if not self.running:
                break
            try:
                index, run, result, error = done.get(timeout=1.0)
            except queue.Empty:
                for index in [index for index in self.running if not processes[index].is_alive()]:
                    run, code = self.running.pop(index), processes[index].exitcode
                    if code < 0:  # with the lock of its GPU, perhaps
                        raise InputError(f"{run.key}: its process was killed by signal {-code}") from None
                    self.take(run, None, "its process ended before it did")
                continue
            del self.running[index]
            idle.append(index)
            self.take(run, result, error)
        for index, process in enumerate(processes):
            todo[index].put(None)
            process.join()
        known = plan(self.results, self.names)
        left = [run for run in known if run.key not in self.results["runs"]]
        print(f"{len(self.results['runs'])} runs done; {len(left)} of the runs known to be needed are left")
        if self.failures:
            key, error = next(iter(self.failures.items()))
            raise InputError(f"{len(self.failures)} runs failed: {key}: {error.strip().splitlines()[-1]}")

    def take(self, run: Run, result: dict | None, error: str | None) -> None:
        if result is not None:
            self.results["runs"][run.key] = result
            write_json(self.args.results, self.results, indent=1)
            print(
                f"{run.key}: {result['loss']:.4f}, {result['seconds']:.1f} s, {result['ms_per_step']:.2f} ms a step, "
                f"{result['memory_gib']} GiB",
                flush=True,
            )
        elif error == NO_TIME:
            self.late.add(run.key)
            print(f"{run.key}: no time", flush=True)
        else:
            self.failures[run.key] = error
            print(f"{run.key}: {error}", file=sys.stderr, flush=True)


# Report


def best_runs(results: dict, name: str, steps: int | None = None) -> list[dict]:
    """The runs of a model at the rate that is best for it, one of each seed."""
    rate, steps = best_rate(results, name), steps or results["settings"]["max_steps"]
    keys = [Run(name, rate, seed, steps).key for seed in SEEDS]
    return [results["runs"][key] for key in keys if key in results["runs"]]


def half_range(values: list[float]) -> float:
    return (max(values) - min(values)) / 2


def spread(values: list[float]) -> str:
    """The mean, and half of the range where there are several."""
    return f"{statistics.mean(values):.4f}" + (f" ± {half_range(values):.4f}" if len(values) > 1 else "")


def mean_loss(runs: list[dict]) -> float:
    return statistics.mean(run["loss"] for run in runs)


def lowest(rows: dict[str, list[dict]]) -> str:
    """Of those of several seeds, if there are any: the lowest of many that have one each is low by chance, too."""
    several = [name for name, runs in rows.items() if len(runs) > 1]
    return min(several or rows, key=lambda name: mean_loss(rows[name]))


def table(rows: dict[str, list[dict]]) -> list[str]:
    """Rows by their loss, lowest first."""
    lines = [
        "| | rate | heads (KV) | MLP | parameters without embedding | runs | held-out loss | against the best twin "
        "| cache, bytes a token | tokens, million | ms a step | seconds |",
        f"| --- |{' --: |' * 11}",
    ]
    twins = {name: runs for name, runs in rows.items() if not is_t6(name)}
    best = mean_loss(twins[lowest(twins)]) if twins else math.nan
    for name, runs in sorted(rows.items(), key=lambda row: mean_loss(row[1])):
        one = runs[0]
        kv = f" ({one['key_value_heads']})" if one["key_value_heads"] != one["heads"] else ""
        ms = min(run["ms_per_step"] for run in runs)
        against = f"{mean_loss(runs) - best:+.4f}" if twins else "-"
        lines.append(
            f"| {name} | {one['learning_rate']:g} | {one['heads']}{kv} | {one['intermediate_size']:,} "
            f"| {one['non_embedding_parameters']:,} | {len(runs)} | {spread([run['loss'] for run in runs])} | {against} "
            f"| {one['cache_bytes_per_token']:,} | {one['tokens'] / 1e6:.1f} | {ms:.1f} | {ms * one['steps'] / 1e3:.0f} |"
        )
    return lines


def verdict(rows: dict[str, list[dict]]) -> str:
    """Which is lowest, the best T6 or the best twin, and whether by more than seeds differ."""
    t6 = {name: runs for name, runs in rows.items() if is_t6(name)}
    twins = {name: runs for name, runs in rows.items() if not is_t6(name)}
    if not t6 or not twins:
        return "There are not yet a T6 and a twin here to compare."
    ours, theirs = lowest(t6), lowest(twins)
    difference = mean_loss(t6[ours]) - mean_loss(twins[theirs])
    lower, other = (ours, theirs) if difference < 0 else (theirs, ours)
    losses = [[run["loss"] for run in rows[name]] for name in (ours, theirs)]
    text = f"**{lower} is lowest**, {abs(difference):.4f} below {other}: "
    if min(map(len, losses)) < 2:
        return text + "of one seed of at least one of them, which does not tell what seeds do."
    if (lower == ours and max(losses[0]) < min(losses[1])) or (lower == theirs and max(losses[1]) < min(losses[0])):
        return (
            text + f"every seed of the one ({len(rows[lower])}) is below every seed of the other ({len(rows[other])})."
        )
    return (
        text
        + f"but their seeds overlap ({spread(losses[0])} and {spread(losses[1])}), so neither is told from the other."
    )


def report(args: argparse.Namespace) -> str:
    """Writes the tables as Markdown and the plot beside them; returns the Markdown."""
    results = read_results(args.results, "compare.py", ("settings", "learning_rate", "data"))
    settings = results["settings"]
    known = list(models(settings))
    rows = {name: runs for name in known if (runs := best_runs(results, name))}
    if not rows:
        raise InputError(f"{args.results} has no runs yet: there is nothing to compare")
    one = next(iter(rows.values()))[0]
    places = {
        f"{run['device']}, torch {run['torch']}, steps {'' if run['is_compiled'] else 'not '}compiled and "
        f"{'' if run['is_captured'] else 'not '}captured"
        for run in results["runs"].values()
    }
    first = finalists(results, known)
    heads = settings["hidden_size"] // settings["head_dim"]
    limit = cache_limit(results)
    timed = {
        name: runs for name, steps in timed_steps(results, first).items() if (runs := best_runs(results, name, steps))
    }
    lines = [
        "# T6 beside MHA, MQA, GQA and MLA",
        "",
        "Made by `python examples/compare.py report` from the runs of `python examples/compare.py run`.",
        "",
        f"{settings['num_layers']} layers of hidden size {settings['hidden_size']}, heads of size {settings['head_dim']}, "
        f"{settings['max_steps']:,} steps of {settings['sequences_per_step']} sequences of {settings['block_length']}: "
        f"{one['tokens'] / 1e6:.1f} million tokens. Losses are nats a token on held-out text, mean and half of the range over "
        f"seeds, each model at the best of its own learning rates; the lowest is looked for among those of several seeds, if there "
        f"are any. T6 is that of `examples/recipe.py`. "
        f"{'; '.join(sorted(places))}. Tokens {results['data'][:16]}.",
        "",
        f"![Held-out loss]({args.output.with_suffix('.png').name})",
    ]
    for title, said, chosen in (
        ("Equal parameters", "Parameters are MHA's to within 1%, by more heads or by a wider MLP.", rows),
        (
            "Equal heads",
            f"Those with MHA's {heads} heads; their parameters are MHA's, too, by the width of the MLP.",
            {name: runs for name, runs in rows.items() if runs[0]["heads"] == heads},
        ),
        (
            "Equal bytes of cache",
            f"Those whose cache has no more than GQA's {limit:,} bytes a token, in bfloat16 as it is stored.",
            {name: runs for name, runs in rows.items() if runs[0]["cache_bytes_per_token"] <= limit},
        ),
        (
            "Equal training time",
            "The T6 and the twins that are lowest at equal tokens, and those that are with a cache no larger than GQA's, each trained for as "
            "long as the slowest of them takes.",
            timed,
        ),
    ):
        lines += ["", f"## {title}", "", said, ""]
        lines += [*table(chosen), "", verdict(chosen)] if chosen else ["No runs yet."]
    rates = sorted({rate for name in rows for rate in losses_by_rate(results, name)})
    lines += ["", "## Learning rates", "", f"Held-out loss of seed {SEEDS[0]}.", ""]
    lines += [f"| | {' | '.join(f'{rate:g}' for rate in rates)} |", f"| --- |{' --: |' * len(rates)}"]
    for name in rows:
        losses = losses_by_rate(results, name)
        lines.append(f"| {name} | {' | '.join(f'{losses[rate]:.4f}' if rate in losses else '-' for rate in rates)} |")
    kinds = list(one["loss_by_kind"])
    lines += ["", "## Kinds of text", "", f"| | {' | '.join(kinds)} |", f"| --- |{' --: |' * len(kinds)}"]
    for name, runs in rows.items():
        cells = [spread([run["loss_by_kind"][kind] for run in runs]) for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    left = [run.key for run in plan(results, known) if run.key not in results["runs"]]
    lines += ["", "## Not run yet", ""]
    lines += [f"* {key}" for key in left] or ["All runs that are known to be needed are here."]
    text = "\n".join(lines) + "\n"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plot(rows, settings, args.output.with_suffix(".png"))
    args.output.write_text(text, encoding="utf-8")
    return text


def plot(rows: dict[str, list[dict]], settings: dict, path: Path) -> None:
    """Curves of the held-out loss, their last part, and the final loss against the size of the cache."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the report needs the package matplotlib") from error

    tokens_per_step = settings["sequences_per_step"] * settings["block_length"]
    figure = Figure(figsize=(16, 5), layout="constrained")
    whole, end, cache = figure.subplots(1, 3)
    markers = itertools.cycle("osD^v*Ph<>dX")
    for index, (name, runs) in enumerate(rows.items()):
        color, style = f"C{index % 10}", "-" if is_t6(name) else "--"
        tokens = [entry["step"] * tokens_per_step / 1e6 for entry in runs[0]["curve"]]
        curves = [[entry["loss"] for entry in run["curve"]] for run in runs]
        mean = [statistics.mean(values) for values in zip(*curves)]
        for axes, start in ((whole, 0), (end, len(mean) * 2 // 3)):
            axes.plot(tokens[start:], mean[start:], style, color=color, linewidth=1.2)
            lows, highs = ([f(values) for values in zip(*curves)][start:] for f in (min, max))
            axes.fill_between(tokens[start:], lows, highs, color=color, alpha=0.15, linewidth=0)
        losses, middle = [run["loss"] for run in runs], mean_loss(runs)
        error = [[middle - min(losses)], [max(losses) - middle]]
        filled = {} if is_t6(name) else {"markerfacecolor": "none"}
        cache.errorbar(
            runs[0]["cache_bytes_per_token"], middle, yerr=error, marker=next(markers), color=color, capsize=3,
            linestyle="none", label=name, **filled,
        )  # fmt: skip
    for axes in (whole, end):
        axes.set(xlabel="million tokens", ylabel="held-out loss, nats a token")
    cache.set(xlabel="cache, bytes a token (bfloat16)", ylabel="final held-out loss")
    cache.set_xscale("log", base=2)
    cache.xaxis.set_major_formatter("{x:,.0f}")
    cache.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with input_errors("compare.py"):
        if args.command == "run":
            args.work_dir.mkdir(parents=True, exist_ok=True)
            try:
                lock = take_lock(args.work_dir)
            except BlockingIOError:
                raise InputError(f"--work-dir {args.work_dir}: another call is at work with it") from None
            try:
                Scheduler(args).run()
            finally:
                release(lock)
        elif args.command == "report":
            print(report(args), end="")
        else:
            results, names = opened(args)
            for run in plan(results, names):
                print(f"{'done' if run.key in results['runs'] else 'to do'}  {run.key}")


if __name__ == "__main__":
    main()
