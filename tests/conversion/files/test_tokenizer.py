"""The tokenizer beside a T6 model against the source's: ids, special tokens, and chat templates."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conversion.__main__ import main
from conversion.files.errors import ConversionError
from conversion.files.signals import Stopped
from conversion.files.tokenizer import chat_templates, compare_tokenizers, load_tokenizer, write_tokenizer
from conversion.sources.families import FAMILIES, make_plan
from hub.check import check_tokenizer
from hub.folder import UploadError

from ..common import last_error, random_source, save_source


TEXT = "In 2024, 12345 tokens:  double  spaces, caf\u00e9 na\u00efve;\n\tdef f(x): return x**2 \u4e2d\u6587 \u65e5\u672c\u8a9e <e> \U0001f600"


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Tokenizer]:
    """Byte-level BPE as Llama 3's and Qwen's, BPE of pieces as Llama 2's, and one that lower-cases."""
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    special = ["<e>", "<pad>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    byte_level.train_from_iterator([TEXT.replace("<e>", "")] * 9, trainer)
    byte_level.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level.pre_tokenizer])

    pieces = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<unk>", "<s>", "<e>", *alphabet], show_progress=False
    )
    pieces.train_from_iterator([TEXT.replace("<e>", "")] * 9, trainer)
    pieces.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", pieces.token_to_id("<s>"))]
    )

    lower = Tokenizer.from_str(byte_level.to_str())
    lower.normalizer = normalizers.Lowercase()
    lower.add_tokens([AddedToken("<|tool|>", lstrip=True, rstrip=True), AddedToken("word", single_word=True)])
    return {"byte-level": byte_level, "pieces": pieces, "lower": lower}


def save(pipeline: Tokenizer, folder: Path, **settings) -> None:
    folder.mkdir(exist_ok=True)
    pipeline.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<e>"} | settings))


def made(tokenizer, text: str):
    """Ids, types and mask of a text, and the text of the ids, or the error: Gemma's class wants a token for the unknown."""
    try:
        encoded = tokenizer(text)
    except Exception as error:
        return str(error)
    return dict(encoded), tokenizer.decode(encoded["input_ids"])


PIPELINES = ("byte-level", "pieces", "lower")
CLASSES = ("GPT2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast", None)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_source(family, pipeline, pipelines, tmp_path):
    """Of every family, and whatever class its tokenizer_config.json names: by either, Transformers may take another class."""
    source, target = tmp_path / "source", tmp_path / "t6"
    no_rope = {"no_rope_layers": [1, 1, 1]} if family == "smollm3" else {}
    config = random_source(model_type=family, **no_rope).config
    config.save_pretrained(source)
    make_plan(config).config.save_pretrained(target)
    first = list(FAMILIES).index(family) + PIPELINES.index(pipeline)
    for name in (CLASSES[first % 6], CLASSES[(first + 3) % 6]):  # with the families, each class in turn
        save(pipelines[pipeline], source, **{"tokenizer_class": name} if name else {})
        write_tokenizer(source, target)
        expected, found = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(target)
        for text in (TEXT, *TEXT.split(), "  a", ""):
            assert made(found, text) == made(expected, text), (name, text)
        assert found.padding_side == expected.padding_side and found.eos_token_id == expected.eos_token_id


def test_side_and_special_tokens(pipelines, tmp_path):
    """What the class or further files of the source say comes along: added tokens, sides, types of inputs."""
    source, target = save_source(tmp_path / "source"), tmp_path / "t6"
    save(
        pipelines["byte-level"], source, pad_token="<pad>", bos_token="<s>", padding_side="left", model_max_length=77,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], image_token="<image>",
    )  # fmt: skip
    (source / "added_tokens.json").write_text(json.dumps({"<extra>": 330}))
    assert main(["hf", str(source), str(target), "--no-verify"]) == 0
    expected, found = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(target)
    batch = ["<|im_start|>a<|im_end|>", f"{TEXT} <image> <extra>"]
    assert found(batch, padding=True) == expected(batch, padding=True)
    assert found.special_tokens_map == expected.special_tokens_map and found.model_max_length == 77
    assert set(found("a")) == set(expected("a"))


@pytest.mark.parametrize("form", ["list", "folder", "both", "single"])
def test_named_chat_templates(form, pipelines, tmp_path):
    source, target = save_source(tmp_path / "source"), tmp_path / "t6"
    templates = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ tools|length }}", "rag": "R{{ bos_token }}"}
    as_list = [{"name": name, "template": template} for name, template in templates.items()]
    if form == "single":
        templates = {"default": templates["default"]}
        as_list = templates["default"]
    save(pipelines["byte-level"], source, **{} if form == "folder" else {"chat_template": as_list})
    if form in ("folder", "both"):
        (source / "chat_template.jinja").write_text(templates["default"])
        (source / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (source / "additional_chat_templates" / f"{name}.jinja").write_text(templates[name])
    (source / "chat_template.json").write_text(json.dumps({"chat_template": "of a processor"}))
    assert main(["hf", str(source), str(target), "--no-verify"]) == 0
    assert chat_templates(AutoTokenizer.from_pretrained(target)) == templates
    assert (target / "chat_template.json").exists()


def test_templates_that_tell_the_time(pipelines, tmp_path):
    """What they make in one moment is not what they make in the next."""
    template = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }} {{ messages[0].content }}"
    save(pipelines["byte-level"], tmp_path / "source", chat_template=template)
    (tmp_path / "target").mkdir()
    assert write_tokenizer(tmp_path / "source", tmp_path / "target")


def test_templates_without_a_tokenizer(tmp_path):
    source, target = save_source(tmp_path / "source"), tmp_path / "t6"
    (source / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (source / name).write_text(name)
    assert main(["hf", str(source), str(target), "--no-verify"]) == 0
    assert (target / "additional_chat_templates" / "tool_use.jinja").read_text().endswith("tool_use.jinja")
    assert not (target / "tokenizer_config.json").exists()


def changed_pipeline(folder: Path) -> None:
    pipeline = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # without the split of digits
    pipeline.save(str(folder / "tokenizer.json"))


def settings(**fields):
    def change(folder: Path) -> None:
        content = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(content | fields))

    return change


FAULTS = {
    "ids": (changed_pipeline, "ids of 'In 2024"),
    "end-of-text": (settings(eos_token="<s>"), "special tokens"),
    "new-token": (settings(extra_special_tokens=["<more>"]), "number of tokens"),
    "side": (settings(padding_side="left"), "padding_side"),
    "length": (settings(model_max_length=7), "model_max_length"),
    "inputs": (settings(model_input_names=["input_ids"]), "model_input_names"),
    "template": (lambda folder: (folder / "chat_template.jinja").write_text("other"), "chat template 'default' makes"),
    "lost-template": (
        lambda folder: shutil.rmtree(folder / "additional_chat_templates"),
        "names of the chat templates",
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("plant, named", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_refused(plant, named, pipelines, tmp_path):
    save(pipelines["byte-level"], tmp_path, pad_token="<pad>", chat_template=[
        {"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"},
    ])  # fmt: skip
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for name in ("source", "result"):
        tokenizer.save_pretrained(tmp_path / name)
    compare_tokenizers(*(load_tokenizer(tmp_path / name) for name in ("source", "result")))
    plant(tmp_path / "result")
    with pytest.raises(ConversionError, match=named):
        compare_tokenizers(*(load_tokenizer(tmp_path / name) for name in ("source", "result")))


@pytest.mark.parametrize(
    "content, named",
    [
        ("{", "source/tokenizer.json cannot be read as JSON"),
        ('{"version": "1.0"}', "source has no tokenizer that can be loaded"),
        (None, "source has no tokenizer that can be loaded"),
    ],
    ids=["not-json", "no-model", "of-its-own-code"],
)
def test_a_tokenizer_that_does_not_load(content, named, pipelines, tmp_path, capsys):
    source = save_source(tmp_path / "source")
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
    save(pipelines["byte-level"], source, **{} if content else own)
    if content:
        (source / "tokenizer.json").write_text(content)
    assert main(["hf", str(source), str(tmp_path / "t6")]) == 1
    assert named in last_error(capsys)
    assert not (tmp_path / "t6").exists()


@pytest.mark.once
def test_panics_are_errors_and_signals_are_not(tmp_path, monkeypatch):
    """A tokenizer in Rust that panics raises what is no `Exception`, as a signal does that ends the run."""
    panic = type("PanicException", (BaseException,), {})("no entry found for key")

    def fail(error):
        def from_pretrained(*args, **kwargs):
            raise error

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)

    (tmp_path / "config.json").write_text("{}")
    fail(panic)
    with pytest.raises(ConversionError, match="no tokenizer that can be loaded: no entry found for key"):
        load_tokenizer(tmp_path)
    with pytest.raises(UploadError, match="does not load from tokenizer.json: PanicException: no entry found"):
        check_tokenizer(tmp_path, {"tokenizer.json": tmp_path / "tokenizer.json"}, None)
    fail(Stopped(signal.SIGTERM))
    for load in (load_tokenizer, lambda folder: check_tokenizer(folder, {"tokenizer.json": folder}, None)):
        with pytest.raises(Stopped):
            load(tmp_path)
