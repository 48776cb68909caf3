"""
Trains MHA, MQA, GQA, MLA, TPA-KVonly and TPA side by side, and reports what came of it.

    python examples/prepare.py --text PATHS --output-dir runs/tokens
    python examples/compare.py run --data runs/tokens --results runs/comparison.json
    python examples/compare.py report --results runs/comparison.json --output docs/comparison.md

As in the paper, heads are added until all have the parameters of MHA, and all see the same batches in the same order.
The learning rate is tuned on MHA, in shorter runs with a schedule of their own (doubled or halved until the best is not at
the edge), and used for all, each with several seeds; TPA is then tuned alike. Ablations, with the first seed: as many heads
as MHA instead of as many parameters, and ranks 1, 2, 4.

`run` does the runs that the results lack, one at a time on each GPU, and may be stopped and called again: results are
added as runs end, and a run that was stopped goes on from its checkpoint, if WORK_DIR is still there. Several calls at
once with one WORK_DIR, of one machine or of several that share their files, share out the runs.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from typing import NamedTuple

from command_line import ROOT, InputError, input_errors, last_checkpoint, number, read_text, write_json


MAIN = ("MHA", "MQA", "GQA", "MLA", "TPA-KVonly", "TPA")
EXTENSIONS = 3  # doublings or halvings of a sweep of learning rates, on each side
MARGIN = 0.5  # minutes that a run needs to start, and to save what it has
PATIENCE = 5.0  # seconds between looks at what other calls have done

# What the runs have in common; a later call must have the same.
SETTINGS = {
    "hidden_size": 512,
    "num_layers": 8,
    "head_dim": 64,
    "block_length": 1024,
    "sequences_per_step": 64,
    "max_steps": 1540,
    "tuning_steps": 400,
    "warmup_steps": 100,
    "eval_steps": 200,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    count = number(int, 1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the runs that the results lack")
    plan = commands.add_parser("plan", help="list the runs that are known to be needed")
    for command in (run, plan):
        command.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder of prepare.py")
        command.add_argument("--seeds", nargs="+", type=number(int, 0), default=[0, 1], metavar="N", help="(0 1)")
        command.add_argument(
            "--learning-rates", nargs="+", type=number(float, 1e-9), default=[5e-4, 1e-3, 2e-3, 4e-3], metavar="X"
        )
        for name, default in SETTINGS.items():
            command.add_argument(f"--{name.replace('_', '-')}", type=count, default=default, help="(%(default)s)")
    run.add_argument("--batch-size", type=count, default=64, metavar="N", help="sequences at once (%(default)s)")
    run.add_argument("--work-dir", type=Path, default=Path("runs/comparison"), metavar="DIR", help="(%(default)s)")
    run.add_argument("--max-minutes", type=number(float, 0), default=1e9, metavar="X", help="stop then")
    run.add_argument("--compile", action="store_true", help="compile the models with torch.compile")
    run.add_argument("--cpu", action="store_true", help="do not use GPUs")
    report = commands.add_parser("report", help="tables and plot")
    report.add_argument("--output", type=Path, default=Path("docs/comparison.md"), metavar="MD", help="(%(default)s)")
    for command in (run, plan, report):
        command.add_argument("--results", type=Path, required=True, metavar="JSON")
    args = parser.parse_args(argv)
    if args.command != "report" and (
        len(args.learning_rates) < 3 or sorted(args.learning_rates) != args.learning_rates
    ):
        parser.error("--learning-rates: at least three, in rising order")
    return args


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import torch
from filelock import FileLock, Timeout
from transformers import AutoConfig

import pretrain
from configuration.make_configs import cache_numbers, count_parameters
from pretraining_data import open_prepared


# What is compared


class Architecture(NamedTuple):
    folder: str  # of configuration/
    overrides: dict[str, int | None]


class Run(NamedTuple):
    architecture: str
    learning_rate: float
    seed: int
    is_tuning: bool = False

    @property
    def key(self) -> str:
        return f"{self.architecture} lr {self.learning_rate:g} seed {self.seed}{' tuning' * self.is_tuning}"


def architectures(settings: dict, make_config: Callable[[Architecture], object]) -> dict[str, Architecture]:
    """Every architecture by its name in the results."""
    hidden, layers, dim = settings["hidden_size"], settings["num_layers"], settings["head_dim"]
    common = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "max_position_embeddings": settings["block_length"],
    }
    # The paper's small model has hidden / 3 and 2 hidden / 3.
    unit = 64 if hidden >= 192 else 8
    latent = max(1, round(hidden / 3 / unit)) * unit

    def llama(kind: str, heads: int, kv_heads: int) -> Architecture:
        fields = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
        return Architecture(f"llama-{kind}-small", {**common, **fields})

    def mla(heads: int) -> Architecture:
        fields = {
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "kv_lora_rank": latent,
            "q_lora_rank": 2 * latent,
            "qk_rope_head_dim": dim // 2,
            "qk_nope_head_dim": dim,
            "v_head_dim": dim,
            "first_k_dense_replace": layers,
        }
        return Architecture("deepseek-mla-small", {**common, **fields})

    def t6(heads: int, rank: int = 2, kvonly: bool = False) -> Architecture:
        fields = {"num_attention_heads": heads, "head_dim": dim, "k_rank": rank, "v_rank": rank}
        return Architecture("t6-small-kvonly" if kvonly else "t6-small", {**common, **fields})

    h = hidden // dim
    mha = llama("mha", h, h)
    target = count_parameters(make_config(mha))

    def matched(make: Callable[[int], Architecture], step: int = 1) -> Architecture:
        """The number of heads, a multiple of `step`, that comes closest to MHA's parameters, which are linear in it."""
        few, more = (count_parameters(make_config(make(heads))) for heads in (step, 2 * step))
        return make(max(1, round(1 + (target - few) / (more - few))) * step)

    return {
        "MHA": mha,
        "MQA": matched(lambda heads: llama("mqa", heads, 1)),
        "GQA": matched(lambda heads: llama("gqa", heads, 2), step=2),
        "MLA": matched(mla),
        "TPA-KVonly": matched(lambda heads: t6(heads, kvonly=True)),
        "TPA": matched(t6),
        "MQA, heads of MHA": llama("mqa", h, 1),
        "GQA, heads of MHA": llama("gqa", h, 2),
        "MLA, heads of MHA": mla(h),
        "TPA-KVonly, heads of MHA": t6(h, kvonly=True),
        "TPA, heads of MHA": t6(h),
        "TPA, rank 1": matched(lambda heads: t6(heads, 1)),
        "TPA, rank 4": matched(lambda heads: t6(heads, 4)),
    }


def final_loss(results: dict, run: Run) -> float | None:
    return results["runs"][run.key]["loss_per_token"] if run.key in results["runs"] else None


def sweep(results: dict, architecture: str, rates: list[float], seed: int) -> tuple[list[Run], float | None]:
    """The runs of a sweep of learning rates as far as they are known to be needed, and the best rate, once it is known."""
    lowest, highest = rates[0] / 2**EXTENSIONS, rates[-1] * 2**EXTENSIONS
    while True:
        runs = [Run(architecture, rate, seed, is_tuning=True) for rate in rates]
        losses = [final_loss(results, run) for run in runs]
        if None in losses:
            return runs, None
        best = rates[losses.index(min(losses))]
        if best == rates[0] and best > lowest:
            rates = [best / 2, *rates]
        elif best == rates[-1] and best < highest:
            rates = [*rates, best * 2]
        else:
            return runs, best


def plan(results: dict, names: list[str]) -> list[Run]:
    """All runs that are known to be needed, in the order in which they are to be done."""
    seeds, rates = results["seeds"], results["learning_rates"]
    runs, rate = sweep(results, "MHA", rates, seeds[0])
    if rate is None:
        return runs
    runs += [Run(name, rate, seed) for seed in seeds for name in MAIN]
    tuning, own_rate = sweep(results, "TPA", [rate / 2, rate, rate * 2], seeds[0])
    runs += tuning
    if own_rate is not None:
        runs += [Run("TPA", own_rate, seed) for seed in seeds]
    runs += [Run(name, rate, seeds[0]) for name in names if name not in MAIN]
    return list(dict.fromkeys(runs))


# Running


def read_results(path: Path) -> dict:
    try:
        results = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(results, dict) or not isinstance(results.get("runs"), dict):
        raise InputError(f"{path} has no `runs`: expected a file of compare.py")
    return results


def open_results(args: argparse.Namespace) -> tuple[dict, dict[str, Architecture]]:
    """The results so far, of the same settings and data, and what is compared."""
    tokenizer, facts = open_prepared(args.data)
    header = {
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "seeds": args.seeds,
        "learning_rates": args.learning_rates,
        "data": facts["sha256"],
    }
    results = {**header, "runs": {}}
    if args.results.exists():
        results = read_results(args.results)
        for name, value in header.items():
            if results.get(name) != value:
                raise InputError(f"{args.results} has {name}={results.get(name)}, this command {value}")

    def make_config(architecture: Architecture):
        options = argparse.Namespace(architecture=architecture.folder, set=list(architecture.overrides.items()))
        return pretrain.make_config(options, tokenizer)

    return results, architectures(header["settings"], make_config)


class Runner:
    """Gives runs to devices until there are none left, or no time."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.results, self.architectures = open_results(args)
        self.deadline = time.monotonic() + 60 * args.max_minutes
        self.changed = threading.Condition()
        self.running: dict[str, FileLock] = {}
        self.failures: list[str] = []
        self.stopped = False
        args.work_dir.mkdir(parents=True, exist_ok=True)

    def seconds_of(self, run: Run) -> float:
        """How long a run takes, by those of its length that are done: of its architecture, or else the longest."""
        done = [result for key, result in self.results["runs"].items() if key.endswith("tuning") == run.is_tuning]
        same = [result["seconds"] for result in done if result["name"] == run.architecture]
        return max(same or [result["seconds"] for result in done] or [0.0])

    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def claim(self, run: Run) -> bool:
        """Whether the run is left to do and no other call is doing it; from then on this one is."""
        lock = FileLock(f"{self.paths(run)[0]}.lock", thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        self.look()
        if run.key in self.results["runs"]:
            lock.release()
            return False
        self.running[run.key] = lock
        return True

    def look(self) -> None:
        """What this call and others have done so far."""
        if self.args.results.exists():
            self.results = read_results(self.args.results)

    def next_run(self) -> Run | None:
        with self.changed:
            while not self.failures and not self.stopped:
                self.look()
                known = plan(self.results, list(self.architectures))
                todo = [run for run in known if run.key not in self.results["runs"] and run.key not in self.running]
                feasible = [
                    run
                    for run in todo
                    if self.checkpointed(run) or self.seconds_of(run) + 60 * MARGIN < self.remaining()
                ]
                for run in feasible:
                    if self.claim(run):
                        return run
                if not feasible and (todo or not self.running):  # no time for any; or all is done
                    return None
                self.changed.wait(PATIENCE)  # what is needed next depends on runs that are going on
            return None

    def paths(self, run: Run) -> tuple[Path, Path, Path]:
        """The model folder, its checkpoints, and what the run prints."""
        name = run.key.replace(" ", "-").replace(",", "")
        return tuple(self.args.work_dir / f"{name}{end}" for end in ("", "-checkpoints", ".log"))

    def checkpointed(self, run: Run) -> bool:
        return last_checkpoint(self.paths(run)[1]) is not None

    def do(self, run: Run, device: str | None) -> None:
        args, architecture = self.args, self.architectures[run.architecture]
        folder, checkpoints, log_file = self.paths(run)
        steps = args.tuning_steps if run.is_tuning else args.max_steps
        warmup_steps = max(1, round(args.warmup_steps * steps / args.max_steps))
        eval_steps = min(args.eval_steps, steps)
        command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--architecture", architecture.folder]
        command += ["--set", *(f"{name}={json.dumps(value)}" for name, value in architecture.overrides.items())]
        options = {
            "data": args.data,
            "block-length": args.block_length,
            "sequences-per-step": args.sequences_per_step,
            "batch-size": min(args.batch_size, args.sequences_per_step),
            "max-steps": steps,
            "warmup-steps": warmup_steps,
            "eval-steps": eval_steps,
            "save-steps": max(eval_steps, steps // 2 // eval_steps * eval_steps),
            "logging-steps": max(1, eval_steps // 10),
            "learning-rate": run.learning_rate,
            "seed": run.seed,
            "output-dir": folder,
            "max-minutes": max(0.0, self.remaining() / 60 - MARGIN),
        }
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command += ["--compile"] * args.compile + ["--cpu"] * (device is None)
        command += ["--resume"] if self.checkpointed(run) else ["--overwrite"]
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        start = time.monotonic()
        with log_file.open("a") as log:
            code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
        seconds = time.monotonic() - start
        with self.changed:
            if code == 0:
                measured = json.loads(read_text(checkpoints / "training.json"))
                # No path of this machine belongs to the results.
                curve = [
                    {name: entry[name] for name in ("step", "eval_loss_per_token", "eval_bits_per_byte")}
                    for entry in pretrain.read_log(checkpoints)
                    if "eval_loss_per_token" in entry
                ]
                result = {
                    "name": run.architecture,
                    "seconds": seconds,
                    "cache_bytes_per_token": 2 * cache_numbers(AutoConfig.for_model(**measured["config"]))[1],
                    "curve": curve,
                    **measured,
                }
                with FileLock(args.work_dir / "results.lock"):
                    self.look()
                    self.results["runs"][run.key] = result
                    write_json(args.results, self.results, indent=1)
                rmtree(folder)
                rmtree(checkpoints)
                print(f"{run.key}: loss {measured['loss_per_token']:.4f}, {seconds:.0f} s", flush=True)
            elif code == pretrain.STOPPED:
                self.stopped = True
                print(f"{run.key}: stopped, goes on with the next call", flush=True)
            else:
                end = read_text(log_file).splitlines()[-15:]
                self.failures.append("\n".join([f"{run.key}: exit code {code}", *end]))
            lock = self.running.pop(run.key)
            if code == 0:
                Path(lock.lock_file).unlink()  # whoever waits for it finds the run done
            lock.release()
            self.changed.notify_all()

    def work(self, device: str | None) -> None:
        try:
            while (run := self.next_run()) is not None:
                self.do(run, device)
        except BaseException as error:
            with self.changed:  # the others may be waiting for this run
                self.failures.append(repr(error))
                self.changed.notify_all()
            raise

    def run(self) -> None:
        """
        Raises:
            InputError: a run failed; the others that were going on have ended.
        """
        use_gpus = torch.cuda.is_available() and not self.args.cpu
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        devices = names if use_gpus else [None]
        with ThreadPoolExecutor(len(devices)) as pool:
            list(pool.map(self.work, devices))
        if self.failures:
            raise InputError("\n".join(self.failures))
        known = plan(self.results, list(self.architectures))
        left = [run for run in known if run.key not in self.results["runs"]]
        print(f"{len(self.results['runs'])} runs done; {len(left)} of the runs known to be needed are left")


# Report


def group(results: dict, name: str, rate: float) -> list[dict]:
    """The runs of an architecture at a learning rate, one of each seed."""
    keys = [Run(name, rate, seed).key for seed in results["seeds"]]
    return [results["runs"][key] for key in keys if key in results["runs"]]


def spread(values: list[float]) -> str:
    """The mean, and half of the range where there are several."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.4f}" + (f" ± {half:.4f}" if len(values) > 1 else "")


def heads(run: dict) -> str:
    config = run["config"]
    kv_heads = config.get("num_key_value_heads", config["num_attention_heads"])
    return f"{config['num_attention_heads']}" + (f" ({kv_heads})" if kv_heads != config["num_attention_heads"] else "")


def table(results: dict, rows: dict[str, list[dict]]) -> list[str]:
    """Loss, cache and cost of runs, by the name of their row, compared with the first row."""
    first = statistics.mean(run["loss_per_token"] for run in next(iter(rows.values())))
    lines = [
        "| attention | heads (KV) | parameters without embedding | held-out loss | against the first | bits per byte "
        "| cache, bytes per token | ms per step | tokens per second | FLOP utilisation | memory, GiB |",
        f"| --- |{' --: |' * 10}",
    ]
    devices = [run["device"] for runs in rows.values() for run in runs]
    device = max(set(devices), key=devices.count)
    for name, runs in rows.items():
        timed = [run for run in runs if run["device"] == device and "step_seconds" in run]

        def typical(field: str, form: str, factor: float = 1.0, timed: list[dict] = timed) -> str:
            values = [factor * run[field] for run in timed if run.get(field)]
            return format(statistics.median(values), form) if values else "-"

        losses = [run["loss_per_token"] for run in runs]
        lines.append(
            f"| {name} | {heads(runs[0])} | {runs[0]['non_embedding_parameters']:,} | {spread(losses)} "
            f"| {statistics.mean(losses) - first:+.4f} | {spread([run['bits_per_byte'] for run in runs])} "
            f"| {runs[0]['cache_bytes_per_token']:,} | {typical('step_seconds', '.1f', 1e3)} "
            f"| {typical('tokens_per_second', ',.0f')} | {typical('mfu', '.1%')} | {typical('memory_gib', '.1f')} |"
        )
    return [
        *lines,
        "",
        f"Times, memory and utilisation are those of {device}, training in batches of {runs[0]['batch_size']}.",
    ]


def report(args: argparse.Namespace) -> str:
    """Writes the tables as Markdown and the plot beside them; returns the Markdown."""
    results = read_results(args.results)
    _, rate = sweep(results, "MHA", results["learning_rates"], results["seeds"][0])
    if rate is None:
        raise InputError(f"{args.results} does not have the learning rates of MHA yet: there is nothing to compare")
    main = {name: runs for name in MAIN if (runs := group(results, name, rate))}
    tuning, own_rate = sweep(results, "TPA", [rate / 2, rate, rate * 2], results["seeds"][0])
    if own_rate is not None and own_rate != rate:
        main[f"TPA, its own rate {own_rate:g}"] = group(results, "TPA", own_rate)
    if "MHA" not in main:
        raise InputError(
            f"{args.results} has no run of MHA at its learning rate, {rate:g}, yet: there is nothing to compare"
        )
    settings, one = results["settings"], main["MHA"][0]
    lines = [
        "# Attention mechanisms, trained side by side",
        "",
        "Made by `python examples/compare.py report` from the runs of `python examples/compare.py run`.",
        "",
        "## Equal parameters",
        "",
        f"{settings['num_layers']} layers of hidden size {settings['hidden_size']}, heads of size "
        f"{settings['head_dim']}, {one['tokens']:,} tokens in {settings['max_steps']:,} steps of "
        f"{settings['sequences_per_step']} sequences of {settings['block_length']}, learning rate {rate:g}, seeds "
        f"{', '.join(map(str, results['seeds']))}. Losses are nats per token on the held-out text, mean and half of the "
        f"range over seeds. torch {one['torch']}, Transformers {one['transformers']}; tokens {results['data'][:16]}.",
        "",
        *table(results, main),
        "",
        f"![Held-out loss]({args.output.with_suffix('.png').name})",
        "",
        "## Learning rates",
        "",
        f"Held-out loss at seed {results['seeds'][0]}, after {settings['tuning_steps']:,} steps with a schedule of as many.",
        "",
    ]
    mha_runs, _ = sweep(results, "MHA", results["learning_rates"], results["seeds"][0])
    rates = sorted({run.learning_rate for run in mha_runs + tuning})
    lines += [f"| | {' | '.join(f'{value:g}' for value in rates)} |", f"| --- |{' --: |' * len(rates)}"]
    for name in ("MHA", "TPA"):
        losses = [final_loss(results, Run(name, value, results["seeds"][0], is_tuning=True)) for value in rates]
        lines.append(f"| {name} | {' | '.join('-' if loss is None else f'{loss:.4f}' for loss in losses)} |")
    names = dict.fromkeys(run["name"] for run in results["runs"].values())
    for title, chosen in (
        ("Equal heads instead of equal parameters", [name for name in names if name.endswith("heads of MHA")]),
        ("Ranks of keys and values, at equal parameters", [name for name in names if ", rank " in name]),
    ):
        rows = {name: group(results, name, rate) for name in sorted(chosen)}
        base = {"MHA": main["MHA"]} if "heads" in title else {"TPA, rank 2": main.get("TPA", [])}
        rows = {name: runs for name, runs in {**base, **rows}.items() if runs}
        if len(rows) > 1:
            lines += ["", f"## {title}", "", *table(results, rows)]
    text = "\n".join(lines) + "\n"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plot(results, main, args.output.with_suffix(".png"))
    args.output.write_text(text, encoding="utf-8")
    return text


def plot(results: dict, rows: dict[str, list[dict]], path: Path) -> None:
    """Curves of the held-out loss, their last part, and the final loss against the size of the cache."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the report needs the package matplotlib") from error

    tokens_per_step = results["settings"]["sequences_per_step"] * results["settings"]["block_length"]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    whole, end, cache = figure.subplots(1, 3)
    for (name, runs), marker in zip(rows.items(), itertools.cycle("osD^v*P")):
        tokens = [entry["step"] * tokens_per_step / 1e6 for entry in runs[0]["curve"]]
        curves = [[entry["eval_loss_per_token"] for entry in run["curve"]] for run in runs]
        mean = [statistics.mean(values) for values in zip(*curves)]
        for axes, start in ((whole, 0), (end, len(mean) * 2 // 3)):
            (line,) = axes.plot(tokens[start:], mean[start:], label=name, linewidth=1.2)
            lows, highs = ([f(values) for values in zip(*curves)][start:] for f in (min, max))
            axes.fill_between(tokens[start:], lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)
        losses = [run["loss_per_token"] for run in runs]
        middle = statistics.mean(losses)
        error = [[middle - min(losses)], [max(losses) - middle]]
        cache.errorbar(runs[0]["cache_bytes_per_token"], middle, yerr=error, marker=marker, capsize=3, label=name)
    for axes in (whole, end):
        axes.set(xlabel="million tokens", ylabel="held-out loss, nats per token")
    cache.set(xlabel="cache, bytes per token (bf16)", ylabel="final held-out loss")
    cache.set_xscale("log", base=2)
    cache.xaxis.set_major_formatter("{x:,.0f}")
    cache.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with input_errors("compare.py"):
        if args.command == "run":
            Runner(args).run()
        elif args.command == "report":
            print(report(args), end="")
        else:
            results, names = open_results(args)
            for run in plan(results, list(names)):
                print(f"{'done' if run.key in results['runs'] else 'to do'}  {run.key}  {names[run.architecture]}")


if __name__ == "__main__":
    main()
