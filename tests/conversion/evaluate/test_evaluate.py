"""Evaluations from the command line."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from conversion.__main__ import main
from conversion.evaluate import evaluation, report
from conversion.evaluate.options import CACHE_DTYPES, TASK_NAMES
from conversion.evaluate.tasks import TASKS

from ..common import as_t6, last_error, source_model
from .test_tasks import characters


ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    source = source_model("llama", "mha", num_hidden_layers=1)
    source.save_pretrained(folder / "source")
    as_t6(source).save_pretrained(folder / "t6")
    (folder / "text.txt").write_text("A text. Another.")
    return folder


def test_report(folders, tmp_path, capsys, monkeypatch):
    assert tuple(TASKS) == TASK_NAMES
    output = tmp_path / "report.json"
    words = [
        "evaluate",
        str(folders / "t6"),
        "--beside",
        str(folders / "source"),
        "--samples",
        "2",
        "--lengths",
        "64,97",
    ]
    words += ["--device", "cpu", "--windows", "2", "--cache-dtypes", ",".join(CACHE_DTYPES), "--output", str(output)]
    assert main(words) == 0
    printed, bars = capsys.readouterr()
    assert "retrieval, source in 8 bits" in bars
    content = json.loads(output.read_text())
    rows = {row["model"]: row for row in content["models"]}
    assert list(rows) == ["source", "source in 8 bits", "source in 4 bits", "t6", "t6 in float8", "t6 in int4"]
    assert all(name in printed for name in rows) and str(tmp_path) not in output.read_text()
    assert rows["t6"]["kl"] < 1e-5 < rows["source in 4 bits"]["kl"]
    assert rows["t6"]["kl"] < rows["t6 in float8"]["kl"] < rows["t6 in int4"]["kl"]
    assert rows["t6"]["scores"] == [
        score | {name: pytest.approx(score[name], rel=1e-4) for name in ("log_probability", "log_probabilities")}
        for score in rows["source"]["scores"]
    ]
    assert [(s["task"], s["length"]) for s in rows["t6"]["scores"]] == [(t, n) for n in (64, 97) for t in TASKS]
    assert [bucket["last"] for bucket in rows["t6"]["loss_by_position"]] == [1, 3, 7, 15, 31, 63, 96]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    # A run that is stopped while it writes leaves what was there.
    old = output.read_text()

    def stopped(rows, path):
        path.write_bytes(b"a part")
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "plot", stopped)
    assert main([*words, "--tasks", "needle"]) == 130
    assert output.read_text() == old and sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.png"]


MISTAKES = {
    "too long": (["--lengths", "64,257"], "--lengths 257: the model's context is 256"),
    "too short": (["--lengths", "5"], "--lengths 5: task needle needs at least 9 tokens"),
    "no folder": (["--beside", "nowhere"], "nowhere is no folder"),
    "no model": (["--beside", "{0}"], "{0}/config.json is missing"),
    "a text for ids": (["--text", "{0}/text.txt"], "--text {0}/text.txt: {0}/t6 has no tokenizer that writes sentences"),
    "no text": (["--text", "{0}/none.txt"], "cannot read {0}/none.txt"),
    "no JSON": (["--output", "{0}/report.txt"], "expected a name that ends in .json"),
    "no place": (["--output", "{0}/none/report.json"], "expected a file in a folder that is there"),
}  # fmt: skip


@pytest.mark.parametrize("more, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(more, message, folders, capsys):
    words = ["evaluate", str(folders / "t6"), "--device", "cpu", *(word.format(folders) for word in more)]
    assert main(words) == 1
    assert message.format(folders) in last_error(capsys)


SIZES = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHERS = {
    "no context": (lambda: BloomForCausalLM(BloomConfig(**SIZES)), "config.json has no max_position_embeddings"),
    "recurrent": (
        lambda: Qwen3NextForCausalLM(Qwen3NextConfig(
            **SIZES, num_key_value_heads=2, head_dim=8, layer_types=["linear_attention"], linear_num_value_heads=2,
            linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=0, intermediate_size=16,
        )),
        "all of whose layers cache keys and values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make_model, message", OTHERS.values(), ids=OTHERS)
def test_other_models_are_refused(make_model, message, tmp_path, capsys):
    make_model().save_pretrained(tmp_path)
    assert main(["evaluate", str(tmp_path), "--device", "cpu"]) == 1
    assert message in last_error(capsys)


def test_a_model_without_positions_behind_its_context(tmp_path):
    """It is asked for nothing there, by default lengths that go up to the context."""
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=80)).save_pretrained(
        tmp_path
    )
    assert main(["evaluate", str(tmp_path), "--device", "cpu", "--samples", "1", "--windows", "1"]) == 0


def test_a_cache_that_a_model_has_not(folders, capsys):
    words = ["evaluate", str(folders / "source"), "--device", "cpu", "--cache-dtypes", "model,int4"]
    assert main(words) == 1
    assert f"--cache-dtypes model,int4: {folders / 'source'} is no T6" in last_error(capsys)


def test_benchmark_of_rows(tmp_path, capsys, monkeypatch):
    """With retrieval; rows of 16 bits are that in a folder, too, whose caches are of others."""
    source = source_model("llama", "mha", num_hidden_layers=1, vocab_size=256, max_position_embeddings=700)
    model = as_t6(source)
    model.config.cache_dtype = "int4"
    model.save_pretrained(tmp_path)
    characters().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("A text. Another.\n" * 100)
    words = [str(tmp_path), str(tmp_path / "text.txt"), "--device", "cpu", "--windows", "1", "--samples", "1"]
    monkeypatch.setattr(sys, "argv", ["low_bit_rows.py", *words, "--repeats", "1"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    runpy.run_path(str(ROOT / "benchmarks" / "low_bit_rows.py"), run_name="__main__")
    rows = {line.split(" | ")[0]: line.split(" | ") for line in capsys.readouterr().out.splitlines()}
    assert rows["| 16 bits"][2] == "1.00x" and rows["| float8_e4m3fn"][2] == "2.00x"
    assert all(rows[name][6].endswith("%") for name in ("| 16 bits", "| float8_e4m3fn", "| int4"))


def test_the_worst_cache_is_warned_of(folders, tmp_path, capsys, monkeypatch):
    """Wherever it stands among those that are measured."""

    def score_all(model, kind, name, *words):
        found = 0.1 if kind == "int4" else 0.9
        scores = [{"task": "needle", "length": 64, "found": found, "log_probability": -1.0}]
        return {"model": name, "found": found, "exact": found, "log_probability": -1.0, "scores": scores}

    monkeypatch.setattr(evaluation, "score_all", score_all)
    words = ["evaluate", str(folders / "t6"), "--beside", str(folders / "source"), "--lengths", "64", "--windows", "1"]
    assert main([*words, "--device", "cpu", "--cache-dtypes", "int4,model"]) == 0
    assert "warning: t6 in int4: of the values hidden" in capsys.readouterr().out


def test_log_probabilities_are_compared_sample_by_sample():
    def row(model: str, *parts: list[float]) -> dict:
        scores = [
            {"task": task, "length": length, "log_probability": sum(part) / len(part), "log_probabilities": part}
            for (task, length), part in zip([("needle", 64), ("needle", 97), ("copying", 97)], parts)
        ]
        return {"model": model, "scores": scores}

    first, second = row("source", [-1.0], [-1.0, -3.0], [-2.0] * 4), row("t6", [-1.5], [-1.5, -3.7], [-2.0] * 4)
    assert report.log_probability_cell(first, first, 97) == "-2.000"
    # Differences of -0.5 and -0.7, whose mean has the standard error 0.1, and of 0: the tasks count alike.
    assert report.log_probability_cell(second, first, 97) == "-2.300 (-0.300 ± 0.050)"
    assert report.log_probability_cell(second, first, 64) == "-1.500 (-0.500 ± inf)"  # of one sample
    # A row of other samples, and one of an older file, have no difference.
    assert report.log_probability_cell(row("t6", [-1.5, -0.5]), first, 64) == "-1.000"
    del second["scores"][2]["log_probabilities"]
    assert report.log_probability_cell(second, first, 97) == "-2.300"


def test_warning():
    source = {"found": 0.5}
    assert report.warning(source, {"found": 0.45}) is None
    assert "the source finds 50% and this model 44%" in report.warning(source, {"found": 0.44})
