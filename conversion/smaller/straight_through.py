"""
Rows as a cache of 8 or 4 bits returns them, with the gradient of what went in (a straight-through estimator, arXiv 1308.3432), so that
a model learns with the rounding of its cache.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch

from modeling_t6 import T6ForCausalLM, heads_at_once_t6
from modeling_t6.cache_t6 import CACHE_DTYPES, FactorLayout, T6DynamicLayer
from modeling_t6.modeling_t6 import T6Attention
from modeling_t6.quantized_rows_t6 import GROUP, LARGEST_A, quantize, rotate_features


TINY = torch.finfo(torch.float32).tiny


def ranges(x: torch.Tensor) -> torch.Tensor:
    """Of each number of x [..., n], the greatest less the least of its `GROUP` neighbours, [..., n]."""
    sizes = [
        (group.amax(-1, keepdim=True) - group.amin(-1, keepdim=True)).expand_as(group) for group in x.split(GROUP, -1)
    ]
    return torch.cat(sizes, -1)


def as_read(
    a: torch.Tensor | None, b: torch.Tensor, layouts: tuple[FactorLayout, FactorLayout], index: int, cache_dtype: str
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """
    A and B [batch, seq, rank, d] of keys (`index` 0) or values (1) as they are read from rows of a `cache_dtype` with these
    `layouts`, which leave a constant A as it is, or hold A [batch, seq, rank, h_kv]. Their gradients are those of A and B. In 4 bits
    the rounding is in steps that are parts of a range of B, and has a gradient by that: numbers that make the range large are
    learnt to be smaller.
    """
    with torch.autocast(b.device.type, enabled=False):
        if cache_dtype == "int4":
            return _as_read_in_4_bits(a, b, layouts[index].num_heads == 0)
        with torch.no_grad():
            layer = T6DynamicLayer()
            layer.layouts, layer.stored_dtype = layouts, CACHE_DTYPES[cache_dtype]
            rows = layer.as_stored(layouts[index].pack(a, b), index)
            read_a, read_b = layouts[index].read(rows, b.dtype)
        return (a + (read_a - a).detach() if layouts[index].num_heads else a), b + (read_b - b).detach()


def _as_read_in_4_bits(
    a: torch.Tensor | None, b: torch.Tensor, is_constant: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The numbers that `QuantizedLayout` packs, which are not packed: that takes most of the time."""
    rotated = rotate_features(b.to(torch.float32))
    size = ranges(rotated)
    with torch.no_grad():
        # B is held times the size of A.
        largest = 1 if is_constant else (a.float().abs().amax(-1, keepdim=True) / LARGEST_A).clamp(min=TINY)
        n, scale, zero = quantize(rotated * largest)
        read = torch.addcmul(zero.to(n.dtype), n, scale.to(n.dtype)).flatten(-2)[..., : b.shape[-1]] / largest
        steps = (read - rotated) / size.clamp(min=TINY)
        if not is_constant:
            change = (a / largest).to(torch.float8_e4m3fn).to(a.dtype) * largest - a
    return (a if is_constant else a + change), b + rotate_features(steps * size).to(b.dtype)


@contextlib.contextmanager
def rounded_rows(model: T6ForCausalLM) -> Iterator[None]:
    """In the block, a model reads its keys and values as rows of its `cache_dtype`, without a cache."""
    attentions = [layer.self_attn for layer in model.model.layers if model.config.cache_dtype is not None]

    def project(attention: T6Attention, *args, **kwargs):
        factors = type(attention).project(attention, *args, **kwargs)
        layouts = attention.key_layout, attention.value_layout
        factors.a_k, factors.b_k = as_read(factors.a_k, factors.b_k, layouts, 0, model.config.cache_dtype)
        factors.a_v, factors.b_v = as_read(factors.a_v, factors.b_v, layouts, 1, model.config.cache_dtype)
        return factors

    for attention in attentions:
        attention.project = functools.partial(project, attention)
    # Kernels that form heads at once would go past `project`.
    at_once, heads_at_once_t6.AT_ONCE = heads_at_once_t6.AT_ONCE, heads_at_once_t6.AT_ONCE and not attentions
    try:
        yield
    finally:
        heads_at_once_t6.AT_ONCE = at_once
        for attention in attentions:
            del attention.project
