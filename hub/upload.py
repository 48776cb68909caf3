"""The steps of an upload: check the folder, complete a copy, push it in one commit, download it again and compare."""

import argparse
import json
import sys
from pathlib import Path

import transformers
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import is_accelerate_available

from .card import model_card, read_card, read_conversion
from .check import CheckedFolder, check_folder, check_numbers
from .code import ROOT, code_digest, code_files, unsafe_code
from .folder import WEIGHTS, UploadError
from .remote import download, find_or_create, look, push, remote_texts, sign_in
from .shared import (
    Checkpoint,
    ConversionError,
    ShardWriter,
    Stopped,
    available_memory,
    hide_bars_of_transformers,
    matches,
    one_line,
    stoppable,
    temporary_folder,
)
from .verify import compare, load_in_clean_process


GITATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.model filter=lfs diff=lfs merge=lfs -text\n"
NO_NUMBERS = " without its numbers, for which this machine has not the memory"


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UploadError(f"{path.name} is not text in UTF-8: {one_line(error)}") from error


def complete(
    args: argparse.Namespace, checked: CheckedFolder, remote: dict[str, Path], folder: Path
) -> tuple[dict[str, Path], str]:
    """
    Makes in `folder` what a T6 folder has beside the weights; the files that are taken as they are, are not copied.

    Args:
        remote: README.md and .gitattributes of the repository, if it has them.

    Returns:
        The files by name, and the digest of the code.
    """
    files, code = checked.files, code_files()
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

    write("config.json", json.dumps(checked.content, indent=2, sort_keys=True) + "\n")
    if "generation_config.json" not in files and checked.content["architectures"] == ["T6ForCausalLM"]:
        GenerationConfig.from_model_config(checked.config).save_pretrained(folder)
        files["generation_config.json"] = folder / "generation_config.json"
    # A card that was edited on the Hub is kept where the folder has none.
    first, second = (remote, files) if args.code_only else (files, remote)
    old_card = read_card(first.get("README.md") or second.get("README.md"))
    card = model_card(old_card, checked, digest, read_conversion(args.folder / "conversion.json"), args)
    write("README.md", card)
    # The license of this code, which is not always that of the weights.
    is_apache = ModelCard(card).data.license == "apache-2.0"
    if "LICENSE" not in files or not is_apache:
        files["LICENSE" if is_apache and "LICENSE" not in files else "LICENSE-CODE"] = ROOT / "LICENSE"
    # The Hub's lines stay: by them, it keeps the other files that it holds.
    texts = [read_text(known[".gitattributes"]) for known in (remote, files) if ".gitattributes" in known]
    lines = "\n".join([*texts, GITATTRIBUTES]).splitlines()
    write(".gitattributes", "\n".join(dict.fromkeys(line for line in lines if line.strip())) + "\n")
    return files, digest


def split_weights(checkpoint: Checkpoint, folder: Path, max_shard_size: int) -> None:
    """Writes the weights into `folder` in shards of at most `max_shard_size` bytes, one tensor in memory at a time."""
    tensors = [(name, info.shape, info.dtype) for name, info in checkpoint.tensors.items()]
    with ShardWriter(folder, tensors, max_shard_size) as writer:
        for name, tensor in tqdm(checkpoint, total=len(tensors), unit="tensor", desc="splitting weights"):
            writer.write(name, tensor)
        writer.close()


def add_weights(
    files: dict[str, Path], checkpoint: Checkpoint, folder: Path, max_shard_size: int | None
) -> dict[str, Path]:
    """All files of the T6 folder `folder`, sorted by name: the weights, split where they are to be, are put there last."""
    if max_shard_size and any(file.stat().st_size > max_shard_size for file in checkpoint.files):
        files = {name: path for name, path in files.items() if not matches(name, WEIGHTS)}
        split_weights(checkpoint, folder, max_shard_size)
        files |= {path.name: path for path in folder.iterdir() if matches(path.name, WEIGHTS)}
    for name, path in files.items():
        if path != folder / name:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(path.resolve())
    return dict(sorted(files.items()))


def check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UploadError(f"{repo_id} is no name of a repository: {one_line(error)}") from error
    if repo_id.count("/") != 1:
        raise UploadError(f"{repo_id} is no name of a repository: expected someone/model")


def what_readers_load(args: argparse.Namespace, checked: CheckedFolder, fits: bool) -> dict:
    """What `load_in_clean_process` is to load and do, before the upload and after it."""
    # With --code-only, tokenizer and generation config are the repository's own.
    tasks = ["generate"] if checked.auto_class == "AutoModelForCausalLM" and not args.code_only else []
    tasks += [] if args.no_tokenizer or args.code_only else ["tokenize"]
    tasks += [] if fits else ["meta"]
    return {"auto_class": checked.auto_class, "tasks": tasks}


def files_of_code(files: dict[str, Path]) -> dict[str, Path]:
    """Those that `--code-only` pushes, and the weights, which it compares with the repository's."""
    kept = (*WEIGHTS, "README.md", "config.json")
    return {name: path for name, path in files.items() if name.endswith(".py") or matches(name, kept)}


def print_files(files: dict[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    for name, size in sizes.items():
        print(f"{size:>15,}  {name}")
    print(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files")


def upload(args: argparse.Namespace) -> None:
    check_repo_id(args.repo_id)
    with temporary_folder("t6-upload-") as home:
        folder = home / "model"
        for name in ("model", "before", "after"):
            (home / name).mkdir()
        # All that takes no time comes before the weights are read.
        checked = check_folder(args.folder, needs_tokenizer=not args.no_tokenizer)
        fits = checked.checkpoint.nbytes < 0.8 * available_memory()
        if not fits and not is_accelerate_available():
            raise UploadError(
                f"{args.folder} does not fit into the memory of this machine, and to load it without its numbers "
                "Transformers needs accelerate: pip install accelerate"
            )
        api, remote = None, {}
        if not args.dry_run:
            api = sign_in(args)
            look(api, args, may_be_missing=True)
            remote = remote_texts(api, args, home / "texts")
        files, digest = complete(args, checked, remote, folder)
        check_numbers(checked.checkpoint)
        files = add_weights(files, checked.checkpoint, folder, args.max_shard_size)
        load = what_readers_load(args, checked, fits)
        expected = load_in_clean_process(
            str(folder), "", **load, home=home / "before", environment={"HF_HUB_OFFLINE": "1"}
        )
        print(f"{args.folder} is complete, and a clean process loads it{'' if fits else NO_NUMBERS}\n")
        if args.code_only:
            files = files_of_code(files)
        print_files({n: path for n, path in files.items() if not (args.code_only and matches(n, WEIGHTS))})
        print(f"\nSHA-256 of the code files: {digest}\n")
        if args.dry_run:
            print(files["README.md"].read_text(encoding="utf-8"))
            return
        commit, pull_request = push(api, args, files, find_or_create(api, args))
        print(f"commit {commit}: {pull_request or f'{constants.ENDPOINT}/{args.repo_id}/tree/{commit}'}")
        try:
            download(api, args.repo_id, commit, files, home / "after" / "cache")
            found = load_in_clean_process(
                args.repo_id, commit, **load, home=home / "after", environment={"HF_TOKEN": api.token}
            )
            compare(found, expected)
        except UploadError as error:
            raise UploadError(f"{error} (commit {commit} is on the Hub, and could not be verified)") from error
        same = "every file and every logit is the same" if fits else "every file is the same"
        print(f"downloaded into a clean cache and loaded by a clean process{'' if fits else NO_NUMBERS}: {same}\n")
        print(f'{checked.auto_class}.from_pretrained("{args.repo_id}", revision="{commit}", trust_remote_code=True)')


def run(args: argparse.Namespace) -> int:
    """Uploads, with one line for what stands in the way; returns the exit code."""
    transformers.logging.set_verbosity_error()
    hide_bars_of_transformers()
    try:
        with stoppable():
            upload(args)
    except Stopped as error:
        print(f"{error}: the same command goes on where this one stopped", file=sys.stderr)
        return error.code
    except (UploadError, ConversionError, OSError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1
    return 0
