"""
Random configurations of every family, with the fields that real checkpoints carry, read or not: what is converted computes
what the source computes, and what is not is refused in one line, for a reason that is known.

    T6_EXAMPLES=200 python -m pytest tests/conversion/test_property.py    that many, other ones each time
"""

import contextlib
import io
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from conversion.__main__ import main
from conversion.sources.families import FAMILIES
from modeling_t6 import T6Cache, T6ForCausalLM
from modeling_t6.cache_t6 import CACHE_NAME

from ..versions import once_but


MORE = os.environ.get("T6_EXAMPLES")
EXAMPLES = math.ceil(int(MORE) / len(FAMILIES)) if MORE else 3
# Why a model that runs may be refused.
REASONS = (
    "'longrope'", "partial_rotary_factor=", "use_bidirectional_attention", "clip_qkv=", "have no RoPE", "use_sliding_window is False",
)  # fmt: skip
LENGTH = 40  # tokens: past all windows, and past what pretraining is said to have seen


def maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
    """A value of a field, or "absent"."""
    return st.one_of(st.just("absent"), strategy)


@st.composite
def rope_fields(draw, size: int, kinds: list[str]) -> dict:
    """As new configurations have them, in `rope_parameters`, or as old ones, in `rope_theta` and `rope_scaling`."""
    kind = draw(st.sampled_from(kinds))
    rope = {"rope_type": kind}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        rope["factor"] = draw(st.sampled_from([1.5, 2.0, 8.0]))
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "yarn":
        rope |= draw(st.sampled_from([{}, {"attention_factor": 1.2}, {"beta_fast": 16.0, "beta_slow": 2.0}]))
    if kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = 24
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * size, "long_factor": [1.0 + i for i in range(size)]}
    theta = draw(st.sampled_from([10000.0, 500000.0]))
    if draw(st.booleans()):
        return {"rope_parameters": rope | {"rope_theta": theta}}
    old = {"type": rope.pop("rope_type")} | rope
    return {"rope_theta": theta} | ({} if kind == "default" else {"rope_scaling": old})


@st.composite
def configurations(draw, family: str) -> dict:
    heads, groups = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3)]))
    head_dim = draw(st.sampled_from([8, 16]))
    layers = draw(st.integers(1, 2))
    partial = draw(st.sampled_from([1.0, 1.0, 0.5]))
    size = int(head_dim * partial) // 2 if family == "phi3" else head_dim // 2
    kinds = ["default", "default", "linear", "dynamic", "yarn", "llama3", "longrope"]
    if family == "phi3":  # which takes no others
        kinds = ["default", "longrope"]
    config = {
        "model_type": family, "vocab_size": 61, "hidden_size": heads * head_dim, "intermediate_size": 40,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head_dim,
        "max_position_embeddings": draw(st.sampled_from([32, 256])), "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": draw(st.sampled_from([None, 0])), "dtype": "float32",
    } | draw(rope_fields(size, kinds))  # fmt: skip
    if config["max_position_embeddings"] == 32:
        config.setdefault("original_max_position_embeddings", 24)
    layer_types = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers)
    fields = {
        "rms_norm_eps": st.sampled_from([1e-6, 1e-5]),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "attention_out_bias": st.booleans(),
        "attention_dropout": st.sampled_from([0.0, 0.1]),
        "hidden_act": st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh"]),
        "hidden_activation": st.sampled_from([None, "relu"]),
        "sliding_window": st.sampled_from([None, 9, 30]),
        "use_sliding_window": st.booleans(),
        "max_window_layers": st.integers(0, 2),
        "layer_types": layer_types,
        "partial_rotary_factor": st.just(partial),
        "original_max_position_embeddings": st.just(24),
        "no_rope_layers": st.sampled_from([[1] * layers, [1] * layers, [0] * layers]),
        "use_bidirectional_attention": st.sampled_from([None, False, True]),
        "clip_qkv": st.sampled_from([None, None, 0.1]),
        "embedding_multiplier": st.sampled_from([1.0, 12.0]),
        "logits_scaling": st.sampled_from([1.0, 8.0]),
        "residual_multiplier": st.sampled_from([1.0, 0.22]),
        "attention_multiplier": st.sampled_from([1.0, 0.1]),
        "pretraining_tp": st.just(2),
        "use_cache": st.booleans(),
        "resid_pdrop": st.just(0.1),
        "residual_dropout": st.just(0.1),
        "tokenizer_class": st.just("GPT2Tokenizer"),
        "transformers_version": st.just("4.40.0"),
        "temperature": st.just(0.5),
    }
    config |= {name: value for name, values in fields.items() if (value := draw(maybe(values))) != "absent"}
    if family == "phi3":
        config["partial_rotary_factor"] = partial
    return config


def save_source(config: dict, folder: Path) -> torch.nn.Module | None:
    """Writes a source with random weights, its configuration as it is drawn; `None` if Transformers cannot run it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.2)
            model(torch.zeros(1, LENGTH, dtype=torch.long))
    except Exception:  # whatever a configuration's validation, or a model, raises
        save_file({"model.norm.weight": torch.ones(8)}, folder / "model.safetensors")
        return None
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return model


def close(logits: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max(), what


@torch.no_grad()
def equal(source: torch.nn.Module, model: T6ForCausalLM) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(61, (2, LENGTH + 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "use_cache": False}
    close(model(ids, **options).logits[mask.bool()], source(ids, **options).logits[mask.bool()], "without a cache")
    close(model(ids[:, :12]).logits, source(ids[:, :12]).logits, "a short text after a long one")
    caches = T6Cache(config=model.config), DynamicCache()
    start = 20  # before windows and lengths of pretraining end
    parts = ids.split([start, *[1] * (LENGTH + 6 - start)], dim=1)
    for position, part in enumerate(parts):
        logits, expected = (
            x(part, use_cache=True, **{CACHE_NAME: cache}).logits for x, cache in zip((model, source), caches)
        )
        close(logits, expected, f"behind a cache, step {position}")


@pytest.mark.parametrize("family", once_but(FAMILIES, "llama", "phi3", "ministral", "gemma"))
def test_random_configurations(family):
    @settings(
        max_examples=EXAMPLES, derandomize=not MORE, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(configurations(family))
    def converts(config):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            source = save_source(config, folder / "source")
            errors = io.StringIO()
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                code = main(["hf", str(folder / "source"), str(folder / "t6"), "--no-verify"])
            if code == 1:
                line = errors.getvalue().strip().splitlines()[-1]
                assert line.startswith("error: ") and not (folder / "t6").exists()
                assert source is None or any(reason in line for reason in REASONS), line
            elif source is not None:
                equal(source, T6ForCausalLM.from_pretrained(folder / "t6").eval())

    converts()
