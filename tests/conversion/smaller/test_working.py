"""Smaller caches from the command line: what an unfinished run is gone on with, and mistakes that cost little to find."""

import json
import random
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conversion.__main__ import main
from conversion.files.locks import release, take_lock
from conversion.smaller import heal, pipeline

from ..common import last_error, source_model


pytestmark = pytest.mark.once


def save(folder: Path, words: int = 99, **sizes) -> Path:
    source_model("llama", "mha", num_hidden_layers=1, max_position_embeddings=32, **sizes).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def write_text(path: Path, seed: int, words: int = 99) -> Path:
    generator = random.Random(seed)
    lines = (" ".join(f"w{generator.randrange(1, words)}" for _ in range(16)) for _ in range(40))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("working") / "source")


@pytest.fixture
def unfinished(source, tmp_path, monkeypatch, capsys):
    """A run that was stopped by Ctrl-C when it began to heal, and the words of its command."""
    shutil.copytree(source, tmp_path / "source")
    texts = [str(write_text(tmp_path / f"{name}.txt", seed)) for seed, name in enumerate(("calibration", "heal"))]
    words = ["hf", str(tmp_path / "source"), str(tmp_path / "t6"), "--k-rank", "1", "--v-rank", "2", "--device", "cpu"]
    words += ["--calibration", texts[0], "--heal", texts[1], "--heal-steps", "1", "--reconstruct-steps", "0"]

    def stopped(*arguments, **options) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(heal, "heal", stopped)
        assert main(words) == 130
    folder = tmp_path / ".t6.unfinished"
    message = f"interrupted: the same command goes on from what {folder} holds"
    assert capsys.readouterr().err.strip().splitlines()[-1] == message
    assert sorted(path.name for path in folder.iterdir()) == ["compressed", "exact", "settings.json"]
    assert not list(tmp_path.glob(".t6.*.partial")) and not (tmp_path / "t6").exists()
    # Healing is Trainer's: what it starts from shows as well without.
    monkeypatch.setattr(heal, "heal", lambda *arguments, **options: None)
    return words


def retrain(folder: Path) -> None:
    """Other weights of the same shapes."""
    state = load_file(folder / "model.safetensors")
    save_file({name: -tensor for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})


def perplexities(folder: Path) -> dict[str, float]:
    rows = json.loads((folder / "conversion.json").read_text())["perplexity"]
    return {row["model"]: row["perplexity"] for row in rows}


def test_goes_on_with_the_same_inputs(unfinished, tmp_path, capsys, monkeypatch):
    """Also where they are named from elsewhere; it says with what, and does not do it again."""
    monkeypatch.setattr(pipeline, "compress", None)
    monkeypatch.chdir(tmp_path)
    words = [str(Path(word).relative_to(tmp_path)) if word.startswith(str(tmp_path)) else word for word in unfinished]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "goes on: the exact model is there, the compressed model is there" in output
    assert sorted(path.name for path in tmp_path.glob("*t6*")) == ["t6"]


CHANGES = {
    "weights": (lambda f: retrain(f / "source"), "SRC, {0}/source, has changed since"),
    "tokenizer": (lambda f: (f / "source" / "merges.txt").write_text("a b"), "SRC, {0}/source, has changed since"),
    "calibration": (lambda f: write_text(f / "calibration.txt", 7), "--calibration, {0}/calibration.txt, has changed"),
    "healing": (lambda f: write_text(f / "heal.txt", 7), "--heal, {0}/heal.txt, has changed since"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_a_changed_input_is_refused(change, message, unfinished, tmp_path, capsys):
    change(tmp_path)
    assert main(unfinished) == 1
    assert message.format(tmp_path) in (error := last_error(capsys)) and "--overwrite begins anew" in error
    assert (tmp_path / ".t6.unfinished" / "compressed").is_dir() and not (tmp_path / "t6").exists()


def test_another_input_or_option_is_refused(unfinished, tmp_path, capsys):
    shutil.copytree(tmp_path / "source", tmp_path / "other")
    for old, new in (("source", "other"), ("--v-rank 2", "--v-rank 1"), ("--device cpu", "--dtype bfloat16")):
        words = " ".join(unfinished).replace(old, new, 1).split(" ")
        assert main(words) == 1
        assert "is an unfinished run with" in last_error(capsys)
    assert (tmp_path / ".t6.unfinished" / "compressed").is_dir() and not (tmp_path / "t6").exists()


def test_a_run_of_another_version_is_refused(unfinished, tmp_path, capsys):
    """One that had fewer options: also where the new ones are not given."""
    path = tmp_path / ".t6.unfinished" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["cache_dtype"]
    path.write_text(json.dumps(settings))
    assert main(unfinished) == 1
    assert "is an unfinished run of another version" in (error := last_error(capsys)) and "--overwrite" in error
    assert (tmp_path / ".t6.unfinished" / "compressed").is_dir() and not (tmp_path / "t6").exists()


def test_overwrite_begins_anew(unfinished, tmp_path, capsys):
    retrain(tmp_path / "source")
    assert main([*unfinished, "--overwrite"]) == 0
    assert "is removed, and this one begins anew" in capsys.readouterr().out
    found = perplexities(tmp_path / "t6")
    assert found["exact"] == pytest.approx(found["source"], rel=1e-5)
    assert found != perplexities_of_a_new_run(unfinished, tmp_path, retrained=False)
    assert found == perplexities_of_a_new_run(unfinished, tmp_path, retrained=True)


def perplexities_of_a_new_run(words: list[str], folder: Path, retrained: bool) -> dict[str, float]:
    if not retrained:
        retrain(folder / "source")  # its own negative again
    assert main([str(folder / "fresh") if word == str(folder / "t6") else word for word in words]) == 0
    found = perplexities(folder / "fresh")
    shutil.rmtree(folder / "fresh")
    if not retrained:
        retrain(folder / "source")
    return found


def test_an_unfinished_run_is_not_forgotten(unfinished, tmp_path, capsys):
    assert main([*unfinished[:3], "--no-verify"]) == 0
    assert f"{tmp_path / '.t6.unfinished'} holds an unfinished run" in capsys.readouterr().out
    (tmp_path / "t6").rename(tmp_path / "exact")
    assert main(unfinished) == 0
    assert not list(tmp_path.glob(".t6*"))


def test_a_stale_exact_model_is_no_success(unfinished, tmp_path, capsys):
    """Whatever made it stale: here, files that nobody should touch."""
    retrain(tmp_path / ".t6.unfinished" / "exact")
    assert main(unfinished) == 1
    assert "differ by more than rounding" in last_error(capsys) and not (tmp_path / "t6").exists()


def test_one_run_at_a_time(unfinished, tmp_path, capsys):
    lock = take_lock(tmp_path / ".t6.unfinished")
    for more in ([], ["--overwrite"]):
        assert main([*unfinished, *more]) == 1
        assert "another run is making" in last_error(capsys)
    assert (tmp_path / ".t6.unfinished" / "compressed").is_dir()
    release(lock)


def test_a_target_filled_meanwhile_loses_nothing(unfinished, tmp_path, capsys, monkeypatch):
    def filled(*arguments, **options) -> None:
        (tmp_path / "t6").mkdir()
        (tmp_path / "t6" / "notes.txt").write_text("hours of work")

    monkeypatch.setattr(heal, "heal", filled)
    assert main(unfinished) == 1
    assert "t6 is not empty" in last_error(capsys)
    assert (tmp_path / "t6" / "notes.txt").read_text() == "hours of work"
    assert (tmp_path / ".t6.unfinished" / "compressed").is_dir()


def test_mistakes_are_found_before_any_work(source, tmp_path, capsys, monkeypatch):
    """Each in one line, before the source is read where that is possible, and with nothing left."""
    text = write_text(tmp_path / "text.txt", 0)
    (tmp_path / "line.txt").write_text(" ".join(["w1"] * 100))
    (tmp_path / "line-end.txt").write_text(" ".join(["w1"] * 100) + "\n")
    (tmp_path / "short.txt").write_text("w1\nw2\n")
    (tmp_path / "text.npy").write_text("w1\n")
    windows = np.ones((2, 32), dtype=int)
    for name, ids in (
        ("short", windows[:, 1:]),
        ("floats", windows / 2),
        ("negative", -windows),
        ("large", 99 * windows),
    ):
        np.save(tmp_path / f"{name}.npy", ids)
    steps = ["--heal-steps", "1", "--heal"]
    before = sorted(path.name for path in tmp_path.iterdir())
    nowhere = str(tmp_path / "no" / "such" / "source")
    cases = [
        (nowhere, text, ["--device", "cuda:7"], "--device cuda:7 does not compute here: expected one of cpu"),
        (nowhere, text, ["--device", "nothing"], "--device nothing does not"),
        (nowhere, text, ["--device", "meta"], "--device meta does not"),
        (nowhere, text, ["--device", ""], "--device  does not"),
        (nowhere, tmp_path / "missing.txt", [], "cannot read"),
        (nowhere, source, [], "cannot read"),
        (nowhere, text, ["--heal", str(tmp_path / "missing.txt"), "--heal-steps", "1"], "missing.txt"),
        (source, tmp_path / "line.txt", [], "the last tenth of"),
        (source, tmp_path / "line-end.txt", [], "the last tenth of"),
        (source, tmp_path / "short.txt", [], "tokens: expected at least one window of 32"),
        (
            source,
            text,
            ["--heal", str(tmp_path / "short.txt"), "--heal-steps", "1"],
            f"--heal {tmp_path / 'short.txt'} has 2 tokens",
        ),
        (source, text, [*steps, str(tmp_path / "missing.npy")], "missing.npy: No such file"),
        (source, text, [*steps, str(tmp_path / "text.npy")], "text.npy is no NumPy file"),
        (source, text, [*steps, str(tmp_path / "short.npy")], "int64 [2, 31]: expected token ids [n, 32]"),
        (source, text, [*steps, str(tmp_path / "floats.npy")], "float64 [2, 32]: expected token ids"),
        (source, text, [*steps, str(tmp_path / "negative.npy")], "negative.npy holds -1"),
        (source, text, [*steps, str(tmp_path / "large.npy")], "token 99 of a text"),
        (source, text, ["--window", "33"], "--window 33: expected 2 to 32"),
        (source, text, ["--window", "1"], "--window 1: expected 2 to 32"),
        (source, text, ["--revision", "main"], "--revision main is of a source on the Hub"),
    ]
    for place, calibration, more, message in cases:
        words = ["hf", str(place), str(tmp_path / "new" / "t6"), "--k-rank", "1", "--calibration", str(calibration)]
        assert main([*words, *more]) == 1
        assert message in last_error(capsys)
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_is_seen_before_it_is_full(source, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    assert main(["hf", str(source), str(tmp_path / "t6")]) == 1
    assert "GB free" in last_error(capsys) and not list(tmp_path.iterdir())


def test_tokens_that_the_model_does_not_know(tmp_path, capsys):
    save(tmp_path / "source", words=150)
    text = write_text(tmp_path / "text.txt", 0, words=150)
    words = ["hf", str(tmp_path / "source"), str(tmp_path / "t6"), "--k-rank", "1", "--calibration", str(text)]
    assert main(words) == 1
    assert "vocab_size=99" in last_error(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]


def test_too_little_memory_of_a_device(source, tmp_path, capsys, monkeypatch):
    def full(*arguments, **options) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    text = write_text(tmp_path / "text.txt", 0)
    monkeypatch.setattr(pipeline, "compress", full)
    assert main(["hf", str(source), str(tmp_path / "t6"), "--k-rank", "1", "--calibration", str(text)]) == 1
    assert "a smaller --batch-size" in last_error(capsys)
