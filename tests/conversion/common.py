"""Small models of Transformers with random weights, no weight at its initial value, and how far predictions are apart."""

from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conversion.sources.families import make_plan
from modeling_t6 import T6ForCausalLM


SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LAYOUTS = {"mha": (4, 4), "gqa": (8, 2), "mqa": (4, 1)}
ROPE = {"rope_theta": 10000.0}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama-linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 4.0} | ROPE},
    "llama-dynamic": {
        "model_type": "llama", "max_position_embeddings": 48,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0} | ROPE,
    },
    "llama-yarn": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} | ROPE,
    },
    "llama-llama3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        } | ROPE,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-sliding": {"model_type": "mistral", "sliding_window": 24},
    "ministral": {
        "model_type": "ministral", "sliding_window": 24, "head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2-sliding": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 32},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 1, 1]},
    "granite": {
        "model_type": "granite", "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.1, "tie_word_embeddings": True, "attention_bias": True,
    },
    "gemma": {"model_type": "gemma", "head_dim": 32},
    "olmo": {"model_type": "olmo", "tie_word_embeddings": True},
    "olmo-untied": {"model_type": "olmo", "attention_bias": True},
    "phi3": {"model_type": "phi3", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5} | ROPE},
}  # fmt: skip


def source_model(family: str, layout: str, dtype: torch.dtype = torch.float32, **overrides):
    return random_source(layout, dtype, **FAMILIES[family] | overrides)


def random_source(layout: str = "gqa", dtype: torch.dtype = torch.float32, **fields):
    """A model of Transformers of the `model_type` and with the other fields that are given."""
    num_heads, num_groups = LAYOUTS[layout]
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_groups, "head_dim": 64 // num_heads}
    config = AutoConfig.for_model(**(SIZES | heads | fields))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15 if parameter.dim() > 1 else 0.3)
    return model.to(dtype)


def exact_model(family: str = "llama", layout: str = "gqa", **overrides) -> T6ForCausalLM:
    """A converted model with random weights, in float64."""
    return as_t6(source_model(family, layout, **overrides)).double()


def as_t6(source) -> T6ForCausalLM:
    plan = make_plan(source.config)
    model = T6ForCausalLM(plan.config).eval()
    state = dict(plan.constants)
    for name, tensor in source.state_dict().items():
        state |= {target: transform(tensor) for target, transform in plan.moves.get(name, ())}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, 99, shape, generator=torch.Generator().manual_seed(1))


def save_source(folder: Path, family: str = "llama", layout: str = "gqa", **kwargs) -> Path:
    shards = {"max_shard_size": kwargs.pop("max_shard_size")} if "max_shard_size" in kwargs else {}
    source_model(family, layout, **kwargs).save_pretrained(folder, **shards)
    return folder


def last_error(capsys) -> str:
    """What the command line printed as its error: one line, after whatever a progress bar had shown."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and sum("error" in line.lower() for line in lines) == 1, lines
    return lines[-1]


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits.float().log_softmax(-1)


def divergence(model: PreTrainedModel, ids: torch.Tensor, expected: torch.Tensor) -> float:
    """Nats per token by which predictions for `ids` [batch, seq] differ from `expected` log-probabilities (KL)."""
    log_probs = log_probabilities(model, ids)
    return F.kl_div(log_probs, expected, log_target=True, reduction="sum").item() / ids.numel()
