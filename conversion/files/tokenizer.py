"""
The tokenizer of a model, written such that it gives the same ids beside another model.

Transformers chooses the class of a tokenizer by the model beside it, and some classes build their own pipeline in place of
the one in tokenizer.json. So the pipeline that the source's tokenizer has once it is loaded is what is written, for the
class that takes a pipeline as it is.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import ConversionError, is_error, reason
from .folders import read_json
from .names import copy_files, matching_files


# Of which a folder with a tokenizer has some.
TOKENIZER_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "*.model.v*", "*.tiktoken", "tekken.json",
)  # fmt: skip
TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*.jinja")
TEXTS = (
    "In 2024, 3.14159 of 1,000,000 and 12345678901 are 0x7F; 1e-9 or 2²⁷ ½ №5.",
    "  leading,  double   spaces,\ttabs\t\t\n\n\nlines \r\n and trailing   ",
    "café naïve Ångström ÀÉÎÕÜ ß œ — «quotes» “curly” ‘single’ … Cafe\u0301 ﬁ Ｆｕｌｌ",
    "def f(x: list[int]) -> int:\n    return sum(i**2 for i in x if i % 2 == 0)  # f'{x!r}' && ||\n\n\tend;\n",
    "中文分词很难。日本語のテキスト、한국어 문장 ไทย العربية עברית हिन्दी русский ελληνικά",
    "😀👩‍👩‍👧‍👦🇫🇷 zero\u200bwidth \ufeffmark no\u00a0break \x00\x7f",
    "don't WE'LL I've it's o'clock — https://a.example/b?c=d&e=%20f#g <tag attr='1'>text</tag>",
    "",
    " ",
    "\n",
    "a",
)
CONVERSATION = [
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": "Thank you,  très bien!"},
]
TOOLS = [{
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}]  # fmt: skip


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """
    The tokenizer that Transformers loads, without code of its own.

    Raises:
        ConversionError: if there is none that can be loaded.
    """
    try:
        if not (folder / "config.json").exists():  # by which AutoTokenizer chooses
            return PreTrainedTokenizerFast.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:  # of the tokenizers library, errors are bare `Exception`s, or panics
        if not is_error(error):
            raise
        raise ConversionError(f"{folder} has no tokenizer that can be loaded: {reason(error)}") from error


def check_tokenizer(folder: Path, needed: bool) -> None:
    """Raises a `ConversionError` if a tokenizer is `needed`, or `folder` has the files of one, and it does not load."""
    if needed or matching_files(folder, TOKENIZER_FILES):
        load_tokenizer(folder)


def chat_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The chat templates by name, of which a tokenizer with one has `default`."""
    templates = tokenizer.chat_template or {}
    return templates if isinstance(templates, dict) else {"default": templates}


def write_tokenizer(source: Path, folder: Path) -> bool:
    """
    Writes the tokenizer and the chat templates of `source` into the T6 folder `folder`; whether there is a tokenizer.

    Raises:
        ConversionError: if the tokenizer cannot be loaded, or is not the same beside the T6 model.
    """
    if not matching_files(source, TOKENIZER_FILES):
        copy_files(source, folder, TEMPLATE_FILES)
        return False
    tokenizer = load_tokenizer(source)
    if tokenizer.is_fast:
        save_tokenizer(tokenizer, folder)
        copy_files(source, folder, ("chat_template.json",))  # a processor's, which no tokenizer writes
    else:
        copy_files(source, folder, (*TOKENIZER_FILES, *TEMPLATE_FILES))
    compare_tokenizers(tokenizer, load_tokenizer(folder))
    return True


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the pipeline of a fast tokenizer, for the class that takes it as it is, with what its own class adds."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    content = read_json(path)
    for field in ("auto_map", "backend", "is_local", "local_files_only"):
        content.pop(field, None)
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    for field in ("model_input_names", "padding_side", "truncation_side", "clean_up_tokenization_spaces"):
        content[field] = getattr(tokenizer, field)  # what the class of the source has by default
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def outcome(function: Callable, *args, **kwargs) -> object:
    """What a call gives, or what it raises: a tokenizer may refuse a text, and a template a conversation."""
    try:
        return function(*args, **kwargs)
    except BaseException as error:  # of the tokenizers library, errors are bare `Exception`s, or panics
        if not is_error(error):
            raise
        return f"{type(error).__name__}: {error}"


def properties(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, object]]:
    """What users of a tokenizer see of it, by name; the ids that it makes of texts come last."""

    def ids(*texts, **options) -> dict[str, list]:
        return dict(tokenizer(*texts, **options))

    yield "number of tokens", len(tokenizer)
    yield "special tokens", {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    yield "ids of special tokens", sorted(tokenizer.all_special_ids)
    for field in ("model_input_names", "padding_side", "truncation_side", "model_max_length"):
        yield field, getattr(tokenizer, field)
    templates = chat_templates(tokenizer)
    yield "names of the chat templates", sorted(templates)
    for name, template in sorted(templates.items()):
        for tools in (None, TOOLS):
            options = {"chat_template": template, "tools": tools, "add_generation_prompt": True, "tokenize": False}
            options["strftime_now"] = str  # a clock that stands still
            yield f"what chat template {name!r} makes", outcome(tokenizer.apply_chat_template, CONVERSATION, **options)
    added = sorted(tokenizer.get_added_vocab(), key=tokenizer.get_added_vocab().get)
    marked = [f"a{token}b {token} c" for token in (*added[:50], *added[-50:])]
    for text in (*TEXTS, *marked):
        for special in (True, False):
            encoded = outcome(ids, text, add_special_tokens=special)
            yield f"ids of {text!r}", encoded
            if isinstance(encoded, dict):
                for skip in (True, False):
                    decoded = outcome(tokenizer.decode, encoded["input_ids"], skip_special_tokens=skip)
                    yield f"text of the ids of {text!r}", decoded
    yield "ids of a pair", outcome(ids, TEXTS[0], TEXTS[3])
    if tokenizer.pad_token_id is not None:
        yield "ids of a padded batch", outcome(ids, [*TEXTS[:4]], padding=True)


def compare_tokenizers(source: PreTrainedTokenizerBase, result: PreTrainedTokenizerBase) -> None:
    """Raises a `ConversionError` that names the first property in which the tokenizers differ."""
    for (name, expected), (_, found) in zip(properties(source), properties(result)):
        if found != expected:
            raise ConversionError(
                f"the tokenizer is another beside the T6 model: {name} are {short(expected)} in the source, "
                f"{short(found)} in the result"
            )


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
