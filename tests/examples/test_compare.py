"""The comparison: what is compared, in which order, that runs go on where they stopped, and what the report says of them."""

import json
import math
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import token_data
import torch
from torch import nn

import ablations
import compare
from captured import batch_starts, read_tokens
from comparison import plan, report
from comparison.training import Training, Worker, checkpoint_of, held_out_windows
from configuration.make_configs import cache_numbers, count_parameters
from conversion.files import locks
from language_modeling import load_tokenizer
from tests.versions import once_but


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "head_dim": 8, "block_length": 16, "sequences_per_step": 4,
    "max_steps": 7, "warmup_steps": 1, "eval_steps": 3,
}  # fmt: skip
TINY = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(value))]
RUN = plan.Run("T6", 1e-3, 0, 7)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return token_data.write_tokens(tmp_path_factory.mktemp("text"), 30, 120)


# What is compared


def test_models(data):
    """At the comparison's own size: parameters within 1% of MHA's, heads as named, and caches as small as their tables need."""
    settings = compare.SETTINGS
    configurations = ablations.Configurations(settings, load_tokenizer(data))
    heads, caches = {}, {}
    for name, ablation in plan.models(settings).items():
        config = configurations.of(ablation)
        count = count_parameters(config) - config.vocab_size * config.hidden_size
        assert count == pytest.approx(25.7e6, rel=0.01), name
        heads[name], caches[name] = config.num_attention_heads, 2 * cache_numbers(config)[1]
        assert config.intermediate_size % 16 == 0
    more = {name for name, number in heads.items() if number != 8}
    assert more == {name for name in heads if "more heads" in name} | {"T6 of the paper"}
    assert min(heads[name] for name in more) > 8
    assert caches["GQA"] == caches["MLA"] == 4096 > caches["T6, ranks 2 and 1"]
    assert list(heads)[1] == "T6" and caches["MHA"] == 16384


# Plan


def test_names_in_files():
    """Results and checkpoints of earlier versions have these, and are gone on with."""
    run = plan.Run("T6, ranks 2 and 1", 5e-4, 2, 1540)
    assert run.key == "T6, ranks 2 and 1 lr 0.0005 seed 2 steps 1540"
    assert checkpoint_of(run, Path("x")) == Path("x/T6-ranks-2-and-1-lr-0.0005-seed-2-steps-1540.pt")


def result(run: plan.Run, loss: float, ms: float = 40.0) -> dict:
    cache = 4608 if run.model == "T6" else 16384 if run.model == "MHA" else 4096
    heads = 16 if "more heads" in run.model else 8
    shape = {"heads": heads, "cache_bytes_per_token": cache}
    return {**run._asdict(), "name": run.model, "loss": loss, "ms_per_step": ms, **shape}


def results_with(losses: dict[plan.Run, float], ms: dict[str, float] | None = None) -> dict:
    runs = {run.key: result(run, loss, (ms or {}).get(run.model, 40.0)) for run, loss in losses.items()}
    return {
        "settings": {"max_steps": 100, "hidden_size": 512, "head_dim": 64},
        "learning_rate": 1e-3,
        "runs": runs,
    }


NAMES = [f"{mechanism}{end}" for end in ("", ", b", ", c") for mechanism in ("MHA", "T6", "GQA")]


def test_plan():
    """The first models; rates and seeds of the lowest, and of the lowest with a cache as small as GQA's; equal times; the others."""

    def loss_of(run: plan.Run) -> float:
        best = 4e-3 if run.model == "GQA" else 1e-3
        return 2 + 0.1 * NAMES.index(run.model) + 10 * abs(run.learning_rate - best) + 1e-3 * run.seed

    losses, done, ms = {}, [], {"T6": 44.0}
    while missing := [r for r in plan.needed_runs(results_with(losses, ms), NAMES) if r not in losses]:
        done.append(missing[0])
        losses[missing[0]] = loss_of(missing[0])
    count = plan.FIRST_MODELS
    assert [run.model for run in done[:count]] == NAMES[:count]
    assert all((run.learning_rate, run.seed, run.steps) == (1e-3, 0, 100) for run in done[:count])
    tuned = {"T6", "T6, b", "MHA", "GQA"}
    rest = done[count:]
    other = next(index for index, run in enumerate(rest) if run.model not in tuned)
    rates = [(run.model, run.learning_rate) for run in rest[:other] if run.seed == 0 and run.steps == 100]
    # GQA's best is not at the edge of 1, 2 and 4e-3, but may not go beyond.
    assert sorted(rates) == [
        ("GQA", 2e-3),
        ("GQA", 4e-3),
        *((m, x) for m in ("MHA", "T6", "T6, b") for x in (5e-4, 2e-3)),
    ]
    assert {(run.model, run.learning_rate) for run in rest[:other] if run.seed == 1} == {
        ("T6", 1e-3), ("T6, b", 1e-3), ("MHA", 1e-3), ("GQA", 4e-3)
    }  # fmt: skip
    # T6 takes 10% longer a step.
    assert {(run.model, run.steps) for run in rest[:other] if run.steps != 100} == {
        (name, 110) for name in tuned - {"T6"}
    }
    assert rest[other].model == NAMES[-1]
    for name in NAMES:
        seeds = plan.SEEDS if name in tuned else (0,)
        assert {run.seed for run in done if run.model == name and run.steps == 100} == set(seeds)
    assert {run.learning_rate for run in done if run.model == NAMES[-1]} > {1e-3}
    for name in tuned - {"T6"}:
        assert {run.seed for run in done if run.model == name and run.steps == 110} == set(plan.SEEDS)
    assert len(done) == len(set(done))


def test_finalists():
    """The lowest of each table; more heads, or long steps, are in no run of equal time."""
    order = ("T6, more heads", "T6, b", "T6", "T6, c", "GQA, more heads", "MHA", "GQA")
    losses = {plan.Run(name, 1e-3, 0, 100): 2 + index / 10 for index, name in enumerate(order)}
    losses |= {plan.Run("T6, c", 2e-3, 0, 100): 2.15}  # at its best rate lower than T6
    results = results_with(losses, {"T6, more heads": 90.0})
    for run in results["runs"].values():
        if run["name"] in ("T6, more heads", "T6, b"):
            run["cache_bytes_per_token"] = 5000
    best = plan.finalists(results, list(order))
    assert best == ["T6, more heads", "T6, b", "T6, c", "GQA, more heads", "MHA"]
    assert plan.timed_finalists(results, list(order)) == ["T6, b", "T6, c", "MHA", "GQA"]
    needed = plan.needed_runs(results, list(order))
    assert {run.steps for run in needed} == {100}  # none waits for the slow one
    (slow,) = (run for run in results["runs"].values() if run["name"] == "T6, b")
    slow["ms_per_step"] = 45.0  # of 40
    assert plan.timed_finalists(results, list(order)) == ["T6, c", "MHA", "GQA"]
    # How long the others' steps are does not matter.
    (other,) = (run for run in results["runs"].values() if run["name"] == "GQA")
    other["ms_per_step"] = 30.0
    assert plan.timed_finalists(results, list(order)) == ["T6, c", "MHA", "GQA"]


def test_equal_times():
    runs = {plan.Run(name, 1e-3, 0, 100): 2.0 for name in ("T6", "MHA", "GQA")}
    results = results_with(runs, {"T6": 50.0, "MHA": 40.0, "GQA": 49.5})
    assert plan.steps_of_equal_time(results, ["T6", "MHA", "GQA"]) == {"T6": 100, "MHA": 120, "GQA": 100}
    assert plan.steps_of_equal_time(results, ["T6", "MLA"]) == {}  # which has no time yet

    other = {plan.Run("MHA", 2e-3, 0, 125): 2.0}
    assert plan.steps_of_equal_time(results_with(runs | other, {"T6": 50.4, "MHA": 40.0}), ["T6", "MHA"])["MHA"] == 125
    assert plan.steps_of_equal_time(results_with(runs | other, {"T6": 54.0, "MHA": 40.0}), ["T6", "MHA"])["MHA"] == 140

    # A GPU that is faster has run one of the two, and a third model, whose time is that of the first GPU by what both ran.
    second, third = plan.Run("T6", 1e-3, 1, 100), plan.Run("GQA", 1e-3, 0, 100)
    results = results_with(runs | {second: 2.0, third: 2.0}, {"T6": 50.0, "MHA": 40.0})
    for run in results["runs"].values():
        run["gpu"] = "one"
    results["runs"][second.key] |= {"gpu": "faster", "ms_per_step": 40.0}
    results["runs"][third.key] |= {"gpu": "faster", "ms_per_step": 44.0}
    assert plan.step_seconds(results) == pytest.approx({"T6": 0.05, "MHA": 0.04, "GQA": 0.055})
    assert plan.steps_of_equal_time(results, ["T6", "MHA"]) == {"T6": 100, "MHA": 120}
    assert plan.steps_of_equal_time(results, ["GQA", "MHA"]) == {"GQA": 100, "MHA": 140}


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [
        ([1.0, 1.1], [1.2, 1.3], r"\*\*T6 is lowest\*\*, 0.2000 below MHA: every seed"),
        ([1.0, 1.25], [1.2, 1.3], r"\*\*T6 is lowest\*\*, 0.1250 below MHA: but their seeds overlap"),
        ([1.3, 1.4], [1.2], r"\*\*MHA is lowest\*\*, 0.1500 below T6: of one seed"),
        ([1.3, 1.4], [1.2, 1.21], r"\*\*MHA is lowest\*\*, 0.1450 below T6: every seed"),
    ],
    ids=["T6", "overlap", "one seed", "twin"],
)
def test_verdict(ours, theirs, expected):
    rows = {"T6": ours, "MHA": theirs, "GQA": [2.0] if len(theirs) == 1 else [0.5]}
    text = report.verdict({name: [{"loss": loss} for loss in losses] for name, losses in rows.items()})
    assert re.match(expected, text), text
    assert "There are not yet a T6 and a twin here" in report.verdict({"GQA": [{"loss": 2.0}]})


# Training


@pytest.fixture(scope="module")
def opened(data) -> tuple[ablations.Configurations, torch.Tensor, dict[str, torch.Tensor]]:
    tokenizer, tokens = read_tokens(data, torch.device("cpu"))
    return (
        ablations.Configurations(SIZES, tokenizer),
        tokens["train"],
        held_out_windows(data, tokens["held_out"], 16),
    )


def new_training(opened, run: plan.Run = RUN, is_compiled: bool = False) -> Training:
    training = Training(run, *opened, is_compiled)
    training.prepare(is_captured=False)
    return training


def test_held_out_windows(tmp_path, data, monkeypatch):
    """Each kind has windows of its own tokens alone; a kind that is too short has none."""
    facts = {"kinds": {"c": {"held_out_tokens": 35}, "docs": {"held_out_tokens": 4}, "prose": {"held_out_tokens": 90}}}
    monkeypatch.setattr("comparison.training.open_prepared", lambda folder: (None, facts))
    monkeypatch.setattr("comparison.training.HELD_OUT_WINDOWS", 3)
    windows = held_out_windows(data, torch.arange(129), 16)
    assert windows["c"].equal(torch.stack([torch.arange(17), torch.arange(16, 33)])) and set(windows) == {"c", "prose"}
    assert windows["prose"][:, 0].tolist() == [39, 71, 103] and windows["prose"].shape == (3, 17)


def test_batches_fit():
    """Windows are one token longer than blocks, and end within the text."""
    settings = {"max_steps": 50, "sequences_per_step": 4, "block_length": 10}
    for count in (21, 30, 31, 99):
        assert batch_starts(count, settings, 0).max() + 11 <= count


@pytest.mark.parametrize("name", ["T6", "GQA, QK norm", "MLA"])
def test_losses_are_those_of_the_model(opened, name):
    """With the causal masks of Transformers' eager attention."""
    training = new_training(opened, RUN._replace(model=name))
    training.load(0)
    training.step()
    found = training.evaluate()
    windows = opened[2]["text"]
    training.model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = training.model(windows[:, :-1]).logits
    expected = nn.functional.cross_entropy(logits.double().flatten(0, 1), windows[:, 1:].flatten())
    assert found["loss"] == found["text"] == pytest.approx(expected.item(), abs=1e-4)


def test_stopped_run_goes_on(opened, tmp_path, monkeypatch):
    """From its checkpoint, to the losses of a run that was not stopped; one that could not end does not start."""
    monkeypatch.setattr("comparison.training.TRIAL_STEPS", 1)
    far, checkpoint = time.time() + 1e6, tmp_path / "work" / "run.pt"
    whole = new_training(opened).train(far, checkpoint)
    assert not checkpoint.exists() and [entry["step"] for entry in whole["curve"]] == [3, 6, 7]
    assert whole["curve"][-1]["loss"] < whole["curve"][0]["loss"]

    assert new_training(opened).train(time.time() - 1e6, checkpoint) is None and not checkpoint.exists()
    clock = iter([0.0])  # past the end after the first look
    fake = SimpleNamespace(monotonic=time.monotonic, time=lambda: next(clock, 1e9))
    with monkeypatch.context() as patch:
        patch.setattr("comparison.training.time", fake)
        assert new_training(opened).train(100.0, checkpoint) is None
    assert torch.load(checkpoint, weights_only=True)[0] == 3
    resumed = new_training(opened).train(far, checkpoint)
    assert not checkpoint.exists()
    for name in ("loss", "loss_by_kind", "curve"):
        assert resumed[name] == whole[name]


def test_what_a_device_cannot(data, tmp_path, monkeypatch, capsys):
    """It is told once, and steps are taken in the next way; what fails in the last way fails."""
    worker = Worker(data, SIZES, False, tmp_path, math.inf, torch.device("cpu"), None)
    assert worker.ways == [(False, False)]
    worker.ways = [(False, True), (False, False)]  # as on a GPU
    monkeypatch.setattr(Training, "captured", lambda self: torch.zeros(2).view(3))
    for _ in range(2):
        assert worker.prepared(RUN).is_captured is False
    assert capsys.readouterr().err.count("T6 lr 0.001 seed 0 steps 7, compiled: False, captured: True\n") == 1
    worker.ways = [(False, True)]
    with pytest.raises(RuntimeError, match="shape"):
        worker.prepared(RUN)


def test_loss_that_is_no_number(opened, tmp_path):
    with pytest.raises(RuntimeError, match="the loss is nan at step 3"):
        new_training(opened, plan.Run("GQA", math.inf, 0, 7)).train(time.time() + 1e6, tmp_path / "x.pt")


def moved_weights(data: Path, device: torch.device, name: str, is_captured: bool) -> torch.Tensor:
    """All weights after seven steps less the first ones, [parameters]."""
    tokenizer, tokens = read_tokens(data, device)
    windows = held_out_windows(data, tokens["held_out"], 16)
    configurations = ablations.Configurations(SIZES, tokenizer)
    training = Training(RUN._replace(model=name), configurations, tokens["train"], windows, False)
    first = nn.utils.parameters_to_vector(training.model.parameters()).detach().clone()
    training.prepare(is_captured)
    assert nn.utils.parameters_to_vector(training.model.parameters()).equal(first)
    for index in range(7):
        training.load(index)
        training.take_step()
        training.evaluate()
    return nn.utils.parameters_to_vector(training.model.parameters()).detach() - first


@pytest.mark.skipif(os.environ.get("T6_TEST_DEVICE") != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", ["T6", "GQA, QK norm", "MLA"])
def test_captured_steps(data, name):
    """A CUDA graph, replayed with other tokens and learning rates and with evaluations between, moves weights as steps without do."""
    expected, found = (moved_weights(data, torch.device("cuda"), name, captured) for captured in (False, True))
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", once_but(["MHA, QK norm", "T6", "T6, QK norm", "MLA"], "T6, QK norm"))
def test_one_graph_for_all_layers(opened, name, monkeypatch):
    """Layers, the last norm and the loss: three graphs, of the same losses as without."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain = new_training(opened, RUN._replace(model=name))
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile_function(f, backend=backend, **kwargs))
    compiled = new_training(opened, RUN._replace(model=name), is_compiled=True)
    assert len(graphs) == 3
    for training in (plain, compiled):
        training.load(0)
        training.step()
    torch.testing.assert_close(plain.loss, compiled.loss)
    assert compiled.evaluate() == pytest.approx(plain.evaluate(), abs=1e-4) and len(graphs) == 3


# Runs and their report


# Of a run in the results, in those of earlier versions, too.
FIELDS = [
    "name", "learning_rate", "seed", "steps", "tokens", "loss", "loss_by_kind", "non_embedding_parameters", "heads",
    "key_value_heads", "intermediate_size", "cache_bytes_per_token", "ms_per_step", "tokens_per_second", "seconds",
    "memory_gib", "is_compiled", "is_captured", "device", "gpu", "torch", "curve",
]  # fmt: skip


@pytest.mark.once
def test_run_and_report(data, tmp_path, monkeypatch, capsys):
    results_file, output = tmp_path / "results" / "comparison.json", tmp_path / "docs" / "comparison.md"
    models = ["--models", "MHA, QK norm", "T6", "GQA"]
    common = ["--data", str(data), "--results", str(results_file), *TINY, *models]
    options = ["run", *common, "--work-dir", str(tmp_path / "work"), "--cpu", "--no-compile"]
    monkeypatch.setattr(plan, "SEEDS", (0, 1))
    monkeypatch.setattr(plan, "MAX_RATE_FACTOR", 1)  # no rate but the first
    for name in ("SAME_TIME", "MAX_STEP"):
        monkeypatch.setattr(plan, name, math.inf)  # times of such steps are chance
    with pytest.raises(SystemExit, match="is no file of compare.py|cannot read"):
        compare.main(["report", "--results", str(results_file), "--output", str(output)])
    compare.main(options)
    assert "0 of the runs known to be needed are left" in capsys.readouterr().out
    results = json.loads(results_file.read_text())
    assert len(results["runs"]) == 6
    for key, run in results["runs"].items():
        assert key == plan.Run(run["name"], run["learning_rate"], run["seed"], run["steps"]).key
        assert list(run) == FIELDS and list(run["curve"][0]) == ["step", "loss", "text"]
        assert run["curve"][-1]["step"] == 7 and run["tokens"] == 7 * 64 and list(run["loss_by_kind"]) == ["text"]
    assert str(tmp_path) not in results_file.read_text()
    lock = locks.take_lock(tmp_path / "work")
    with pytest.raises(SystemExit, match="--work-dir .*: another call is at work with it"):
        compare.main(options)
    locks.release(lock)
    with pytest.raises(SystemExit, match="has max_steps=7, this command 8"):
        compare.main([*options, "--max-steps", "8"])
    for words, message in (
        (["--head-dim", "16"], "--hidden-size 32: expected a multiple of 4 heads of --head-dim 16"),
        (["--block-length", "2000"], "tokens has 2968 training tokens of a kind: expected 4000"),
        (["--block-length", "900"], "tokens has 742 held-out tokens of a kind: expected 901, or less --block-length"),
    ):
        with pytest.raises(SystemExit, match=message):
            compare.main([*options, *words, "--results", str(tmp_path / "other.json")])
    with pytest.raises(SystemExit, match="there is no T7; there are MHA, QK norm; T6; "):
        compare.main(["plan", *common[:-3], "T7"])
    compare.main(["plan", *common])
    assert capsys.readouterr().out.count("done  ") == 6

    compare.main(["report", "--results", str(results_file), "--output", str(output)])
    text = output.read_text()
    assert capsys.readouterr().out == text
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG" and "](comparison.png)" in text
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert list(sections)[:4] == ["Equal parameters", "Equal heads", "Equal bytes of cache", "Equal training time"]
    losses = [results["runs"][plan.Run("T6", compare.LEARNING_RATE, seed, 7).key]["loss"] for seed in (0, 1)]
    row = next(line for line in sections["Equal parameters"].splitlines() if line.startswith("| T6 |")).split(" | ")
    assert row[6] == f"{sum(losses) / 2:.4f} ± {abs(losses[0] - losses[1]) / 2:.4f}"
    assert "| MHA, QK norm |" not in sections["Equal bytes of cache"] and "| GQA |" in sections["Equal bytes of cache"]
    assert all(" is lowest**" in sections[name] for name in list(sections)[:4] if "bytes" not in name)
    assert "There are not yet a T6 and a twin here" in sections["Equal bytes of cache"]
    assert "cpu, torch " in text and "steps not compiled and not captured. Tokens " in text
    assert f"* MLA lr {compare.LEARNING_RATE:g} seed 0 steps 7" in sections["Not run yet"]
