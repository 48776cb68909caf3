"""
Llama-shaped models of Transformers as T6 models, exactly (section 4 of the paper).

MHA, GQA and MQA are non-contextual TPA: with G key/value heads, R_K = R_V = G, the rows of B_K and B_V are the source's
key and value heads, and the constant A_g is G at the query heads of group g and 0 elsewhere. The factor cache then
holds what the source's cache holds. What a family does beyond Llama is folded into its weights, or is an option of
`T6Config`.
"""

import torch
from transformers import PreTrainedConfig

from modeling_t6 import T6Config

from ..files.errors import ConversionError
from .plan import Plan


def group_matrix(num_heads: int, num_groups: int) -> torch.Tensor:
    """The constant A factors [G, h] of grouped-query attention: A_g is G at the heads of group g (section 4)."""
    groups = torch.arange(num_heads) // (num_heads // num_groups)
    return num_groups * (groups == torch.arange(num_groups)[:, None]).float()


def plan_llama(config: PreTrainedConfig, **options) -> Plan:
    """The plan for Llama itself, which those of the other families start from; `options` are `T6Config`'s."""
    num_heads = config.num_attention_heads
    num_groups = getattr(config, "num_key_value_heads", None) or num_heads
    if num_heads % num_groups:
        raise ConversionError(
            f"config.json: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_groups}"
        )
    fields = {
        "q_rank": None,
        "k_rank": num_groups,
        "v_rank": num_groups,
        "noncontextual_a": True,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        "attention_bias": getattr(config, "attention_bias", False) or False,
        "mlp_bias": getattr(config, "mlp_bias", False) or False,
    }
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "max_position_embeddings", "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
        "tie_word_embeddings", "attention_dropout", "sliding_window", "layer_types",
    ):  # fmt: skip
        if hasattr(config, name):
            fields[name] = getattr(config, name)
    if "sliding_attention" not in (fields.get("layer_types") or ()):
        fields["layer_types"] = None
    fields["rope_parameters"] = dict(config.rope_parameters)
    t6_config = T6Config(**fields | options)

    plan = Plan(t6_config, ignored=("rotary_emb.inv_freq",))
    plan.move("model.embed_tokens.weight", "model.embed_tokens.weight")
    plan.move("model.norm.weight", "model.norm.weight")
    if t6_config.tie_word_embeddings:
        plan.ignored += ("lm_head.weight",)
    else:
        plan.move("lm_head.weight", "lm_head.weight")
    for layer in range(t6_config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            plan.move(f"{prefix}.{name}.weight", f"{prefix}.{name}.weight")
        biases = {"q": t6_config.attention_bias, "o": t6_config.attention_out_bias, "mlp": t6_config.mlp_bias}
        for source, target, bias in (
            ("self_attn.q_proj", "self_attn.q_proj", biases["q"]),
            ("self_attn.k_proj", "self_attn.k_b_proj", biases["q"]),
            ("self_attn.v_proj", "self_attn.v_b_proj", biases["q"]),
            ("self_attn.o_proj", "self_attn.o_proj", biases["o"]),
            ("mlp.gate_proj", "mlp.gate_proj", biases["mlp"]),
            ("mlp.up_proj", "mlp.up_proj", biases["mlp"]),
            ("mlp.down_proj", "mlp.down_proj", biases["mlp"]),
        ):
            plan.move(f"{prefix}.{source}.weight", f"{prefix}.{target}.weight")
            if bias:
                plan.move(f"{prefix}.{source}.bias", f"{prefix}.{target}.bias")
        for name in ("k_a", "v_a"):
            plan.constants[f"{prefix}.self_attn.{name}"] = group_matrix(num_heads, num_groups)
    return plan


def plan_qwen2(config: PreTrainedConfig) -> Plan:
    return plan_llama(config, attention_bias=True, attention_out_bias=False)


def plan_qwen3(config: PreTrainedConfig) -> Plan:
    plan = plan_llama(config, qk_norm=True)
    for layer in range(config.num_hidden_layers):
        for name in ("q_norm", "k_norm"):
            plan.move(*2 * (f"model.layers.{layer}.self_attn.{name}.weight",))
    return plan


def plan_seed_oss(config: PreTrainedConfig) -> Plan:
    return plan_llama(config, attention_out_bias=config.attention_out_bias)


def plan_smollm3(config: PreTrainedConfig) -> Plan:
    without_rope = [layer for layer, rope in enumerate(config.no_rope_layers) if not rope]
    if without_rope:
        raise ConversionError(f"smollm3: layers {without_rope} have no RoPE, which a T6 model cannot say of a layer")
    return plan_llama(config)
