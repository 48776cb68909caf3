"""Pretraining: any architecture, the paper's recipe, and runs that go on as if they had never stopped."""

import json
import os
import random
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import command_line
import language_modeling
import prepare
import pretrain
import pretraining_data
import recipe
import throughput
from configuration.make_configs import DIRECTORY, make_configs
from modeling_t6 import T6Config
from tests import processes
from tests.versions import once_but


ROOT = Path(__file__).parents[2]
SIZE = "hidden_size=32 num_hidden_layers=2".split()
T6 = ["--architecture", "t6-small", "--set", *SIZE, "num_attention_heads=3", "head_dim=8", "k_rank=1"]
MHA = ["--architecture", "llama-mha-small", "--set", *SIZE, "num_attention_heads=4", "num_key_value_heads=2"]
RUN = """--block-length 32 --sequences-per-step 8 --max-steps 6 --warmup-steps 2 --learning-rate 3e-3 --eval-steps 2
    --save-steps 3 --logging-steps 1 --cpu""".split()


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Lines of words, a few of them outside ASCII."""
    generator = random.Random(0)
    words = ["the", "king", "and", "queen", "of", "naïve", "Ωmega", "wood", "walks", "speaks", "\t"]
    return ["\n".join(" ".join(generator.choices(words, k=9)) for _ in range(12)) for _ in range(60)]


@pytest.fixture(scope="module")
def data(documents, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for index, text in enumerate(documents):
        (folder / f"{index}.txt").write_text(text, encoding="utf-8")
    output = folder / "tokens"
    options = ["--vocab-size", "300", "--held-out-fraction", "0.1", "--num-processes", "1"]
    prepare.main(["--text", str(folder), *options, "--output-dir", str(output)])
    return output


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """One finished run."""
    folder = tmp_path_factory.mktemp("run") / "model"
    pretrain.main([*T6, *RUN, "--data", str(data), "--batch-size", "4", "--output-dir", str(folder)])
    return folder


def losses(folder: Path) -> list[tuple]:
    entries = pretrain.read_log(folder.with_name(f"{folder.name}-checkpoints"))
    names = ("step", "loss", "grad_norm", "learning_rate", "eval_loss_per_token", "eval_bits_per_byte")
    return [tuple(entry.get(name) for name in names) for entry in entries]


# Data


def test_prepared_folder(data, documents):
    facts = json.loads((data / "data.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(data)
    read = {}
    for name in ("train", "held_out"):
        tokens = torch.from_file(
            str(data / f"{name}.bin"), size=(data / f"{name}.bin").stat().st_size // 2, dtype=torch.uint16
        )
        assert len(tokens) == facts[f"{name}_tokens"]
        texts = tokenizer.decode(tokens.int().tolist()).split(tokenizer.bos_token)
        assert texts[0] == ""
        read[name] = texts[1:]
        assert len(read[name]) == facts[f"{name}_documents"]
    assert sorted(read["train"] + read["held_out"]) == sorted(documents)
    assert 0 < len(read["held_out"]) < 20
    assert facts["held_out_bytes"] == sum(len(text.encode()) for text in read["held_out"])


@pytest.mark.once
def test_prepare_deduplicates(tmp_path, capsys):
    """Equal documents once; none held out whose lines are in the training text, and the same result by processes."""
    generator = random.Random(1)
    lines = [f"{' '.join(generator.choices('abcdefgh', k=20))} {index}" for index in range(400)]
    (tmp_path / "a").mkdir()
    for index in range(40):
        (tmp_path / "a" / f"{index}.md").write_text("\n".join(lines[10 * index : 10 * index + 10]))
    (tmp_path / "a" / "copy.md").write_text((tmp_path / "a" / "3.md").read_text())
    (tmp_path / "a" / "binary.md").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "a" / "other.rst").write_text("not asked for")
    near, fresh = tmp_path / "near.txt", tmp_path / "fresh.txt"
    near.write_text("\n".join(lines[:6] + [f"another line of the held-out text {index}" for index in range(5)]))
    fresh.write_text("\n".join(lines[:4] + [f"another line of the held-out text {index}" for index in range(5)]))
    options = ["--text", str(tmp_path / "a"), "--held-out", str(near), str(fresh), "--vocab-size", "280"]
    facts = prepare.main([*options, "--num-processes", "1", "--output-dir", str(tmp_path / "one")])
    assert (facts["train_documents"], facts["files_left_out"]) == (40, 1)
    assert (facts["held_out_documents"], facts["held_out_documents_dropped"]) == (1, 1)
    assert facts["held_out_bytes"] == fresh.stat().st_size
    assert prepare.main([*options, "--num-processes", "2", "--output-dir", str(tmp_path / "two")]) == facts
    with pytest.raises(SystemExit, match="is not empty: --overwrite replaces it"):
        prepare.main([*options, "--output-dir", str(tmp_path / "two")])
    for end, message in (
        (["--held-out", str(tmp_path / "a")], "there is no training text"),
        (
            ["--held-out-fraction", "0"],
            "no held-out text: of 40 documents, the share took none; expected a larger --held-out-f",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            prepare.main(
                ["--text", str(tmp_path / "a"), *end, "--num-processes", "1", "--output-dir", str(tmp_path / "x")]
            )
    assert not (tmp_path / "x").exists()


def test_endings_of_files(tmp_path):
    for name in ("a.txt", "docs-0.jsonl.xz", "other.xz", "b.md"):
        (tmp_path / name).touch()
    found = [path.name for _, path, _ in prepare.find_files([("text", tmp_path)], [".txt", ".jsonl.xz"])]
    assert found == ["a.txt", "docs-0.jsonl.xz"]


@pytest.mark.parametrize("count, held_out", [(2, 1), (9, 1)])
def test_prepare_of_few_files(count, held_out, tmp_path):
    """By default, one of them is held out."""
    for index in range(count):
        (tmp_path / f"{index}.txt").write_text(f"file {index}: the king and the queen of {'wood ' * index}")
    options = ["--text", str(tmp_path), "--vocab-size", "280", "--num-processes", "1"]
    facts = prepare.main([*options, "--output-dir", str(tmp_path / "tokens")])
    assert (facts["train_documents"], facts["held_out_documents"]) == (count - held_out, held_out)


@pytest.mark.parametrize(
    "names, message",
    [
        (["one.txt"], "of 1 documents, the share took none; expected more documents, or --held-out"),
        (["x.py"], "no text in .*txt, .md"),
    ],
)
def test_prepare_without_enough(names, message, tmp_path):
    for name in names:
        (tmp_path / name).write_text("the king")
    with pytest.raises(SystemExit, match=message):
        prepare.main(["--text", str(tmp_path), "--num-processes", "1", "--output-dir", str(tmp_path / "tokens")])
    assert not (tmp_path / "tokens").exists()


def test_windows_of_processes_make_up_the_batches():
    windows = language_modeling.RandomWindows(torch.arange(1000), 10, 48, seed=0)
    whole = [window.tolist() for window in pretraining_data.PreparedWindows(windows, 8, 0, 1)]
    assert whole == [windows[index].tolist() for index in range(48)]
    shares = [[w.tolist() for w in pretraining_data.PreparedWindows(windows, 4, rank, 2)] for rank in range(2)]
    assert [w for a in range(0, 24, 4) for share in shares for w in share[a : a + 4]] == whole
    # A run of one process goes on with two.
    start = pretraining_data.PreparedWindows(windows, 8, 0, 1)
    taken = iter(start)
    assert [next(taken).tolist() for _ in range(16)] == whole[:16]
    for rank in range(2):
        rest = pretraining_data.PreparedWindows(windows, 4, rank, 2)
        rest.load_state_dict(start.state_dict())
        assert [w.tolist() for w in rest] == shares[rank][8:]


@pytest.fixture(scope="module")
def dataset(documents, tmp_path_factory) -> Path:
    """A data set of two files, each of 30 documents."""
    folder = tmp_path_factory.mktemp("dataset")
    for part in range(2):
        rows = [json.dumps({"id": index, "words": documents[30 * part + index]}) for index in range(30)]
        (folder / f"train-{part}.jsonl").write_text("\n".join(rows))
    return folder


def stream_of(dataset: Path, tokenizer: Path, *options: str) -> pretrain.Data:
    words = ["--dataset", str(dataset), "--text-column", "words", "--tokenizer", str(tokenizer), *options]
    return pretrain.Data(pretrain.parse_args([*words, "--held-out-documents", "5", "--output-dir", "unused"]))


@pytest.mark.once
@pytest.mark.parametrize("portion", [3, 256])
def test_stream(dataset, data, documents, monkeypatch, portion):
    """All documents but those held out, in order, then again; from any place by its state."""
    monkeypatch.setattr(pretraining_data, "DOCUMENTS", portion)
    source = stream_of(dataset, data)
    assert source.held_out.equal(language_modeling.encode(source.tokenizer, documents[:5]))
    expected = language_modeling.encode(source.tokenizer, documents[5:])
    windows = source.training(block_length=50, num_windows=0, rank=0, world_size=1)
    iterator, states, seen = iter(windows), [windows.state_dict()], []
    for _ in range(2 * len(expected) // 50):
        seen.append(next(iterator))
        states.append(json.loads(json.dumps(windows.state_dict())))
    iterator.close()
    assert torch.cat(seen).equal(torch.cat([expected, expected])[: len(seen) * 50])
    for place in (0, 1, 7, len(expected) // 50, len(seen) - 3):
        again = source.training(50, 0, 0, 1)
        again.load_state_dict(states[place])
        iterator = iter(again)
        assert all(next(iterator).equal(window) for window in seen[place : place + 3])
        iterator.close()


@pytest.mark.once
def test_stream_is_shared_among_processes(dataset, data, documents):
    found = []
    for rank in range(2):
        source = stream_of(dataset, data)
        iterator = iter(source.training(50, 0, rank, 2))
        expected = language_modeling.encode(source.tokenizer, documents[5:30] if rank == 0 else documents[30:])
        found = torch.cat([next(iterator) for _ in range(len(expected) // 50)])
        iterator.close()
        assert found.equal(expected[: len(found)])


# Models


def test_every_architecture_by_name(data, tmp_path):
    """Tiny models of each kind: the classes, and the vocabulary of the data; projections to the residual stream are 0."""
    tokenizer = AutoTokenizer.from_pretrained(data)
    for name, fields in make_configs().items():
        args = pretrain.parse_args(
            ["--architecture", name, "--set", "num_hidden_layers=1", "first_k_dense_replace=1", "--output-dir", "x"]
        )
        if "deepseek" not in name:
            args.set.pop()
        config = pretrain.make_config(args, tokenizer)
        assert (config.model_type, config.vocab_size) == (fields["model_type"], 320)  # 300, up to a multiple of 64
        assert config.num_attention_heads == fields["num_attention_heads"]
        if name.endswith("-small"):
            model = pretrain.make_model(config, "sdpa")
            assert type(model).__name__ == fields["architectures"][0]
            zero = [name for name, weight in model.named_parameters() if not weight.any()]
            assert sorted(name.split(".")[-2] for name in zero) == ["down_proj", "o_proj"]
    args.architecture = str(DIRECTORY / "t6-small" / "config.json")
    args.set = [("hidden_size", 48), ("q_rank", None)]
    config = pretrain.make_config(args, tokenizer)
    assert (config.hidden_size, config.intermediate_size, config.q_rank) == (48, 128, None)


@pytest.mark.parametrize("architecture", [T6, MHA], ids=["t6", "mha"])
def test_attention_function(architecture, data, tmp_path):
    """Each layer of each step attends by the function that is asked for, without a mask."""
    masks = {"training": [], "evaluation": []}

    def attention(module, query, key, value, attention_mask, **kwargs):
        masks["training" if module.training else "evaluation"].append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("observed", attention)
    AttentionMaskInterface.register("observed", AttentionMaskInterface()["sdpa"])
    options = ["--data", str(data), "--batch-size", "4", "--attention", "observed"]
    pretrain.main([*architecture, *RUN, *options, "--output-dir", str(tmp_path / "model")])
    assert masks["training"] == [None] * (6 * 2 * 2)  # steps, batches, layers
    assert masks["evaluation"]
    assert json.loads((tmp_path / "model-checkpoints" / "training.json").read_text())["attention"] == "observed"


@pytest.fixture
def graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """Programs that were compiled; they are left as they are."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile_function(f, backend=backend, **kwargs))
    return found


def test_compiled(data, run, tmp_path, graphs):
    """Layers are one program, the last norm and the loss another each; the losses are those without."""
    folder = tmp_path / "model"
    pretrain.main([*T6, *RUN, "--data", str(data), "--batch-size", "4", "--compile", "--output-dir", str(folder)])
    assert len(graphs) == 3
    for found, expected in zip(losses(folder), losses(run), strict=True):
        assert [x is None for x in found] == [x is None for x in expected]
        assert list(filter(None, found)) == pytest.approx(list(filter(None, expected)), rel=1e-4)


@pytest.mark.parametrize("name", once_but(["llama-mha-small", "t6-small"], "t6-small"))
def test_compiled_under_ddp(name, data, tmp_path, graphs):
    """A layer stays one program where DDP's first bucket, of 1 MiB, is full before its end."""
    size = ["hidden_size=384", "num_hidden_layers=2"]
    args = pretrain.parse_args(["--architecture", name, "--set", *size, "--output-dir", "x"])
    model = pretrain.make_model(pretrain.make_config(args, AutoTokenizer.from_pretrained(data)), "sdpa")
    pretrain.compile_parts(model)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ids = torch.arange(64).view(2, 32)
        torch.nn.parallel.DistributedDataParallel(model)(ids, labels=ids, use_cache=False).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == 3
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama-mha-small", "t6-small"])
def test_flops(name):
    """Against counting by hand: 6 a weight of a matrix, 12 h d T for attention, and forming heads from factors."""
    fields = make_configs()[name] | {"num_hidden_layers": 3, "vocab_size": 320}
    config = pretrain.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = sum(
        weight.numel() for weight in model.parameters() if weight.ndim == 2
    )  # tied: the embedding is the head
    per_layer = 12 * config.num_attention_heads * config.head_dim * 256
    if name == "t6-small":
        ranks = config.q_rank + config.k_rank + config.v_rank
        per_layer += 6 * ranks * config.num_attention_heads * config.head_dim
    # In some versions the angles of RoPE are a matrix product too, of 64 operations a token.
    assert throughput.training_flops(config, 256) == pytest.approx(6 * matrices + 3 * per_layer, rel=1e-5)


def test_figures_of_a_run_that_went_on():
    """On another machine, perhaps: its speed and memory are those of the last call."""
    log = [
        {"step": step, "step_seconds": 9.0 - step, "tokens_per_second": step, "memory_gib": 10 - step}
        for step in range(1, 9)
    ]
    log.append({"step": 8, "eval_loss_per_token": 1.0, "eval_bits_per_byte": 2.0})
    figures = pretrain.figures_of_log(log, 5)
    assert (figures["step_seconds"], figures["tokens_per_second"], figures["memory_gib"]) == (2, 7, 4)
    assert figures["loss_per_token"] == 1 and "step_seconds" not in pretrain.figures_of_log(log, 8)


def test_recipe(monkeypatch):
    """The paper's: appendix H.1."""
    args = pretrain.parse_args(["--output-dir", "x"])
    assert (args.max_steps, args.sequences_per_step, args.warmup_steps, args.weight_decay) == (100_000, 480, 2000, 0.1)
    assert (args.dataset, args.dataset_config) == ("HuggingFaceFW/fineweb-edu", "sample-100BT")
    assert pretrain.parse_args(["--dataset", "other", "--output-dir", "x"]).dataset_config is None
    assert {size: rates[0] for size, rates in pretrain.LEARNING_RATES.items()} == {
        "small": 6e-4,
        "medium": 6e-4,
        "large": 2e-4,
        "xl": 1e-4,
    }


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, "heads"),
        ({"k_rank": 1}, False),
        ({"k_rank": [2, 1]}, False),
        ({"q_rank": 1}, False),
        ({"v_rank": 1}, "heads"),
        ({"noncontextual_a": True}, False),
        ({"c_factor_dim": 4}, False),
        ({"q_rank": None}, "heads"),
    ],
    ids=str,
)
def test_norm_of_the_recipe(fields, expected):
    """Of formed heads, where a variant can have it and heads are of more than one row."""
    config = T6Config(num_hidden_layers=2, hidden_size=64, num_attention_heads=2, head_dim=32, vocab_size=64, **fields)
    new = T6Config(**config.to_dict() | recipe.fields(config))
    assert new.qk_norm == expected


def test_t6_by_the_recipe(data, tmp_path, monkeypatch):
    """MHA's heads and as many parameters, A constant, heads as large as Llama's; the paper's T6 on demand, and sizes as given."""
    configs, models, make_model = {}, {}, pretrain.make_model

    def stop(trainer, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain.PackedTrainer, "train", stop)
    monkeypatch.setattr(pretrain, "make_model", lambda *args: models.setdefault("new", make_model(*args)))
    size = ["--architecture", "t6-small", "--set", "hidden_size=256", "num_hidden_layers=2"]
    llama = ["--architecture", "llama-mha-small", *size[2:], "num_attention_heads=4", "num_key_value_heads=4"]
    given = [*size, "num_attention_heads=5"]
    narrow = [*size[:3], "hidden_size=48", "num_hidden_layers=2"]
    for name, options in (
        ("recipe", size),
        ("paper", [*size, "--paper"]),
        ("given", given),
        ("narrow", narrow),
        ("Llama", llama),
    ):
        models.clear()
        with pytest.raises(SystemExit):
            pretrain.main(
                [*options, *RUN, "--data", str(data), "--batch-size", "4", "--output-dir", str(tmp_path / name)]
            )
        configs[name] = models["new"].config, models["new"].num_parameters(), models["new"].model.layers[1].self_attn
    (config, count, layer), (paper, paper_count, paper_layer) = configs["recipe"], configs["paper"]
    assert (config.num_attention_heads, paper.num_attention_heads) == (4, 34)
    assert config.intermediate_size % 64 == 0 and count == pytest.approx(paper_count, rel=0.02)
    assert config.attention_bias and not config.attention_out_bias and not paper.attention_bias
    assert configs["given"][0].num_attention_heads == 5 and configs["given"][0].attention_bias
    assert configs["given"][0].intermediate_size == paper.intermediate_size
    assert (config.qk_norm, paper.qk_norm, configs["given"][0].qk_norm) == ("heads", False, "heads")
    assert not configs["Llama"][0].attention_bias and configs["narrow"][0].num_attention_heads == 1
    with pytest.raises(SystemExit, match="--set attention_bias=false: .* --paper does without"):
        pretrain.main(
            [
                *size,
                "attention_bias=false",
                *RUN,
                "--data",
                str(data),
                "--batch-size",
                "4",
                "--output-dir",
                str(tmp_path / "x"),
            ]
        )

    inputs = torch.randn(300, 256)
    inputs = inputs / inputs.square().mean(-1, keepdim=True).sqrt()
    with torch.no_grad():
        for name in "qkv":
            a, b = (getattr(layer, f"{name}_{factor}_proj")(inputs) for factor in "ab")
            assert a.equal(a[:1].expand_as(a)) and not getattr(paper_layer, f"{name}_a_proj").weight.eq(0).any()
            rank = getattr(layer, f"{name}_rank")
            heads = a.unflatten(-1, (-1, rank)) @ b.unflatten(-1, (rank, -1)) / rank
            assert heads.std().item() == pytest.approx(0.02 * 256**0.5, rel=0.5)  # four heads have few constants


# Runs


def test_model_folder(run, data):
    measured = json.loads((run.with_name("model-checkpoints") / "training.json").read_text())
    log = pretrain.read_log(run.with_name("model-checkpoints"))
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in log if "eval_loss_per_token" in entry] == [2, 4, 6]
    assert log[-1]["eval_loss_per_token"] == measured["loss_per_token"] < log[0]["loss"]
    assert all(entry["tokens"] == 256 * entry["step"] for entry in log if "loss" in entry)
    assert measured["tokens_per_second"] == pytest.approx(256 / measured["step_seconds"], rel=0.5)
    # Nothing that is no part of a model of the Hub.
    names = {path.name for path in run.iterdir() if path.suffix != ".py"}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    # What it reports is what the folder gives, one token at a time past the first.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert model.num_parameters() == measured["parameters"] and model.config.use_cache
    facts = json.loads((data / "data.json").read_text())
    ids = torch.from_file(str(data / "held_out.bin"), size=facts["held_out_tokens"], dtype=torch.uint16).int().tolist()
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 31):
            window = torch.tensor([ids[start : start + 32]])
            scores = model(window).logits[0, :-1].log_softmax(-1)
            nats -= scores.gather(-1, window[0, 1:, None]).sum().item()
    assert measured["loss_per_token"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert tokenizer.decode(model.generate(torch.tensor([ids[:4]]), max_new_tokens=3)[0])


def test_learning_rates_of_the_schedule(run):
    """Linear warm-up from 0 over 2 steps, then half a cosine to a tenth; `log` has the rate of the step that was made."""
    rates = [
        entry["learning_rate"] for entry in pretrain.read_log(run.with_name("model-checkpoints")) if "loss" in entry
    ]
    cosine = [3e-4 + 2.7e-3 * (1 + torch.tensor(torch.pi * step / 4).cos().item()) / 2 for step in range(5)]
    assert rates == pytest.approx([*([0, 1.5e-3, *cosine][: 6 + (rates[0] > 0)])][int(rates[0] > 0) :], rel=1e-5)


def interrupt(monkeypatch, owner: type, windows: int) -> None:
    """Breaks off when one more than so many windows are asked for."""
    count = 0
    original = owner.__iter__

    def interrupted(self):
        nonlocal count
        for window in original(self):
            count += 1
            if count > windows:
                raise KeyboardInterrupt
            yield window

    monkeypatch.setattr(owner, "__iter__", interrupted)


def test_killed_run_goes_on(run, data, tmp_path, monkeypatch):
    """The same losses, to the last bit, and the same weights."""
    folder = tmp_path / "model"
    options = [*T6, *RUN, "--data", str(data), "--batch-size", "4", "--output-dir", str(folder)]
    interrupt(
        monkeypatch, pretraining_data.PreparedWindows, 40
    )  # in the sixth step; the last checkpoint is that of the third
    with pytest.raises(SystemExit, match="130"):
        pretrain.main(options)
    monkeypatch.undo()
    assert not folder.exists() and len(losses(folder)) == 7
    with pytest.raises(SystemExit, match="started with learning_rate=0.003, this command has 0.002"):
        pretrain.main([*options, "--resume", "--learning-rate", "2e-3", "--min-learning-rate", "3e-4"])
    with pytest.raises(SystemExit, match="started with num_attention_heads=3, this command has 5"):
        pretrain.main([*options, "--resume", "--set", *SIZE, "num_attention_heads=5", "head_dim=8", "k_rank=1"])
    with pytest.raises(SystemExit, match="holds checkpoints: --resume goes on"):
        pretrain.main(options)
    pretrain.main([*options, "--resume"])
    assert losses(folder) == losses(run)
    for name, tensor in load_file(run / "model.safetensors").items():
        assert load_file(folder / "model.safetensors")[name].equal(tensor)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model-checkpoints"}


@pytest.mark.once
def test_checkpoints_that_someone_has_kept(data, tmp_path):
    """A new run removes what an older one that was killed has left, and nothing else."""
    checkpoints = tmp_path / "model-checkpoints"
    (checkpoints / "checkpoint-4").mkdir(parents=True)
    (checkpoints / "checkpoint-best").mkdir()
    (checkpoints / "checkpoint-best" / "trainer_state.json").write_text("{}")
    options = [*T6, *RUN, "--max-steps", "2", "--data", str(data), "--batch-size", "8"]
    pretrain.main([*options, "--output-dir", str(tmp_path / "model")])
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-best"}


@pytest.mark.once
def test_full_disk_leaves_the_log(tmp_path):
    """What a run has logged is not lost where it cannot be written anew."""
    path = tmp_path / "log.jsonl"
    text = "".join(json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(100))
    path.write_text(text)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OSError):
            pretrain.cut_log(path, 90)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == text
    pretrain.cut_log(path, 90)
    assert path.read_text() == text[: text.index('{"step": 91')]


@pytest.mark.once
def test_streamed_run_goes_on(dataset, data, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining_data, "DOCUMENTS", 4)
    options = [*T6, *RUN, "--dataset", str(dataset), "--text-column", "words", "--tokenizer", str(data)]
    options += ["--held-out-documents", "5", "--batch-size", "8"]
    pretrain.main([*options, "--output-dir", str(tmp_path / "whole")])
    with monkeypatch.context() as context:
        interrupt(context, pretraining_data.StreamedWindows, 40)
        with pytest.raises(SystemExit, match="130"):
            pretrain.main([*options, "--output-dir", str(tmp_path / "parts")])
    pretrain.main([*options, "--output-dir", str(tmp_path / "parts"), "--resume"])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_stopped_by_signal(run, data, tmp_path, monkeypatch):
    """SIGTERM saves a checkpoint, and the run goes on from there."""
    folder = tmp_path / "model"
    options = [*T6, *RUN, "--data", str(data), "--batch-size", "4", "--output-dir", str(folder)]
    on_step_end = throughput.Clock.on_step_end

    def on_fourth(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(throughput.Clock, "on_step_end", on_fourth)
    with pytest.raises(SystemExit) as caught:
        pretrain.main(options)
    assert caught.value.code == 75 and not folder.exists()
    assert command_line.last_checkpoint(tmp_path / "model-checkpoints").name == "checkpoint-4"
    monkeypatch.undo()
    pretrain.main([*options, "--resume"])
    assert losses(folder) == losses(run)


DISTRIBUTED = """
import sys, pretrain
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import Trainer
mode = None
init, train = AcceleratorState.__init__, Trainer.train

def initialize(self, *args, fsdp_plugin=None, **kwargs):
    # Without a GPU, accelerate would leave FSDP aside, and start DDP.
    fresh = not AcceleratorState._shared_state
    init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh and fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin

def train_and_look(self, *args, **kwargs):
    output = train(self, *args, **kwargs)
    assert {isinstance(p, DTensor) for p in self.model.parameters()} == {mode == "fsdp"}
    return output

AcceleratorState.__init__, Trainer.train = initialize, train_and_look

def run(folder, *more):
    options = [*sys.argv[1:], "--batch-size", "2", "--output-dir", f"{mode}/{folder}"]
    return pretrain.pretrain(pretrain.parse_args([*options, *["--fsdp"] * (mode == "fsdp"), *more]))

def main():
    global mode
    for mode in ("ddp", "fsdp"):  # in this order: what asks for FSDP stays in the environment
        assert run("whole") is not None
        assert run("parts", "--max-minutes", "0") is None
        assert run("parts", "--resume") is not None
        AcceleratorState._reset_state(reset_partial_state=True)
    pretrain.torch.distributed.destroy_process_group()
"""


@pytest.mark.once
def test_two_processes(run, data, tmp_path):
    """FSDP2 and DDP by accelerate, with gloo: resumed equals uninterrupted, and both equal one process."""
    path = f"{os.environ['PYTHONPATH']}:{ROOT}:{ROOT / 'examples'}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    options = [*T6, *RUN, "--data", str(data)]
    result = processes.run_in_two(DISTRIBUTED, *options, env=environment, cwd=tmp_path)
    assert result.code == 0, result.stderr[-3000:]
    assert result.stdout.count("on 2 x 2 x 2") == 6 and result.stdout.count("stopped at step 1 of 6") == 2
    weights = load_file(run / "model.safetensors")
    for mode in ("fsdp", "ddp"):
        whole, parts = losses(tmp_path / mode / "whole"), losses(tmp_path / mode / "parts")
        assert whole == parts
        for mine, others in zip(losses(run), whole, strict=True):
            # Sums in another order, in float32.
            assert [value for value in others if value is not None] == pytest.approx(
                [value for value in mine if value is not None], rel=2e-5
            )
        for folder in ("whole", "parts"):
            for name, tensor in load_file(tmp_path / mode / folder / "model.safetensors").items():
                torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.once
@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--architecture", "t7"],
            r"t7: no such file or folder; configuration/ has deepseek-mla-large, .*, t6-xl-kvonly",
        ),
        (["--set", "heads=3"], "T6Config has no field heads"),
        (["--set", "dtype=bfloat16"], "--set dtype: new models are trained in float32"),
        (["--set", "head_dim=7"], "no such architecture: .*even number of features"),
        (
            ["--architecture", "llama-mha-small", "--set", "num_attention_heads=4"],
            "num_attention_heads=4 is no multiple of num_key_value_heads=12",
        ),
        (["--set", "vocab_size=10"], "vocab_size=10 is less than the 300 tokens"),
        (["--architecture", "{data}/data.json"], "is no config.json of Transformers"),
        (["--data", "{tmp}/empty"], "cannot load the tokenizer"),
        (["--data", "{tmp}/cut"], "the sizes of its files are not those that data.json states"),
        (["--data", "{tmp}/damaged"], "damaged is no folder of prepare.py"),
        (["--data", "{tmp}/missing"], "missing is no folder of prepare.py: .*held_out.bin"),
        (["--batch-size", "3"], "--sequences-per-step 8 is no multiple of --batch-size 3 times 1 processes"),
        (["--block-length", "2000"], "--block-length 2000 exceeds max_position_embeddings=1024"),
        (["--min-learning-rate", "1"], "--min-learning-rate 1.0 exceeds the learning rate"),
        (["--resume"], "--resume: there is no checkpoint"),
        (["--attention", "flash"], "--attention flash: .* is not supported"),
        (["--report-to", "paper"], "--report-to paper: no such package is installed"),
    ],
)
def test_one_line_errors(data, tmp_path, options, message):
    for name in ("cut", "damaged", "missing"):
        shutil.copytree(data, tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut" / "train.bin").write_bytes((data / "train.bin").read_bytes()[:-2])
    (tmp_path / "damaged" / "data.json").write_text("{")
    (tmp_path / "missing" / "held_out.bin").unlink()
    options = [option.format(tmp=tmp_path, data=data) for option in options]
    common = [*RUN, "--data", str(data), "--batch-size", "4", "--output-dir", str(tmp_path / "model")]
    with pytest.raises(SystemExit) as caught:
        pretrain.main([*common, *options])
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    assert re.search(message, caught.value.code)
    assert not (tmp_path / "model").exists() and not (tmp_path / "model-checkpoints").exists()


def test_loss_that_is_no_number(data, tmp_path):
    options = [*T6, *RUN, "--data", str(data), "--batch-size", "4", "--output-dir", str(tmp_path / "model")]
    with pytest.raises(SystemExit, match="the loss is nan at step"):
        pretrain.main([*options, "--learning-rate", "1e30", "--warmup-steps", "0"])
