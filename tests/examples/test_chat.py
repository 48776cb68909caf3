"""A chat with a tiny converted model, by one question, by lines, and what cannot be chatted with."""

import io
import re
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import chat
import export
import generate
import score
from conversion.__main__ import main as convert
from tests.conversion.common import save_source


TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T6 with GQA: 8 heads of 8 numbers in 2 groups, 3 layers; it has learned nothing."""
    folder = tmp_path_factory.mktemp("chat")
    save_source(folder / "source", "llama", "gqa")
    words = ["user", "assistant", *(f"w{i}" for i in range(97))]
    pipeline = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    pipeline.pre_tokenizer, pipeline.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=pipeline, chat_template=TEMPLATE).save_pretrained(folder / "source")
    assert convert(["hf", str(folder / "source"), str(folder / "t6"), "--no-verify"]) == 0
    return folder


def test_one_question(folder, capsys):
    chat.main(
        [str(folder / "t6"), "--prompt", "w1 w2", "--max-new-tokens", "9", "--temperature", "0", "--dtype", "float32"]
    )
    *answer, figures = capsys.readouterr().out.strip().splitlines()
    assert answer and "w" in answer[-1]
    # 3 words of the template and 8 tokens of the answer are cached, the ninth is not yet; each has 3 layers, 2 + 2 heads
    # of 8 numbers of 4 bytes, of MHA 8 + 8 heads.
    assert re.fullmatch(
        r"\[9 tokens, [\d.]+ per second; cache of 11 tokens 4,224 bytes, 384 a token, its source 384, MHA 1,536\]",
        figures,
    ), figures


def test_lines(folder, capsys, monkeypatch):
    """Each answer is given what was said before."""
    monkeypatch.setattr("sys.stdin", io.StringIO("w1\nw2 w3\n\nw4\n"))
    chat.main([str(folder / "t6"), "--max-new-tokens", "5", "--temperature", "0"])
    lengths = [int(n) for n in re.findall(r"cache of (\d+) tokens", capsys.readouterr().out)]
    assert len(lengths) == 2 and lengths[0] == 2 + 4 and lengths[1] > lengths[0] + 3


@pytest.mark.once
def test_refused(folder, capsys):
    with pytest.raises(SystemExit, match="has no chat template: examples/generate.py"):
        chat.main(["examples/t6-tiny-shakespeare", "--prompt", "w1"])
    with pytest.raises(SystemExit, match="more than the context of the model"):
        chat.main([str(folder / "t6"), "--prompt", "w1 " * 300])
    with pytest.raises(SystemExit, match="2"):
        chat.main([str(folder / "t6"), "--prompt", " "])
    assert "--prompt is empty" in capsys.readouterr().err


@pytest.mark.once
def test_what_cannot_be_loaded_is_told_in_one_line(folder, tmp_path, monkeypatch, capsys):
    """Weights cut off, a model of another kind, a dtype that is none, and messages of bytes that are no text."""
    broken, text = shutil.copytree(folder / "t6", tmp_path / "broken"), tmp_path / "text.txt"
    (broken / "model.safetensors").write_bytes(b"cut")
    text.write_text("w1 w2")
    commands = {
        "chat.py": (chat.main, [broken, "--prompt", "w1"]),
        "generate.py": (generate.main, ["--model", broken, "--prompt", "w1"]),
        "export.py": (export.main, [broken, tmp_path / "step.pt2"]),
        "score.py": (score.main, ["perplexity", broken, text]),
    }
    PreTrainedTokenizerFast.from_pretrained(broken, bos_token="w1").save_pretrained(broken)  # which score.py wants
    for name, (main, arguments) in commands.items():
        with pytest.raises(SystemExit) as caught:
            main(list(map(str, arguments)))
        assert re.fullmatch(rf"{name}: error: cannot load the model {broken}: .*header.*", caught.value.code)
        with pytest.raises(SystemExit, match="2"):
            main([*map(str, arguments), "--dtype", "half"])
        assert "argument --dtype: invalid choice: 'half'" in capsys.readouterr().err
    for main, arguments in list(commands.values())[:2]:
        for option, value in (
            ("--seed", "-1"),
            ("--temperature", "inf"),
            ("--temperature", "nan"),
            ("--temperature", "-1"),
        ):
            with pytest.raises(SystemExit, match="2"):
                main([*map(str, arguments), option, value])
            assert f"argument {option}: invalid" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--model must be a T6 model, got one of type 'llama'"):
        generate.main(["--model", str(folder / "source"), "--prompt", "w1"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w1 \xff\n"), encoding="utf-8"))
    with pytest.raises(SystemExit, match="a message is not UTF-8 text"):
        chat.main([str(folder / "t6")])
    with pytest.raises(SystemExit, match="2"):
        chat.main([str(folder / "t6"), "--prompt", "w1 \udcff"])
    assert "argument --prompt: invalid UTF-8 value" in capsys.readouterr().err
