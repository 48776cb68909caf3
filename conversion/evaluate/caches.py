"""Caches to evaluate a model with: its own, or keys and values rounded to a few bits."""

import torch
from transformers import Cache, DynamicCache, DynamicLayer, PreTrainedModel

from modeling_t6 import T6Cache, T6ForCausalLM


GROUP = 32  # features that share a scale in 4 bits
PARAMETERS = 4  # bytes of a group's scale and zero point, in 16 bits each


def rounded(states: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """
    `states` [..., n] as they come back from `bits` bits each: in groups of `group` neighbours, at even steps from the
    least to the greatest, with both the step and the least in float16.
    """
    groups = states.float().unflatten(-1, (-1, group))
    levels = 2**bits - 1
    low = groups.amin(-1, keepdim=True).half().float()
    step = ((groups.amax(-1, keepdim=True) - low) / levels).half().float()
    step = torch.where(step > 0, step, torch.ones_like(step))
    codes = ((groups - low) / step).round().clamp(0, levels)
    return (codes * step + low).flatten(-2).to(states.dtype)


class RoundedLayer(DynamicLayer):
    """
    Keys and values of one layer, each token's rounded by itself when it comes: 8 bits in one group for each head, fewer in
    groups of 32 features. They are held in the model's dtype: what is measured is what rounding costs, and the bytes
    that packed integers would take are counted.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def group(self, size: int) -> int:
        return GROUP if self.bits < 8 and size % GROUP == 0 else size

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        states = (rounded(x, self.bits, self.group(x.shape[-1])) for x in (key_states, value_states))
        return super().update(*states, *args, **kwargs)

    @property
    def packed_nbytes(self) -> float:
        """Bytes of the integers, and of the scales and zero points."""
        tensors = (self.keys, self.values) if self.is_initialized else ()
        return sum(x.numel() * (self.bits / 8 + PARAMETERS / self.group(x.shape[-1])) for x in tensors)


class RoundedCache(DynamicCache):
    """A `DynamicCache` of `RoundedLayer`s, of a model without sliding windows."""

    def __init__(self, config, bits: int):
        super().__init__(config=config)
        self.layers = [RoundedLayer(bits) for _ in self.layers]
        self.bits = bits


def can_be_rounded(model: PreTrainedModel) -> bool:
    """Whether the model keeps keys and values of all tokens in all layers."""
    layers = DynamicCache(config=model.config).layers
    return (
        not isinstance(model, T6ForCausalLM) and bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    )


def make_cache(model: PreTrainedModel, kind: str = "model") -> Cache:
    """
    An empty cache.

    Args:
        kind: `"model"` for what the model makes, in its dtype; `"8"`, `"4"` or `"2"` for keys and values in as many bits;
            `"float8_e4m3fn"` or `"int4"` for rows of a T6 in that dtype.
    """
    if kind in ("8", "4", "2"):
        return RoundedCache(model.config, int(kind))
    if isinstance(model, T6ForCausalLM):
        return T6Cache(config=model.config, dtype=None if kind == "model" else kind)
    return DynamicCache(config=model.config)
