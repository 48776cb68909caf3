"""SRC: where it lies, what is checked before a weight is read, and how the result is compared with it."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig

from . import verify
from .files.checkpoints import Checkpoint, count_numbers
from .files.companions import COMPANIONS, check_json, generation_config, without_byte_order_marks
from .files.errors import ConversionError, reason
from .files.folders import read_json
from .files.links import check_files
from .files.names import matching_files
from .files.tokenizer import check_tokenizer
from .layerwise import compare_layers
from .sources import families, official
from .sources.fields import check_fields
from .sources.gguf import GgufFile, is_gguf
from .verify import Comparison


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
        raise ConversionError(what_to_do_with_a_file(Path(source)))
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


def what_to_do_with_a_file(path: Path) -> str:
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


class TransformersSource:
    """
    A model of Transformers. Made with its configuration alone: what cannot be converted is refused before weights are looked for.

    Args:
        path: the folder or GGUF file that `local_folder` gives.
        temporary: a folder for what is not to be kept.

    Attributes:
        folder: what is read as the model: `path`, or a copy of what Transformers does not read as it lies.
        companions: the folder of the tokenizer and what else belongs to the model, from `check_companions` on.
        checkpoint: the weights, from `load_weights` on.

    Raises:
        ConversionError: naming what of the source is not as it must be.
    """

    def __init__(self, path: Path, temporary: Path):
        self.path, self.temporary = path, temporary
        self.gguf, self.folder, described = None, path, path / "config.json"
        if path.is_file():
            self.gguf, self.folder, described = GgufFile(path), temporary / "source", path
            for note in self.gguf.write_config(self.folder):
                print("note:", note)
        content = read_config(self.folder)
        check_files(self.folder, READ)
        check_json(self.folder)
        check_fields(content, str(described))
        if (settings := self.folder / "generation_config.json").exists():
            check_fields(read_json(settings), str(settings))
        self.folder = without_byte_order_marks(self.folder, READ, temporary)
        try:
            self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            self.plan = families.make_plan(self.config)
        except ConversionError:
            raise
        except Exception as error:  # whatever a configuration's validation raises
            raise ConversionError(f"{described}: {reason(error)}") from error
        self.model_type = self.config.model_type

    def check_companions(self, needs_tokenizer: bool) -> None:
        generation_config(self.folder)
        self.companions = self.folder
        if self.gguf is not None:
            self.companions = self.temporary / "tokenizer"
            self.gguf.write_tokenizer(self.companions)
        check_tokenizer(self.companions, needs_tokenizer)

    def load_weights(self, hub_name: str | None, max_shard_size: int) -> None:
        """
        Args:
            hub_name: of a source on the Hub, whose weights are downloaded now.
            max_shard_size: of the shards into which the weights of a GGUF file are dequantised.
        """
        if hub_name is not None:
            from_hub(hub_name, self.path.name, READ)  # the same commit
            check_files(self.path, READ)
            self.folder = self.companions = without_byte_order_marks(self.path, READ, self.temporary)
        if self.gguf is not None:
            self.gguf.write_weights(self.folder, max_shard_size)
        self.checkpoint = Checkpoint(self.folder)
        self.plan = families.plan_as_loaded(self.config, self.checkpoint)

    @property
    def files(self) -> list[Path]:
        """The files of which the result is made: those of the weights that are loaded, and what describes the model."""
        if self.gguf is not None:
            return [self.gguf.path]
        return sorted({*matching_files(self.folder, DESCRIPTION), *self.checkpoint.files})

    def compare(self, result: Path, rounded: bool) -> Comparison:
        """Runs source and result side by side; see `verify`."""
        numbers, cache_numbers = count_numbers(self.checkpoint), verify.cache_numbers(self.plan.config)
        if verify.fits_in_memory(numbers, cache_numbers):
            return verify.compare_with_transformers(self.folder, result, rounded)
        print("source and result do not fit into memory together: they are compared layer by layer")
        return compare_layers(self.folder, self.config, self.checkpoint, result, rounded)


class ResearchSource:
    """
    A checkpoint of the paper's research code, with the attributes of `TransformersSource` that writing it needs.

    Args:
        path: its folder, or a `ckpt.pt`.
    """

    model_type = "t6"

    def __init__(self, path: Path, temporary: Path):
        if is_gguf(path):
            raise ConversionError(f"{path} is GGUF: `{HF} {path}` reads those")
        if path.is_dir():
            check_files(path, READ)
            check_json(path)
        self.arguments, self.checkpoint = official.load(path)
        self.plan = official.make_plan(self.arguments, self.checkpoint)
        self.companions = without_byte_order_marks(path, READ, temporary) if path.is_dir() else path

    def compare(self, result: Path, rounded: bool) -> Comparison:
        if not verify.fits_in_memory(count_numbers(self.checkpoint)):
            raise ConversionError(
                "source and result cannot be compared: they do not fit into memory together; --no-verify writes a model "
                "that nothing has verified"
            )
        return verify.compare_with_research_code(self.arguments, self.checkpoint, result, rounded)
