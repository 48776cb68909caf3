"""SRC: where it lies, and what of it is not as it must be that shows before a weight is read."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .files.companions import COMPANIONS
from .files.errors import ConversionError, reason
from .files.folders import read_json
from .sources.gguf import is_gguf


WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
DESCRIPTION = ("config.json", "adapter_config.json", *COMPANIONS)
# What of a folder is read, or copied.
READ = (*WEIGHTS, *DESCRIPTION, "ckpt.pt", "pytorch_model.bin")
HF, OFFICIAL = "python -m conversion hf", "python -m conversion official"


def local_folder(source: str, revision: str | None) -> Path:
    """
    The folder or GGUF file `source`, or a folder with the repository of that name on the Hub, as yet without weights.

    Raises:
        ConversionError: if it is neither, with what it is instead.
    """
    if os.path.isdir(source) or is_gguf(Path(source)):
        if revision is not None:
            raise ConversionError(f"--revision {revision} is of a source on the Hub, and {source} is here")
        return Path(source)
    if os.path.lexists(source):
        raise ConversionError(of_file(Path(source)))
    if looks_like_a_path(source):
        raise ConversionError(f"{source}: there is no such folder")
    return from_hub(source, revision, DESCRIPTION)


def from_hub(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder in the Hub's cache with the files of a repository that have a name of one of `patterns`."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ConversionError(f"{name} is no folder here, and no name on the Hub (someone/model)") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"{name} is no folder here, and could not be had from the Hub: {reason(error)}"
        ) from error


def looks_like_a_path(source: str) -> bool:
    """Whether no name on the Hub is written so."""
    parts = source.split("/")
    return (
        parts[0] in (".", "..", "~") or "" in parts or len(parts) > 2 or "\\" in source
        or source.lower().endswith((".gguf", ".safetensors", ".bin", ".pt"))
    )  # fmt: skip


def of_file(path: Path) -> str:
    """What to do with a file that was given for a folder."""
    if not path.exists():
        return f"{path} is a link to {path.resolve()}, which is not there"
    if path.suffix in (".pt", ".pth", ".ckpt"):
        return f"{path} is a file: expected a folder; `{OFFICIAL}` reads a ckpt.pt of the research code"
    return f"{path} is a file: expected the folder that it is in, with config.json, or a name on the Hub"


def read_config(source: Path) -> dict:
    """
    The content of config.json.

    Raises:
        ConversionError: if there is none, or if it is one of the research code, with what to do.
    """
    path = source / "config.json"
    if not path.exists():
        if (source / "ckpt.pt").exists():
            raise ConversionError(f"{source} has no config.json but a ckpt.pt: `{OFFICIAL}` reads those")
        if ggufs := sorted(source.glob("*.gguf")):
            raise ConversionError(f"{source} has no config.json but GGUF: `{HF} {ggufs[0]}` reads one such file")
        if (source / "adapter_config.json").exists():
            raise ConversionError(f"{source} is an adapter alone: merge it into its model, and convert that")
        raise ConversionError(f"{source} has no config.json: expected a folder as `save_pretrained` writes it")
    content = read_json(path)
    if {"rank", "n_embd", "n_layer"} <= set(content):
        raise ConversionError(f"{source} is a model of the research code: `{OFFICIAL}` reads those")
    return content
