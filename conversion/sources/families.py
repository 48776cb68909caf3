"""The families of Transformers that are Llama-shaped, and why others are not."""

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

from ..files.checkpoints import Checkpoint
from ..files.errors import ConversionError
from .folded import plan_gemma, plan_granite, plan_olmo
from .llama import (
    plan_llama,
    plan_ministral,
    plan_mistral,
    plan_qwen2,
    plan_qwen3,
    plan_seed_oss,
    plan_smollm3,
)
from .phi3 import plan_phi3
from .plan import Plan


FAMILIES: dict[str, Callable[[PreTrainedConfig], Plan]] = {
    "llama": plan_llama,
    "mistral": plan_mistral,
    "ministral": plan_ministral,
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


# Families that read `sliding_window`.
WINDOWED = ("mistral", "ministral", "qwen2", "qwen3", "smollm3", "phi3")
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
    plan = FAMILIES[kind](config)
    for field in ("sliding_window", "attention_chunk_size"):
        if not (field == "sliding_window" and kind in WINDOWED) and getattr(config, field, None) is not None:
            plan.notes.append(
                f"config.json has {field}={getattr(config, field)}, which {kind} does not read: every token sees all those "
                "before it, as in the source without a cache (a cache of Transformers forgets tokens by this field)"
            )
    return plan


def plan_as_loaded(config: PreTrainedConfig, checkpoint: Checkpoint) -> Plan:
    """
    The plan for the weights that Transformers loads from `checkpoint`. Under a configuration that ties the output layer to the
    embeddings, it still loads both if the checkpoint has both and they differ; if it has only one, that one is used for both.

    Raises:
        ConversionError: as `make_plan`, or if Transformers would load other files than those of `checkpoint`.
    """
    if getattr(config, "transformers_weights", None) is not None:
        raise ConversionError(
            f"config.json names its weights, transformers_weights={config.transformers_weights!r}: expected them in "
            "model.safetensors, or in shards with model.safetensors.index.json"
        )
    if (checkpoint.folder / "adapter_config.json").exists():
        raise ConversionError(
            f"{checkpoint.folder} holds adapter_config.json, by which Transformers loads another model: merge the adapter "
            "into the weights, or take it away"
        )
    has_embeddings, has_head = (name in checkpoint.tensors for name in (EMBEDDINGS, HEAD))
    if config.tie_word_embeddings and has_embeddings and has_head:
        embeddings, head = (checkpoint.read(name).to(config.dtype or torch.float64) for name in (EMBEDDINGS, HEAD))
        if not torch.equal(embeddings, head):
            config = copy.copy(config)
            config.tie_word_embeddings = False
    plan = make_plan(config)
    if config.tie_word_embeddings and has_head and not has_embeddings:
        plan.moves[HEAD] = plan.moves.pop(EMBEDDINGS)
    return plan
