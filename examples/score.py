"""
Evaluates a causal language model: the nine tasks of the T6 paper with lm-eval, and the perplexity of text files.

    python examples/score.py tasks runs/t6-medium --size medium --output-dir runs/t6-medium-scores
    python examples/score.py perplexity runs/t6-medium book.txt
    python examples/score.py perplexity runs/t6-medium book.txt --cache-dtype float8_e4m3fn
    python examples/score.py held-out runs/t6-medium --data runs/tokens --windows 1024 2048
    python examples/score.py card runs/t6-medium --data runs/tokens --output runs/t6-medium-card.json

`tasks` runs lm-eval's group t6_paper at 0 and at 2 shots and prints the scores beside the paper's; the same with lm-eval
alone is `lm_eval --model hf --model_args pretrained=MODEL,trust_remote_code=True --include_path examples/tasks --tasks t6_paper`. `table`
prints results that are there already. Without a network, `export` on a machine that has one writes the tasks' data as
files, and `--data DIR` evaluates on them; `local` makes a folder of your own files such a folder. `card` makes each kind of held-out
text a task of lm-eval, for a model card where the data of no others are at hand.
"""

import argparse
import functools
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

from command_line import DTYPES, InputError, input_errors, loading, number, one_line, read_text, write_json
from configuration.sizes import SIZES


TASKS = Path(__file__).parent / "tasks"
PAPER = TASKS / "t6_paper" / "paper.json"
LOCAL = "t6_paper_local"

# What the paper reports of each task (section 6.1), and its heading there.
COLUMNS = {
    "arc_easy": ("acc_norm", "ARC-E"),
    "arc_challenge": ("acc_norm", "ARC-C"),
    "boolq": ("acc", "BoolQ"),
    "hellaswag": ("acc_norm", "HellaSw."),
    "openbookqa": ("acc_norm", "OBQA"),
    "piqa": ("acc_norm", "PIQA"),
    "winogrande": ("acc", "W.G."),
    "mmlu": ("acc", "MMLU"),
    "sciq": ("acc_norm", "SciQ"),
}

# The splits that lm-eval's tasks name: that of the questions, then those that examples may come from.
SPLITS = {
    **dict.fromkeys(("arc_easy", "arc_challenge", "openbookqa", "sciq"), ("test", "train", "validation")),
    **dict.fromkeys(("boolq", "hellaswag", "piqa", "winogrande"), ("validation", "train")),
    "mmlu": ("test", "dev"),
}
SPLIT_FIELDS = {
    "test": "test_split",
    "validation": "validation_split",
    "train": "training_split",
    "dev": "fewshot_split",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add_model(command: argparse.ArgumentParser) -> None:
        command.add_argument("model", metavar="MODEL", help="folder or Hub name")
        command.add_argument("--batch-size", type=number(int, 1), default=16, metavar="N", help="(%(default)s)")
        command.add_argument("--device", help="(cuda if there is one, else cpu)")
        command.add_argument(
            "--dtype", choices=DTYPES, default="auto", help="of the weights (auto: as the checkpoint)"
        )

    def add_size(command: argparse.ArgumentParser) -> None:
        command.add_argument("--size", choices=list(SIZES), help="print the paper's scores of this size too")

    tasks = commands.add_parser("tasks", help="run the nine tasks")
    add_model(tasks)
    add_size(tasks)
    tasks.add_argument("--shots", nargs="+", type=number(int, 0), default=[0, 2], metavar="N", help="(0 2)")
    tasks.add_argument("--data", type=Path, metavar="DIR", help="of `export` or `local`, in place of the Hub")
    tasks.add_argument("--limit", type=number(int, 1), metavar="N", help="questions of each task, for a trial")
    tasks.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="for lm-eval's results, as JSON")

    table = commands.add_parser("table", help="print results of lm-eval beside the paper's")
    table.add_argument("results", nargs="+", type=Path, metavar="JSON", help="results that lm-eval wrote")
    add_size(table)

    perplexity = commands.add_parser("perplexity", help="perplexity and bits per byte of text files")
    add_model(perplexity)
    perplexity.add_argument("text", nargs="+", type=Path, metavar="FILE")
    perplexity.add_argument("--window", type=number(int, 2), metavar="N", help="tokens (max_position_embeddings)")
    perplexity.add_argument(
        "--cache-dtype",
        choices=("model", "float8_e4m3fn", "int4"),
        help="token by token, through a T6Cache of this dtype",
    )
    perplexity.add_argument("--output", type=Path, metavar="JSON", help="write the figures there too")

    held_out = commands.add_parser("held-out", help="loss on prepare.py's held-out text, by kind and by position")
    add_model(held_out)
    held_out.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder of prepare.py")
    held_out.add_argument("--windows", nargs="+", type=number(int, 2), metavar="N", help="(max_position_embeddings)")
    held_out.add_argument("--output", type=Path, metavar="JSON", help="write the figures there too")

    card = commands.add_parser("card", help="lm-eval's perplexities of prepare.py's held-out text, for a model card")
    add_model(card)
    card.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder of prepare.py")
    card.add_argument("--limit", type=number(int, 1), metavar="N", help="documents of each kind (all)")
    card.add_argument("--output", type=Path, required=True, metavar="JSON", help="for hub_upload.py --eval-results")

    export = commands.add_parser("export", help="write the tasks' data of the Hub as files")
    export.add_argument("directory", type=Path, metavar="DIR")
    export.add_argument("--tasks", default="t6_paper", metavar="NAME", help=argparse.SUPPRESS)
    export.add_argument("--include-path", type=Path, default=TASKS, metavar="DIR", help=argparse.SUPPRESS)

    local = commands.add_parser("local", help="write the lm-eval group of a folder of data")
    local.add_argument(
        "directory", type=Path, metavar="DIR", help="holds TASK/SPLIT.jsonl, with the columns of the Hub's data"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from conversion.files.devices import find_device
from language_modeling import (
    encode,
    held_out_windows,
    load_tokenizer,
    loss_report,
    position_losses,
    text_size,
    total_loss,
)
from modeling_t6 import T6Cache  # which registers T6 with the Auto classes
from pretraining_data import held_out_of_kinds, kinds_of, open_prepared


# lm-eval


def import_lm_eval():
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise InputError(f"this command needs the package lm_eval: pip install 'lm_eval[hf]' ({error})") from error
    return lm_eval


@functools.cache  # it reads some thousand files
def task_manager(include_path: Path):
    return import_lm_eval().tasks.TaskManager(include_path=str(include_path))


def run_tasks(args: argparse.Namespace) -> list[dict]:
    """Evaluates at each number of shots; returns what was written."""
    lm_eval = import_lm_eval()
    include, group = (args.data, LOCAL) if args.data else (TASKS, "t6_paper")
    if args.data and not args.data.is_dir():
        raise InputError(f"--data: there is no folder {args.data}; `score.py export` writes one")
    if args.data and not (args.data / f"{LOCAL}.yaml").exists():
        raise InputError(f"{args.data} has no {LOCAL}.yaml: `score.py local {args.data}` writes it")
    device = find_device(args.device)
    with loading("model", args.model):
        model = lm_eval.models.huggingface.HFLM(
            pretrained=args.model, device=device, batch_size=args.batch_size, dtype=args.dtype
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for shots in args.shots:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=[group],
            num_fewshot=shots,
            limit=args.limit,
            task_manager=task_manager(include),
            log_samples=False,
        )
        results["model_name"] = args.model
        path = args.output_dir / f"results-{shots}-shot.json"
        write_json(path, results, default=lm_eval.utils.handle_non_serializable)
        # Nine scores, not sixty: what a model card is to show.
        write_json(args.output_dir / f"card-{shots}-shot.json", card_results(results))
        print(table([results], args.size), end="\n\n")
        written.append(results)
    return written


def task_scores(results: dict) -> dict[str, tuple[str, dict]]:
    """lm-eval's name and scores of those of the nine tasks that a file of its results holds."""
    found = {}
    for task in COLUMNS:
        for name in (task, f"{LOCAL}_{task}"):
            if name in results["results"]:
                found[task] = name, results["results"][name]
    return found


def card_results(results: dict) -> dict:
    """The paper's nine scores, in the form of lm-eval's files."""
    card = {"results": {}, "n-shot": {}, "model_name": results["model_name"]}
    for task, (_, scores) in task_scores(results).items():
        metric, heading = COLUMNS[task]
        card["results"][task] = {"alias": heading} | {
            key: scores[key] for key in (f"{metric},none", f"{metric}_stderr,none") if key in scores
        }
        card["n-shot"][task] = shots_of(results)
    return card


def shots_of(results: dict) -> int:
    shots = {shots for shots in results.get("n-shot", {}).values() if isinstance(shots, int)}
    if len(shots) != 1:
        raise InputError(f"the results mix numbers of shots: {sorted(shots)}")
    return shots.pop()


def table(all_results: list[dict], size: str | None) -> str:
    """A Markdown table of scores in percent, with the paper's of that size and number of shots."""
    headings = [heading for _, heading in COLUMNS.values()]
    lines = []
    for shots in sorted({shots_of(results) for results in all_results}):
        rows = {}
        if size:
            paper = json.loads(read_text(PAPER))["scores"][size].get(str(shots), {})
            rows |= {f"{method}, paper": list(scores) for method, scores in paper.items()}
        for results in all_results:
            if shots_of(results) == shots:
                found = task_scores(results)
                rows[Path(str(results.get("model_name", "this model"))).name] = [
                    100 * found[task][1][f"{metric},none"] if task in found else None
                    for task, (metric, _) in COLUMNS.items()
                ]
        lines += ["", f"| {shots}-shot | {' | '.join(headings)} | Avg. |", f"| --- |{' --: |' * (len(headings) + 1)}"]
        for name, scores in rows.items():
            # The mean of the nine, as in the paper; of fewer it would be another quantity.
            scores.append(None if None in scores else sum(scores) / len(scores))
            cells = ["-" if score is None else f"{score:.2f}" for score in scores]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    if size:
        lines += ["", f"The paper's scores: {json.loads(read_text(PAPER))['source']}."]
    return "\n".join(lines[1:])


def read_results(path: Path) -> dict:
    try:
        results = json.loads(read_text(path))
        found = task_scores(results)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no file of results that lm-eval wrote: {error!r}") from error
    if not found:
        raise InputError(f"{path} has none of the tasks {', '.join(COLUMNS)}")
    return results


# The tasks' data as files


def base_task(name: str) -> str:
    return "mmlu" if name.startswith("mmlu_") else name


def write_local_group(directory: Path) -> list[str]:
    """
    Writes the group t6_paper_local of the tasks that `directory` holds: lm-eval's own, but for where their data are.

    Returns:
        The names of the tasks.
    """
    if not directory.is_dir():
        raise InputError(f"there is no folder {directory}; `score.py export` writes one")
    tasks = {}
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        if base_task(folder.name) not in SPLITS or folder.name == "mmlu":
            raise InputError(
                f"{folder}: no such task; the folders are {', '.join(COLUMNS)}, but mmlu_SUBJECT for MMLU"
            )
        splits = SPLITS[base_task(folder.name)]
        files = {split: folder / f"{split}.jsonl" for split in splits if (folder / f"{split}.jsonl").is_file()}
        if splits[0] not in files:
            raise InputError(f"{folder} has no {splits[0]}.jsonl, the questions")
        tasks[folder.name] = {
            "task": folder.name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in files.items()}},
            **{SPLIT_FIELDS[split]: None for split in splits if split not in files},
        }
    if not tasks:
        raise InputError(f"{directory} holds no folder of a task")
    mmlu = [task for name, task in tasks.items() if base_task(name) == "mmlu"]
    members = [task for name, task in tasks.items() if base_task(name) != "mmlu"]
    if mmlu:
        members.append(f"{LOCAL}_mmlu")
        aggregate = [{"metric": "acc", "weight_by_size": True}]
        write_yaml(
            directory / f"{LOCAL}_mmlu.yaml",
            {"group": f"{LOCAL}_mmlu", "task": mmlu, "aggregate_metric_list": aggregate},
        )
    write_yaml(directory / f"{LOCAL}.yaml", {"group": LOCAL, "task": members})
    return list(tasks)


def write_yaml(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")  # JSON is YAML


def export_data(args: argparse.Namespace) -> list[str]:
    """Writes the data of the tasks as TASK/SPLIT.jsonl, and their group."""
    if args.directory.exists() and any(args.directory.iterdir()):
        raise InputError(f"{args.directory} is not empty")
    try:
        tasks = task_manager(args.include_path).load([args.tasks])["tasks"]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the data of {args.tasks}: {one_line(error)}") from error
    for name, task in tasks.items():
        for split in SPLITS[base_task(name)]:
            if split in task.dataset:
                path = args.directory / name / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                task.dataset[split].to_json(path, force_ascii=False)
    return write_local_group(args.directory)


# Perplexity


def perplexity(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """
    The loss of each text, in windows that share one token: each token but the first, which starts the document, is
    predicted once, from those before it in its window.

    Returns:
        By file: tokens, loss_per_token (nats), perplexity, loss_per_character (nats), bits_per_byte.
    """
    device, texts = find_device(args.device), {path: read_text(path) for path in args.text}
    for path, text in texts.items():
        if not text.strip():
            raise InputError(f"{path} is empty")
    tokenizer = load_tokenizer(args.model)
    with loading("model", args.model):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(device)
    window = args.window or getattr(model.config, "max_position_embeddings", None)
    if window is None:
        raise InputError(f"--window is needed: the configuration of {args.model} has no max_position_embeddings")
    new_cache = None
    if args.cache_dtype is not None:
        if model.config.model_type != "t6":
            raise InputError(f"--cache-dtype is for T6 models: {args.model} is {model.config.model_type}")
        dtype = None if args.cache_dtype == "model" else args.cache_dtype
        new_cache = functools.partial(T6Cache, config=model.config, dtype=dtype)
        try:
            new_cache()
        except ValueError as error:
            raise InputError(f"--cache-dtype {args.cache_dtype}: {error}") from error
    reports = {}
    for path, text in texts.items():
        tokens = encode(tokenizer, [text])
        nats = total_loss(model, held_out_windows(tokens, window), args.batch_size, new_cache)
        report = loss_report(nats, len(tokens) - 1, *text_size([text]))
        loss = report["loss_per_token"]
        reports[str(path)] = {"tokens": len(tokens) - 1, "perplexity": math.exp(loss), "window": window, **report}
        print(
            f"{path}: {len(tokens) - 1:,} tokens, loss {loss:.4f} nats, perplexity {math.exp(loss):.3f}, "
            f"{report['bits_per_byte']:.4f} bits per byte"
        )
    if args.output:
        write_json(args.output, reports)
    return reports


# Held-out text of `prepare.py`


def read_held_out(folder: Path, facts: dict) -> dict[str, torch.Tensor]:
    """The ids of each kind."""
    tokens = np.fromfile(folder / "held_out.bin", dtype=facts["dtype"]).astype("int64")
    return held_out_of_kinds(folder, facts, torch.from_numpy(tokens))


def check_tokens(name: str, tokenizer: PreTrainedTokenizerBase, data: Path) -> None:
    """Raises an `InputError` if the model `name` has a tokenizer by which the ids of `data`, made by another, are other tokens."""
    try:
        own = load_tokenizer(name)
    except InputError:  # it has none: whoever trained it has kept that elsewhere
        return
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"{name} has another tokenizer than {data}: expected tokens of prepare.py --tokenizer {name}")


def card(args: argparse.Namespace) -> dict:
    """Evaluates each kind of held-out text as a task of lm-eval, of its documents; returns what was written, in the form of its files."""
    lm_eval = import_lm_eval()
    device, (tokenizer, facts) = find_device(args.device), open_prepared(args.data)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    with loading("model", args.model):
        model = lm_eval.models.huggingface.HFLM(
            pretrained=args.model, device=device, batch_size=args.batch_size, dtype=args.dtype
        )
    with TemporaryDirectory() as folder:
        tasks = []
        for kind, tokens in read_held_out(args.data, facts).items():
            if len(tokens) < 2:
                continue
            places = (tokens == start).nonzero()[1:, 0].tolist()
            path = Path(folder) / f"{kind}.jsonl"
            documents = tokenizer.batch_decode(tokens.tensor_split(places), skip_special_tokens=True)
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[: args.limit]))
            tasks.append(
                {
                    "task": f"held_out_{kind}",
                    "task_alias": f"held-out text: {kind}",
                    "dataset_path": "json",
                    "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": folder},
                    "test_split": "test",
                    "output_type": "loglikelihood_rolling",
                    "doc_to_text": "",
                    "doc_to_target": "text",
                    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
                }
            )
        manager = lm_eval.tasks.TaskManager(include_defaults=False)
        results = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, log_samples=False)
    found = {"results": results["results"], "n-shot": results["n-shot"], "model_name": args.model}
    write_json(args.output, found, default=lm_eval.utils.handle_non_serializable)
    for task, scores in results["results"].items():
        print(f"{task}: {scores['bits_per_byte,none']:.4f} bits per byte")
    return found


def held_out(args: argparse.Namespace) -> dict[str, dict]:
    """
    The loss of each kind of held-out text, in windows that share one token, and that of all kinds by position.

    Returns:
        By window: `kinds`, by kind and for "all" as in `perplexity`; and `positions`, the loss per token in nats between two
        powers of two, by the first and the last place of a window's tokens, which are counted from 0.
    """
    device, (tokenizer, facts) = find_device(args.device), open_prepared(args.data)
    kinds, texts = kinds_of(facts), read_held_out(args.data, facts)
    with loading("model", args.model):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(device)
    if model.config.get_text_config().vocab_size < len(tokenizer):
        raise InputError(f"{args.model} has fewer tokens than the tokenizer of {args.data}, {len(tokenizer)}")
    check_tokens(args.model, tokenizer, args.data)
    windows = args.windows or [getattr(model.config, "max_position_embeddings", None)]
    if windows == [None]:
        raise InputError(f"--windows is needed: the configuration of {args.model} has no max_position_embeddings")
    reports = {}
    for window in windows:
        nats = torch.zeros(window - 1, dtype=torch.float64)
        counts = torch.zeros(window - 1, dtype=torch.long)
        report = {}
        for kind, part in texts.items():
            if len(part) < 2:
                continue
            kind_nats, kind_counts = position_losses(model, held_out_windows(part, window), args.batch_size)
            nats[: len(kind_nats)] += kind_nats
            counts[: len(kind_counts)] += kind_counts
            report[kind] = held_out_report(kind_nats, kind_counts, kinds[kind])
        report["all"] = held_out_report(nats, counts, facts)
        for kind, numbers in report.items():
            loss = numbers["loss_per_token"]
            print(
                f"window {window}, {kind}: {numbers['tokens']:,} tokens, loss {loss:.4f}, perplexity {math.exp(loss):.3f}"
            )
        reports[str(window)] = {"kinds": report, "positions": losses_by_position(nats, counts)}
    if args.output:
        write_json(args.output, reports)
    return reports


def held_out_report(nats: torch.Tensor, counts: torch.Tensor, facts: dict) -> dict[str, float]:
    number = int(counts.sum())
    report = loss_report(nats.sum().item(), number, facts["held_out_characters"], facts["held_out_bytes"])
    return {"tokens": number, "perplexity": math.exp(report["loss_per_token"]), **report}


def losses_by_position(nats: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
    losses, first = {}, 1
    while first <= len(nats):
        last = min(2 * first - 1, len(nats))
        if number := int(counts[first - 1 : last].sum()):
            losses[f"{first}-{last}"] = nats[first - 1 : last].sum().item() / number
        first *= 2
    return losses


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    with input_errors("score.py"):
        if args.command == "tasks":
            return run_tasks(args)
        if args.command == "table":
            print(table([read_results(path) for path in args.results], args.size))
        elif args.command == "perplexity":
            return perplexity(args)
        elif args.command == "held-out":
            return held_out(args)
        elif args.command == "card":
            return card(args)
        else:
            names = export_data(args) if args.command == "export" else write_local_group(args.directory)
            print(f"{args.directory}: {', '.join(names)}")
            return names


if __name__ == "__main__":
    main()
