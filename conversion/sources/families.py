"""The families of Transformers that are Llama-shaped, and why others are not."""

from collections.abc import Callable

from transformers import PreTrainedConfig

from ..files.errors import ConversionError
from .folded import plan_gemma, plan_granite, plan_olmo
from .llama import plan_llama, plan_qwen2, plan_qwen3, plan_seed_oss, plan_smollm3
from .phi3 import plan_phi3
from .plan import Plan


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
