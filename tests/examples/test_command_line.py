"""What all examples and benchmarks have in common as commands: quick answers, and what they say of what is not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import command_line
import compare
import diagnose
import export
import gather
import generate
import prepare
import pretrain
import score
import train
from conversion.smaller.text import read_text
from serving import command


ROOT = Path(__file__).parents[2]
HELP = """
import json, runpy, sys
from pathlib import Path

codes = {}
for path in sys.argv[1:]:
    sys.path[0] = str(Path(path).parent)
    for option in ("--help", "--no-such-option"):
        sys.argv = [path, option]
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as error:
            codes.setdefault(Path(path).name, []).append(error.code)
slow = {"torch", "transformers", "numpy", "datasets", "matplotlib"} & set(sys.modules)
print(json.dumps([codes, sorted(slow)]))
"""


@pytest.mark.once
def test_help_and_mistakes_are_answered_at_once():
    """Before anything is imported that takes seconds. What is no command has no arguments to parse."""
    files = sorted(
        [*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "configuration/make_configs.py"]
    )
    commands = [
        str(path) for path in files if "ArgumentParser\n" in path.read_text() or "def parse_args" in path.read_text()
    ]
    others = {
        "ablations",
        "architectures",
        "captured",
        "command_line",
        "gpu",
        "language_modeling",
        "options",
        "muon",
        "pretraining_data",
        "recipe",
        "results",
        "scheduler",
        "serve",
        "shapes",
        "throughput",
        "timing",
        "turns",
        "twins",
        "vllm_server",
    }
    assert {path.stem for path in files if str(path) not in commands} == others | {"training"}
    result = subprocess.run([sys.executable, "-c", HELP, *commands], capture_output=True, text=True)
    codes, slow = json.loads(result.stdout.splitlines()[-1])
    assert codes == {Path(path).name: [0, 2] for path in commands} and not slow
    assert "usage: training_step.py" in result.stdout and "error: " in result.stderr


@pytest.mark.once
@pytest.mark.parametrize(
    "module, options",
    [
        (compare, "plan --results {tmp}/x --data {missing}"),
        (diagnose, "run --results {tmp}/x --data {missing}"),
        (diagnose, "report --results {missing}"),
        (export, "{missing} {tmp}/x.pt2"),
        (gather, "{missing} --output-dir {tmp}/x"),
        (generate, "--model {missing}"),
        (prepare, "--output-dir {tmp}/x --text {missing}"),
        (prepare, "--output-dir {tmp}/x --text {text} --num-processes 1 --tokenizer {missing}"),
        (pretrain, "--output-dir {tmp}/x --data {missing}"),
        (pretrain, "--output-dir {tmp}/x --tokenizer {shipped} --dataset {missing}"),
        (pretrain, "--output-dir {tmp}/x --tokenizer {missing}"),
        (score, "local {missing}"),
        (score, "held-out any --data {missing}"),
        (score, "perplexity {missing} {text}"),
        (score, "tasks any --output-dir {tmp}/x --data {missing}"),
        (score, "tasks {missing} --output-dir {tmp}/x"),
        (train, "--output-dir {tmp}/x --dataset {missing}"),
        (train, "--output-dir {tmp}/x --text {text} --config {missing}"),
        (train, "--output-dir {tmp}/x --text {text} --tokenizer {missing}"),
    ],
)
def test_what_is_missing_is_named(module, options, tmp_path):
    """In one line that says what there should be."""
    missing, text = tmp_path / "runs" / "missing", tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 40)
    options = options.format(tmp=tmp_path, missing=missing, text=text, shipped=generate.SHIPPED)
    with pytest.raises(SystemExit) as caught:
        module.main(options.split())
    message = str(caught.value.code)
    assert str(missing) in message and "\n" not in message and "Repo id" not in message
    assert any(words in message.lower() for words in ("there is no", "no such file"))
    assert not (tmp_path / "x").exists()


@pytest.mark.once
@pytest.mark.parametrize("device", ["mps:7", "gpu"])
@pytest.mark.parametrize("module, options", [(generate, ""), (score, "perplexity {shipped} {text}")])
def test_a_device_that_is_not_there_is_named(module, options, device, tmp_path, monkeypatch):
    """Before a model is loaded."""
    (tmp_path / "text.txt").write_text("to be")
    monkeypatch.setattr(module, "AutoModelForCausalLM", None)
    options = options.format(shipped=generate.SHIPPED, text=tmp_path / "text.txt")
    with pytest.raises(SystemExit) as caught:
        module.main([*options.split(), "--device", device])
    assert f"error: --device {device} does not compute here: expected one of cpu" in str(caught.value.code)


@pytest.mark.once
def test_all_texts_are_read_before_a_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("to be")
    monkeypatch.setattr(score, "AutoModelForCausalLM", None)
    with pytest.raises(SystemExit, match="error: cannot read .*missing: No such file"):
        score.main(["perplexity", str(generate.SHIPPED), str(tmp_path / "text.txt"), str(tmp_path / "missing")])


@pytest.mark.once
def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "text.txt").write_bytes("\ufeffto be".encode())
    assert command_line.read_text(tmp_path / "text.txt") == read_text(tmp_path / "text.txt") == "to be"


@pytest.mark.once
@pytest.mark.parametrize("name", ["{tmp}/missing", "runs/some/missing"])
def test_server_names_what_is_missing(name, tmp_path, monkeypatch):
    """Before `transformers serve` is imported; what is a folder, or may be on the Hub, goes on to it."""
    calls = []
    monkeypatch.setattr("transformers.cli.transformers.main", lambda: calls.append(sys.argv))
    monkeypatch.setattr(command, "within_context", lambda method: method)
    monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path), "--port", "1"])
    command.main()
    monkeypatch.setattr(sys, "argv", ["serve.py", "someone/t6@main"])
    command.main()
    assert calls == [["serve.py", "serve", str(tmp_path), "--port", "1"], ["serve.py", "serve", "someone/t6@main"]]
    name = name.format(tmp=tmp_path)
    monkeypatch.setattr(sys, "argv", ["serve.py", name])
    with pytest.raises(SystemExit, match=f"there is no folder {name}; names on the Hub are"):
        command.main()
