"""Smaller caches from the command line: the table, the files, healing, and going on after a kill."""

import copy
import json
import math
import os
import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerState, TrainingArguments

from conversion.__main__ import main, parse_args
from conversion.files.folders import last_checkpoint
from conversion.files.tokenizer import load_tokenizer
from conversion.smaller import heal, text
from conversion.smaller import options as smaller_options
from conversion.smaller.heal import DistillationTrainer, compiled_layers, distillation_loss, make_optimizer, run
from conversion.smaller.pipeline import Texts
from conversion.smaller.straight_through import rounded_rows
from modeling_t6 import T6Config, T6ForCausalLM
from modeling_t6.cache_t6 import CACHE_NAME

from ... import processes
from ..common import divergence, last_error, log_probabilities, source_model


ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A source with 4 key/value heads and a tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("smaller")
    source_model("llama", "mha", num_hidden_layers=2, max_position_embeddings=32).save_pretrained(folder / "source")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "source")
    generator = random.Random(0)
    for name, lines in (("calibration", 300), ("heal", 900)):
        words = (" ".join(f"w{generator.randrange(1, 99)}" for _ in range(16)) for _ in range(lines))
        (folder / f"{name}.txt").write_text("\n".join(words) + "\n")
    return folder


def options(folder: Path, target: Path, *more: str) -> list[str]:
    calibration = ["--calibration", str(folder / "calibration.txt")]
    few = ["--batch-size", "4", "--device", "cpu", "--reconstruct-steps", "10"]
    return ["hf", str(folder / "source"), str(target), *calibration, *few, *more]


def healing(folder: Path, steps: int) -> list[str]:
    return ["--heal", str(folder / "heal.txt"), "--heal-steps", str(steps), "--heal-learning-rate", "3e-3"]


@pytest.mark.once
@pytest.mark.parametrize("option", ["--heal-learning-rate", "--cache-ratio"])
def test_numbers_without_end(option, capsys):
    """Half of an infinite learning rate is as large: healing would begin anew for ever."""
    with pytest.raises(SystemExit, match="2"):
        parse_args(["hf", "source", "t6", option, "inf"])
    assert f"argument {option}: invalid positive float value: 'inf'" in capsys.readouterr().err


@pytest.mark.once
@pytest.mark.parametrize("seed", ["-1", str(2**32 - 1)])
def test_seeds_that_no_library_takes(seed, capsys):
    """Known before the work, not when healing begins."""
    with pytest.raises(SystemExit, match="2"):
        parse_args(["hf", "source", "t6", "--k-rank", "1", "--seed", seed])
    assert "argument --seed: invalid non-negative int value" in capsys.readouterr().err


@pytest.mark.once
def test_a_model_without_numbers_is_not_written(folder, tmp_path, monkeypatch, capsys):
    """Healing can fail behind the last step whose loss was looked at."""

    def diverges(model, *args, **kwargs):
        model.lm_head.weight.data.fill_(math.nan)

    monkeypatch.setattr(heal, "heal", diverges)
    ranks = ["--k-rank", "2", "--v-rank", "2", "--retrieval-samples", "0"]
    assert main(options(folder, tmp_path / "t6", *ranks, *healing(folder, 2))) == 1
    assert "the healed model has perplexity nan: expected a number; lower --heal-learning-rate" in last_error(capsys)
    assert not (tmp_path / "t6").exists()


def test_compresses_and_heals(folder, tmp_path, capsys):
    target, half = tmp_path / "t6", ["--cache-ratio", "2", "--cache-dtype", "model"]
    assert main(options(folder, target, *half, *healing(folder, 160))) == 0
    output, bars = capsys.readouterr()
    for word in (
        "source",
        "exact",
        "compressed",
        "healed",
        "bytes per token",
        "perplexity",
        "each attention's output",
    ):
        assert word in output
    shown = {line.partition(":")[0] for line in bars.replace("\r", "\n").splitlines() if "%|" in line}
    perplexities = {f"perplexity, {name}" for name in ("source", "exact", "compressed", "healed")}
    retrieval, windows = ({f"{what}, source", f"{what}, result"} for what in ("retrieval", "windows"))
    assert shown == {
        "converting",
        "calibrating",
        "trying ranks",
        "fitting",
        "reconstructing",
        *perplexities,
        *retrieval,
        *windows,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t6"]

    report = json.loads((target / "conversion.json").read_text())
    rows = {row["model"]: row for row in report["perplexity"]}
    assert list(rows) == ["source", "exact", "compressed", "healed"]
    assert rows["exact"]["perplexity"] == pytest.approx(rows["source"]["perplexity"], rel=1e-5)
    assert rows["source"]["cache_bytes_per_token"] == 2 * 2 * 64 * 4 == 2 * rows["healed"]["cache_bytes_per_token"]
    assert [row["model"] for row in report["retrieval"]] == ["source", "result"]
    for row in report[
        "retrieval"
    ]:  # words alone are no sentences: the tasks are told in ids, those that 32 tokens hold
        assert [(s["task"], s["length"], s["count"]) for s in row["scores"]] == [
            (task, 32, 4) for task in ("needle", "keys", "values", "variables", "copying")
        ]
        assert row["log_probability"] < 0 and f"{row['log_probability']:.3f}" in output
    assert str(tmp_path) not in json.dumps(report) and report["source_model_type"] == "llama"
    picture = (target / "conversion.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000

    # The numbers of the table, counted anew from what was written.
    source = AutoModelForCausalLM.from_pretrained(folder / "source").eval()
    model = T6ForCausalLM.from_pretrained(target).eval()
    content = (folder / "calibration.txt").read_text()
    held_out = content[content.index("\n", int(len(content) * 0.9)) + 1 :]
    ids = torch.tensor([int(word[1:]) for word in held_out.split()])
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    for name, reread, found in zip(("source", "healed"), (source, model), report["retrieval"]):
        with torch.no_grad():
            loss = reread(ids, labels=ids).loss.item()
            some = ids[torch.linspace(0, len(ids) - 1, min(len(ids), 32)).long()]
            last = reread(some[:, :-1]).logits[:, 15:].float().transpose(1, 2)
        assert math.exp(loss) == pytest.approx(rows[name]["perplexity"], rel=1e-4)
        assert found["cache_bytes_per_token"] == rows[name]["cache_bytes_per_token"]
        bucket = found["loss_by_position"][-1]
        assert (bucket["first"], bucket["last"]) == (16, 31) and f"{bucket['loss']:.3f}" in output
        assert bucket["loss"] == pytest.approx(torch.nn.functional.cross_entropy(last, some[:, 16:]).item(), rel=1e-4)

    # Healing brings the predictions back towards the source's.
    assert main(options(folder, tmp_path / "unhealed", *half, "--no-verify")) == 0
    expected = log_probabilities(source, ids)
    unhealed = T6ForCausalLM.from_pretrained(tmp_path / "unhealed").eval()
    assert (unhealed.config.k_rank, unhealed.config.v_rank) == (model.config.k_rank, model.config.v_rank)
    assert divergence(model, ids, expected) < 0.9 * divergence(unhealed, ids, expected)
    tokens = model.generate(ids[:2, :8], max_new_tokens=8, do_sample=False)
    assert tokens.shape == (2, 16)


@pytest.mark.once
def test_rows_of_8_bits_are_chosen_where_they_lose_less(folder, tmp_path, capsys):
    """Whole heads in 8 bits, beside half of them in the model's dtype; what is saved uses such rows by itself."""
    target = tmp_path / "t6"
    assert main(options(folder, target, "--cache-ratio", "2")) == 0
    assert "rows of the cache in float8_e4m3fn" in capsys.readouterr().out
    rows = json.loads((target / "conversion.json").read_text())["perplexity"]
    assert rows[-1]["cache_bytes_per_token"] == 2 * 2 * 64 == rows[0]["cache_bytes_per_token"] / 4  # of float32
    model = T6ForCausalLM.from_pretrained(target)
    assert (model.config.k_rank, model.config.v_rank, model.config.cache_dtype) == (4, 4, "float8_e4m3fn")
    cache = getattr(model(torch.ones(1, 5, dtype=torch.long)), CACHE_NAME)
    assert cache.layers[1].keys.dtype == cache.layers[1].values.dtype == torch.float8_e4m3fn


# Converts, and is killed as soon as there is a checkpoint. Arguments: the checkpoints' folder, then those of the conversion.
KILLED = """if True:
    import os, signal, sys, threading, time
    from pathlib import Path
    from conversion.__main__ import main
    from conversion.files.folders import last_checkpoint

    def kill():
        while last_checkpoint(Path(sys.argv[1])) is None:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    sys.exit(main(sys.argv[2:]))"""


@pytest.mark.once
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_goes_on_after_a_kill(optimizer, folder, tmp_path, capsys):
    """A run that is killed while it heals leaves no result, and ends as if it had not been killed."""
    more = ["--heal-optimizer", optimizer, "--k-rank", "1,2", "--v-rank", "1", "--retrieval-samples", "0"]
    more += ["--no-verify", *healing(folder, 12)]
    assert main(options(folder, tmp_path / "whole", *more)) == 0
    checkpoints = tmp_path / ".t6.unfinished" / "checkpoints"
    arguments = [str(checkpoints), *options(folder, tmp_path / "t6", *more)]
    killed = processes.run(KILLED, *arguments, env=dict(os.environ), cwd=ROOT)
    assert killed.code == -signal.SIGKILL and not (tmp_path / "t6").exists(), killed.stderr

    # Another run is not taken for its continuation.
    other = [*more[:-1], "1e-3"]
    assert main(options(folder, tmp_path / "t6", *other)) == 1
    assert "--heal-learning-rate 0.003, this one has 0.001" in last_error(capsys)
    assert main(options(folder, tmp_path / "t6", *more)) == 0
    assert "healing goes on from checkpoint-" in capsys.readouterr().out
    assert not list(tmp_path.glob(".t6.unfinished"))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "t6"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_part_of_a_checkpoint(part, tmp_path):
    """Whatever part of its last file a killed run wrote, the checkpoint before is the one to go on from."""
    for step in (10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_checkpoint(tmp_path) is None
    state = tmp_path / "checkpoint-9" / "trainer_state.json"
    TrainerState(global_step=9).save_to_json(str(state))
    assert last_checkpoint(tmp_path) == state.parent
    whole = state.read_text().strip()
    state_10 = tmp_path / "checkpoint-10" / "trainer_state.json"
    state_10.write_text(whole[: int(part * (len(whole) - 1))])
    assert last_checkpoint(tmp_path) == state.parent
    state_10.write_text(whole)
    assert last_checkpoint(tmp_path) == state_10.parent


@pytest.mark.once
def test_mean_pool(folder, tmp_path):
    target = tmp_path / "t6"
    more = ["--method", "mean-pool", "--k-rank", "2", "--v-rank", "2", "--reconstruct-steps", "0"]
    assert main(options(folder, target, *more)) == 0
    source = AutoModelForCausalLM.from_pretrained(folder / "source")
    weight = T6ForCausalLM.from_pretrained(target).model.layers[1].self_attn.k_b_proj.weight
    heads = source.model.layers[1].self_attn.k_proj.weight.view(2, 2, 16, 64)
    assert torch.allclose(weight, heads.mean(1).flatten(0, 1), atol=1e-6)


HEAL = ["--heal", "HEAL", "--heal-steps", "5"]
REFUSED = {
    "rank-0": (["--k-rank", "0"], "--k-rank 0: expected 1 to 4"),
    "rank-5": (["--v-rank", "5"], "--v-rank 5: expected 1 to 4"),
    "three-ranks": (["--k-rank", "1,2,1"], "--k-rank has 3 ranks: expected 1, or 2"),
    "both": (["--k-rank", "1", "--cache-ratio", "2"], "--cache-ratio chooses the ranks itself"),
    "ratio-too-large": (["--cache-ratio", "9"], "--cache-ratio 9: expected 1 to 8"),
    "ratio-too-large-for-16-bits": (
        ["--cache-ratio", "5", "--cache-dtype", "model"],
        "--cache-ratio 5: expected 1 to 4 for this model with --cache-dtype model",
    ),
    "ratio-below-one": (["--cache-ratio", "0.5"], "--cache-ratio 0.5: expected 1 to 8"),
    "dtype-without-ranks": (["--cache-dtype", "model"], "--calibration needs --k-rank"),
    "heal-without-ranks": (HEAL, "--calibration needs --k-rank"),
    "heal-without-steps": (["--k-rank", "1", *HEAL[:2]], "--heal and --heal-steps go together"),
    "tokens-without-heal": (["--k-rank", "1", "--heal-tokens", "9"], "--heal-tokens needs --heal"),
    "narrow-dtype": (["--k-rank", "1", "--compute-dtype", "bfloat16"], "would round the result's weights, which are float32"),
    "mean-pool-by-layer": (["--method", "mean-pool", "--cache-ratio", "2"], "one rank for all layers"),
    "no-text": (["--k-rank", "1", "--held-out", "nowhere.txt"], "nowhere.txt"),
    "empty-text": (["--k-rank", "1", "--held-out", "EMPTY"], "empty.txt is empty"),
    "not-text": (["--k-rank", "1", "--heal", "BYTES", "--heal-steps", "5"], "bytes.txt is not UTF-8 text"),
    "short-text": (["--k-rank", "1", "--held-out", "SHORT"], "short.txt has 3 tokens"),
    "window": (["--k-rank", "1", "--window", "33"], "--window 33: expected 2 to 32"),
}  # fmt: skip


@pytest.mark.parametrize("more, message", REFUSED.values(), ids=REFUSED)
def test_refused(more, message, folder, tmp_path, capsys):
    names = {"HEAL": "heal", "EMPTY": "empty", "BYTES": "bytes", "SHORT": "short"}
    for name, content in (("empty", b" \n"), ("bytes", b"w1 \xff\xfe"), ("short", b"w1 w2 w3\n")):
        (folder / f"{name}.txt").write_bytes(content)
    more = [str(folder / f"{names[word]}.txt") if word in names else word for word in more]
    assert main(options(folder, tmp_path / "t6", *more)) == 1
    assert message in last_error(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option, value", [("--method", "fit"), ("--device", "cuda:9"), ("--heal-tokens", "9"), ("--seed", "0")]
)
def test_options_of_a_smaller_cache(option, value, folder, tmp_path, capsys):
    """Of an exact conversion they would do nothing."""
    assert main(["hf", str(folder / "source"), str(tmp_path / "t6"), option, value]) == 1
    assert f"{option} needs --k-rank, --v-rank or --cache-ratio" in last_error(capsys)


def test_needs_calibration_and_a_tokenizer(folder, tmp_path, capsys):
    assert main(["hf", str(folder / "source"), str(tmp_path / "t6"), "--k-rank", "1"]) == 1
    assert "needs --calibration TEXT" in last_error(capsys)
    source_model("llama", "mha").save_pretrained(tmp_path / "bare")
    arguments = options(folder, tmp_path / "t6", "--k-rank", "1")
    arguments[1] = str(tmp_path / "bare")
    assert main(arguments) == 1
    assert "has no tokenizer" in last_error(capsys)


@pytest.mark.parametrize("package", ["matplotlib", "accelerate"])
def test_a_missing_package_is_named_before_any_work(package, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smaller_options, "find_spec", lambda name: None if name == package else True)
    assert main(options(folder, tmp_path / "t6", "--k-rank", "1", *healing(folder, 40))) == 1
    assert f"needs {package}: pip install" in last_error(capsys)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def model(folder) -> T6ForCausalLM:
    if not (folder / "exact").exists():
        assert main(["hf", str(folder / "source"), str(folder / "exact")]) == 0
    return T6ForCausalLM.from_pretrained(folder / "exact")


def test_loss_of_healing(model, folder, tmp_path):
    """KL, hidden states and the text's own loss, against float64 sums over the two models' outputs."""
    teacher = AutoModelForCausalLM.from_pretrained(folder / "source")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    ids = torch.randint(1, 99, (3, 32))
    expected = teacher(ids, output_hidden_states=True)
    outputs = model(ids, labels=ids, output_hidden_states=True)
    p, q = (x.logits.double().softmax(-1) for x in (expected, outputs))
    loss = (p * (p / q).log()).sum(-1).mean()
    for state, target in zip(outputs.hidden_states[1:], expected.hidden_states[1:]):
        loss += (state - target).double().square().sum() / target.double().square().sum() / 2  # layers

    def healing_loss(weight: float) -> torch.Tensor:
        arguments = TrainingArguments(str(tmp_path / "trainer"), use_cpu=True, report_to="none")
        trainer = DistillationTrainer(model=model, args=arguments, teacher=teacher, cross_entropy=weight)
        return trainer.compute_loss(model, {"input_ids": ids}).double()

    torch.testing.assert_close(healing_loss(0.0), loss, rtol=1e-4, atol=0)  # float32 sums of a hundred numbers
    torch.testing.assert_close(healing_loss(0.3), loss + 0.3 * outputs.loss, rtol=1e-4, atol=0)


def test_heals_on_some_tokens(folder, tmp_path):
    """What healing reads of its text, and options that reach it."""
    more = [*healing(folder, 4), "--heal-tokens", "100", "--heal-cross-entropy", "0.5"]
    args = parse_args(options(folder, tmp_path / "t6", "--k-rank", "1", *more))
    assert smaller_options.wants_smaller_cache(args) and args.heal_cross_entropy == 0.5
    config = T6Config(max_position_embeddings=32)
    texts = Texts(args, folder / "source", config)
    assert texts.healing.shape == (3, 32) and texts.healing.dtype == torch.long
    args.heal_tokens = None
    whole = Texts(args, folder / "source", config).healing
    assert len(whole) > 3 and torch.equal(texts.healing, whole[:3])

    # Windows of tokens are healed on as they are.
    given = torch.arange(5 * 32).view(5, 32) % 99
    args.heal = tmp_path / "heal.npy"
    np.save(args.heal, given.to(torch.uint8).numpy())
    assert torch.equal(Texts(args, folder / "source", config).healing, given)
    args.heal_tokens = 100
    assert torch.equal(Texts(args, folder / "source", config).healing, given[:3])


def test_defaults_of_methods():
    words = ["hf", "SRC", "DST", "--k-rank", "1", "--calibration", "TEXT", *HEAL]
    for method, steps, rate in (("fit", 500, 1e-4), ("mean-pool", 0, 3e-4)):
        for optimizer, times in (("adamw", 1), ("muon", 3)):
            args = parse_args([*words, "--method", method, "--heal-optimizer", optimizer])
            assert smaller_options.wants_smaller_cache(args)
            assert (args.reconstruct_steps, args.heal_learning_rate) == (steps, times * rate)


def test_optimizers_of_healing(model):
    """Each parameter is in one group, at its rate; a step of Muon has singular values of one size."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, divisor in (("adamw", 1), ("muon", 3)):
        optimizer = make_optimizer(model, name, 0.9, fused=False)
        rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert sorted(rates) == sorted(names.values()) and len(rates) == sum(
            len(g["params"]) for g in optimizer.param_groups
        )
        assert rates["model.layers.0.self_attn.q_proj.weight"] == 0.9
        assert rates["model.layers.1.mlp.down_proj.weight"] == pytest.approx(0.3)
        assert rates["model.layers.0.self_attn.k_a"] == pytest.approx(0.9 / divisor)
        assert rates["model.embed_tokens.weight"] == pytest.approx(0.3 / divisor)
    weight = model.model.layers[0].self_attn.q_proj.weight
    old, ids = weight.detach().clone(), torch.randint(1, 99, (2, 32))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    values = torch.linalg.svdvals(weight.detach() - old)
    expected = 0.9 * 0.2 * max(weight.shape) ** 0.5  # whose root mean square is that of AdamW's steps
    # Five Newton-Schulz steps in bfloat16 take the gradient's singular values to 0.7 to 1.2, but for the smallest.
    assert (values[: len(values) // 4] > 0.6 * expected).all() and (values < 1.3 * expected).all()


def test_a_loss_that_is_no_number(folder, tmp_path, capsys, monkeypatch):
    compute_loss = DistillationTrainer.compute_loss
    monkeypatch.setattr(
        DistillationTrainer, "compute_loss", lambda *args, **kwargs: compute_loss(*args, **kwargs) * float("nan")
    )
    assert main(options(folder, tmp_path / "t6", "--k-rank", "1", *healing(folder, 40))) == 1
    assert "cannot heal: the loss is nan" in last_error(capsys)
    assert not (tmp_path / "t6").exists()


@pytest.mark.once
def test_a_rate_that_is_too_high_is_halved(folder, tmp_path, capsys, monkeypatch):
    """A killed run goes on at the lower rate; where no rate is low enough, nothing is written."""
    rates, compute = [], heal.heal

    def heal_at(*args, learning_rate: float, **options):
        rates.append(learning_rate)
        if len(rates) == 5:
            raise KeyboardInterrupt
        return compute(*args, learning_rate=learning_rate, **options)

    monkeypatch.setattr(heal, "heal", heal_at)
    more = ["--k-rank", "1", "--retrieval-samples", "0", "--no-verify", *healing(folder, 40)[:-1]]
    assert main(options(folder, tmp_path / "t6", *more, "2")) == 130
    assert rates == [2, 1, 0.5, 0.25, 0.125]
    assert main(options(folder, tmp_path / "t6", *more, "2")) == 0
    printed = capsys.readouterr().out
    assert rates[5] == 0.125 and "at a learning rate of 2 the loss is " in printed
    assert printed.count(": healing begins anew at half of it") == len(set(rates)) - 1
    rows = json.loads((tmp_path / "t6" / "conversion.json").read_text())["perplexity"]
    perplexities = {row["model"]: row["perplexity"] for row in rows}
    assert perplexities["healed"] < 1.5 * perplexities["compressed"]

    assert main(options(folder, tmp_path / "other", *more, "1e4")) == 1
    assert re.search("at a learning rate of 156.25 the loss is .*: lower --heal-learning-rate", last_error(capsys))
    assert rates[-1] == 1e4 / 64 and not (tmp_path / "other").exists()


@pytest.mark.once
def test_healed_in_half_precision(tmp_path, monkeypatch):
    """As on a GPU. The model computes in its own precision again then."""
    monkeypatch.setattr(heal, "TrainingArguments", lambda **options: TrainingArguments(**options | {"bf16": True}))
    config = T6Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    )
    model, ids = T6ForCausalLM(config), torch.arange(4 * 16).view(4, 16)
    options = {"steps": 1, "batch_size": 4, "optimizer": "adamw", "learning_rate": 1e-3, "device": "cpu"}
    heal.heal(model, copy.deepcopy(model), ids, tmp_path / "checkpoints", **options)
    model.save_pretrained(tmp_path / "t6")
    with torch.no_grad():
        expected = T6ForCausalLM.from_pretrained(tmp_path / "t6").eval()(ids).logits
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.once
def test_what_is_watched_is_of_all_windows(model, folder, tmp_path, monkeypatch):
    """Questions, which are the last windows, too; before the first step, in whole batches."""
    seen = []

    def compute(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"])
        if len(seen) > 3:
            raise KeyboardInterrupt  # the first step
        return model.lm_head.weight.sum()

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute)
    monkeypatch.setattr(heal, "PROBED_BATCHES", 3)
    ids = torch.arange(50)[:, None].expand(50, 8)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "source").eval()
    options = {"steps": 10, "batch_size": 4, "optimizer": "adamw", "learning_rate": 1e-3, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        heal.heal(model, teacher, ids, tmp_path, **options)
    assert [len(batch) for batch in seen[:3]] == [4, 4, 4]
    assert torch.cat(seen[:3])[:, 0].tolist() == [0, 4, 8, 13, 17, 22, 26, 31, 35, 40, 44, 49]


def test_windows_hold_the_text(folder, monkeypatch):
    """Reading a text in pieces loses and repeats nothing; of the first windows, no more is read than they need."""
    tokenizer = load_tokenizer(folder / "source")
    lines = "".join(f"w{i % 98 + 1} w{i % 7 + 1}\n" for i in range(40_000))
    ids = text.windows(tokenizer, lines, 32, "text").flatten().tolist()
    assert ids == [int(word[1:]) for word in lines.split()][: len(ids)] and len(ids) == 80_000
    monkeypatch.setattr(text, "PIECES", 1)
    monkeypatch.setattr(text, "PIECE", 10_000)
    read = []
    first = text.windows(
        lambda pieces, **options: read.append(pieces) or tokenizer(pieces, **options), lines, 32, "text", 99
    )
    assert first.flatten().tolist() == ids[: 99 * 32] and len(read) == 2
    kept, held_out = text.split_held_out(lines)
    assert kept + held_out == lines and kept.endswith("\n") and 0.09 < len(held_out) / len(lines) < 0.11


@pytest.mark.once
@pytest.mark.parametrize(
    "whole, end",
    [
        ("one line " * 1000, " "),
        ("one line " * 1000 + "\n", " "),
        ("a\nline " + "b c " * 1000, " "),
        ("\u6771\u4eac" * 1000, ""),
    ],
    ids=["line", "ended", "long", "words"],
)
def test_held_out_of_one_line(whole, end):
    """A text may be one line, or end with a long one: a tenth is held out all the same."""
    kept, held_out = text.split_held_out(whole)
    assert kept + held_out == whole and kept.endswith(end) and 0.09 < len(held_out) / len(whole) < 0.11


@pytest.mark.once
def test_compiled_layers_compute_the_same(folder):
    """One graph for each pair of ranks, one for all layers of the source, one for the loss."""
    torch._dynamo.reset()
    teacher = AutoModelForCausalLM.from_pretrained(folder / "source").eval()
    config = T6Config(
        vocab_size=99, hidden_size=64, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4, head_dim=16, q_rank=None,
        k_rank=[1, 3, 1, 2], v_rank=[2, 2, 2, 1], noncontextual_a=True, qk_norm=False, cache_dtype="float8_e4m3fn",
    )  # fmt: skip
    model = T6ForCausalLM(config).train()
    for name, parameter in model.named_parameters():  # outputs are zeros at first
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, 99, (3, 17))
    counter = CompileCounterWithBackend("eager")

    def gradients(loss_function) -> list[torch.Tensor]:
        (expected, expected_states), (outputs, states) = run(teacher, ids), run(model, ids)
        assert [len(states), len(expected_states)] == [4, 2]
        loss = loss_function(outputs.logits, expected.logits, states[-2:], expected_states, ids, 0.5)
        found = list(torch.autograd.grad(loss, [*model.parameters()]))
        assert all(gradient.abs().max() > 1e-5 for gradient in found)
        return found

    with rounded_rows(model):
        expected = gradients(distillation_loss)
        with compiled_layers(model, teacher, backend=counter):
            loss_function = torch.compile(distillation_loss, backend=counter)
            for _ in range(2):
                torch.testing.assert_close(gradients(loss_function), expected, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 3 + 1 + 1
    assert "forward" not in vars(model.model.layers[0])
    assert torch.equal(run(model, ids)[1][0], model(ids, output_hidden_states=True).hidden_states[1])
