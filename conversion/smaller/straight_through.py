"""
Rows of a cache as they come back from it, with the gradient of what went in (a straight-through estimator, arXiv 1308.3432): what is
learnt for rows of 8 or 4 bits is learnt with their rounding.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch

from modeling_t6 import T6ForCausalLM
from modeling_t6.cache_t6 import CACHE_DTYPES, FactorLayout, T6DynamicLayer
from modeling_t6.modeling_t6 import T6Attention
from modeling_t6.quantized_rows_t6 import GROUP, LARGEST_A, rotate_features


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
    layout = layouts[index]
    with torch.autocast(b.device.type, enabled=False):
        with torch.no_grad():
            layer = T6DynamicLayer()
            layer.layouts, layer.stored_dtype = layouts, CACHE_DTYPES[cache_dtype]
            read_a, read_b = layout.read(layer.as_stored(layout.pack(a, b), index), b.dtype)
            if layout.num_heads and cache_dtype == "int4":  # B has the size of A there
                largest = a.abs().amax(-1, keepdim=True) / LARGEST_A
                read_a, read_b = read_a * largest, read_b / largest.clamp(min=torch.finfo(b.dtype).tiny)
            change = read_b - b
        if cache_dtype == "int4":
            size = ranges(rotate_features(b))
            steps = rotate_features(change) / size.detach().clamp(min=torch.finfo(size.dtype).tiny)
            change = rotate_features(steps * size)
        return (a + (read_a - a.detach()) if layout.num_heads else a), b + change


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
    try:
        yield
    finally:
        for attention in attentions:
            del attention.project
