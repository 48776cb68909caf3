"""The comparison: what is run, that it goes on where it stopped, and what the report says of it."""

import argparse
import json
import re
import statistics
from pathlib import Path

import pytest
import token_data

import compare
import pretrain
from command_line import last_checkpoint
from configuration.make_configs import count_parameters
from language_modeling import load_tokenizer


TINY = """--hidden-size 32 --num-layers 1 --head-dim 8 --block-length 16 --sequences-per-step 4 --max-steps 3
    --tuning-steps 2 --warmup-steps 1 --eval-steps 1 --seeds 3 4 --learning-rates 1e-3 2e-3 4e-3""".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return token_data.write_tokens(tmp_path_factory.mktemp("text"), 30, 120)


def config_of(architecture: compare.Architecture, tokenizer):
    options = argparse.Namespace(architecture=architecture.folder, set=list(architecture.overrides.items()))
    return pretrain.make_config(options, tokenizer)


def test_equal_parameters(data):
    """At the comparison's own size: within 1% of MHA, and at least 20M outside of the embedding."""
    tokenizer = load_tokenizer(data)
    named = compare.architectures(compare.SETTINGS, lambda architecture: config_of(architecture, tokenizer))
    counts, heads = {}, {}
    for name, architecture in named.items():
        config = config_of(architecture, tokenizer)
        counts[name] = count_parameters(config) - config.vocab_size * config.hidden_size
        heads[name] = config.num_attention_heads
    assert counts["MHA"] > 20e6
    for name, count in counts.items():
        if "heads of MHA" in name:
            assert heads[name] == heads["MHA"] == 8
        else:
            assert count == pytest.approx(counts["MHA"], rel=0.01)
    assert list(named)[:6] == list(compare.MAIN)
    assert config_of(named["TPA, rank 4"], tokenizer).ranks(0) == (4, 4)
    assert config_of(named["TPA-KVonly"], tokenizer).q_rank is None


def results_with(losses: dict[compare.Run, float]) -> dict:
    runs = {run.key: {"loss_per_token": loss} for run, loss in losses.items()}
    return {"seeds": [0, 1], "learning_rates": [1e-3, 2e-3, 4e-3], "runs": runs}


def test_plan():
    """The rate is tuned on MHA, until the best is not at the edge; then all; then TPA's rate; then the ablations."""
    names = [*compare.MAIN, "TPA, rank 1"]
    losses = {}
    done = []

    def loss_of(run: compare.Run) -> float:
        best = 8e-3 if run.architecture == "MHA" else 4e-3
        return 3 + abs(run.learning_rate - best)

    while missing := [run for run in compare.plan(results_with(losses), names) if run not in losses]:
        done.append(missing[0])
        losses[missing[0]] = loss_of(missing[0])
    assert [run.learning_rate for run in done[:5]] == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    assert all(run.architecture == "MHA" and run.is_tuning for run in done[:5])
    main = [(run.architecture, run.seed) for run in done[5:17]]
    assert main == [(name, seed) for seed in (0, 1) for name in compare.MAIN]
    assert all(run.learning_rate == 8e-3 and not run.is_tuning for run in done[5:17])
    # TPA: 4e-3 is at the edge of 4, 8 and 16e-3, so 2e-3 is needed; 4e-3 is the best, with each seed.
    assert [(run.learning_rate, run.is_tuning) for run in done[17:21]] == [
        (x, True) for x in (4e-3, 8e-3, 16e-3, 2e-3)
    ]
    assert done[21:23] == [compare.Run("TPA", 4e-3, seed) for seed in (0, 1)]
    assert done[23:] == [compare.Run("TPA, rank 1", 8e-3, 0)]


def test_sweep_ends_at_a_limit():
    """Where less is always better, it does not go on forever."""
    losses = {}
    while True:
        runs, best = compare.sweep(results_with(losses), "MHA", [1e-3, 2e-3, 4e-3], 0)
        if best is not None:
            break
        losses |= {run: run.learning_rate for run in runs}
    assert best == pytest.approx(1e-3 / 8) and len(runs) == 6


class InProcess:
    """In the place of `subprocess`: a process that starts Python takes longer than these runs."""

    STDOUT = None

    def __init__(self):
        self.commands, self.codes = [], {}

    def run(self, command, env, stdout, stderr):
        self.commands.append(command)
        assert env["PYTHONPATH"].split(":")[0] == str(compare.ROOT)
        code = self.codes.get(len(self.commands), 0)
        if code == 1:
            stdout.write("Traceback\nout of memory\n")
        elif code == pretrain.STOPPED:
            with pytest.raises(SystemExit) as caught:
                pretrain.main([*command[2:], "--max-minutes", "0"])
            code = caught.value.code
        else:
            pretrain.main(command[2:])
        return argparse.Namespace(returncode=code)


def test_calls_at_once(data, tmp_path):
    """A run is done by one of two calls, and both see what either has done."""
    results_file = tmp_path / "comparison.json"
    options = ["run", "--data", str(data), "--results", str(results_file), *TINY, "--work-dir", str(tmp_path), "--cpu"]
    one, other = (compare.Runner(compare.parse_args(options)) for _ in range(2))
    first, second, third = (one.next_run(), other.next_run(), one.next_run())
    assert [run.learning_rate for run in (first, second, third)] == [1e-3, 2e-3, 4e-3]
    assert not one.claim(second) and not other.claim(first)

    result = {"name": "MHA", "seconds": 1.0, "loss_per_token": 1.0}
    compare.write_json(results_file, one.results | {"runs": {first.key: result}})
    one.running.pop(first.key).release()
    assert not other.claim(first)  # it is done
    assert first.key in other.results["runs"]
    other.running.pop(second.key).release()  # its call was killed
    assert one.next_run() == second


@pytest.mark.once
def test_run_and_report(data, tmp_path, monkeypatch, capsys):
    process = InProcess()
    monkeypatch.setattr(compare, "subprocess", process)
    monkeypatch.setattr(pretrain.signal, "signal", lambda *_: None)  # here it is not called in the main thread
    architectures = compare.architectures
    ablations = ("TPA, heads of MHA", "TPA, rank 1")  # of each kind one, for the sake of time

    def fewer(*args):
        return {name: of for name, of in architectures(*args).items() if name in (*compare.MAIN, *ablations)}

    monkeypatch.setattr(compare, "architectures", fewer)
    results_file, work = tmp_path / "results" / "comparison.json", tmp_path / "work"
    common = ["--data", str(data), "--results", str(results_file), *TINY]
    options = ["run", *common, "--work-dir", str(work), "--cpu", "--max-minutes", "60"]

    process.codes = {2: pretrain.STOPPED}
    compare.main(options)
    assert "stopped, goes on with the next call" in capsys.readouterr().out
    assert len(json.loads(results_file.read_text())["runs"]) == 1
    assert len(process.commands) == 2
    (checkpoints,) = work.glob("*-checkpoints")
    assert last_checkpoint(checkpoints).name == "checkpoint-1"

    process.codes = {4: 1}
    with pytest.raises(SystemExit, match=r"(?s)MHA lr 0.004 seed 3 tuning: exit code 1.*out of memory"):
        compare.main(options)
    assert "--resume" in process.commands[2] and "--resume" not in process.commands[3]
    with pytest.raises(SystemExit, match="has settings=.*, this command"):
        compare.main([*options, "--max-steps", "4"])
    with pytest.raises(SystemExit, match="does not have the learning rates of MHA yet"):
        compare.main(["report", "--results", str(results_file), "--output", str(tmp_path / "x.md")])

    # As many as fit: each run takes far less than the two minutes, which is what those that are done say.
    results = json.loads(results_file.read_text())
    for run in results["runs"].values():
        run["seconds"] = 600.0
    results_file.write_text(json.dumps(results))
    compare.main([*options, "--max-minutes", "2"])
    assert len(process.commands) == 4

    for run in results["runs"].values():
        run["seconds"] = 0.1
    results_file.write_text(json.dumps(results))
    monkeypatch.setattr(compare, "EXTENSIONS", 0)
    compare.main(options)
    assert "0 of the runs known to be needed are left" in capsys.readouterr().out
    assert {path.name for path in work.iterdir() if path.suffix != ".log"} == {"results.lock"}
    number = len(process.commands)
    compare.main(options)
    assert len(process.commands) == number  # nothing is done twice
    capsys.readouterr()

    compare.main(["plan", *common])
    listed = capsys.readouterr().out.splitlines()
    results = json.loads(results_file.read_text())
    assert all(line.startswith("done  ") for line in listed) and len(listed) == len(results["runs"])
    check_results(results, process)
    check_report(results, results_file, tmp_path, capsys)


def check_results(results: dict, process: InProcess) -> None:
    for key, run in results["runs"].items():
        is_tuning = key.endswith("tuning")
        assert key == compare.Run(run["name"], run["learning_rate"], run["seed"], is_tuning).key
        assert run["data"]["data_seed"] == 0 and run["data"]["sha256"] == results["data"]  # the same order for all
        assert [entry["step"] for entry in run["curve"]] == ([1, 2] if is_tuning else [1, 2, 3])
        assert run["curve"][-1]["eval_loss_per_token"] == run["loss_per_token"]
    seeds = {name: {run["seed"] for run in results["runs"].values() if run["name"] == name} for name in compare.MAIN}
    assert all(found == {3, 4} for found in seeds.values())
    caches = {run["name"]: run["cache_bytes_per_token"] for run in results["runs"].values()}
    assert caches["MHA"] == 2 * 2 * 32 and caches["MQA"] == 2 * 2 * 8
    assert str(compare.ROOT) not in json.dumps(results["runs"])


def check_report(results: dict, results_file: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "docs" / "comparison.md"
    compare.main(["report", "--results", str(results_file), "--output", str(output)])
    text = output.read_text()
    assert capsys.readouterr().out == text
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG" and "](comparison.png)" in text
    rate = float(re.search(r"learning rate (\S+), seeds 3, 4", text)[1])
    for name in compare.MAIN:
        runs = [results["runs"][compare.Run(name, rate, seed).key] for seed in (3, 4)]
        losses = [run["loss_per_token"] for run in runs]
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |")).split(" | ")
        assert row[3] == f"{statistics.mean(losses):.4f} ± {abs(losses[0] - losses[1]) / 2:.4f}"
        assert row[2] == f"{runs[0]['non_embedding_parameters']:,}"
        assert row[6] == f"{runs[0]['cache_bytes_per_token']:,}"
    for title in ("Equal parameters", "Learning rates", "Equal heads", "Ranks of keys and values"):
        assert f"\n## {title}" in f"\n{text}"
    assert text.count("| TPA, rank ") == 2 and text.count(", heads of MHA |") == 1
