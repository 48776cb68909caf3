"""
Llama-shaped models of Transformers as T6 models, exactly (section 4 of the paper).

MHA, GQA and MQA are non-contextual TPA: with G key/value heads, R_K = R_V = G, the rows of B_K and B_V are the source's
key and value heads, and the constant A_g is G at the query heads of group g and 0 elsewhere. The factor cache then
holds what the source's cache holds. What a family does beyond Llama is folded into its weights, or is an option of
`T6Config`.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

from modeling_t6 import T6Config

from .errors import ConversionError
from .plan import Plan, Transform, unchanged


def scaled(factor: float) -> Transform:
    return unchanged if factor == 1 else lambda tensor: tensor * factor


def centered(tensor: torch.Tensor) -> torch.Tensor:
    """The weight of a projection into, or an embedding of, the residual stream, its output with mean 0."""
    return tensor - tensor.mean(dim=0, keepdim=True)


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


def fold(plan: Plan, ending: str, transform: Transform) -> None:
    """Lets `transform` act on the tensors of the T6 model whose names end so, after what they already undergo."""
    if transform is unchanged:
        return
    for source, moves in plan.moves.items():
        plan.moves[source] = [
            (target, (lambda tensor, first=first: transform(first(tensor))) if target.endswith(ending) else first)
            for target, first in moves
        ]
    plan.rounds = True


def untie(plan: Plan) -> None:
    """Gives the output layer weights of its own, as what is folded into the embeddings must not reach it."""
    if plan.config.tie_word_embeddings:
        plan.config.tie_word_embeddings = False
        plan.move("model.embed_tokens.weight", "lm_head.weight")


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


def plan_granite(config: PreTrainedConfig) -> Plan:
    """Granite multiplies embeddings, scores, what a block adds, and logits by constants, here folded into weights."""
    plan = plan_llama(config)
    if config.embedding_multiplier != 1 or config.logits_scaling != 1:
        untie(plan)
    fold(plan, "embed_tokens.weight", scaled(config.embedding_multiplier))
    fold(plan, "lm_head.weight", scaled(1 / config.logits_scaling))
    for ending in ("q_proj.weight", "q_proj.bias"):
        fold(plan, ending, scaled(config.attention_multiplier * plan.config.head_dim**0.5))
    for ending in ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias"):
        fold(plan, ending, scaled(config.residual_multiplier))
    return plan


def plan_gemma(config: PreTrainedConfig) -> Plan:
    """Gemma scales embeddings by sqrt(hidden_size) and norms by 1 + weight."""
    plan = plan_llama(config, hidden_act=getattr(config, "hidden_activation", None) or config.hidden_act)
    untie(plan)
    fold(plan, "embed_tokens.weight", scaled(config.hidden_size**0.5))
    fold(plan, "norm.weight", lambda weight: 1 + weight)
    return plan


def plan_olmo(config: PreTrainedConfig) -> Plan:
    """
    OLMo's norms are LayerNorms without weights. With everything that enters the residual stream centred, its mean is
    always 0, where LayerNorm and RMSNorm are the same; the output layer sees normalised, hence centred, states.
    """
    if config.clip_qkv is not None:
        raise ConversionError(f"olmo: clip_qkv={config.clip_qkv} clips keys and values, which a T6 model does not")
    plan = plan_llama(config, rms_norm_eps=1e-5)
    for layer in range(config.num_hidden_layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            del plan.moves[f"model.layers.{layer}.{name}.weight"]
            plan.constants[f"model.layers.{layer}.{name}.weight"] = torch.ones(config.hidden_size)
    del plan.moves["model.norm.weight"]
    plan.constants["model.norm.weight"] = torch.ones(config.hidden_size)
    fold(plan, "embed_tokens.weight", lambda weight: weight - weight.mean(dim=1, keepdim=True))
    for ending in ("o_proj.weight", "o_proj.bias", "down_proj.weight"):
        fold(plan, ending, centered)
    return plan


def plan_phi3(config: PreTrainedConfig) -> Plan:
    """Phi-3's queries, keys and values are one projection, its gate and up another."""
    plan = plan_llama(config)
    t6 = plan.config
    queries, keys = t6.num_attention_heads * t6.head_dim, t6.k_rank * t6.head_dim

    def rows(start: int, end: int, total: int) -> Transform:
        def cut(weight: torch.Tensor) -> torch.Tensor:
            if weight.shape[0] != total:
                raise ValueError(f"expected {total} rows")
            return weight[start:end]

        return cut

    total, inner = queries + 2 * keys, t6.intermediate_size
    for layer in range(t6.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for fused, parts in (
            ("self_attn.qkv_proj", {
                "q_proj": ("self_attn.q_proj", rows(0, queries, total)),
                "k_proj": ("self_attn.k_b_proj", rows(queries, queries + keys, total)),
                "v_proj": ("self_attn.v_b_proj", rows(queries + keys, total, total)),
            }),
            ("mlp.gate_up_proj", {
                "gate_proj": ("mlp.gate_proj", rows(0, inner, 2 * inner)),
                "up_proj": ("mlp.up_proj", rows(inner, 2 * inner, 2 * inner)),
            }),
        ):  # fmt: skip
            module = fused.split(".")[0]
            for name, (target, cut) in parts.items():
                del plan.moves[f"{prefix}.{module}.{name}.weight"]
                plan.move(f"{prefix}.{fused}.weight", f"{prefix}.{target}.weight", cut)
    return plan


FAMILIES: dict[str, Callable[[PreTrainedConfig], Plan]] = {
    "llama": plan_llama,
    "mistral": plan_llama,
    "ministral": plan_llama,
    "qwen2": plan_qwen2,
    "qwen3": plan_qwen3,
    "seed_oss": plan_seed_oss,
    "smollm3": plan_smollm3,
    "granite": plan_granite,
    "gemma": plan_gemma,
    "olmo": plan_olmo,
    "phi3": plan_phi3,
}

REFUSED = {
    "olmo2": "it normalises the outputs of attention and MLP instead of their inputs",
    "olmo3": "it normalises the outputs of attention and MLP instead of their inputs",
    "exaone4": "it normalises the outputs of attention and MLP instead of their inputs",
    "gemma2": "it caps attention scores and logits, and normalises the outputs of attention and MLP too",
    "gemma3": "it normalises the outputs of attention and MLP too, and its layers differ in RoPE",
    "gemma3_text": "it normalises the outputs of attention and MLP too, and its layers differ in RoPE",
    "cohere": "attention and MLP run side by side, and its RoPE is interleaved",
    "cohere2": "attention and MLP run side by side, and its RoPE is interleaved",
    "glm": "its RoPE is interleaved",
    "glm4": "its RoPE is interleaved",
    "helium": "its RoPE is interleaved",
    "stablelm": "its norms are LayerNorms with biases",
    "starcoder2": "its norms are LayerNorms with biases, and its MLP has no gate",
    "phi": "its norms are LayerNorms with biases, and its MLP has no gate",
    "nemotron": "its norms are LayerNorms with biases, and its MLP has no gate",
    "arcee": "its MLP has no gate",
    "apertus": "its MLP has no gate",
    "mixtral": "its MLP is a mixture of experts",
    "qwen2_moe": "its MLP is a mixture of experts",
    "qwen3_moe": "its MLP is a mixture of experts",
    "olmoe": "its MLP is a mixture of experts",
    "granitemoe": "its MLP is a mixture of experts",
    "phimoe": "its MLP is a mixture of experts",
    "gpt_oss": "its MLP is a mixture of experts, and its attention has sinks",
    "deepseek_v2": "its attention is MLA, whose keys mix rotated and unrotated parts",
    "deepseek_v3": "its attention is MLA, whose keys mix rotated and unrotated parts",
    "t6": "it is a T6 model already",
}


def make_plan(config: PreTrainedConfig) -> Plan:
    """
    The plan for a model of Transformers.

    Raises:
        ConversionError: naming the architecture and the reason, if no T6 model computes the same function.
    """
    kind = config.model_type
    if kind in REFUSED:
        raise ConversionError(f"{kind} cannot be converted exactly: {REFUSED[kind]}")
    if kind not in FAMILIES:
        raise ConversionError(f"{kind} is not known to be Llama-shaped: supported are {', '.join(sorted(FAMILIES))}")
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError("config.json has a quantization_config: quantised weights cannot be converted exactly")
    return FAMILIES[kind](config)
