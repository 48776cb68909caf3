"""Whether configuration, weights and tokenizer of a folder belong together, and are whole."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import TemplateSyntaxError
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

import modeling_t6
from modeling_t6 import T6Config
from modeling_t6.modeling_t6 import AUTO_MAP

from .folder import CHAT_TEMPLATES, TOKENIZER_FILES, WEIGHTS, UploadError, collect
from .shared import INDEX, Checkpoint, is_error, listed, matches, one_line, read_json


# Fields by which `from_pretrained` or a pipeline would read other files than those that are checked, or other numbers.
REDIRECTIONS = ("transformers_weights", "configuration_files", "custom_pipelines", "quantization_config")
MOST_LABELS = 10**6  # Transformers makes a name for each


class CheckedFolder(NamedTuple):
    """
    What is known of a folder before its numbers are read.

    Attributes:
        files: by name.
        content: of config.json, completed.
        config: as Transformers reads it.
        checkpoint: names, shapes and dtypes of the tensors.
        has_chat_template: whether the tokenizer has one that needs no name.
    """

    files: dict[str, Path]
    content: dict
    config: T6Config
    checkpoint: Checkpoint
    has_chat_template: bool

    @property
    def auto_class(self) -> str:
        """The Auto class that loads what config.json describes."""
        name = self.content["architectures"][0]
        return next(auto_class for auto_class, reference in AUTO_MAP.items() if reference.endswith(f".{name}"))


def check_folder(folder: Path, needs_tokenizer: bool) -> CheckedFolder:
    """
    All checks but that of the numbers: only headers of the weights are read.

    Raises:
        UploadError, ConversionError: naming the file, and the field or tensor, that is not what it must be.
    """
    files = collect(folder)
    for name in files:
        if name.endswith(".json"):
            check_json(folder / name)
    checkpoint = Checkpoint(folder)
    # Transformers prefers model.safetensors to an index.
    loaded = {path.name for path in checkpoint.files} | ({INDEX} if "model.safetensors" not in files else set())
    if extra := [name for name in files if matches(name, WEIGHTS) and name not in loaded]:
        raise UploadError(f"{folder} holds weights that would not be loaded: {', '.join(extra)}")
    content, config = check_config(folder, checkpoint)
    check_tensors(checkpoint, content, config)
    tokenizer = check_tokenizer(folder, files, config) if needs_tokenizer else None
    if "generation_config.json" in files:
        try:
            GenerationConfig.from_pretrained(folder).validate()
        except Exception as error:  # whatever the validation of its fields raises
            raise UploadError(f"generation_config.json: {one_line(error)}") from error
    templates = getattr(tokenizer, "chat_template", None) or {}
    has_chat_template = isinstance(templates, str) or "default" in templates
    return CheckedFolder(files, content, config, checkpoint, has_chat_template)


def check_json(path: Path) -> None:
    """Raises an `UploadError` or `ConversionError` if a file is not a JSON object, as Transformers reads it."""
    with path.open("rb") as file:
        if file.read(3) == b"\xef\xbb\xbf":
            raise UploadError(
                f"{path} begins with a byte order mark, which Transformers does not read: save it without"
            )
    try:
        read_json(path)
    except ValueError as error:  # an integer of thousands of digits
        raise UploadError(f"{path} cannot be read as JSON: {one_line(error)}") from error


def check_config(folder: Path, checkpoint: Checkpoint) -> tuple[dict, T6Config]:
    """`config.json` completed, and as Transformers reads it."""
    content = read_json(folder / "config.json")
    if content.get("model_type") != "t6":
        raise UploadError(f"config.json: `model_type` must be 't6', got {content.get('model_type')!r}")
    check_fields(content, checkpoint)
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
    known = [reference.rpartition(".")[2] for auto_class, reference in AUTO_MAP.items() if auto_class != "AutoConfig"]
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in known:
        raise UploadError(
            f"config.json: `architectures` must be one of {', '.join(sorted(known))}, got {architectures}"
        )
    try:
        config = T6Config.from_pretrained(folder)
    except Exception as error:  # whatever the validation of a configuration raises
        raise UploadError(f"config.json: {one_line(error)}") from error
    content |= {"architectures": architectures, "auto_map": dict(AUTO_MAP)}
    return content, config


def check_fields(content: dict, checkpoint: Checkpoint) -> None:
    """Refuses what a configuration takes without a word, or would make endless objects of."""
    for field in REDIRECTIONS:
        if content.get(field) is not None:
            raise UploadError(
                f"config.json: `{field}` must not be there, got {str(content[field])[:80]}: by it other files or numbers "
                "would be loaded than those that are checked here"
            )
    layers = {match[1] for name in checkpoint.tensors if (match := re.search(r"\blayers\.(\d+)\.", name))}
    number = content.get("num_hidden_layers")
    if isinstance(number, int) and number > len(layers):
        raise UploadError(f"config.json: `num_hidden_layers` is {number}, the weights hold {len(layers)} layers")
    labels = content.get("num_labels")
    if isinstance(labels, int) and labels > MOST_LABELS:
        raise UploadError(f"config.json: `num_labels` is {labels}: expected at most {MOST_LABELS}")
    for field in ("dtype", "torch_dtype"):
        if (value := content.get(field)) is not None:
            dtype = getattr(torch, value, None) if isinstance(value, str) else None
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise UploadError(f"config.json: `{field}` must be one such as 'bfloat16' or 'float32', got {value!r}")


def check_tensors(checkpoint: Checkpoint, content: dict, config: T6Config) -> None:
    """
    Compares names, shapes and dtypes with the configuration; completes `dtype` in the content of config.json.

    Raises:
        UploadError: naming the tensor that is missing, unexpected, or of another shape or dtype.
    """
    try:
        with torch.device("meta"):
            model = getattr(modeling_t6, content["architectures"][0])(config)
    except Exception as error:  # whatever torch and RoPE's functions make of sizes and parameters
        raise UploadError(f"config.json describes a model that cannot be made: {one_line(error)}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    found = checkpoint.tensors
    for kind, names in (
        ("are missing from", set(expected) - tied - set(found)),
        ("are unknown to config.json, but in", set(found) - set(expected)),
    ):
        if names:
            raise UploadError(f"{listed(names)} {kind} the weights")
    for name, info in found.items():
        if info.shape != expected[name]:
            raise UploadError(
                f"{name} in {info.file.name} has shape {list(info.shape)}, by config.json it is {list(expected[name])}"
            )
    first = next(iter(found.values())).dtype
    content["dtype"] = content.get("dtype") or content.get("torch_dtype") or str(first).removeprefix("torch.")
    check_dtypes(checkpoint, getattr(torch, content["dtype"]))


def check_dtypes(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """
    Accepts a mix of dtypes that is of one piece, such as norms in float32 or a layer in bfloat16: Transformers loads all
    tensors in that of config.json. Refuses weights none of which has it, and a tensor that is no wider than it and has the
    dtype neither of its like in other layers nor of another tensor of its layer: it was rounded.
    """

    def place(name: str) -> tuple[str, str]:
        """The layer and what is left of a name."""
        layer = re.match(r".*?\.\d+\.", name)
        return (layer[0], name[layer.end() :]) if layer else ("", name)

    tensors = checkpoint.tensors
    counts = Counter(info.dtype for info in tensors.values())
    in_layer = Counter((place(name)[0], info.dtype) for name, info in tensors.items())
    alike: dict[str, set[torch.dtype]] = {}
    for name, info in tensors.items():
        alike.setdefault(place(name)[1], set()).add(info.dtype)
    for name, info in tensors.items():
        layer, rest = place(name)
        alone = len(alike[rest]) > 1 and in_layer[layer, info.dtype] == 1
        odd = alone and info.dtype != dtype and info.dtype.itemsize <= dtype.itemsize
        if odd or dtype not in counts:
            raise UploadError(f"{name} in {info.file.name} has dtype {info.dtype}, by config.json it is {dtype}")
    if len(counts) > 1:
        mix = ", ".join(f"{count} in {str(dtype).removeprefix('torch.')}" for dtype, count in counts.most_common())
        print(f"tensors of mixed dtypes ({mix}): Transformers loads all in {dtype}, config.json's `dtype`")


def check_numbers(checkpoint: Checkpoint) -> None:
    """Reads every number; raises a `ConversionError` that names the tensor with one that is not finite."""
    with tqdm(total=checkpoint.nbytes, unit="B", unit_scale=True, desc="checking weights") as progress:
        for _, tensor in checkpoint:
            progress.update(tensor.nbytes)


def check_tokenizer(folder: Path, files: dict[str, Path], config: T6Config) -> PreTrainedTokenizerBase:
    """The tokenizer, which must load without code of its own, and know no token that the model does not."""
    if not any(matches(name, TOKENIZER_FILES) for name in files):
        raise UploadError(f"{folder} has no tokenizer: save it there, or pass --no-tokenizer if the model has none")
    if "tokenizer_config.json" in files and read_json(files["tokenizer_config.json"]).get("auto_map"):
        raise UploadError("tokenizer_config.json: `auto_map` names code of its own, only the code of T6 is pushed")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        largest = max(tokenizer.get_vocab().values(), default=-1)
    except BaseException as error:  # whatever reading a tokenizer raises
        if not is_error(error):
            raise
        names = [name for name in files if matches(name, (*TOKENIZER_FILES, *CHAT_TEMPLATES))]
        raise UploadError(
            f"the tokenizer does not load from {listed(names)}: {type(error).__name__}: {one_line(error)}"
        ) from error
    check_chat_templates(tokenizer)
    if largest >= config.vocab_size:
        raise UploadError(f"the tokenizer has token {largest}, by config.json `vocab_size` is {config.vocab_size}")
    return tokenizer


def check_chat_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises an `UploadError` for one that cannot be read as a template."""
    templates = tokenizer.chat_template or {}
    for name, template in (templates if isinstance(templates, dict) else {"default": templates}).items():
        if not isinstance(template, str):
            raise UploadError(f"the chat template {name} must be text, got {template!r}")
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
        except TemplateSyntaxError as error:
            raise UploadError(
                f"the chat template {name} is no template, line {error.lineno}: {one_line(error)}"
            ) from error
        except Exception:  # one that wants tools or another role: what it raises is its own
            continue
