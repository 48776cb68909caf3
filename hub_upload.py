"""
Puts a T6 folder on the Hub as a repository that anyone loads with plain Transformers.

    python hub_upload.py MODEL_DIR REPO_ID --dry-run    checks the folder, shows files and model card, contacts nobody
    python hub_upload.py MODEL_DIR REPO_ID              uploads in one commit, downloads it again and compares logits

The folder is left as it is: what it lacks (code, LICENSE, model card, ...) is added to a copy. An upload that was cut off
goes on where it stopped when the command is run again: the weights that arrived are not sent twice.
"""

import argparse
import ast
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    RepoFile,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig

import modeling_t6
from conversion.files.checkpoints import INDEX, Checkpoint, ShardWriter, shard_size
from conversion.files.errors import ConversionError
from conversion.files.folders import read_json
from conversion.files.memory import available_memory
from modeling_t6 import T6Config
from modeling_t6.cache_t6 import factor_layouts
from modeling_t6.modeling_t6 import AUTO_MAP


Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parent
PAPER = "https://arxiv.org/abs/2501.06425"
# The part of the card that is written here; what stands around it is the author's, and stays.
BEGIN, END = "<!-- T6: written by hub_upload.py; text outside these marks is kept -->", "<!-- /T6 -->"

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TEXTS = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*", ".gitattributes")
CONVERSION = ("conversion.json", "conversion.png")  # the report of `python -m conversion`
PICKLES = (
    "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npy", "*.npz", "*.msgpack",
    "*.h5", "*.dill",
)  # fmt: skip
# What other tools leave in a folder; not uploaded, and not worth an error.
LEFT_OUT = (".git", ".cache", "__pycache__", ".DS_Store", ".ipynb_checkpoints")
# A push replaces these: what the repository held of them and the folder does not have, would be loaded in its place.
REPLACED = (*WEIGHTS, *TOKENIZER_FILES, *CONVERSION, *PICKLES, "*.py", "config.json", "generation_config.json")
GITATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.model filter=lfs diff=lfs merge=lfs -text\n"

PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}

# What the code of a model may import, and what it may not name: all that opens files, connections or processes.
IMPORTS = {
    "__future__", "abc", "collections", "contextlib", "copy", "dataclasses", "enum", "functools", "itertools", "math",
    "numbers", "operator", "os", "torch", "transformers", "triton", "typing", "warnings",
}  # fmt: skip
FORBIDDEN_MODULES = (
    "torch.hub",
    "torch.utils.cpp_extension",
    "torch.distributed",
    "torch.multiprocessing",
    "torch.package",
)
# Of torch.distributed, the tensors that an engine has spread over its processes: they open no connection themselves.
SPREAD_TENSORS = {f"torch.distributed.tensor.{name}" for name in ("DTensor", "Partial", "Replicate", "Shard")}
FORBIDDEN_NAMES = {
    "open", "exec", "eval", "__import__", "input", "breakpoint", "globals", "vars", "__builtins__", "__globals__",
    "__subclasses__", "__loader__", "os", "sys", "io", "builtins", "importlib", "pathlib", "shutil", "socket", "subprocess",
    "ctypes", "pickle", "save", "load", "load_library", "load_inline", "cpp_extension", "hub", "distributed",
    "multiprocessing", "tofile", "from_file", "memmap", "dump", "write", "write_text", "write_bytes", "system", "popen",
    "Popen", "unlink", "mkdir", "cached_file", "snapshot_download", "hf_hub_download", "push_to_hub", "save_pretrained",
    "from_pretrained", "use_kernel_forward_from_hub", "use_kernel_func_from_hub",
}  # fmt: skip


class UploadError(Exception):
    """The folder, the repository or the Hub is not what a push needs; the message says what and where."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="MODEL_DIR", type=Path, help="as `save_pretrained` or a conversion wrote it")
    parser.add_argument("repo_id", metavar="REPO_ID", help="name on the Hub: someone/model")
    parser.add_argument("--private", action="store_true", help="make a new repository that only its owner sees")
    parser.add_argument("--revision", help="branch to push to, made if it is not there (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of pushing to main")
    parser.add_argument("--commit-message", help="default: what is pushed, in one line")
    parser.add_argument("--dry-run", action="store_true", help="check, list files and show the card; contact nobody")
    parser.add_argument(
        "--code-only",
        action="store_true",
        help="push code, config.json and card only, to a repository that holds the weights of MODEL_DIR",
    )
    parser.add_argument("--max-shard-size", type=shard_size, help="split larger files of weights, e.g. 5GB")
    parser.add_argument("--token", help="default: HF_TOKEN, or that of `hf auth login`")
    parser.add_argument(
        "--license", help="of the weights, an identifier of the Hub (default: the card's, else apache-2.0)"
    )
    parser.add_argument("--base-model", help="name on the Hub of the model this one was made from")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="data sets of the Hub that it was trained on")
    parser.add_argument("--eval-results", nargs="+", type=Path, metavar="JSON", help="results written by lm-eval")
    parser.add_argument("--no-tokenizer", action="store_true", help="the model has none")
    args = parser.parse_args(argv)
    if args.create_pr and (args.revision or args.private):
        parser.error(
            "--create-pr opens a pull request against main of an existing repository: not with --revision, --private"
        )
    # The Hub would make a branch of that name, which loads in place of the commit.
    if re.fullmatch(r"[0-9a-f]{40}|refs/(?!pr/\d).*", revision := args.revision or "main"):
        parser.error(f"--revision must be a branch or refs/pr/N, got {revision}")
    if args.commit_message is not None and not args.commit_message.strip():
        parser.error("--commit-message must not be empty")
    if args.token is not None and not args.token.strip():
        parser.error("--token must not be empty")
    return args


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file at the top of a repository has a name of one of these kinds."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)


def listed(names: Iterable[str]) -> str:
    """The first of many names, for an error that stays one line."""
    names = sorted(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


# The folder


def collect(folder: Path) -> dict[str, Path]:
    """The files of a model folder by name; raises an `UploadError` that lists what has no place on the Hub."""
    if not folder.is_dir():
        raise UploadError(f"{folder} is no folder")
    kept = (*WEIGHTS, *TOKENIZER_FILES, *TEXTS, *CONVERSION, "config.json", "generation_config.json", *code_files())
    files, pickles, strays, links = {}, [], [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or any(part in LEFT_OUT for part in path.relative_to(folder).parts):
            continue
        if path.exists() and not path.is_file():  # a pipe or a device: reading it may never end
            strays.append(name)
        elif matches(path.name, PICKLES) or begins_as_pickle(path):
            pickles.append(name)
        elif leads_out(path, folder) and not matches(name, ("*.safetensors", *code_files())):
            links.append(f"{name} -> {path.resolve()}")
        elif matches(name, kept) or fnmatch(name, "additional_chat_templates/*.jinja"):
            files[name] = path
        else:
            strays.append(name)
    if pickles:
        raise UploadError(
            f"{folder} holds {listed(pickles)}: pickles run code when they are loaded, only safetensors are pushed"
        )
    if strays:
        raise UploadError(f"{folder} holds files that are no part of a T6 model: {listed(strays)}")
    if links:
        raise UploadError(f"{folder} holds links to files outside of it, which are not pushed: {listed(links)}")
    return files


def leads_out(path: Path, folder: Path) -> bool:
    """
    Whether a link leads to a file that is not the folder's: one of a folder from elsewhere may lead to a private key.
    The Hub's cache keeps the files of `snapshots/COMMIT` in `blobs`.
    """
    root, target = folder.resolve(), path.resolve()
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    return not any(target.is_relative_to(root) for root in roots)


def begins_as_pickle(path: Path) -> bool:
    """Whether a file begins as `torch.save` or `pickle` write, whatever its name."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UploadError(f"cannot read {path}: {error.strerror}") from error
    return start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and len(start) > 1)


def check_config(folder: Path) -> tuple[dict, T6Config]:
    """`config.json` as it is, and as Transformers reads it."""
    content = read_json(folder / "config.json")
    if content.get("model_type") != "t6":
        raise UploadError(f"config.json: `model_type` must be 't6', got {content.get('model_type')!r}")
    try:
        config = T6Config.from_pretrained(folder)
    except Exception as error:  # whatever the validation of a configuration raises
        raise UploadError(f"config.json: {' '.join(str(error).split())}") from error
    auto_map = content.get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise UploadError(f"config.json: `auto_map` must be an object from Auto classes to classes, got {auto_map!r}")
    for auto_class, reference in auto_map.items():
        # A model that was loaded from the Hub says "someone/model--module.Class".
        if str(reference).rpartition("--")[2] != AUTO_MAP.get(auto_class):
            raise UploadError(
                f"config.json: `auto_map` says {auto_class} is {reference!r}, this package has {AUTO_MAP.get(auto_class)!r}"
            )
    architectures = content.get("architectures") or ["T6ForCausalLM"]
    known = {reference.rpartition(".")[2] for auto_class, reference in AUTO_MAP.items() if auto_class != "AutoConfig"}
    if len(architectures) != 1 or architectures[0] not in known:
        raise UploadError(
            f"config.json: `architectures` must be one of {', '.join(sorted(known))}, got {architectures}"
        )
    content |= {"architectures": architectures, "auto_map": dict(AUTO_MAP)}
    return content, config


def auto_class_of(content: dict) -> str:
    """The Auto class that loads what config.json describes."""
    return next(name for name, reference in AUTO_MAP.items() if reference.endswith(f".{content['architectures'][0]}"))


def check_weights(checkpoint: Checkpoint, content: dict, config: T6Config) -> None:
    """
    Compares names, shapes and dtypes with the configuration and reads every number.

    Raises:
        UploadError, ConversionError: naming the tensor that is missing, unexpected, of another shape or dtype, or not
            finite.
    """
    with torch.device("meta"):
        model = getattr(modeling_t6, content["architectures"][0])(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    found = checkpoint.tensors
    for kind, names in (
        ("are missing from", set(expected) - tied - set(found)),
        ("are unknown to config.json, but in", set(found) - set(expected)),
    ):
        if names:
            raise UploadError(f"{listed(names)} {kind} the weights")
    first = next(iter(found.values())).dtype
    dtype = content.get("dtype") or content.get("torch_dtype") or str(first).removeprefix("torch.")
    content["dtype"] = dtype
    for name, info in found.items():
        if info.shape != expected[name]:
            raise UploadError(
                f"{name} in {info.file.name} has shape {list(info.shape)}, by config.json it is {list(expected[name])}"
            )
        if str(info.dtype) != f"torch.{dtype}":
            raise UploadError(f"{name} in {info.file.name} has dtype {info.dtype}, by config.json it is torch.{dtype}")
    with tqdm(total=checkpoint.nbytes, unit="B", unit_scale=True, desc="checking weights") as progress:
        for _, tensor in checkpoint:  # raises on a number that is not finite
            progress.update(tensor.nbytes)


def check_tokenizer(folder: Path, files: dict[str, Path], config: T6Config) -> None:
    if not any(name in files for name in TOKENIZER_FILES):
        raise UploadError(f"{folder} has no tokenizer: save it there, or pass --no-tokenizer if the model has none")
    if "tokenizer_config.json" in files and read_json(files["tokenizer_config.json"]).get("auto_map"):
        raise UploadError("tokenizer_config.json: `auto_map` names code of its own, only the code of T6 is pushed")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever reading a tokenizer raises
        raise UploadError(f"the tokenizer does not load: {' '.join(str(error).split())}") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise UploadError(f"the tokenizer has token {largest}, by config.json `vocab_size` is {config.vocab_size}")


def split_weights(checkpoint: Checkpoint, folder: Path, max_shard_size: int) -> None:
    """Writes the weights into `folder` in shards of at most `max_shard_size` bytes, one tensor in memory at a time."""
    tensors = [(name, info.shape, info.dtype) for name, info in checkpoint.tensors.items()]
    with ShardWriter(folder, tensors, max_shard_size) as writer:
        for name, tensor in tqdm(checkpoint, total=len(tensors), unit="tensor", desc="splitting weights"):
            writer.write(name, tensor)
        writer.close()


# The code


def code_files() -> dict[str, Path]:
    """The files that a repository of a T6 model carries: `modeling_t6.py`, and what it and they import."""
    package, waiting, files = ROOT / "modeling_t6", ["configuration_t6.py", "modeling_t6.py"], {}
    while waiting:
        name = waiting.pop()
        if name not in files:
            files[name] = package / name
            for node in ast.walk(ast.parse(files[name].read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level:
                    waiting.append(f"{node.module}.py")
    return dict(sorted(files.items()))


def unsafe_code(source: str) -> list[str]:
    """
    What a reader of code files fears, found in their syntax tree: imports that a model does not need, and names that open
    files, connections or processes. It keeps this package's code honest; it is no sandbox for the code of others.
    """
    tree = ast.parse(source)
    harmless = set()  # a name that is forbidden elsewhere
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):  # `save_pretrained` may call the one that it overrides
            own = [
                node for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr == function.name
            ]
            harmless |= {id(node) for node in own if ast.unparse(node.value) == "super()"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "tl.load",
            "os.environ",
        ):  # Triton's; reads settings
            harmless |= {id(node), id(node.value)}

    found = set()
    for node in ast.walk(tree):
        modules, names = [], []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            names = [alias.name for alias in node.names if alias.name == "os" and alias.asname]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level == 0:
                modules = [f"{node.module}.{name}" for name in names]
                modules += [node.module] if not SPREAD_TENSORS.issuperset(modules) else []
                names += [node.module] if node.module == "os" else []
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        for module in modules:
            allowed = module.split(".")[0] in IMPORTS or module.startswith("huggingface_hub.dataclasses")
            if not allowed or module.startswith(FORBIDDEN_MODULES) and module not in SPREAD_TENSORS:
                found.add((node.lineno, f"imports {module}"))
        if id(node) not in harmless:
            found |= {(node.lineno, f"uses {name}") for name in names if name in FORBIDDEN_NAMES}
    return [f"line {line} {what}" for line, what in sorted(found)]


def code_digest(files: dict[str, Path]) -> str:
    """
    SHA-256 of the code files, by name and content; the same as that which this prints in a folder that holds them:

        LC_ALL=C sha256sum *.py | sha256sum
    """
    names = sorted((name for name in files if name.endswith(".py")), key=str.encode)
    lines = "".join(f"{sha256(files[name])}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_commit() -> str | None:
    """The commit of this repository, marked where its code was changed since; `None` outside of a repository."""
    try:
        git = ["git", "-C", str(ROOT)]
        answer = subprocess.run(
            [*git, "rev-parse", "--show-toplevel", "HEAD"], capture_output=True, text=True, check=True
        )
        top, commit = answer.stdout.splitlines()
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", "modeling_t6"], capture_output=True
        ).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    if Path(top) != ROOT:
        return None
    return f"{commit} with changes" if changed else commit


# The model card


def cache_bytes(config: T6Config, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of cache per token: of the factors, and of K and V with h, 8 and 2 heads of the same size."""
    layers = range(config.num_hidden_layers)
    numbers = sum(layout.width for layer in layers for layout in factor_layouts(config, layer))
    rows = {"T6, this model": numbers * dtype.itemsize}
    heads = config.num_attention_heads
    for name, count in ((f"MHA, {heads} heads", heads), ("GQA, 8 KV heads", 8), ("GQA, 2 KV heads", 2)):
        if count <= heads and (count < heads or name.startswith("MHA")):
            rows[name] = 2 * len(layers) * count * config.head_dim * dtype.itemsize
    return rows


def read_results(paths: list[Path], task_type: str) -> list[EvalResult]:
    """The scores in the JSON files that lm-eval writes with `--output_path`."""
    results = []
    for path in paths:
        content = read_json(path)
        tasks, shots = content.get("results"), content.get("n-shot", {})
        if not (
            isinstance(tasks, dict) and tasks and all(isinstance(part, dict) for part in (shots, *tasks.values()))
        ):
            raise UploadError(f"{path} has no `results`: expected a file that lm-eval wrote")
        for task, scores in tasks.items():
            for key, value in scores.items():
                metric, _, choice = key.partition(",")
                if isinstance(value, (int, float)) and choice and not metric.endswith("_stderr"):
                    if not math.isfinite(value):
                        raise UploadError(f"{path}: {key} of {task} is {value}, no score for a card")
                    name = metric if choice == "none" else f"{metric} ({choice})"
                    error = scores.get(f"{metric}_stderr,{choice}")
                    results.append(
                        EvalResult(
                            task_type=task_type,
                            dataset_type=task,
                            dataset_name=str(scores.get("alias", task)).strip(" -") or task,
                            # A part of what tells results apart: without it one number of shots replaces another.
                            dataset_config=f"{shots[task]}-shot" if task in shots else None,
                            dataset_args={"num_few_shot": shots[task]} if task in shots else None,
                            metric_type=metric,
                            metric_name=name,
                            metric_value=value,
                            metric_args={"stderr": error} if isinstance(error, float) else None,
                        )
                    )
        if not results:
            raise UploadError(f"{path} holds no score")
    return results


def read_card(path: Path | None) -> ModelCard:
    try:
        text = path.read_text(encoding="utf-8") if path else ""
        card = ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}")
    except Exception as error:  # YAML's errors, and those of malformed results
        raise UploadError(f"README.md: the metadata cannot be read: {' '.join(str(error).split())}") from error
    for name in ("base_model", "datasets", "tags"):
        values = card.data.get(name) or []
        values = values if isinstance(values, list) else [values]
        if not all(isinstance(value, str) for value in values):
            raise UploadError(f"README.md: `{name}` must be a name or a list of names, got {values}")
    return card


def read_conversion(path: Path) -> dict:
    """The report of a conversion, or an empty one; raises an `UploadError` if it is none."""
    report = read_json(path) if path.is_file() else {}
    rows, numbers = report.get("perplexity") or [], ("cache_bytes_per_token", "perplexity")
    if not (
        all(isinstance(report.get(name) or "", str) for name in ("command", "source", "base_model"))
        and isinstance(report.get("versions") or {}, dict)
        and isinstance(rows, list)
        and all(isinstance(row, dict) and "model" in row for row in rows)
        and all(isinstance(row.get(name), (int, float)) for row in rows for name in numbers)
    ):
        raise UploadError(f"{path} is not what `python -m conversion` writes")
    return report


def card_metadata(old: ModelCard, auto_class: str, conversion: dict, args: argparse.Namespace) -> ModelCardData:
    """What the author's card says, completed; options go before it."""
    task = PIPELINE_TAGS[auto_class]
    data = {key: value for key, value in old.data.to_dict().items() if key not in ("model-index", "model_name")}
    base_model = args.base_model or conversion.get("base_model") or data.get("base_model")
    license_fields = license_of(args, data, base_model, bool(conversion))
    for key in ("license", "license_name", "license_link"):
        data.pop(key, None)
    data |= {"library_name": "transformers", "pipeline_tag": task, **license_fields}
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), "t6", "tensor-product-attention"]))
    data |= {"base_model": base_model} if base_model else {}
    data |= {"datasets": args.datasets} if args.datasets else {}
    results = {}
    for result in [*(old.data.eval_results or []), *read_results(args.eval_results or [], task)]:
        name = result.metric_name or result.metric_type
        results[result.task_type, result.dataset_type, result.dataset_config, name] = result
    if results:
        data |= {"model_name": args.repo_id.split("/")[-1], "eval_results": list(results.values())}
    return ModelCardData(**data)


def model_card(
    old: ModelCard,
    content: dict,
    config: T6Config,
    checkpoint: Checkpoint,
    digest: str,
    conversion: dict,
    args: argparse.Namespace,
) -> str:
    """The text of README.md: metadata, and a part of its own in what the author wrote."""
    auto_class, repo_id = auto_class_of(content), args.repo_id
    data = card_metadata(old, auto_class, conversion, args)
    results = [
        (" ".join(filter(None, (r.dataset_name, r.dataset_config))), r.metric_name, f"{r.metric_value:.4f}")
        for r in data.eval_results or []
    ]
    dtype = getattr(torch, content["dtype"])
    sizes = cache_bytes(config, dtype)
    parameters = sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())
    ranks = ["no factors (one projection)" if config.q_rank is None else config.q_rank, config.k_rank, config.v_rank]
    rows = {
        "parameters": f"{parameters:,}",
        "layers, hidden size, MLP": f"{config.num_hidden_layers}, {config.hidden_size}, {config.intermediate_size}",
        "heads, head size": f"{config.num_attention_heads}, {config.head_dim}",
        "ranks of Q, K, V": ", ".join(str(rank) for rank in ranks),
        "A factors": "learned constants" if config.noncontextual_a else "of the token",
        "sliding window": f"{config.sliding_window} tokens" if config.sliding_window else None,
        "context, vocabulary": f"{config.max_position_embeddings:,}, {config.vocab_size:,}",
        "weights": content["dtype"],
    }
    versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers", "huggingface_hub")}
    bases = [data.base_model] if isinstance(data.base_model, str) else data.base_model or []
    provenance = {
        "made from": conversion.get("source") or ", ".join(bases),
        "converted by": conversion.get("command") and f"`{conversion['command']}`",
        "converted with": ", ".join(f"{k} {v}" for k, v in (conversion.get("versions") or {}).items()),
        "code": (commit := code_commit()) and f"commit {commit} of T6 for Transformers",
        "pushed with": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    part = CARD.format(
        begin=BEGIN,
        end=END,
        paper=PAPER,
        repo_id=repo_id,
        endpoint=constants.ENDPOINT,
        auto_class=auto_class,
        tokenizer="" if args.no_tokenizer else LOAD_TOKENIZER,
        imports=auto_class if args.no_tokenizer else f"{auto_class}, AutoTokenizer",
        architecture=table(("", ""), [(name, value) for name, value in rows.items() if value]),
        cache=table(
            (f"bytes per token, {content['dtype']}", "", "beside this model"),
            [(name, f"{size:,}", f"{size / sizes['T6, this model']:.2f}x") for name, size in sizes.items()],
        ),
        digest=digest,
        results=f"\n## Evaluation\n\n{table(('task', 'metric', 'value'), results)}\n" if results else "",
        conversion=conversion_results(conversion),
        provenance=table(("", ""), [(name, value) for name, value in provenance.items() if value]),
    )
    text = old.text.strip()
    start = text.find(BEGIN)
    end = text.find(END, start)
    if 0 <= start < end:
        text = text[:start] + part + text[end + len(END) :]
    else:
        # After the author's introduction, before all else.
        section = re.search(r"^## ", text, re.MULTILINE)
        head, tail = (text[: section.start()], text[section.start() :]) if section else (text, "")
        text = f"{head.strip() or '# ' + repo_id.split('/')[-1]}\n\n{part}\n\n{tail}"
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def conversion_results(conversion: dict) -> str:
    """What the conversion cost, as it measured it on held-out text."""
    rows = conversion.get("perplexity") or []
    if not rows:
        return ""
    cells = [(row["model"], f"{row['cache_bytes_per_token']:,.0f}", f"{row['perplexity']:.4f}") for row in rows]
    text = table(("held-out text", "cache, bytes per token", "perplexity"), cells)
    return f"\n{text}\n\n![Perplexity against cache size](conversion.png)\n"


def license_of(args: argparse.Namespace, data: dict, base_model: str | None, converted: bool) -> dict[str, str]:
    """The card's fields on the license of the weights. That of a base model cannot be known here: the card points to it."""
    if args.license:
        if args.license != "other":
            return {"license": args.license}
        return {"license": "other", "license_name": "see-license-file", "license_link": "LICENSE"}
    if data.get("license"):
        return {key: data[key] for key in ("license", "license_name", "license_link") if key in data}
    if not converted and not base_model:
        return {"license": "apache-2.0"}
    if base_model:
        name = base_model if isinstance(base_model, str) else base_model[0]
        link = f"{constants.ENDPOINT}/{name}"
        return {"license": "other", "license_name": "that-of-the-base-model", "license_link": link}
    if (args.folder / "LICENSE").is_file():
        return {"license": "other", "license_name": "see-license-file", "license_link": "LICENSE"}
    raise UploadError(
        "the license of converted weights is that of their source: pass --license (as in the source's card) or --base-model"
    )


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---", *("---:" for _ in head[1:])) if len(head) > 2 else tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


LOAD_TOKENIZER = "\ntokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)"
CARD = """{begin}

A T6 model: a Llama-like decoder with [tensor product attention]({paper}).
Its queries, keys and values are products of small factors, and only the factors of keys and values are cached.

## Load it

```python
from transformers import {imports}

repo = "{repo_id}"
# The 40 digits of a commit that you have looked at: {endpoint}/{repo_id}/commits/main
revision = "..."
{tokenizer}
model = {auto_class}.from_pretrained(repo, revision=revision, trust_remote_code=True)
```

Why a revision: the code in this repository runs on your machine. A branch such as `main` can be given other code at any
time by whoever holds the account; the commit that you have read cannot. With `trust_remote_code=False` Transformers
refuses to load the model, and nothing runs; without either it asks first. The weights are safetensors, which hold
numbers only.

SHA-256 of the code files, the same for every model with the same code:

```text
{digest}
```

To compare, and to check the files that were downloaded:

```bash
hf download {repo_id} --revision REVISION --include "*.py" --local-dir code
(cd code && LC_ALL=C sha256sum *.py | sha256sum)
hf cache verify {repo_id} --revision REVISION
```

## Architecture

{architecture}

Cache, beside that of ordinary attention with the same layers, heads and head size:

{cache}
{results}
## Provenance

{provenance}
{conversion}
{end}"""


# A process that knows nothing of this package


# Loads as a stranger does. Arguments: source, revision or "", Auto class, what to do beside, result.
LOAD = """
import sys
import torch
import transformers
from safetensors.torch import save_file

source, revision, auto_class, tasks, result = sys.argv[1:]
options = {"trust_remote_code": True}
if revision:
    options |= {"revision": revision, "code_revision": revision}
config = transformers.AutoConfig.from_pretrained(source, **options)
model = getattr(transformers, auto_class).from_pretrained(source, dtype="auto", **options).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
length = min(64, config.max_position_embeddings)
ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    output = model(input_ids=ids, use_cache=False)
tensors = {name: value.contiguous() for name, value in output.items() if isinstance(value, torch.Tensor)}
if "generate" in tasks:
    prompt = ids[:1, : max(1, length - 8)]
    tensors["generated"] = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=length - prompt.shape[1] or 1
    )
if "tokenize" in tasks:
    loaded = transformers.AutoTokenizer.from_pretrained(source, **options)
    tensors["token_ids"] = torch.tensor(loaded("To be, or not to be: \\u00e9\\u6728 1234").input_ids or [-1])
save_file(tensors, result)
"""


def load_in_clean_process(
    source: str, revision: str, auto_class: str, tasks: list[str], home: Path, environment: dict[str, str]
) -> dict[str, torch.Tensor]:
    """
    What a process computes that loads the model by the Auto classes, with nothing in its caches but those in `home`.

    Returns:
        The model's outputs for random tokens; with the tasks "generate" and "tokenize", a greedy continuation and the
        token ids of a sentence.
    """
    result = home / "result.safetensors"
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    }
    environment = inherited | {
        "HF_HOME": str(home / "home"),
        "HF_HUB_CACHE": str(home / "cache"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    } | environment  # fmt: skip
    arguments = [source, revision, auto_class, ",".join(tasks), str(result)]
    process = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], cwd=home, env=environment, capture_output=True, text=True
    )
    if process.returncode != 0:
        lines = [line for line in process.stderr.strip().splitlines() if line.strip()] or ["it ended without a word"]
        raise UploadError(f"a clean process cannot load {revision and 'the repository' or 'the folder'}: {lines[-1]}")
    tensors = load_file(result)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    for name in expected:
        if name not in found or not torch.equal(found[name], expected[name]):
            raise UploadError(f"the model that was downloaded is not the one in the folder: its {name} differ")


# The Hub


def connection_errors() -> tuple[type[Exception], ...]:
    """Of the HTTP library that this version of huggingface_hub uses."""
    modules = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    return tuple(module.TransportError for module in modules if module is not None)


def cause(error: BaseException) -> BaseException:
    """The first HTTP or connection error in a chain of exceptions, else the exception itself."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, (HfHubHTTPError, OfflineModeIsEnabled, *connection_errors())):
            return link
        link = link.__cause__ or link.__context__
    return error


def explain(error: BaseException, repo_id: str) -> str:
    """One line on why the Hub did not do what it was asked."""
    outer, error = error, cause(error)
    endpoint = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: nothing can be uploaded"
    if isinstance(error, connection_errors()):
        return f"no connection to {endpoint}, or it broke off: {error or type(error).__name__}"
    if not isinstance(error, HfHubHTTPError):
        return " ".join(str(error).split()) or type(error).__name__
    status = error.response.status_code
    if status == 400 and isinstance(outer, ValueError):  # huggingface_hub has put it into words
        return " ".join(str(outer).split())
    server = f" ({error.server_message})" if getattr(error, "server_message", None) else ""
    if isinstance(error, RevisionNotFoundError):
        return f"404: {repo_id} has no such revision{server}"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"404: {repo_id} has no such file{server}"
    if isinstance(error, RepositoryNotFoundError) and status == 404:
        return f"404: there is no {repo_id} at {endpoint}, or the token may not see it"
    reasons = {
        401: f"401: {endpoint} does not accept the token",
        403: f"403: the token may not do this with {repo_id}",
        404: f"404: {endpoint} has no such thing",
        409: f"409: {repo_id} was changed by another at the same time: run again",
        412: f"412: {repo_id} was changed by another at the same time: run again",
        429: f"429: {endpoint} wants fewer requests",
    }
    return reasons.get(status, f"{status}: {endpoint} fails") + server


def retry_after(error: BaseException) -> float | None:
    """Seconds to wait before the same request may succeed; `None` if it never will."""
    error = cause(error)
    if isinstance(error, connection_errors()):
        return 0
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in (429, 500, 502, 503, 504):
        return None
    try:
        return float(error.response.headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 60


def patiently(
    what: str, repo_id: str, function: Callable[[], Result], attempts: int = 5, longest: float = 300
) -> Result:
    """
    The result of `function`, tried again where the Hub is busy or the connection breaks.

    Raises:
        UploadError: one line, after the last attempt or for an error that stays.
    """
    for attempt in range(attempts):
        try:
            return function()
        except Exception as error:  # the HTTP library's, Xet's, or huggingface_hub's own
            wait = retry_after(error)
            if wait is None or wait > longest or attempt == attempts - 1:
                raise UploadError(f"{what}: {explain(error, repo_id)}") from error
            wait = max(wait, 2**attempt)
            print(f"{what}: {explain(error, repo_id)}; again in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError


def remote_files(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def same_file(path: Path, entry: RepoFile | None) -> bool:
    """Whether the Hub's file is this one, by its hash."""
    if entry is None or entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == sha256(path)
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == entry.blob_id


def sign_in(args: argparse.Namespace) -> HfApi:
    """The client, with a token that the Hub knows."""
    token = args.token or get_token()
    if not token:
        raise UploadError("there is no token: pass --token, set HF_TOKEN, or run `hf auth login`")
    if not re.fullmatch(r"[!-~]+", token):  # the HTTP library would repeat it in its error
        raise UploadError("the token has blanks or other characters that no token has")
    api = HfApi(token=token, library_name="t6-transformers")
    user = patiently("signing in", args.repo_id, api.whoami)
    print(f"signed in as {user['name']} at {constants.ENDPOINT}")
    return api


def remote_texts(api: HfApi, args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """README.md and .gitattributes of the repository, those that are there."""

    def fetch(name: str, revision: str | None) -> Path | None:
        try:
            return Path(hf_hub_download(args.repo_id, name, revision=revision, cache_dir=folder, token=api.token))
        except RevisionNotFoundError:
            return fetch(name, None) if revision else None  # a new branch starts from main
        except (RepositoryNotFoundError, RemoteEntryNotFoundError):
            return None

    what = f"looking at {args.repo_id}"
    found = {
        name: patiently(what, args.repo_id, lambda name=name: fetch(name, args.revision), attempts=2)
        for name in ("README.md", ".gitattributes")
    }
    return {name: path for name, path in found.items() if path is not None}


def find_or_create(api: HfApi, args: argparse.Namespace) -> str:
    """Makes the repository and the branch where they are missing; returns the commit at the head of the branch."""
    repo_id, branch = args.repo_id, args.revision or "main"
    if not args.create_pr and not args.code_only:
        patiently(
            f"creating {repo_id}",
            repo_id,
            lambda: api.create_repo(repo_id, private=True if args.private else None, exist_ok=True),
        )
    info = patiently(f"looking at {repo_id}", repo_id, lambda: api.model_info(repo_id))
    if args.private and not info.private:
        raise UploadError(f"{repo_id} exists and is public: --private makes a new repository")
    if branch == "main" or branch.startswith("refs/"):
        return patiently(f"looking at {branch}", repo_id, lambda: api.model_info(repo_id, revision=branch)).sha
    tags = patiently("listing tags", repo_id, lambda: api.list_repo_refs(repo_id)).tags
    if branch in {ref.name for ref in tags}:
        raise UploadError(f"{branch} is a tag of {repo_id}: --revision must be a branch")
    patiently(
        f"creating the branch {branch}", repo_id, lambda: api.create_branch(repo_id, branch=branch, exist_ok=True)
    )
    branches = patiently("listing branches", repo_id, lambda: api.list_repo_refs(repo_id)).branches
    return next(ref.target_commit for ref in branches if ref.name == branch)


def push(api: HfApi, args: argparse.Namespace, files: dict[str, Path], head: str) -> tuple[str, str | None]:
    """
    Uploads in one commit on top of `head`; until that commit is made, the repository is what it was.

    Returns:
        The commit, and the address of the pull request if there is one.
    """
    repo_id = args.repo_id
    remote = patiently(f"listing {repo_id}", repo_id, lambda: remote_files(api, repo_id, head))
    if args.code_only:
        weights = {name: path for name, path in files.items() if matches(name, WEIGHTS)}
        others = {name for name, path in weights.items() if not same_file(path, remote.get(name))}
        others |= {name for name in remote if matches(name, WEIGHTS) and name not in weights}
        if others:
            raise UploadError(
                f"--code-only: {repo_id} does not hold the weights of {args.folder}: {', '.join(sorted(others))} differ"
            )
        files = {name: path for name, path in files.items() if name not in weights}
    replaced = ("*.py",) if args.code_only else REPLACED
    stale = [name for name in remote if name not in files and matches(name, replaced)]
    if stale:
        print(f"removing from {repo_id}: {', '.join(stale)}")
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
    revision = args.revision or "main"
    options = {"revision": revision, "create_pr": args.create_pr}
    message = args.commit_message or f"{'Code of a' if args.code_only else 'A'} T6 model, by hub_upload.py"

    def commit() -> tuple[str, str | None]:
        try:
            # Has the Hub check the card, uploads what it does not have yet, and makes the commit.
            info = api.create_commit(repo_id, operations, commit_message=message, parent_commit=head, **options)
        except HfHubHTTPError as error:
            # The commit may be ours, made by a request whose answer was lost.
            if error.response.status_code in (409, 412) and not args.create_pr:
                sha = api.model_info(repo_id, revision=revision).sha
                now = remote_files(api, repo_id, sha)
                if all(same_file(path, now.get(name)) for name, path in files.items()) and not set(stale) & set(now):
                    return sha, None
            raise
        return info.oid, info.pr_url

    # Asked twice, a pull request would be opened twice.
    return patiently("uploading", repo_id, commit, attempts=1 if args.create_pr else 5)


def download(api: HfApi, repo_id: str, commit: str, files: dict[str, Path], cache: Path) -> None:
    """Downloads `files` at a commit into an empty cache, and compares them byte by byte, by their hashes."""
    options = {"revision": commit, "cache_dir": cache, "token": api.token}
    folder = Path(
        patiently(
            "downloading",
            repo_id,
            lambda: snapshot_download(repo_id, allow_patterns=list(files), **options),
            attempts=2,
        )
    )
    for name, path in files.items():
        if sha256(folder / name) != (expected := sha256(path)):
            print(f"{name} arrived damaged: downloading it again", file=sys.stderr)
            patiently(
                "downloading", repo_id, lambda n=name: hf_hub_download(repo_id, n, force_download=True, **options), 2
            )
            if (found := sha256(folder / name)) != expected:
                raise UploadError(f"{name} arrives damaged at each download: SHA-256 {found}, uploaded was {expected}")


# All of it


def check_folder(args: argparse.Namespace) -> tuple[dict[str, Path], dict, T6Config, Checkpoint]:
    """The files of MODEL_DIR by name, the completed content of config.json, and what configuration and weights say."""
    files = collect(args.folder)
    content, config = check_config(args.folder)
    checkpoint = Checkpoint(args.folder)
    # Transformers prefers model.safetensors to an index.
    loaded = {path.name for path in checkpoint.files} | ({INDEX} if "model.safetensors" not in files else set())
    if extra := [name for name in files if matches(name, WEIGHTS) and name not in loaded]:
        raise UploadError(f"{args.folder} holds weights that would not be loaded: {', '.join(extra)}")
    check_weights(checkpoint, content, config)
    if not args.no_tokenizer:
        check_tokenizer(args.folder, files, config)
    if "generation_config.json" in files:
        try:
            GenerationConfig.from_pretrained(args.folder).validate()
        except (OSError, ValueError, TypeError) as error:
            raise UploadError(f"generation_config.json: {' '.join(str(error).split())}") from error
    read_card(files.get("README.md"))
    read_conversion(args.folder / "conversion.json")
    return files, content, config, checkpoint


def complete(
    args: argparse.Namespace,
    files: dict[str, Path],
    content: dict,
    config: T6Config,
    checkpoint: Checkpoint,
    remote: dict[str, Path],
    folder: Path,
) -> tuple[dict[str, Path], str]:
    """
    Makes a whole T6 folder of `files` in `folder`; those that are taken as they are, are not copied.

    Args:
        remote: README.md and .gitattributes of the repository, if it has them.

    Returns:
        The files by name, and the digest of the code.
    """
    code = code_files()
    for name, path in code.items():
        if problems := unsafe_code(path.read_text(encoding="utf-8")):
            raise UploadError(f"modeling_t6/{name} is not safe to push: {'; '.join(problems)}")
        if name in files and files[name].read_bytes() != path.read_bytes():
            print(f"{name}: the one in {args.folder} is replaced by this package's")
    files = files | code
    digest = code_digest(files)

    def write(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8")
        files[name] = folder / name

    write("config.json", json.dumps(content, indent=2, sort_keys=True) + "\n")
    if "generation_config.json" not in files and content["architectures"] == ["T6ForCausalLM"]:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        files["generation_config.json"] = folder / "generation_config.json"
    if args.max_shard_size and any(file.stat().st_size > args.max_shard_size for file in checkpoint.files):
        files = {name: path for name, path in files.items() if not matches(name, WEIGHTS)}
        split_weights(checkpoint, folder, args.max_shard_size)
        files |= {path.name: path for path in folder.iterdir() if matches(path.name, WEIGHTS)}
    conversion = read_conversion(args.folder / "conversion.json")
    # A card that was edited on the Hub is kept where the folder has none.
    first, second = (remote, files) if args.code_only else (files, remote)
    old_card = read_card(first.get("README.md") or second.get("README.md"))
    card = model_card(old_card, content, config, checkpoint, digest, conversion, args)
    write("README.md", card)
    # The license of this code, which is not always that of the weights.
    is_apache = ModelCard(card).data.license == "apache-2.0"
    if "LICENSE" not in files or not is_apache:
        files["LICENSE" if is_apache and "LICENSE" not in files else "LICENSE-CODE"] = ROOT / "LICENSE"
    # The Hub's lines stay: by them, it keeps the other files that it holds.
    texts = [
        known[".gitattributes"].read_text(encoding="utf-8") for known in (remote, files) if ".gitattributes" in known
    ]
    lines = "\n".join([*texts, GITATTRIBUTES]).splitlines()
    write(".gitattributes", "\n".join(dict.fromkeys(line for line in lines if line.strip())) + "\n")
    for name, path in files.items():
        if path != folder / name:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(path.resolve())
    return dict(sorted(files.items())), digest


def upload(args: argparse.Namespace) -> None:
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        raise UploadError(f"{args.repo_id} is no name of a repository: {' '.join(str(error).split())}") from error
    if args.repo_id.count("/") != 1:
        raise UploadError(f"{args.repo_id} is no name of a repository: expected someone/model")
    with tempfile.TemporaryDirectory(prefix="t6-upload-") as temporary:
        home, folder = Path(temporary), Path(temporary) / "model"
        for name in ("model", "before", "after"):
            (home / name).mkdir()
        files, content, config, checkpoint = check_folder(args)
        api, remote = None, {}
        if not args.dry_run:
            api = sign_in(args)
            remote = remote_texts(api, args, home / "texts")
        files, digest = complete(args, files, content, config, checkpoint, remote, folder)
        auto_class = auto_class_of(content)
        # With --code-only, tokenizer and generation config are the repository's own.
        tasks = ["generate"] if auto_class == "AutoModelForCausalLM" and not args.code_only else []
        tasks += [] if args.no_tokenizer or args.code_only else ["tokenize"]
        load = {"auto_class": auto_class, "tasks": tasks}
        size = sum(path.stat().st_size for name, path in files.items() if matches(name, WEIGHTS))
        fits = size < 0.8 * available_memory()
        expected = {}
        if fits:
            environment = {"HF_HUB_OFFLINE": "1"}
            expected = load_in_clean_process(str(folder), "", **load, home=home / "before", environment=environment)
            print(f"{args.folder} is complete, and a clean process loads it\n")
        else:
            print(f"{args.folder} is complete; it does not fit into the memory of this machine, and was not loaded\n")
        if args.code_only:
            files = {
                n: path
                for n, path in files.items()
                if n.endswith(".py") or matches(n, (*WEIGHTS, "README.md", "config.json"))
            }
        # With --code-only the weights are compared with the repository's, not pushed.
        sizes = {n: p.stat().st_size for n, p in files.items() if not (args.code_only and matches(n, WEIGHTS))}
        for name, size in sizes.items():
            print(f"{size:>15,}  {name}")
        print(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files")
        print(f"\nSHA-256 of the code files: {digest}\n")
        if args.dry_run:
            print(files["README.md"].read_text(encoding="utf-8"))
            return
        commit, pull_request = push(api, args, files, find_or_create(api, args))
        print(f"commit {commit}: {pull_request or f'{constants.ENDPOINT}/{args.repo_id}/tree/{commit}'}")
        try:
            download(api, args.repo_id, commit, files, home / "after" / "cache")
            if fits:
                environment = {"HF_TOKEN": api.token}
                found = load_in_clean_process(
                    args.repo_id, commit, **load, home=home / "after", environment=environment
                )
                compare(found, expected)
        except UploadError as error:
            raise UploadError(f"{error} (commit {commit} is on the Hub, and could not be verified)") from error
        same = "every file and every logit is the same" if fits else "every file is the same"
        print(f"downloaded into a clean cache{' and loaded by a clean process' if fits else ''}: {same}\n")
        print(f'{auto_class}.from_pretrained("{args.repo_id}", revision="{commit}", trust_remote_code=True)')


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    try:
        upload(args)
    except (UploadError, ConversionError, OSError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
