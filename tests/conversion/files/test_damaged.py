"""Damaged folders of Transformers' models: one line that names what is wrong, and nothing at the target."""

import codecs
import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, GenerationConfig

from conversion.__main__ import main

from ...processes import run
from ..common import last_error, save_source


ROOT = Path(__file__).parents[3]
K = "model.layers.1.self_attn.k_proj.weight"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("whole") / "source")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = save_source(tmp_path_factory.mktemp("sharded") / "source", max_shard_size="120KB")
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert SHARD in names, names
    return folder


def weights(change):
    """Damages the tensors of the one file."""

    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return damage


def config(**fields):
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content.update(fields)
        content = {name: value for name, value in content.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def rope(**fields):
    return config(rope_parameters={"rope_type": "default", "rope_theta": 1e4} | fields)


def new(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def file(name: str, content: bytes | None):
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return damage


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def header_too_long(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


def pickles_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def index(change):
    def damage(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def truncated_shard(folder: Path) -> None:
    os.truncate(folder / SHARD, 1000)


def duplicate_tensor(folder: Path) -> None:
    first = next(iter(load_file(folder / "model-00001-of-00004.safetensors").items()))
    save_file(load_file(folder / SHARD) | dict([first]), folder / SHARD, {"format": "pt"})


def swap(name: str):
    return index(lambda weight_map: weight_map.update({K: name}))


WHOLE = {
    "truncated": (truncated, "model.safetensors"),
    "empty": (file("model.safetensors", b""), "model.safetensors"),
    "text-for-weights": (file("model.safetensors", b"not weights at all"), "model.safetensors"),
    "header-too-long": (header_too_long, "model.safetensors"),
    "no-weights": (file("model.safetensors", None), "model.safetensors"),
    "pickles-only": (pickles_only, "pickles are not read"),
    "missing-tensor": (weights(lambda s: s.pop(K)), K),
    "unexpected-tensor": (weights(lambda s: s.update(extra=torch.ones(2))), "extra"),
    "wrong-shape": (weights(lambda s: s.update({K: s[K][:-1].clone()})), K),
    "transposed": (weights(lambda s: s.update({K: s[K].T.contiguous()})), K),
    "no-dimension": (weights(lambda s: s.update({K: torch.tensor(1.0)})), K),
    "integers": (weights(lambda s: s.update({K: s[K].to(torch.int8)})), "I8"),
    "float8": (weights(lambda s: s.update({K: s[K].to(torch.float8_e4m3fn)})), "F8_E4M3"),
    "nan": (weights(lambda s: s[K].view(-1)[7:8].fill_(float("nan"))), K),
    "infinite": (weights(lambda s: s[K].view(-1)[7:8].fill_(float("-inf"))), K),
    "no-config": (file("config.json", None), "config.json"),
    "config-not-json": (file("config.json", b"{"), "config.json"),
    "config-not-utf8": (file("config.json", b"\xff\xfe{}"), "config.json"),
    "config-a-list": (file("config.json", b"[]"), "list"),
    "no-model-type": (config(model_type="absent"), "config.json"),
    "model-type-list": (config(model_type=["llama"]), "config.json: `model_type` must be text, got ['llama']"),
    "labels": (config(id2label=7), "config.json: `id2label` must be an object or null, got 7"),
    "dtype-unknown": (config(dtype="half-precision"), "config.json: `dtype` must be a floating-point type of torch"),
    "dtype-integer": (config(torch_dtype="int8"), "config.json: `torch_dtype` must be a floating-point type of torch"),
    "dtype-by-part": (config(dtype={"": "float32"}), "config.json: `dtype` must be a floating-point type of torch"),
    "unknown-model-type": (config(model_type="no-such-model"), "no-such-model"),
    "code-of-its-own": (config(model_type="own", auto_map={"AutoConfig": "own.Own"}), "config.json: "),
    "another-model": (config(model_type="gpt2"), "gpt2"),
    "mixture-of-experts": (config(model_type="mixtral"), "mixtral"),
    "heads-in-no-groups": (config(num_key_value_heads=3), "num_key_value_heads=3"),
    "too-few-layers": (config(num_hidden_layers=2), "model.layers.2"),
    "too-many-layers": (config(num_hidden_layers=4), "model.layers.3"),
    "no-layers": (config(num_hidden_layers=0), "num_hidden_layers"),
    "layers-without-end": (config(num_hidden_layers=10**9), "`num_hidden_layers` must be an integer from 1 to 10,000"),
    "heads-without-end": (config(num_attention_heads=10**9), "`num_attention_heads` must be"),
    "head-dim-0": (config(head_dim=0), "`head_dim` must be an integer from 1"),
    "head-dim-text": (config(head_dim="16"), "got '16'"),
    "true-for-a-number": (config(num_key_value_heads=True), "`num_key_value_heads` must be an integer"),
    "theta-text": (config(rope_theta="10000"), "`rope_theta` must be a number above 0, got '10000'"),
    "theta-null": (rope(rope_theta=None), "`rope_parameters.rope_theta` must be a number above 0, got None"),
    "theta-list": (rope(rope_theta=[1e4]), "`rope_parameters.rope_theta` must be"),
    "theta-infinite": (rope(rope_theta=float("inf")), "got inf"),
    "factor-text": (rope(rope_type="linear", factor="4"), "`rope_parameters.factor` must be"),
    "no-factor": (rope(rope_type="linear"), "factor"),
    "rope-a-list": (config(rope_parameters=[1]), "`rope_parameters` must be an object or null, got [1]"),
    "old-rope-a-text": (config(rope_scaling="linear"), "`rope_scaling` must be"),
    "epsilon-text": (config(rms_norm_eps="1e-6"), "`rms_norm_eps` must be a number"),
    "activation-a-number": (config(hidden_act=1), "`hidden_act` must be text"),
    "tied-a-text": (config(tie_word_embeddings="no"), "`tie_word_embeddings` must be true or false"),
    "token-a-text": (config(eos_token_id="</s>"), "`eos_token_id` must be an integer"),
    "layer-types-a-text": (config(layer_types="full"), "`layer_types` must be"),
    "generation-a-list": (new("generation_config.json", b"[]"), "generation_config.json must hold a JSON object"),
    "generation-a-text": (new("generation_config.json", b'{"max_new_tokens": "many"}'), "generation_config.json: `max_new_tokens` must be a number, got 'many'"),
    "generation-end": (new("generation_config.json", b'{"eos_token_id": [1, "a"]}'), "generation_config.json: `eos_token_id` must be"),
    "templates-not-json": (new("chat_template.json", b"{"), "chat_template.json cannot be read as JSON"),
    "tokenizer-not-json": (new("tokenizer.json", b"{"), "tokenizer.json cannot be read as JSON"),
    "tokenizer-of-nothing": (new("tokenizer.json", b"{}"), "has no tokenizer that can be loaded"),
    "tokenizer-without-model": (new("tokenizer.json", b'{"version": "1.0", "model": {}}'), "no tokenizer that can be"),
    "sentences-of-noise": (new("tokenizer.model", b"\x00\x01 noise"), "no tokenizer that can be"),
    "text-for-a-number": (config(hidden_size="wide"), "hidden_size"),
    "vocabulary": (config(vocab_size=98), "[98, 64]"),
    "inner-size": (config(intermediate_size=95), "mlp"),
    "unknown-rope": (config(rope_parameters={"rope_type": "spiral", "rope_theta": 1.0}), "spiral"),
    "unknown-activation": (config(hidden_act="sillu"), "sillu"),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config"),
}  # fmt: skip
SHARDED = {
    "missing-shard": (file(SHARD, None), SHARD),
    "truncated-shard": (truncated_shard, SHARD),
    "duplicate-tensor": (duplicate_tensor, "two files"),
    "index-not-json": (file(INDEX, b"weights"), INDEX),
    "index-without-map": (file(INDEX, b"{}"), "weight_map"),
    "index-of-numbers": (index(lambda m: m.update({K: 7})), K),
    "index-leaves-folder": (swap("../source/model-00001-of-00004.safetensors"), "expected the name of a file beside it"),
    "index-absolute": (swap("/etc/passwd"), "expected the name of a file beside it"),
    "index-to-parent": (swap(".."), "expected the name of a file beside it"),
    "index-backslash": (swap("..\\model.safetensors"), "expected the name of a file beside it"),
    "index-to-pickle": (swap("config.json"), "expected a .safetensors file"),
    "index-to-another-shard": (swap("model-00001-of-00004.safetensors"), K),
    "index-forgets": (index(lambda m: m.pop(K)), K),
    "index-invents": (index(lambda m: m.update(invented=SHARD)), "invented"),
}  # fmt: skip


def refused(source: Path, folder: Path, named: str, capsys) -> None:
    assert main(["hf", str(source), str(folder / "t6")]) == 1
    assert named in last_error(capsys)
    assert sorted(path.name for path in folder.iterdir()) == ["source"]


@pytest.mark.parametrize("damage, named", WHOLE.values(), ids=WHOLE)
def test_one_file(damage, named, whole, tmp_path, capsys):
    damage(shutil.copytree(whole, tmp_path / "source"))
    refused(tmp_path / "source", tmp_path, named, capsys)


@pytest.mark.parametrize("damage, named", SHARDED.values(), ids=SHARDED)
def test_shards(damage, named, sharded, tmp_path, capsys):
    damage(shutil.copytree(sharded, tmp_path / "source"))
    refused(tmp_path / "source", tmp_path, named, capsys)


def test_byte_order_marks(sharded, tmp_path):
    """What some editors write before JSON is read, and not written again: Transformers does not read it."""
    source = shutil.copytree(sharded, tmp_path / "source")
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(source / "tokenizer.json"))
    for name in ("config.json", "generation_config.json", "tokenizer.json", INDEX):
        (source / name).write_bytes(codecs.BOM_UTF8 + (source / name).read_bytes())
    assert main(["hf", str(source), str(tmp_path / "t6"), "--verify"]) == 0
    for path in (tmp_path / "t6").glob("*.json"):
        assert not path.read_bytes().startswith(codecs.BOM_UTF8), path
    assert AutoTokenizer.from_pretrained(tmp_path / "t6").tokenize("b") == ["b"]
    assert GenerationConfig.from_pretrained(tmp_path / "t6").bos_token_id == 1


def test_a_link_that_leaves_the_folder(sharded, tmp_path, capsys):
    """Links are followed only where the Hub's cache makes them: what a shard's name leads to must be a shard."""
    source = shutil.copytree(sharded, tmp_path / "source")
    (source / SHARD).unlink()
    (source / SHARD).symlink_to("/etc/passwd")
    refused(source, tmp_path, SHARD, capsys)


def test_sources_that_are_none(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source, named in (
        (str(whole / "config.json"), "is a file"),
        ("someone/no-such-model", "someone/no-such-model"),
        ("no such/name at all", "no such/name at all"),
    ):
        assert main(["hf", source, str(tmp_path / "t6")]) == 1
        assert named in last_error(capsys)
    assert not list(tmp_path.iterdir())


def test_targets_that_cannot_be(whole, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    for target, named in (("file", "is a file"), ("full", "not empty"), ("file/below", "cannot write")):
        assert main(["hf", str(whole), str(tmp_path / target)]) == 1
        assert named in last_error(capsys)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "kept.txt").read_text() == "kept"


@pytest.mark.once
def test_a_full_disk(whole, tmp_path):
    """The system refuses to write more than 64 kB into a file."""
    code = """if True:
        import resource, sys
        from conversion.__main__ import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        # Of healing, Trainer writes checkpoints by these two, whose errors are no `OSError`.
        import torch
        from safetensors.torch import save_file
        from conversion.files.errors import ConversionError
        from conversion.files.folders import new_folder
        for write in (torch.save, save_file):
            try:
                with new_folder(sys.argv[-1]) as folder:
                    write({"weight": torch.ones(10**5)}, folder / "model")
            except ConversionError as error:
                print("told:", error)
        sys.exit(main(sys.argv[1:]))"""
    process = run(code, "hf", str(whole), str(tmp_path / "t6"), env=dict(os.environ), cwd=ROOT)
    assert process.code == 1 and not list(tmp_path.iterdir())
    assert f"error: cannot write {tmp_path / 't6'}" in process.stderr and "File too large" in process.stderr
    assert "Traceback" not in process.stderr
    told = [line for line in process.stdout.splitlines() if line.startswith("told: ")]
    assert [line.partition("t6: ")[2] for line in told] == [
        "a file could not be written whole, as on a full disk", "File too large (os error 27)",
    ]  # fmt: skip


@pytest.mark.once
def test_the_file_that_is_written_is_named(whole, tmp_path, monkeypatch, capsys):
    """Not the one that it is copied from; and where there is no place for temporary files, that is said."""

    def copy(source, target, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", copy)
    assert main(["hf", str(whole), str(tmp_path / "t6")]) == 1
    assert last_error(capsys) == f"error: cannot write {tmp_path / 't6'}: No space left on device"
    missing = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    monkeypatch.setattr(tempfile, "gettempdir", mock.Mock(side_effect=missing))
    assert main(["hf", str(whole), str(tmp_path / "t6")]) == 1
    assert "No usable temporary directory found" in last_error(capsys)
    assert not list(tmp_path.iterdir())
