"""Families that scale or centre what Llama does not: Granite, Gemma, OLMo. All of it is folded into weights."""

import torch
from transformers import PreTrainedConfig

from ..files.errors import ConversionError
from .llama import plan_llama, plan_llama_shaped
from .plan import Plan, Transform, unchanged


def scaled(factor: float) -> Transform:
    return unchanged if factor == 1 else lambda tensor: tensor * factor


def centered(tensor: torch.Tensor) -> torch.Tensor:
    """The weight of a projection into, or an embedding of, the residual stream, its output with mean 0."""
    return tensor - tensor.mean(dim=0, keepdim=True)


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
    if getattr(config, "use_bidirectional_attention", None):
        raise ConversionError(
            "gemma: use_bidirectional_attention lets tokens see those after them, a T6 model does not"
        )
    plan = plan_llama_shaped(config, attention_bias=config.attention_bias)
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
    plan = plan_llama_shaped(config, attention_bias=config.attention_bias, rms_norm_eps=1e-5)
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
