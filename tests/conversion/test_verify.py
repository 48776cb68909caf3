"""Verification: a planted fault of each kind is refused, by whole models and layer by layer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationMixin

from conversion import layerwise, verify
from conversion.__main__ import main
from conversion.files.checkpoints import Checkpoint
from conversion.files.errors import ConversionError
from modeling_t6 import T6ForCausalLM

from ..versions import once_but
from .common import ROPE, last_error, random_ids, random_source, save_source


LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}  # fmt: skip
SOURCES = {
    "windows": {
        "model_type": "ministral", "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "far-window": {"model_type": "mistral", "sliding_window": 1000, "max_position_embeddings": 4096},
    "longrope": {"model_type": "phi3", "rope_parameters": LONG | ROPE, "original_max_position_embeddings": 64},
    "dynamic": {
        "model_type": "llama", "max_position_embeddings": 96,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0} | ROPE,
    },
    "many-tokens": {"model_type": "gemma", "vocab_size": 1000},
    "filled-rows": {"model_type": "llama", "head_dim": 10},  # of 20 numbers, which kernels do not read
    "yarn": {
        "model_type": "qwen3",
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} | ROPE,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Of each source, its folder and that of its T6 model, converted on first use."""
    root = tmp_path_factory.mktemp("verify")

    class Folders(dict):
        def __missing__(self, name: str) -> tuple[Path, Path]:
            random_source(**SOURCES[name]).save_pretrained(root / name)
            assert main(["hf", str(root / name), str(root / f"{name}-t6"), "--no-verify"]) == 0
            self[name] = root / name, root / f"{name}-t6"
            return self[name]

    return Folders()


def config(**fields):
    def plant(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | fields))

    return plant


def rope(**fields):
    def plant(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["rope_parameters"] |= fields
        (folder / "config.json").write_text(json.dumps(content))

    return plant


def weight(name: str, change):
    def plant(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state[name])
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return plant


def extra_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {"model.layers.3.mlp.up_proj.weight": torch.ones(2)}, folder / "model.safetensors")


def generation(**fields):
    def plant(folder: Path) -> None:
        content = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps(content | fields))

    return plant


SWAPPED = ["full_attention", "sliding_attention", "sliding_attention"]
FAULTS = {
    "window-off-by-one": ("windows", config(sliding_window=41), "logits differ"),
    "window-of-no-layer": ("windows", config(layer_types=["full_attention"] * 3), "logits differ"),
    "window-of-every-layer": ("windows", config(layer_types=["sliding_attention"] * 3), "logits differ"),
    "window-of-another-layer": ("windows", config(layer_types=SWAPPED), "logits differ"),
    "far-window-off-by-one": ("far-window", config(sliding_window=1001), "behind a cache of 1016 tokens"),
    "far-window-missing": ("far-window", config(sliding_window=None, layer_types=None), "behind a cache of 1016 tokens"),
    "short-factor": ("longrope", rope(short_factor=[1.0, 1.0, 1.0, 1.1]), "logits differ"),
    "long-factor": ("longrope", rope(long_factor=[1.0, 2.0, 3.0, 4.1]), "logits differ"),
    "switch-one-later": ("longrope", rope(original_max_position_embeddings=65), "verification failed"),
    "rope-type": ("dynamic", rope(rope_type="default"), "at positions"),
    "rope-context": ("dynamic", config(max_position_embeddings=97), "at positions"),
    "rope-scale": ("yarn", rope(factor=4.1), "logits differ"),
    "rope-theta": ("yarn", rope(rope_theta=10001.0), "logits differ"),
    "norm-epsilon": ("yarn", config(rms_norm_eps=1e-4), "logits differ"),
    "one-weight": (
        "yarn", weight("model.layers.2.self_attn.k_b_proj.weight", lambda w: w[0, 0].add_(0.5)), "logits differ",
    ),
    "one-group": ("yarn", weight("model.layers.1.self_attn.v_a", lambda w: w.copy_(w.roll(1, 1))), "logits differ"),
    "one-token": ("yarn", weight("lm_head.weight", lambda w: w[98].mul_(1.01)), "logits differ"),
    # Of a token that is in no text.
    "one-number-of-a-token": (
        "many-tokens", weight("model.embed_tokens.weight", lambda w: w[777, 5].neg_()), "embedding of token 777 differs",
    ),
    "size-of-a-token": (
        "many-tokens", weight("model.embed_tokens.weight", lambda w: w[777].mul_(1.01)), "embedding of token 777 differs",
    ),
    "context": ("yarn", config(max_position_embeddings=512), "max_position_embeddings=512, the source has 256"),
    "end-of-text-elsewhere": ("yarn", config(eos_token_id=7), "eos_token_id=7, the source has None"),
    "dtype": ("yarn", config(dtype="float16"), "dtype=torch.float16, the source torch.float32"),
    "biases": ("yarn", config(attention_bias=True), "k_b_proj.bias is missing from the weights"),
    "one-tensor-more": ("yarn", extra_tensor, "layers.3.mlp.up_proj.weight is unknown to config.json"),
    "shape": ("yarn", config(intermediate_size=97), "gate_proj.weight has shape .96, 64., by config.json it is .97, 64."),
    "end-of-text": ("yarn", generation(eos_token_id=7), "eos_token_id=7, the source has None"),
    "sampling": ("yarn", generation(do_sample=True, temperature=0.5), "do_sample=True"),
}  # fmt: skip


def planted(folders, name: str, plant, tmp_path: Path) -> tuple[Path, Path]:
    source, result = folders[name]
    plant(shutil.copytree(result, tmp_path / "t6"))
    return source, tmp_path / "t6"


def by_layers(source: Path, result: Path, rounded: bool = False) -> verify.Comparison:
    return layerwise.compare_layers(source, AutoConfig.from_pretrained(source), Checkpoint(source), result, rounded)


@pytest.mark.parametrize(
    "name", once_but([name for name in SOURCES if name != "longrope"], "windows", "dynamic", "yarn")
)
def test_what_is_right_passes(name, folders):
    assert verify.compare_with_transformers(*folders[name]).logit_difference < 1e-5


def test_long_rope(folders, monkeypatch):
    """Where the source itself loses its text at the switch, as in some versions of Transformers, that is said."""
    source = verify.load_source(folders["longrope"][0])
    ids = random_ids(1, 60)
    same = torch.equal(*(source.generate(ids, max_new_tokens=12, do_sample=False, use_cache=x) for x in (True, False)))
    if not same:
        with pytest.raises(ConversionError, match="from token 65 on, .* loses the source's text"):
            verify.compare_with_transformers(*folders["longrope"])
        return
    assert verify.compare_with_transformers(*folders["longrope"]).logit_difference < 1e-5
    plain = GenerationMixin.prepare_inputs_for_generation
    monkeypatch.setattr(T6ForCausalLM, "prepare_inputs_for_generation", plain)
    with pytest.raises(
        ConversionError, match="feeds the source 65 tokens, without the cache, and the result 1 tokens"
    ):
        verify.compare_with_transformers(*folders["longrope"])


@pytest.mark.parametrize("family", once_but(["ministral", "granite", "gemma", "olmo", "llama-biases"], "granite"))
def test_what_is_right_passes_layer_by_layer(family, tmp_path, monkeypatch, capsys):
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if family == "ministral" else {}
    save_source(tmp_path / "source", family, num_hidden_layers=2, **layers)
    monkeypatch.setattr(verify, "fits_in_memory", lambda *numbers: False)
    assert main(["hf", str(tmp_path / "source"), str(tmp_path / "t6")]) == 0
    output = capsys.readouterr().out
    assert "layer by layer" in output and "verified: logits differ by" in output
    monkeypatch.setattr(layerwise, "fits_in_memory", lambda *numbers: False)
    assert main(["hf", str(tmp_path / "source"), str(tmp_path / "none")]) == 1
    assert "not even a layer of both fits into memory" in last_error(capsys)
    assert not (tmp_path / "none").exists()


@pytest.mark.once
@pytest.mark.parametrize("name, plant, named", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_refused(name, plant, named, folders, tmp_path):
    with pytest.raises(ConversionError, match=named):
        verify.compare_with_transformers(*planted(folders, name, plant, tmp_path))


@pytest.mark.once
def test_rows_of_another_kind_are_refused(folders, tmp_path):
    """Where weights are rounded, no tokens are generated, whose caches would show it."""
    with pytest.raises(ConversionError, match="config.json has cache_dtype='int4', the source has None"):
        verify.compare_with_transformers(*planted(folders, "yarn", config(cache_dtype="int4"), tmp_path), rounded=True)


@pytest.mark.once
@pytest.mark.parametrize(
    "fault",
    ["window-of-another-layer", "far-window-off-by-one", "long-factor", "one-group", "one-token", "size-of-a-token"],
)
def test_a_planted_fault_is_refused_layer_by_layer(fault, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(layerwise, "ROWS", 32)  # the last tokens are in the fourth part of the vocabulary
    name, plant, _ = FAULTS[fault]
    with pytest.raises(ConversionError, match="verification failed: .* in layer"):
        by_layers(*planted(folders, name, plant, tmp_path))
