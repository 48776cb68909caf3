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


def rope_parameters(config: PreTrainedConfig, partial: bool) -> dict:
    """
    The RoPE of a family that rotates whole heads, or, if `partial`, what `partial_rotary_factor` says of each.

    Raises:
        ConversionError: for parameters with which the family's cache holds keys rotated in two ways, or does not run.
    """
    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    if partial:
        return rope
    if kind == "longrope":
        raise ConversionError(
            f"{config.model_type}: rope_type 'longrope' rotates by other factors from one length on, and this family's "
            "cache keeps the keys from before: with and without it, such a model computes different functions"
        )
    factor = rope.pop("partial_rotary_factor", None)  # which the default RoPE of these families does not read
    if kind != "default" and factor not in (None, 1):
        raise ConversionError(f"{config.model_type}: RoPE rotates whole heads, got partial_rotary_factor={factor}")
    return rope


def windows_by_layer(config: PreTrainedConfig) -> dict:
    """The windows of a family whose `layer_types` say which layers have one."""
    if "sliding_attention" not in config.layer_types:
        # Without the field, so that a `sliding_window` beside it stays without effect, as it is in the source.
        return {} if set(config.layer_types) <= {"full_attention"} else {"layer_types": config.layer_types}
    return {"sliding_window": config.sliding_window, "layer_types": config.layer_types}


def plan_llama_shaped(config: PreTrainedConfig, *, partial_rope: bool = False, **options) -> Plan:
    """
    The plan for a decoder of Llama's shape, which the plans of the families start from. Of `config`, only fields that all
    of them read are read here: what one reads and another ignores is among `options`, fields of `T6Config`.
    """
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
        "attention_dropout": config.attention_dropout or 0.0,
        "rope_parameters": rope_parameters(config, partial_rope),
        "dtype": config.dtype,
    }
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id",
        "tie_word_embeddings",
    ):  # fmt: skip
        fields[name] = getattr(config, name)
    if hasattr(config, "rms_norm_eps"):
        fields["rms_norm_eps"] = config.rms_norm_eps
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


def plan_llama(config: PreTrainedConfig) -> Plan:
    return plan_llama_shaped(config, attention_bias=config.attention_bias, mlp_bias=config.mlp_bias)


def plan_mistral(config: PreTrainedConfig) -> Plan:
    return plan_llama_shaped(config, sliding_window=config.sliding_window)


def plan_ministral(config: PreTrainedConfig) -> Plan:
    return plan_llama_shaped(config, **windows_by_layer(config))


def plan_qwen2(config: PreTrainedConfig) -> Plan:
    return plan_llama_shaped(config, attention_bias=True, attention_out_bias=False, **windows_by_layer(config))


def plan_qwen3(config: PreTrainedConfig) -> Plan:
    windows = windows_by_layer(config)
    plan = plan_llama_shaped(config, qk_norm=True, attention_bias=config.attention_bias, **windows)
    for layer in range(config.num_hidden_layers):
        for name in ("q_norm", "k_norm"):
            plan.move(*2 * (f"model.layers.{layer}.self_attn.{name}.weight",))
    return plan


def plan_seed_oss(config: PreTrainedConfig) -> Plan:
    biases = {name: getattr(config, name) for name in ("attention_bias", "attention_out_bias", "mlp_bias")}
    return plan_llama_shaped(config, **biases)


def plan_smollm3(config: PreTrainedConfig) -> Plan:
    without_rope = [layer for layer, rope in enumerate(config.no_rope_layers[: config.num_hidden_layers]) if not rope]
    if without_rope:
        raise ConversionError(f"smollm3: layers {without_rope} have no RoPE, which a T6 model cannot say of a layer")
    windows = windows_by_layer(config)
    if "sliding_window" in windows and not config.use_sliding_window:
        raise ConversionError(
            "smollm3: layer_types has 'sliding_attention' and use_sliding_window is False, which some of Transformers' "
            "attention functions take for a window and others do not"
        )
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return plan_llama_shaped(config, **biases, **windows)
