"""The files that belong to a model beside its weights."""

import codecs
import json
from pathlib import Path

from transformers import GenerationConfig

from .errors import ConversionError, reason
from .folders import read_json
from .names import copy_files, matching_files
from .tokenizer import TEMPLATE_FILES, TOKENIZER_FILES, write_tokenizer


COPIED = ("generation_config.json", "LICENSE*", "NOTICE*")
# What comes along beside the weights.
COMPANIONS = (*COPIED, *TOKENIZER_FILES, *TEMPLATE_FILES)


def generation_config(folder: Path) -> dict:
    """How Transformers generates with the model of a folder: by generation_config.json, or by fields of config.json."""
    try:
        try:
            loaded = GenerationConfig.from_pretrained(folder)
        except OSError:  # there is no such file
            loaded = GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
        loaded.validate()
    except Exception as error:  # whatever its validation raises
        raise ConversionError(f"{folder / 'generation_config.json'}: {reason(error)}") from error
    content = loaded.to_dict()
    return {
        name: content[name] for name in sorted(content) if name not in ("transformers_version", "_from_model_config")
    }


def write_companions(source: Path, folder: Path) -> None:
    """
    Writes what belongs to the model `source` into the T6 folder `folder`.

    Raises:
        ConversionError: if the tokenizer cannot be loaded, or is not the same beside the T6 model.
    """
    copy_files(source, folder, COPIED)
    write_tokenizer(source, folder)


def write_generation_config(source: Path, folder: Path) -> None:
    """Where a configuration of Transformers says how to generate: a T6 model's does not."""
    if not (folder / "generation_config.json").exists():
        expected = generation_config(source)
        if expected != generation_config(folder):
            content = {name: value for name, value in expected.items() if value is not None}
            path = folder / "generation_config.json"  # not by `save_pretrained`, which refuses what `generate()` takes
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def without_byte_order_marks(source: Path, patterns: tuple[str, ...], folder: Path) -> Path:
    """
    The folder `source`, or, if JSON in it begins with a byte order mark, which Transformers does not read, `folder` with
    links to all of its files and those files without the mark.
    """
    files = matching_files(source, patterns)
    marked = set()
    for path in files:
        if path.suffix == ".json":
            with path.open("rb") as file:
                if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
                    marked.add(path)
    if not marked:
        return source
    for path in files:
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy.unlink(missing_ok=True)  # of a call before the weights were there
        if path in marked:
            copy.write_bytes(path.read_bytes().removeprefix(codecs.BOM_UTF8))
        else:
            copy.symlink_to(path.resolve())
    return folder


def check_json(source: Path) -> None:
    """Raises a `ConversionError` that names a companion in JSON that is damaged, or holds something else than an object."""
    for path in matching_files(source, COMPANIONS):
        if path.suffix == ".json":
            read_json(path)
