"""Models of the small size, at a toy size: what `run` trains and measures, that it goes on, and its report."""

import json
import math
import shlex
import sys
import time
from pathlib import Path
from threading import Thread

import at_scale
import pytest
from token_data import write_tokens

import pretrain
from conversion.files import locks
from hub import command, upload


COMMON = """--set hidden_size=32 num_hidden_layers=1 head_dim=8 --tokens 4000 --sequences-per-step 8 --block-length 128
    --batch-size 4 --warmup-steps 1 --eval-steps 2 --no-compile --cpu --lengths 1000 --samples 1""".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("text"), 40, 60)


@pytest.fixture
def in_this_process(monkeypatch) -> list[list[str]]:
    """`pretrain.py` as a function: a process of its own would import for seconds. Holds the arguments of its calls."""
    calls = []

    def run(command: list[str], lock: int | None = None) -> int:
        calls.append(command[2:])
        try:
            pretrain.main(command[2:])
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1
        return 0

    monkeypatch.setattr(at_scale, "exit_code", run)
    return calls


@pytest.mark.once
def test_run_and_report(data, in_this_process, tmp_path):
    options = ["--data", str(data), "--results", str(tmp_path / "r.json"), "--work-dir", str(tmp_path / "work")]
    at_scale.main(["run", *options, *COMMON, "--models", "T6", "--learning-rates", "T6=0.01"])
    at_scale.main(["run", *options, *COMMON, "--models", "MHA, QK norm", "T6"])
    assert [call[call.index("--max-steps") + 1] for call in in_this_process] == ["4", "4"]  # no model twice
    results = json.loads((tmp_path / "r.json").read_text())
    assert list(results["runs"]) == ["T6", "MHA, QK norm"]
    assert [run["learning_rate"] for run in results["runs"].values()] == [0.01, 6e-4]
    assert [run["config"]["model_type"] for run in results["runs"].values()] == ["t6", "qwen3"]
    for facts in results["runs"].values():
        # Two programs measured it, in windows of the same length.
        whole = facts["held_out"]["128"]["kinds"]["all"]
        assert whole["loss_per_token"] == pytest.approx(facts["loss_per_token"], rel=1e-5)
        assert whole["perplexity"] == pytest.approx(math.exp(facts["loss_per_token"]), rel=1e-5)
        assert facts["held_out"]["256"]["positions"].keys() - facts["held_out"]["128"]["positions"].keys() == {
            "128-255"
        }
        assert facts["curve"][-1] == {"step": 4, "loss": pytest.approx(facts["loss_per_token"], abs=1e-4)}
        assert len(facts["retrieval"]["scores"]) == 5 and facts["tokens"] == 4 * 8 * 128
    assert results["runs"]["T6"]["cache_bytes_per_token"] == 2 * (32 + 32)  # rows of 2 (4 + 8) numbers, filled up
    assert results["runs"]["MHA, QK norm"]["cache_bytes_per_token"] == 2 * 2 * 12 * 8

    output = tmp_path / "report" / "r.md"
    at_scale.main(["report", "--results", str(tmp_path / "r.json"), "--output", str(output)])
    text = output.read_text()
    for facts in results["runs"].values():
        assert f"| {facts['loss_per_token']:.4f} |" in text
        assert f"{facts['held_out']['256']['kinds']['all']['perplexity']:.3f} |" in text
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    for changed, message in (
        (["--learning-rates", "T6=0.1"], "--learning-rates T6=0.1: .* has it with 0.01"),
        (["--samples", "7"], r"--samples and --lengths ask for 7 texts of .* tokens: expected 1 of"),
    ):
        with pytest.raises(SystemExit, match=message):
            at_scale.main(["run", *options, *COMMON, *changed])
    with pytest.raises(SystemExit, match="has tokens=4000, this command 5000: expected another --results"):
        at_scale.main(["run", *options, *COMMON, "--tokens", "5000"])


@pytest.mark.once  # a run goes on with the oldest, too: `test_killed_run_goes_on`
def test_stopped(data, in_this_process, tmp_path, capsys):
    """A model that time ran out for goes on where it was; none is begun when there is no time left."""
    options = ["--data", str(data), "--results", str(tmp_path / "r.json"), "--work-dir", str(tmp_path / "work")]
    options += [*COMMON, "--models", "GQA", "MLA"]
    at_scale.main(["run", *options, "--minutes", "0"])
    assert not in_this_process
    stop = ["--max-minutes", "0", "--logging-steps", "1"]
    at_scale.exit_code(
        ["python", *at_scale.command_of(at_scale.parse_args(["run", *options]), "GQA", None)[1:], *stop]
    )
    assert list((tmp_path / "work" / "gqa-checkpoints").glob("checkpoint-1"))
    at_scale.main(["run", *options[:-1], "--no-measure"])
    assert ["--resume" in call for call in in_this_process] == [False, True]
    assert capsys.readouterr().out.count("no time") == 1
    runs = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert list(runs) == ["GQA"] and "held_out" not in runs["GQA"]
    with pytest.raises(SystemExit, match="gqa was trained with max_steps=4, this command has 5"):
        at_scale.main(["run", *options, "--tokens", "5000", "--results", str(tmp_path / "other.json")])
    (tmp_path / "others").mkdir()
    # Whatever the results are called: a model of the work folder stands for what it was trained on, and how.
    for changed, named in (
        (["--data", str(write_tokens(tmp_path / "others", 30, 60))], "sha256=.*, this command has"),
        (["--learning-rates", "GQA=0.1"], "learning_rate=0.0006, this command has 0.1"),
        (
            ["--set", *options[options.index("--set") + 1 : options.index("--tokens")], "rms_norm_eps=0.1"],
            "rms_norm_eps=1e-0., this command",
        ),
    ):
        with pytest.raises(SystemExit, match=f"gqa was trained with {named}"):
            at_scale.main(["run", *options, *changed, "--results", str(tmp_path / "other.json")])
    with pytest.raises(SystemExit, match="MLA: pretrain.py ended with exit code 1"):
        at_scale.main(["run", *options, "--batch-size", "3"])


@pytest.mark.once
def test_measuring_that_failed(data, in_this_process, monkeypatch, tmp_path):
    """What a model was trained to stays in the results; the next call measures it, and trains it no more."""
    options = ["--data", str(data), "--results", str(tmp_path / "r.json"), "--work-dir", str(tmp_path / "work")]
    options += [*COMMON, "--models", "GQA"]
    with monkeypatch.context() as context:
        context.setattr(at_scale.score, "main", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            at_scale.main(["run", *options])
    found = json.loads((tmp_path / "r.json").read_text())["runs"]["GQA"]
    assert found["curve"] and "held_out" not in found
    at_scale.main(["run", *options])
    measured = json.loads((tmp_path / "r.json").read_text())["runs"]["GQA"]
    assert measured.items() >= found.items() and measured["retrieval"]["scores"] and len(in_this_process) == 1


@pytest.mark.once
def test_what_is_there_is_kept(data, in_this_process, tmp_path):
    """A folder that no run of these made is no model to train over, also where it has the name of one."""
    model = tmp_path / "work" / "gqa"
    model.mkdir(parents=True)
    options = ["--data", str(data), "--results", str(tmp_path / "r.json"), "--work-dir", str(model.parent)]
    options += [*COMMON, "--models", "GQA", "--no-measure"]
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text("{}")
    with pytest.raises(
        SystemExit, match="gqa is not empty, and no .*training.json says how it was trained: expected an"
    ):
        at_scale.main(["run", *options])
    assert not in_this_process and {path.name for path in model.iterdir()} == {"config.json", "model.safetensors"}
    # One that came in while a model was trained is not replaced either.
    words = at_scale.command_of(at_scale.parse_args(["run", *options]), "GQA", None)
    assert at_scale.exit_code(words) == 1 and (model / "config.json").read_text() == "{}"


def test_script():
    """The repository that its last line names is one that the upload takes."""
    lines = Path(at_scale.__file__).with_suffix(".sh").read_text().splitlines()
    (words,) = (shlex.split(line) for line in lines if "hub_upload.py" in line)
    upload.check_repo_id(command.parse_args(words[2:]).repo_id)


@pytest.mark.once
def test_one_call_at_a_time(data, tmp_path):
    """Also while what a killed one has started trains on: that holds the lock, whoever else lets it go."""
    work, begun, end = (tmp_path / name for name in ("work", "begun", "end"))
    options = ["--data", str(data), "--results", str(tmp_path / "r.json"), "--work-dir", str(work), *COMMON]
    work.mkdir()
    lock = locks.take_lock(work)
    child = f"""
import pathlib, time
pathlib.Path({str(begun)!r}).touch()
while not pathlib.Path({str(end)!r}).exists():
    time.sleep(0.01)
"""
    thread = Thread(target=at_scale.exit_code, args=([sys.executable, "-c", child], lock))
    thread.start()
    while not begun.exists():
        time.sleep(0.01)
    locks.release(lock)
    try:
        with pytest.raises(SystemExit, match="--work-dir .*work: another call is at work with it"):
            at_scale.main(["run", *options, "--minutes", "0"])
    finally:
        end.touch()
        thread.join()
    at_scale.main(["run", *options, "--minutes", "0"])


def test_told_to_stop(tmp_path):
    """What trains is told to, too, and is waited for."""
    child = """
import os, pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.2)
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    with pytest.raises(SystemExit), at_scale.input_errors("at_scale.py"):
        at_scale.exit_code([sys.executable, "-c", child, str(tmp_path / "stopped")])
    assert (tmp_path / "stopped").exists()


def test_unknown_model(capsys):
    with pytest.raises(SystemExit):
        at_scale.parse_args(["run", "--data", "d", "--results", "r", "--models", "RNN"])
    assert "--models: there is no RNN; there are T6-KVonly; T6; MHA" in capsys.readouterr().err


@pytest.mark.parametrize("gpus, batch_size", [(1, 64), (4, 64), (8, 32)])
def test_several_processes(gpus, batch_size, monkeypatch, tmp_path):
    """On any usual number of GPUs a step is one of all of them."""
    monkeypatch.setattr(at_scale.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(at_scale.torch.cuda, "device_count", lambda: gpus)
    args = at_scale.parse_args(["run", "--data", "d", "--results", "r", "--work-dir", str(tmp_path)])
    command = at_scale.command_of(args, "T6 of the paper", 25.0)
    place = command.index("--nproc-per-node")
    assert command[1:place] == ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    assert command[place + 1] == str(gpus) and Path(command[place + 2]).name == "pretrain.py"
    parsed = pretrain.parse_args(command[place + 3 :])
    assert (parsed.max_steps, parsed.sequences_per_step, parsed.paper, parsed.compile) == (3815, 256, True, True)
    assert parsed.batch_size == batch_size and parsed.sequences_per_step % (batch_size * gpus) == 0
    assert (parsed.max_minutes, parsed.output_dir) == (25.0, tmp_path / "t6-of-the-paper")
