"""Whether configuration, weights and tokenizer of a folder belong together, and are whole."""

from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

import modeling_t6
from modeling_t6 import T6Config
from modeling_t6.modeling_t6 import AUTO_MAP

from .folder import TOKENIZER_FILES, UploadError, listed
from .shared import Checkpoint, read_json


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
