"""Checks of single fields of config.json and generation_config.json, before anything is computed from them."""

import math
from collections.abc import Callable, Mapping

import torch

from ..files.errors import ConversionError


# The largest that is taken for a size: what is computed for each layer or head must end.
SIZES = {
    "vocab_size": 10**8, "hidden_size": 10**6, "intermediate_size": 10**7, "num_hidden_layers": 10**4,
    "num_attention_heads": 1024, "num_key_value_heads": 1024, "head_dim": 10**5, "max_position_embeddings": 10**10,
    "original_max_position_embeddings": 10**10,
}  # fmt: skip
POSITIVE = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor", "logits_scaling")
NUMBERS = (
    "rms_norm_eps", "initializer_range", "attention_dropout", "embedding_multiplier", "residual_multiplier",
    "attention_multiplier", "clip_qkv", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
)  # fmt: skip
# Of generation_config.json, or of config.json in old models.
GENERATION = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "temperature",
    "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty",
)  # fmt: skip
FLAGS = ("tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias", "use_sliding_window", "do_sample")
WORDS = ("model_type", "hidden_act", "rope_type", "type")
# For these, null is as good as absent.
NULLABLE = (
    "num_key_value_heads", "head_dim", "original_max_position_embeddings", "partial_rotary_factor", "attention_dropout",
    "clip_qkv", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "type", *FLAGS, *GENERATION,
)  # fmt: skip


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_list(value: object, accepts: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(accepts, value))


def is_dtype(value: object) -> bool:
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


Rule = tuple[str, Callable[[object], bool]]  # what is expected, and whether a value is that


def _rules() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for name, most in SIZES.items():
        rules[name] = (
            f"an integer from 1 to {most:,}",
            lambda value, most=most: is_integer(value) and 1 <= value <= most,
        )
    for name in POSITIVE:
        rules[name] = "a number above 0", lambda value: is_number(value) and value > 0
    rules |= dict.fromkeys((*NUMBERS, *GENERATION), ("a number", is_number))
    rules |= {name: ("true or false", lambda value: isinstance(value, bool)) for name in FLAGS}
    rules |= {name: ("text", lambda value: isinstance(value, str)) for name in WORDS}
    for name in ("long_factor", "short_factor"):
        rules[name] = "a list of numbers", lambda value: is_list(value, is_number)
    for name in ("sliding_window", "attention_chunk_size"):
        rules[name] = "an integer or null", lambda value: value is None or is_integer(value)
    for name in ("dtype", "torch_dtype"):
        rules[name] = (
            "a floating-point type of torch such as bfloat16, or null",
            lambda value: value is None or is_dtype(value),
        )
    rules["id2label"] = "an object or null", lambda value: value is None or isinstance(value, Mapping)
    rules["layer_types"] = (
        "a list of texts or null",
        lambda value: value is None or is_list(value, lambda item: isinstance(item, str)),
    )
    rules["no_rope_layers"] = (
        "a list of integers or null",
        lambda value: value is None or is_list(value, lambda item: isinstance(item, int)),
    )
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        rules[name] = (
            "an integer, a list of integers or null",
            lambda value: value is None or is_integer(value) or is_list(value, is_integer),
        )
    return rules


RULES = _rules()


def check_fields(content: Mapping[str, object], file: str) -> None:
    """
    Args:
        content: of a `config.json` or `generation_config.json`, which errors call `file`.

    Raises:
        ConversionError: naming file and field, with what was expected and what was got.
    """

    def check(fields: Mapping[str, object], inside: str = "") -> None:
        for name, value in fields.items():
            expected, accepts = RULES.get(name, (None, None))
            if accepts is not None and not (value is None and name in NULLABLE) and not accepts(value):
                raise ConversionError(f"{file}: `{inside}{name}` must be {expected}, got {shown(value)}")

    check(content)
    for name in ("rope_parameters", "rope_scaling"):
        rope = content.get(name)
        if rope is not None and not isinstance(rope, dict):
            raise ConversionError(f"{file}: `{name}` must be an object or null, got {shown(rope)}")
        check(rope or {}, f"{name}.")


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
