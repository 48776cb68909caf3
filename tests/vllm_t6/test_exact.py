"""Whatever the plugin serves, 32 requests at once: greedy tokens, and what they are worth, are those of `generate()`."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from conversion.__main__ import main as convert
from conversion.smaller.compress import compress
from modeling_t6 import T6ForCausalLM

from ..conversion.common import FAMILIES, exact_model, save_source
from ..modeling_t6.common import random_model, tiny_config
from .common import MIXED_LAYERS, ask, assert_same, engine, generate, random_prompts, serve_exactly


def rope(rope_type: str, **fields) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0} | fields}


LONGROPE = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)], "factor": 4.0}
VARIANTS = {
    "plain": {},
    "kv_only": {"q_rank": None},
    "noncontextual_a": {"noncontextual_a": True},
    "noncontextual_a-kv_only": {"noncontextual_a": True, "q_rank": None},
    "sigmoid": {"head_factor_act": "sigmoid"},
    "softmax": {"head_factor_act": "softmax"},
    "qk_norm": {"qk_norm": True},
    "qk_norm_of_heads": {"qk_norm": "heads", "head_factor_act": "sigmoid"},
    "grouped_heads": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "grouped_heads-noncontextual_a": {"num_attention_heads": 6, "num_key_value_heads": 2, "noncontextual_a": True},
    "head_norm": {"head_norm": True},
    "output_gate": {"output_gate": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "biases_but_of_output": {"attention_bias": True, "attention_out_bias": False},
    "bias_of_output": {"attention_out_bias": True},
    "partial_rope": rope("default", partial_rotary_factor=0.5),
    "linear": rope("linear", factor=4.0),
    "llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=64),
    "sliding": {"sliding_window": 24},
    "mixed_layers": MIXED_LAYERS,
    "ranks_by_layer": {"num_hidden_layers": 3, "k_rank": [1, 2, 3], "v_rank": [2, 2, 1]},
    "ranks_by_layer-mixed_layers": {"k_rank": [1, 2, 3], "v_rank": [2, 2, 1]} | MIXED_LAYERS,
    "ranks_by_layer-sliding": {"num_hidden_layers": 2, "k_rank": [1, 3], "v_rank": [2, 1], "sliding_window": 24},
    "34_heads_of_12": {"num_attention_heads": 34, "head_dim": 12},
    "47_heads_of_8": {"num_attention_heads": 47, "head_dim": 8},
    "ranks_over_16": {"k_rank": 17, "v_rank": 18},
    "untied": {"tie_word_embeddings": False},
    "gelu": {"hidden_act": "gelu"},
    "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "all_at_once": {
        "qk_norm": True, "head_norm": True, "output_gate": True, "attention_bias": True, "mlp_bias": True,
        "head_factor_act": "sigmoid", "tie_word_embeddings": False,
    } | MIXED_LAYERS,
}  # fmt: skip


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_variant(fields, tmp_path):
    serve_exactly(random_model(tiny_config(**fields)), tmp_path)


@pytest.mark.parametrize(
    ("original", "max_model_len", "lengths"),
    [(256, 256, (1, 64, 130, 200)), (16, 256, (17, 18, 64, 130))],
    ids=["short_factors", "long_factors"],
)
def test_longrope(original, max_model_len, lengths, tmp_path):
    """
    vLLM takes the long factors, for all requests, if it is told of a longer context than the original one; Transformers
    goes by the length of each. They agree where requests are all shorter than that, or all longer.
    """
    fields = rope("longrope", original_max_position_embeddings=original, **LONGROPE)
    model = random_model(tiny_config(max_position_embeddings=1024, **fields))
    model.save_pretrained(tmp_path)
    prompts = random_prompts(lengths, each=8)
    with engine(tmp_path, max_model_len=max_model_len) as llm:
        assert_same(ask(llm, prompts), generate(model, prompts))


LAYOUTS = {name: (name, "gqa") for name in FAMILIES if name != "llama-dynamic"}
LAYOUTS |= {"llama-mha": ("llama", "mha"), "llama-mqa": ("llama", "mqa")}


@pytest.mark.parametrize(("family", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_converted_family(family, layout, tmp_path):
    """vLLM answers as T6 does in Transformers, and as the source does that it was converted from."""
    source, target = save_source(tmp_path / "source", family, layout), tmp_path / "t6"
    assert convert(["hf", str(source), str(target), "--no-verify"]) == 0
    prompts = random_prompts()
    with engine(target) as llm:
        outputs = ask(llm, prompts)
    for cls, folder in ((T6ForCausalLM, target), (AutoModelForCausalLM, source)):
        assert_same(outputs, generate(cls.from_pretrained(folder).eval(), prompts))


def test_fewer_keys_that_are_normed(tmp_path):
    """A Qwen3 whose keys have lost heads, by layer: the norm is that of formed heads, of constant A."""
    source = exact_model("qwen3", "mha").float()
    ids = torch.randint(99, (4, 60), generator=torch.Generator().manual_seed(0))
    serve_exactly(compress(source, ids, [1, 3, 2], [2], quiet=True), tmp_path)


def test_sharded_folder(tmp_path):
    model = random_model(tiny_config())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    prompts = random_prompts()
    with engine(tmp_path) as llm:
        assert_same(ask(llm, prompts), generate(model, prompts))
