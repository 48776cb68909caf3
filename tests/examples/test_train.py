"""The training script: its folder, its resuming, what it measures, and what it refuses."""

import argparse
import json
import math
import os
import random
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import command_line
import language_modeling
import train
from tests import processes


ROOT = Path(__file__).parents[2]
TINY = """--hidden-size 16 --num-hidden-layers 2 --num-attention-heads 3 --head-dim 8 --q-rank 2 --k-rank 1 --v-rank 2
    --max-position-embeddings 16 --vocab-size 300 --batch-size 4 --max-steps 6 --eval-steps 2 --logging-steps 2
    --learning-rate 0.01 --warmup-steps 2 --dropout 0.1 --attention-dropout 0.1""".split()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only lose by more
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Lines of words, a few of them outside ASCII."""
    generator = random.Random(0)
    words = ["the", "king", "and", "queen", "of", "naïve", "Ωmega", "wood", "walks", "speaks", "\t"]
    lines = (" ".join(generator.choices(words, k=8)) for _ in range(200))
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory) -> argparse.Namespace:
    """One finished run."""
    folder = tmp_path_factory.mktemp("run") / "model"
    options = ["--text", str(text), *TINY, "--prompt", "the king", "--output-dir", str(folder)]
    return argparse.Namespace(folder=folder, report=train.main(options), text=text)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folder_is_complete(run):
    code = {path.name for path in (ROOT / "modeling_t6").glob("*.py")} - {"__init__.py"}
    files = {path.name for path in run.folder.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert expected | {"tokenizer.json", "tokenizer_config.json", "modeling_t6.py"} <= files
    assert {name for name in files if name.endswith(".py")} <= code
    # Nothing temporary; "other" is the folder of another test.
    assert {path.name for path in run.folder.parent.iterdir()} - {"other"} == {"model", "model-checkpoints"}

    config = json.loads((run.folder / "config.json").read_text())
    assert config["use_cache"] and config["auto_map"]["AutoModelForCausalLM"] == "modeling_t6.T6ForCausalLM"
    card = (run.folder / "README.md").read_text()
    assert card.startswith("---\n") and f"{run.report['bits_per_byte']:.4f}" in card
    assert f"--text {run.text}" in card and "words.txt" in card and "license: apache-2.0" in card
    # 1 (8 + 8) numbers of keys and 2 (8 + 8) of values, 3 heads padded to 8, in 2 layers of float32.
    assert "384 bytes; MHA with the same heads: 384 bytes" in card


@pytest.mark.once  # with the oldest, too: `test_remote_code.py`
def test_loads_in_a_process_without_the_package(run, tmp_path):
    code = """if True:
        import sys
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        # Without the flag, AutoTokenizer too asks whether to trust the code that config.json names.
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
        inputs = tokenizer(["the king", "the queen and the"], return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert output.shape[1] == inputs["input_ids"].shape[1] + 4
        assert "modeling_t6" not in sys.modules
        print(tokenizer.decode(output[0], skip_special_tokens=True))"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = processes.run(code, str(run.folder), env=environment, cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert result.stdout.startswith("the king")


def test_reported_loss(run):
    """Against a plain sum over the held-out text, one token at a time past the first."""
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    model = AutoModelForCausalLM.from_pretrained(run.folder)
    text = run.text.read_text(encoding="utf-8")
    held_out = text[text.index("\n", round(0.9 * len(text))) + 1 :]
    ids = [tokenizer.bos_token_id, *tokenizer(held_out)["input_ids"]]
    nats = 0.0
    for start in range(0, len(ids) - 1, 15):
        window = torch.tensor([ids[start : start + 16]])
        log_probabilities = model(window).logits[0, :-1].log_softmax(-1)
        nats -= log_probabilities.gather(-1, window[0, 1:, None]).sum().item()
    expected = {
        "loss_per_token": nats / (len(ids) - 1),
        "loss_per_character": nats / len(held_out),
        "bits_per_byte": nats / math.log(2) / len(held_out.encode()),
    }
    assert run.report == pytest.approx(expected, rel=1e-5)
    assert run.report["loss_per_token"] < math.log(300)  # it learned something
    # It is the best of the evaluations that Trainer made.
    state = json.loads(
        (command_line.last_checkpoint(run.folder.with_name("model-checkpoints")) / "trainer_state.json").read_text()
    )
    evaluations = [entry["eval_bits_per_byte"] for entry in state["log_history"] if "eval_bits_per_byte" in entry]
    assert len(evaluations) == 3 and min(evaluations) == pytest.approx(run.report["bits_per_byte"], rel=1e-4)


def test_resumed_run_equals_uninterrupted_run(run, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    options = ["--text", str(run.text), *TINY, "--prompt", "the king", "--output-dir", str(folder)]
    get_window = train.RandomWindows.__getitem__

    def interrupted(dataset, index):
        if index >= 5 * 4:  # in the sixth step; the last checkpoint is that of the fourth
            raise KeyboardInterrupt
        return get_window(dataset, index)

    monkeypatch.setattr(train.RandomWindows, "__getitem__", interrupted)
    with pytest.raises(SystemExit, match="130"):
        train.main(options)
    monkeypatch.undo()
    assert not folder.exists()
    assert command_line.last_checkpoint(tmp_path / "model-checkpoints").name == "checkpoint-4"
    (tmp_path / "model-checkpoints" / "checkpoint-5").mkdir()  # a checkpoint that a killed run left half written

    (tmp_path / "longer.txt").write_text(run.text.read_text(encoding="utf-8") + "one more line\n", encoding="utf-8")
    for changed, named in (
        (["--hidden-size", "24"], "hidden_size=16, this command has 24"),
        (["--text", str(tmp_path / "longer.txt")], "held_out_text_sha256="),
        (["--validation-text", str(run.text)], "training_text_sha256="),
        (["--learning-rate", "2e-4"], "learning_rate=.*, this command has 0.0002"),
        (["--max-steps", "9"], "max_steps=6, this command has 9"),
        (["--gradient-accumulation", "3"], "windows_per_step=4, this command has 12"),
        (["--dropout", "0.2"], "dropout=0.1, this command has 0.2"),
        (["--attention-dropout", "0.2"], "attention_dropout=0.1, this command has 0.2"),
        (["--vocab-size", "290"], "vocab_size=300, this command has 290"),
        (["--tokenizer", str(run.folder)], "tokenizer=None"),
        (["--seed", "9"], "seed=0, this command has 9"),
    ):
        with pytest.raises(SystemExit, match=f"--resume: the run was started with {named}"):
            train.main([*options, *changed, "--resume"])
    report = train.main([*options, "--resume"])
    assert report == pytest.approx(run.report, rel=1e-5)
    for name, tensor in load_file(run.folder / "model.safetensors").items():
        torch.testing.assert_close(load_file(folder / "model.safetensors")[name], tensor, rtol=1e-5, atol=1e-6)


def test_failed_run_leaves_the_old_folder(run, monkeypatch):
    def fail(*args):
        raise RuntimeError("stopped")

    before = snapshot(run.folder)
    options = ["--text", str(run.text), *TINY, "--output-dir", str(run.folder)]
    monkeypatch.setattr(train, "model_card", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        train.main([*options, "--overwrite", "--seed", "1", "--checkpoint-dir", str(run.folder.parent / "other")])
    assert snapshot(run.folder) == before
    assert {path.name for path in run.folder.parent.iterdir()} == {"model", "model-checkpoints", "other"}


def test_loss_that_is_no_number(text, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "window_losses", lambda logits, labels: torch.full((len(labels),), torch.nan))
    with pytest.raises(SystemExit, match="the held-out loss was never a number"):
        train.main(["--text", str(text), *TINY, "--max-steps", "2", "--output-dir", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


@pytest.mark.once
def test_other_sources_and_options(run, tmp_path):
    """A saved tokenizer and configuration, held-out text of its own, half precision, epochs; then replaced."""
    config = json.loads((run.folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "other.txt").write_text("the queen speaks of wood\n" * 9)
    folder = tmp_path / "model"
    options = f"""--text {run.text} {tmp_path / "other.txt"} --validation-text {tmp_path / "other.txt"}
        --config {tmp_path} --tokenizer {run.folder} --q-rank none --set rms_norm_eps=1e-5 --epochs 0.1 --batch-size 2
        --block-length 12 --gradient-accumulation 2 --save-dtype bfloat16 --output-dir {folder}""".split()
    train.main(options)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and "model.layers.0.self_attn.q_proj.weight" in model.state_dict()
    assert (model.config.num_hidden_layers, model.config.q_rank, model.config.rms_norm_eps) == (1, None, 1e-5)
    assert (folder / "tokenizer.json").read_bytes() == (run.folder / "tokenizer.json").read_bytes()
    assert "held out (other.txt)" in (folder / "README.md").read_text()

    train.main([*options, "--overwrite", "--seed", "3", "--save-dtype", "float32", "--hidden-size", "24"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.dtype, model.config.hidden_size, model.config.intermediate_size) == (torch.float32, 24, 64)


def test_dataset(text, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = text.read_text(encoding="utf-8").splitlines()
    (tmp_path / "data").mkdir()
    documents = [json.dumps({"words": "\n".join(lines[start : start + 10])}) for start in range(0, 200, 10)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(documents))
    options = ["--dataset", str(tmp_path / "data"), *TINY, "--max-steps", "1", "--output-dir", str(tmp_path / "model")]
    with pytest.raises(SystemExit, match="no column 'text', only words"):
        train.main(options)
    train.main([*options, "--text-column", "words"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size <= 300


def test_tokenizer_keeps_every_byte(run):
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    text = "the king\n\n  of — 木 \U0001f600\x00 , 'tis"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token == "<|pad|>"
    assert tokenizer.model_max_length == 16


def test_split():
    documents = ["one\ntwo\n", "three\nfour\nfive\n", "six\n"]
    training, held_out = train.split_documents(documents, 0.5)
    assert (training, held_out) == (["one\ntwo\n", "three\nfour\n"], ["five\n", "six\n"])
    assert train.split_documents(["no line ends here"], 0.25) == (["no line ends "], ["here"])


def test_random_windows():
    tokens = torch.arange(103)
    windows = train.RandomWindows(tokens, block_length=10, num_windows=45, seed=3)
    passes = [torch.cat([windows[9 * number + i] for i in range(9)]).tolist() for number in range(5)]
    assert all(len(set(seen)) == 90 for seen in passes)  # each token at most once in a pass
    assert len({tuple(seen) for seen in passes}) == 5 and len({min(seen) for seen in passes}) > 1
    again = train.RandomWindows(tokens, block_length=10, num_windows=99, seed=3)
    assert again[30].equal(windows[30]) and again[2].equal(windows[2])  # in any order, whatever the length
    other = train.RandomWindows(tokens, block_length=10, num_windows=45, seed=4)
    assert torch.cat([other[i] for i in range(9)]).tolist() not in passes
    shortest = train.RandomWindows(tokens[:10], block_length=10, num_windows=2, seed=0)
    assert shortest[1].equal(tokens[:10])


@pytest.mark.parametrize("length", [2, 9, 10, 11, 28, 29])
def test_held_out_windows_predict_each_token_once(length):
    windows = train.held_out_windows(torch.arange(length), block_length=10)
    assert all(len(window) == min(length, 10) for window in windows)
    batch = language_modeling.collate(windows)
    labels = batch["labels"][:, 1:]
    assert labels[labels != language_modeling.IGNORED].tolist() == list(range(1, length))
    assert batch["input_ids"].min() >= 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--text", "{tmp}/missing.txt"], r"cannot read .*missing.txt: No such file"),
        (["--text", "{tmp}/empty.txt"], "the training text is empty"),
        (["--text", "{tmp}/binary.txt"], "is not UTF-8 text"),
        (["--text", "{text}", "--validation-text", "{tmp}/empty.txt"], "the held-out text is empty"),
        (["--text", "{tmp}/short.txt"], r"the training text has \d+ tokens, less than one block of 16"),
        (["--text", "{text}", "--block-length", "17"], "--block-length 17 exceeds the 16 of the model"),
        (["--text", "{text}", "--resume"], "--resume: there is no checkpoint in .*new-checkpoints"),
        (["--text", "{text}", "--head-dim", "7"], "no such architecture: .*even number of features"),
        (["--text", "{text}", "--set", "ranks=1"], "T6Config has no field ranks"),
        (["--text", "{text}", "--set", "vocab_size=4096"], "--set vocab_size: tokens are those of the tokenizer"),
        (["--text", "{text}", "--config", "{tmp}/missing"], "cannot read .*missing"),
        (["--text", "{text}", "--config", "{text}"], "is not JSON"),
        (["--text", "{text}", "--config", "{tmp}/gpt2.json"], "does not describe a T6 model"),
        (["--text", "{text}", "--tokenizer", "{tmp}/missing"], "cannot load the tokenizer"),
    ],
)
def test_one_line_errors(text, tmp_path, options, message):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short.txt").write_text("to be\nnot")
    (tmp_path / "gpt2.json").write_text('{"model_type": "gpt2"}')
    options = [option.format(tmp=tmp_path, text=text) for option in options]
    with pytest.raises(SystemExit) as caught:
        train.main([*TINY, "--output-dir", str(tmp_path / "new"), *options])
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    assert re.search(message, caught.value.code)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("signals_of_a_terminal")
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_command_ends_in_one_line(number, code, capsys):
    with pytest.raises(SystemExit) as caught, command_line.input_errors("train.py"):
        signal.raise_signal(number)
    error = capsys.readouterr().err
    assert caught.value.code == code and error.startswith("train.py: ") and error.count("\n") == 1


def test_nothing_is_overwritten_unasked(run, tmp_path):
    options = ["--text", str(run.text), *TINY]
    with pytest.raises(SystemExit, match="is not empty: --overwrite replaces it"):
        train.main([*options, "--output-dir", str(run.folder)])
    notes = tmp_path / "notes" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("kept")
    for folder, message in ((notes.parent, "is not a model alone"), (run.text.parent, "holds --text")):
        with pytest.raises(SystemExit, match=message):
            train.main([*options, "--output-dir", str(folder), "--overwrite"])
    assert notes.read_text() == "kept" and run.text.exists()
    with pytest.raises(SystemExit, match="holds checkpoints: --resume goes on, --overwrite starts anew"):
        checkpoints = str(run.folder.with_name("model-checkpoints"))
        train.main([*options, "--output-dir", str(tmp_path / "new"), "--checkpoint-dir", checkpoints])


@pytest.mark.parametrize(
    "options", [["--vocab-size", "257"], ["--dropout", "1"], ["--max-steps", "0"], ["--epochs", "x"]]
)
def test_bad_options(options, capsys):
    with pytest.raises(SystemExit) as caught:
        train.parse_args(["--text", "a", "--output-dir", "b", *options])
    assert caught.value.code == 2 and options[0] in capsys.readouterr().err.splitlines()[-1]
