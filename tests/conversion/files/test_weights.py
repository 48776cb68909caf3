"""The weights that are converted are those that Transformers loads, or they are refused by name; verified or not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conversion.__main__ import main

from ...versions import once_but
from ..common import last_error, random_ids, random_source


HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Sources with two layers: tied, untied, in shards, and another untied one, whose weights differ."""
    root = tmp_path_factory.mktemp("weights")
    for name, tied, shards in (
        ("tied", True, None),
        ("untied", False, None),
        ("shards", False, "60KB"),
        ("other", False, None),
    ):
        model = random_source(model_type="llama", num_hidden_layers=2, tie_word_embeddings=tied)
        if name == "other":
            with torch.no_grad():
                model.lm_head.weight.mul_(-1)
        model.save_pretrained(root / name, **{"max_shard_size": shards} if shards else {})
    return {path.name: path for path in root.iterdir()}


def weights(folder: Path, change, file: str = "model.safetensors") -> None:
    state = dict(load_file(folder / file))
    change(state)
    save_file(state, folder / file, {"format": "pt"})


def own_head(folder: Path, saved: dict) -> None:
    weights(folder, lambda state: state.update({HEAD: state[EMBEDDINGS].flip(0).contiguous()}))


def head_of_the_embeddings(folder: Path, saved: dict) -> None:
    weights(folder, lambda state: state.update({HEAD: state[EMBEDDINGS].clone()}))


def head_alone(folder: Path, saved: dict) -> None:
    weights(folder, lambda state: state.update({HEAD: state.pop(EMBEDDINGS)}))


def single_beside_shards(folder: Path, saved: dict) -> None:
    shutil.copy(saved["other"] / "model.safetensors", folder)


def stale_index(folder: Path, saved: dict) -> None:
    shutil.copy(saved["shards"] / INDEX, folder)  # of shards that are not there


def pickle_beside(folder: Path, saved: dict) -> None:
    torch.save(load_file(saved["other"] / "model.safetensors"), folder / "pytorch_model.bin")


def variant_beside(folder: Path, saved: dict) -> None:
    shutil.copy(saved["other"] / "model.safetensors", folder / "model.fp16.safetensors")
    shutil.copy(saved["other"] / "model.safetensors", folder / "consolidated.safetensors")


LOADED = {
    "own-head": ("tied", own_head),
    "head-of-the-embeddings": ("tied", head_of_the_embeddings),
    "head-alone": ("tied", head_alone),
    "single-beside-shards": ("shards", single_beside_shards),
    "stale-index": ("untied", stale_index),
    "pickle-beside": ("untied", pickle_beside),
    "variant-beside": ("untied", variant_beside),
}


@torch.no_grad()
@pytest.mark.parametrize("name, change", LOADED.values(), ids=LOADED)
def test_as_transformers_loads_them(name, change, saved, tmp_path):
    source = shutil.copytree(saved[name], tmp_path / "source")
    change(source, saved)
    assert main(["hf", str(source), str(tmp_path / "t6"), "--no-verify"]) == 0
    ids = random_ids(1, 12)
    expected, logits = (AutoModelForCausalLM.from_pretrained(tmp_path / x)(ids).logits for x in ("source", "t6"))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert main(["hf", str(source), str(tmp_path / "verified")]) == 0


@torch.no_grad()
@pytest.mark.parametrize("family", once_but(["gemma", "granite", "olmo"], "granite"))
def test_a_head_of_its_own_where_embeddings_are_folded(family, tmp_path):
    options = {"embedding_multiplier": 12.0, "logits_scaling": 8.0} if family == "granite" else {}
    random_source(model_type=family, tie_word_embeddings=True, num_hidden_layers=2, **options).save_pretrained(
        tmp_path / "source"
    )
    own_head(tmp_path / "source", {})
    assert main(["hf", str(tmp_path / "source"), str(tmp_path / "t6")]) == 0


def named_in_config(folder: Path, saved: dict) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    shutil.copy(saved["other"] / "model.safetensors", folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"transformers_weights": "weights.safetensors"}))


def adapter(folder: Path, saved: dict) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))


def variant_alone(folder: Path, saved: dict) -> None:
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


def lost_head(folder: Path, saved: dict) -> None:
    weights(folder, lambda state: state.pop(HEAD))


REFUSED = {
    "named-in-config": (named_in_config, "transformers_weights='weights.safetensors'"),
    "adapter": (adapter, "adapter_config.json"),
    "variant-alone": (variant_alone, "only model.fp16.safetensors"),
    "lost-head": (lost_head, HEAD),
}


@pytest.mark.once
@pytest.mark.parametrize("change, named", REFUSED.values(), ids=REFUSED)
def test_refused_by_name(change, named, saved, tmp_path, capsys):
    source = shutil.copytree(saved["untied"], tmp_path / "source")
    change(source, saved)
    assert main(["hf", str(source), str(tmp_path / "t6"), "--no-verify"]) == 1
    assert named in last_error(capsys)
    assert not (tmp_path / "t6").exists()


def test_mixed_dtypes_load_as_the_source_does(saved, tmp_path):
    """By the configuration, not by the first tensor in the file; each tensor keeps the dtype in which it is stored."""
    source = shutil.copytree(saved["untied"], tmp_path / "source")
    weights(
        source, lambda s: s.update({name: s[name].bfloat16() for name in s if "norm" not in name and name != HEAD})
    )
    content = json.loads((source / "config.json").read_text())
    for dtype in ("bfloat16", "float32"):
        (source / "config.json").write_text(json.dumps(content | {"dtype": dtype}))
        assert main(["hf", str(source), str(tmp_path / dtype)]) == 0
        expected, model = (AutoModelForCausalLM.from_pretrained(x, dtype="auto") for x in (source, tmp_path / dtype))
        assert model.dtype == expected.dtype == getattr(torch, dtype)
        stored = load_file(tmp_path / dtype / "model.safetensors")
        assert stored[HEAD].dtype == torch.float32 and stored[EMBEDDINGS].dtype == torch.bfloat16


def test_a_dtype_in_which_nothing_is_stored(saved, tmp_path):
    """An upload refuses a configuration that no tensor agrees with: that of the weights is written."""
    source = shutil.copytree(saved["untied"], tmp_path / "source")
    weights(source, lambda s: s.update({name: s[name].bfloat16() for name in s}))
    assert main(["hf", str(source), str(tmp_path / "t6")]) == 0
    assert json.loads((source / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((tmp_path / "t6" / "config.json").read_text())["dtype"] == "bfloat16"


def test_values_that_float16_cannot_hold(saved, tmp_path, capsys):
    source = shutil.copytree(saved["untied"], tmp_path / "source")
    weights(source, lambda s: s["model.layers.0.mlp.up_proj.weight"].view(-1)[:1].fill_(1e5))
    assert main(["hf", str(source), str(tmp_path / "t6"), "--dtype", "float16", "--no-verify"]) == 1
    assert "model.layers.0.mlp.up_proj.weight has values too large for float16" in last_error(capsys)
