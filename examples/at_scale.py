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
Models of the paper's small size, one after the other: each is trained by `pretrain.py` on the same batches, and measured.

    python examples/at_scale.py run --data runs/tokens --results runs/at_scale.json
    python examples/at_scale.py report --results runs/at_scale.json --output runs/at_scale.md

`run` trains on all GPUs of the machine. It does the models that its results lack, and goes on with one that was stopped: by
`--minutes`, or however. Results have, of each model: held-out loss by kind of text, by position, and in windows of the trained length and
of twice as much; what it finds in texts (the tasks of `python -m conversion evaluate`); tokens per second and memory.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from command_line import (
    InputError,
    field_and_value,
    input_errors,
    last_checkpoint,
    number,
    only_call,
    read_text,
    write_json,
)


# By name in the results: arguments of `pretrain.py`.
MODELS = {
    "T6-KVonly": ["--architecture", "t6-small-kvonly"],  # the lowest of the comparison
    "T6": ["--architecture", "t6-small"],
    "MHA": ["--architecture", "llama-mha-small"],
    "GQA": ["--architecture", "llama-gqa-small"],
    "MLA": ["--architecture", "deepseek-mla-small"],
    "T6 of the paper": ["--architecture", "t6-small", "--paper"],
    "MHA, QK norm": ["--architecture", "llama-mha-small", "--set", "model_type=qwen3"],
}
# What the runs have in common; a later call must have the same.
SETTINGS = {"tokens": 10**9, "sequences_per_step": 256, "block_length": 1024, "warmup_steps": 300}
BATCH_SIZE = 64  # sequences a device at once, at most
STOPPED = 75  # exit code of a run of `pretrain.py` that has more to do
LONGER = 2  # times the trained length, in which losses are measured, too


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    count = number(int, 1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and measure the models that the results lack")
    run.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder of prepare.py")
    run.add_argument("--models", nargs="+", metavar="NAME", help=f"in this order ({'; '.join(MODELS)})")
    run.add_argument("--work-dir", type=Path, default=Path("runs/at_scale"), metavar="DIR", help="(%(default)s)")
    run.add_argument("--minutes", type=number(float, 0), metavar="X", help="stop training then, with a checkpoint")
    for name, default in SETTINGS.items():
        run.add_argument(f"--{name.replace('_', '-')}", type=count, default=default, metavar="N", help="(%(default)s)")
    run.add_argument(
        "--learning-rates", nargs="+", type=field_and_value, default=[], metavar="NAME=X", help="(the size's)"
    )
    run.add_argument("--set", nargs="+", type=field_and_value, default=[], metavar="FIELD=VALUE", help="in all models")
    run.add_argument(
        "--batch-size", type=count, metavar="N", help=f"sequences a device ({BATCH_SIZE}, or fewer with many GPUs)"
    )
    run.add_argument("--eval-steps", type=count, default=400, metavar="N", help="(%(default)s)")
    run.add_argument("--save-steps", type=count, metavar="N", help="steps between checkpoints (EVAL_STEPS)")
    run.add_argument(
        "--lengths", nargs="+", type=count, metavar="N", help="tokens of texts to find in (half of a block, and all)"
    )
    run.add_argument("--samples", type=count, default=40, metavar="N", help="of a task and length (%(default)s)")
    run.add_argument("--processes", type=count, metavar="N", help="one for each GPU (all)")
    run.add_argument("--no-compile", action="store_true", help="do not compile layers with torch.compile")
    run.add_argument("--no-measure", action="store_true", help="train alone, for a trial of speed and memory")
    run.add_argument("--cpu", action="store_true", help="do not use GPUs")
    report = commands.add_parser("report", help="tables and plot")
    report.add_argument("--output", type=Path, default=Path("runs/at_scale.md"), metavar="MD", help="(%(default)s)")
    for command in (run, report):
        command.add_argument("--results", type=Path, required=True, metavar="JSON")
    args = parser.parse_args(argv)
    if args.command == "run":
        for option, names in (("--models", args.models or ()), ("--learning-rates", dict(args.learning_rates))):
            if unknown := set(names) - set(MODELS):
                parser.error(f"{option}: there is no {', '.join(sorted(unknown))}; there are {'; '.join(MODELS)}")
    return args


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import torch

import pretrain
import score
from configuration.make_configs import cache_numbers
from conversion.evaluate import evaluation
from conversion.evaluate import report as retrieval
from conversion.evaluate.options import TASK_NAMES
from conversion.files.devices import find_device
from conversion.smaller.languages import find_language
from pretraining_data import Data, open_prepared
from results import markdown_table, open_results, read_results, three_panels
from training import check_same_run


# Training


def folder_of(args: argparse.Namespace, name: str) -> Path:
    return args.work_dir / name.lower().replace(", ", "-").replace(" ", "-")


def steps_of(args: argparse.Namespace) -> int:
    return math.ceil(args.tokens / (args.sequences_per_step * args.block_length))


def arguments_of(args: argparse.Namespace, name: str) -> list[str]:
    """Those of `pretrain.py` that say what a model is and what it is trained on."""
    given = list(MODELS[name])
    if args.set:
        given += [] if "--set" in given else ["--set"]
        given += [f"{field}={json.dumps(value)}" for field, value in args.set]
    options = {"data": args.data, "output-dir": folder_of(args, name), "max-steps": steps_of(args)}
    options |= {name.replace("_", "-"): getattr(args, name) for name in SETTINGS if name != "tokens"}
    options["learning-rate"] = dict(args.learning_rates).get(name)
    return given + as_words(options)


def as_words(options: dict) -> list[str]:
    return [text for option, value in options.items() if value is not None for text in (f"--{option}", str(value))]


def batch_size_of(args: argparse.Namespace, processes: int) -> int:
    """The one that is asked for, or the largest of which a process's share of a step is a multiple."""
    share = max(1, args.sequences_per_step // processes)
    return args.batch_size or max(size for size in range(1, BATCH_SIZE + 1) if share % size == 0)


def command_of(args: argparse.Namespace, name: str, minutes: float | None) -> list[str]:
    """That trains a model with `pretrain.py`, or goes on with it."""
    folder, on_gpus = folder_of(args, name), torch.cuda.is_available() and not args.cpu
    processes = (args.processes or torch.cuda.device_count()) if on_gpus else 1
    options = {"batch-size": batch_size_of(args, processes), "eval-steps": args.eval_steps}
    given = arguments_of(args, name) + as_words(options | {"save-steps": args.save_steps, "max-minutes": minutes})
    given += ["--cpu"] if args.cpu else []
    given += [] if args.no_compile else ["--compile"]
    given += ["--resume"] if last_checkpoint(checkpoints_of(folder)) else []
    script = [str(Path(__file__).with_name("pretrain.py")), *given]
    if not on_gpus:
        return [sys.executable, *script]
    # By this machine's name, which its network may not know, processes would wait for each other in vain.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return [sys.executable, *launcher, "--nproc-per-node", str(processes), *script]


def exit_code(command: list[str], lock: int | None = None) -> int:
    """
    Of a command that runs to its end, and holds the `lock` until then, also where this process is killed. It is told to stop when this
    process is: `subprocess.run` would kill it, and a launcher that is killed leaves its processes behind, on the GPUs.
    """
    with subprocess.Popen(command, pass_fds=() if lock is None else (lock,)) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise


def checkpoints_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-checkpoints")


def is_trained(args: argparse.Namespace, name: str) -> bool:
    """
    Raises:
        InputError: it is, with other settings or on other data, or nothing says how.
    """
    folder = folder_of(args, name)
    path = checkpoints_of(folder) / "training.json"
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not path.exists():
        raise InputError(f"{folder} is not empty, and no {path} says how it was trained: expected another --work-dir")
    asked = pretrain.parse_args(arguments_of(args, name))
    _, settings = pretrain.run_settings(asked, Data(asked))
    check_same_run(json.loads(read_text(path)), settings, f"{folder} was trained")
    return True


def trained(args: argparse.Namespace, name: str, deadline: float, lock: int | None) -> bool:
    """
    Trains a model to its end; whether time allowed that.

    Raises:
        InputError: `pretrain.py` failed.
    """
    if is_trained(args, name):
        return True
    left = deadline - time.monotonic()
    if left <= 0:
        return False
    command = command_of(args, name, left / 60 if left < math.inf else None)
    code = exit_code(command, lock)
    if code == 0:
        return True
    if code == STOPPED or time.monotonic() > deadline:  # of several processes, their launcher has a code of its own
        return False
    raise InputError(f"{name}: pretrain.py ended with exit code {code}")


# Measuring


def measure(args: argparse.Namespace, folder: Path, device: str) -> dict:
    """Held-out losses and retrieval of a trained model."""
    length, batch_size = args.block_length, batch_size_of(args, 1)
    windows = [str(length), str(LONGER * length)]
    options = ["--windows", *windows, "--device", device, "--batch-size", str(max(1, batch_size // 4))]
    held_out = score.main(["held-out", str(folder), "--data", str(args.data), *options])
    model, _ = evaluation.load_model(folder, torch.float32, device)
    language = find_language(evaluation.load_tokenizer(folder), model.config.vocab_size)
    samples = evaluation.all_samples(language, list(TASK_NAMES), lengths_of(args), args.samples)
    found = evaluation.score_all(model, "model", folder.name, language, samples, batch_size)
    for one in found["scores"]:
        del one["log_probabilities"]
    numbers = cache_numbers(model.config)[1]
    return {"held_out": held_out, "retrieval": found, "cache_bytes_per_token": 2 * numbers}


def lengths_of(args: argparse.Namespace) -> list[int]:
    """Tokens of texts to find in."""
    return args.lengths or [args.block_length // 2, args.block_length]


def check_results(args: argparse.Namespace, runs: dict[str, dict]) -> None:
    """Raises an `InputError` if another rate is asked for than that of a model that is there, or other texts than it was measured by."""
    for name in runs.keys() & set(args.models or MODELS) & set(dict(args.learning_rates)):
        rate, known = dict(args.learning_rates)[name], runs[name]["learning_rate"]
        if rate != known:
            raise InputError(
                f"--learning-rates {name}={rate}: {args.results} has it with {known}: expected another file"
            )
    if args.no_measure:
        return
    asked = args.samples, sorted(set(lengths_of(args)))
    for name, facts in runs.items():
        scores = facts.get("retrieval", {}).get("scores")
        if scores and asked != (found := (scores[0]["count"], sorted({score["length"] for score in scores}))):
            raise InputError(
                f"--samples and --lengths ask for {asked[0]} texts of {asked[1]} tokens: expected {found[0]} of {found[1]}, as {args.results} "
                f"has them of {name}"
            )


def facts_of(folder: Path) -> dict:
    """What `pretrain.py` says of a run, with its curve of held-out loss."""
    facts = json.loads(read_text(checkpoints_of(folder) / "training.json"))
    log = read_text(checkpoints_of(folder) / "log.jsonl").splitlines()
    entries = [entry for entry in map(json.loads, log) if "eval_loss_per_token" in entry]
    curve = {entry["step"]: round(entry["eval_loss_per_token"], 5) for entry in entries}
    config = {"num_attention_heads", "num_key_value_heads", "intermediate_size", "model_type"}
    facts["config"] = {name: value for name, value in facts["config"].items() if name in config}
    return facts | {"curve": [{"step": step, "loss": loss} for step, loss in curve.items()]}


def run(args: argparse.Namespace, lock: int | None) -> dict:
    """Adds to the results what they lack, and returns them. What trains holds the `lock` on the work folder, too."""
    _, facts = open_prepared(args.data)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"set": dict(args.set)}
    results = open_results(args.results, "at_scale.py", {"settings": settings, "data": facts["sha256"]})
    results.setdefault("text", facts.get("kinds"))
    check_results(args, results["runs"])
    deadline = time.monotonic() + 60 * (math.inf if args.minutes is None else args.minutes)
    device = "cpu" if args.cpu else find_device(None)
    for name in args.models or MODELS:
        known, folder = results["runs"].get(name), folder_of(args, name)
        # What is not measured is, while there is a model.
        if known and ("held_out" in known or args.no_measure or not folder.is_dir()):
            continue
        if not trained(args, name, deadline, lock):
            print(f"{name}: no time")
            break
        found = results["runs"][name] = facts_of(folder)
        write_json(args.results, results, indent=1)  # measuring may fail
        if not args.no_measure:
            found |= measure(args, folder, device)
            write_json(args.results, results, indent=1)
        if device != "cpu":
            torch.cuda.empty_cache()
    return results


# Report


def heads(facts: dict) -> str:
    count = facts["config"]["num_attention_heads"]
    kv = facts["config"].get("num_key_value_heads") or count
    return f"{count}" if kv == count else f"{count} ({kv})"


def report(args: argparse.Namespace) -> str:
    """Writes the tables as Markdown and the plot beside them; returns the Markdown."""
    results = read_results(args.results, "at_scale.py", ("settings", "data"))
    settings, runs = results["settings"], results["runs"]
    if not runs:
        raise InputError(f"{args.results} has no runs yet: there is nothing to compare")
    runs = dict(sorted(runs.items(), key=lambda item: item[1]["loss_per_token"]))
    one = next(iter(runs.values()))
    unique = sum(kind["train_tokens"] for kind in results["text"].values()) if results["text"] else None
    passes = f", {one['tokens'] / unique:.1f} passes over {unique / 1e6:.1f} million" if unique else ""
    places = sorted({f"{run['processes']} x {run['device']}, torch {run['torch']}" for run in runs.values()})
    lines = [
        "# Models of the paper's small size",
        "",
        "Made by `python examples/at_scale.py report` from the runs of `python examples/at_scale.py run`.",
        "",
        f"{one['tokens'] / 1e6:,.1f} million tokens each{passes}, in {one['max_steps']:,} steps of {settings['sequences_per_step']} sequences of "
        f"{settings['block_length']}; one seed. {'; '.join(places)}. Tokens {results['data'][:16]}.",
        "",
        f"![Held-out loss by tokens seen and by position]({args.output.with_suffix('.png').name})",
        "",
        "Held-out loss is nats a token. The cache is bytes a token in bfloat16, as it is stored.",
        "",
    ]
    columns = ["rate", "heads (KV)", "MLP", "parameters", "without embedding", "cache", "held-out loss", "tokens/s"]
    columns += ["GiB a GPU", "of the peak FLOP/s"]
    table = {}
    for name, facts in runs.items():
        table[name] = [
            f"{facts['learning_rate']:g}", heads(facts), f"{facts['config']['intermediate_size']:,}",
            f"{facts['parameters']:,}", f"{facts['non_embedding_parameters']:,}",
            f"{facts['cache_bytes_per_token']:,}" if "cache_bytes_per_token" in facts else "-",
            f"{facts['loss_per_token']:.4f}",
            f"{facts['tokens_per_second']:,.0f}" if "tokens_per_second" in facts else "-",
            f"{facts['memory_gib']:.1f}" if facts["memory_gib"] else "-",
            f"{facts['mfu']:.1%}" if "mfu" in facts else "-",
        ]  # fmt: skip
    lines += markdown_table(columns, table)
    measured = {name: facts for name, facts in runs.items() if "held_out" in facts}
    if measured:
        lines += measured_tables(measured)
    text = "\n".join(lines) + "\n"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plot(runs, settings, args.output.with_suffix(".png"))
    args.output.write_text(text, encoding="utf-8")
    return text


def measured_tables(runs: dict[str, dict]) -> list[str]:
    one = next(iter(runs.values()))
    windows = list(one["held_out"])
    kinds = [kind for kind in one["held_out"][windows[0]]["kinds"] if kind != "all"]
    lines = ["", "## Kinds of text", "", f"Held-out loss in windows of {windows[0]}, and perplexity of all text.", ""]
    lines += markdown_table(
        [*kinds, *(f"perplexity at {int(window):,}" for window in windows)],
        {
            name: [f"{facts['held_out'][windows[0]]['kinds'][kind]['loss_per_token']:.4f}" for kind in kinds]
            + [f"{facts['held_out'][window]['kinds']['all']['perplexity']:.3f}" for window in windows]
            for name, facts in runs.items()
        },
    )
    places = list(one["held_out"][windows[-1]]["positions"])
    lines += ["", "## Positions", "", f"Held-out loss by the place of a token in windows of {windows[-1]}.", ""]
    lines += markdown_table(
        places,
        {
            name: [f"{facts['held_out'][windows[-1]]['positions'][place]:.3f}" for place in places]
            for name, facts in runs.items()
        },
    )
    tasks = list(retrieval.by_task(one["retrieval"]))
    samples = one["retrieval"]["scores"][0]["count"]
    lengths = sorted({score["length"] for score in one["retrieval"]["scores"]})
    lines += [
        "",
        "## What is found",
        "",
        f"Of the values of the tasks of `python -m conversion evaluate`, the part that greedy decoding says, {samples} texts of each task and of "
        f"{' and '.join(f'{length:,}' for length in lengths)} tokens; and the log-probability of an answer's token, in nats.",
        "",
    ]
    lines += markdown_table(
        [*tasks, "all", "log-probability"],
        {
            name: [f"{part:.1%}" for part in [*retrieval.by_task(of).values(), of["found"]]]
            + [f"{of['log_probability']:.3f}"]
            for name, of in ((name, facts["retrieval"]) for name, facts in runs.items())
        },
    )
    return lines


def plot(runs: dict[str, dict], settings: dict, path: Path) -> None:
    """Curves of the held-out loss, their last part, and the loss by position."""
    tokens_per_step = settings["sequences_per_step"] * settings["block_length"]
    figure, (whole, end, places) = three_panels()
    for index, (name, facts) in enumerate(runs.items()):
        style = f"C{index}{'-' if name.startswith('T6') else '--'}"
        tokens = [entry["step"] * tokens_per_step / 1e6 for entry in facts["curve"]]
        losses = [entry["loss"] for entry in facts["curve"]]
        for axes, start in ((whole, 0), (end, len(losses) * 2 // 3)):
            axes.plot(tokens[start:], losses[start:], style, label=name)
        if "held_out" in facts:
            positions = list(facts["held_out"].values())[-1]["positions"]
            firsts = [int(place.split("-")[0]) for place in positions]
            places.step(firsts, list(positions.values()), style, where="post")
    for axes in (whole, end):
        axes.set(xlabel="million tokens", ylabel="held-out loss, nats a token")
    places.set(xlabel="place in the window", ylabel="held-out loss")
    places.set_xscale("log", base=2)
    places.axvline(settings["block_length"], color="gray", linestyle=":")
    end.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with input_errors("at_scale.py"):
        if args.command == "run":
            with only_call(args.work_dir) as lock:
                run(args, lock)
        else:
            print(report(args), end="")


if __name__ == "__main__":
    main()
