"""The files of a model folder and of a repository: what they are, and what may be there."""

import os
from pathlib import Path

from .code import code_files
from .shared import leads_out, listed, matches


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "*.model", "*.model.v*", "*.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CHAT_TEMPLATES = ("additional_chat_templates/*.jinja",)  # beside the one in `chat_template.jinja`, by name
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TEXTS = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*", ".gitattributes")
CONVERSION = ("conversion.json", "conversion.png")  # the report of `python -m conversion`
PICKLES = (
    "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npy", "*.npz", "*.msgpack",
    "*.h5", "*.dill",
)  # fmt: skip
# What other tools leave in a folder; not uploaded, and not worth an error.
LEFT_OUT = (".git", ".cache", "__pycache__", ".DS_Store", ".ipynb_checkpoints")

# What the repository holds of these and the folder does not, belongs to another model, and readers would get it with this
# one: loaded in the place of what is pushed, or with it. A push removes it.
CODE = ("*.py", "custom_generate/*")  # `from_pretrained` puts the latter in the place of `generate()`
OWN = (*TOKENIZER_FILES, *CHAT_TEMPLATES, "generation_config.json")  # with --code-only, the repository's stay
FOREIGN = (
    "adapter_config.json",  # an adapter is loaded with the model
    # Variants, and files for one version of Transformers.
    "*.index.*.json", "config.*.json", "tokenizer.*.json",
    # Other tokenizers: Transformers looks for their files.
    "tokenizer.*", "vocab.*", "vocab-*.json", "*_vocab.json", "*.model", "*.spm", "*.tiktoken", "tekken.json",
    "normalizer.json", "emoji.json", "dict.txt", "bpe.codes", "*.jinja", "additional_chat_templates/*",
    # Of processors and pipelines.
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "audio_tokenizer_config.json",
    "modelcard.json",
    # By these, other libraries read the weights in another way: Sentence Transformers, diffusers, servers.
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "model_index.json", "params.json",
    "quant*_config.json", "*_quant_config.json",
)  # fmt: skip
REPLACED = (*WEIGHTS, *PICKLES, *CONVERSION, "config.json", *CODE, *OWN, *FOREIGN)


class UploadError(Exception):
    """The folder, the repository or the Hub is not what a push needs; the message says what and where."""


def collect(folder: Path) -> dict[str, Path]:
    """The files of a model folder by name; raises an `UploadError` that lists what has no place on the Hub."""
    if not folder.is_dir():
        raise UploadError(f"{folder} is no folder")
    code = tuple(code_files())
    kept = (
        *WEIGHTS,
        *TOKENIZER_FILES,
        *CHAT_TEMPLATES,
        *TEXTS,
        *CONVERSION,
        "config.json",
        "generation_config.json",
        *code,
    )
    files, pickles, strays, links = {}, [], [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()  # what a linked folder holds is not walked through
        if is_folder or any(part in LEFT_OUT for part in path.relative_to(folder).parts):
            continue
        if leads_out(path, folder) and name not in code:  # the code that is pushed is this package's
            links.append(f"{name} -> {os.path.realpath(path)}")
        elif path.exists() and not path.is_file():  # a linked folder; a pipe or a device, reading which may never end
            strays.append(name)
        elif matches(path.name, PICKLES) or begins_as_pickle(path):
            pickles.append(name)
        elif matches(name, kept):
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


def begins_as_pickle(path: Path) -> bool:
    """Whether a file begins as `torch.save` or `pickle` write, whatever its name."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UploadError(f"cannot read {path}: {error.strerror}") from error
    return start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and len(start) > 1)
