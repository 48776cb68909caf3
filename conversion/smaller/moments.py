"""Second moments of a model's activations on a text: all that a fit knows of the model."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from modeling_t6 import T6ForCausalLM
from modeling_t6.factors_t6 import apply_rotary_pos_emb, form_heads
from modeling_t6.modeling_t6 import T6Attention

from .normed_heads import constant_factors


def to_complex(x: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """
    Features [..., d] as complex numbers [..., d / 2], such that RoPE multiplies each by exp(i position frequency).
    What is not rotated is paired the same way: it commutes with everything.
    """
    pairs = [part.unflatten(-1, (2, -1)) for part in x.split([rotary_dim, x.shape[-1] - rotary_dim], dim=-1)]
    return torch.cat([torch.complex(pair[..., 0, :], pair[..., 1, :]) for pair in pairs], dim=-1)


def from_complex(x: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Features [..., d] of complex numbers [..., d / 2]."""
    parts = x.split([rotary_dim // 2, x.shape[-1] - rotary_dim // 2], dim=-1)
    return torch.cat([torch.cat([part.real, part.imag], dim=-1) for part in parts], dim=-1)


# Most of the power of keys often belongs to a mean that all tokens share, or to tokens that no query reads. In the feature pairs that
# RoPE hardly rotates, a mean adds the same to all scores of a query, which the softmax does not see; a fit by power would keep it
# instead of what tells tokens apart. So keys are weighted as they are read: by their variance under each query's probabilities.
# The probabilities on a text say little of what a question would look for, so all keys count a little, too.
ALL_KEYS = 0.25  # weight of the variance in which all tokens of a window count alike
WHOLE_KEYS = 0.01  # weight of keys with their mean, so that no error of the mean becomes large
MAX_PROBABILITIES = 2**28  # probabilities, or values that heads read, of the sequences that are looked at side by side


@dataclass
class Moments:
    """
    Sums over the tokens of a text, of one layer with G keys and values for h heads of size d.

    Attributes:
        keys: sum over queries of the covariance of K[f] after RoPE under their probabilities, the mean over heads, [d / 2, G, G],
            complex; with parts of the covariance in the window, and of the sum of K[f] K[f]^H.
        queries: sum of |Q_i[f]|^2, [h, d / 2]; where the norm of formed heads follows, [h_kv, d / 2], of a group's queries the sum.
        values: sum over heads and tokens of (p V)(p V)^T, V the values of all groups side by side, [G d, G d].
    """

    keys: torch.Tensor
    queries: torch.Tensor
    values: torch.Tensor


def attention_probabilities(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Of scores [batch, h, seq, seq], which are overwritten, and a mask [batch, 1, seq, seq], bool or to be added; `None`: a text's."""
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return (scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)).softmax(-1)


def layer_moments(attention: T6Attention, hidden_states: torch.Tensor, position_embeddings, mask) -> Moments:
    """The moments of one batch of `hidden_states` [batch, seq, hidden]."""
    d, rotary_dim = attention.head_dim, attention.config.rotary_dim
    query = attention.q_proj(hidden_states).unflatten(-1, (-1, d))
    key = attention.k_b_proj(hidden_states).unflatten(-1, (-1, d))
    value, k_a = attention.v_b_proj(hidden_states), constant_factors(attention, "k")
    if attention.qk_norm:
        query = attention.q_norm(query)
    powers = to_complex(query.double(), rotary_dim).flatten(0, 1).abs().square().sum(0)
    if attention.qk_norm == "heads":
        # Before their norm, in parts of a token's mean size: what is left to the norm is a number that is the same for all tokens, about.
        size = (
            form_heads(k_a, key).square().mean(-1) + attention.k_norm.variance_epsilon
        ).sqrt()  # [batch, seq, h_kv]
        parts = size / size.mean(-1, keepdim=True)
        powers = powers.unflatten(0, (size.shape[-1], -1)).sum(1) * parts.double().pow(-2).mean((0, 1))[:, None]
        key = attention.k_norm.weight * key / size.mean(-1)[..., None, None]
    elif attention.qk_norm:
        key = attention.k_norm(key)

    query, key = (apply_rotary_pos_emb(x, *position_embeddings) for x in (query, key))
    complex_key = to_complex(key.double(), rotary_dim).permute(0, 3, 2, 1)  # [batch, F, G, seq]
    heads = form_heads(k_a, key)
    if attention.qk_norm == "heads":
        heads = (heads / parts[..., None]).repeat_interleave(attention.num_key_value_groups, dim=2)
    query, heads = query.transpose(1, 2) * attention.scaling, heads.transpose(1, 2)
    mask = None if mask is None else mask.expand(len(query), -1, -1, -1)
    num_heads, seq = query.shape[1:3]
    count = max(1, MAX_PROBABILITIES // (num_heads * seq * max(seq, value.shape[-1])))
    keys = values = 0
    for start in range(0, len(query), count):
        some = slice(start, start + count)
        scores = query[some] @ heads[some].mT
        probabilities = attention_probabilities(scores, None if mask is None else mask[some])
        # Every head reads the values of all groups, to see what the others' values would be to it. Sums of products in
        # float32 are positive definite to its rounding only.
        read_values = (probabilities.flatten(1, 2) @ value[some]).double().flatten(0, 1)
        values = values + read_values.mT @ read_values
        read = probabilities.mean(1).to(complex_key.dtype)  # [batch, seq, seq]
        one_key = complex_key[some]
        centred = one_key - one_key.mean(-1, keepdim=True)
        means = (one_key.flatten(1, 2) @ read.mT).view_as(one_key)
        whole = (one_key * (read.sum(-2)[:, None, None] + WHOLE_KEYS)) @ one_key.mH
        keys = keys + (whole - means @ means.mH + ALL_KEYS * centred @ centred.mH).sum(0)
    return Moments(keys, powers, values)


@contextlib.contextmanager
def attention_hooks(model: T6ForCausalLM, hook: Callable) -> Iterator[None]:
    """Calls `hook(attention, args, kwargs, output)` for each attention that runs in the block."""
    handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect_moments(model: T6ForCausalLM, batches: Iterable[torch.Tensor]) -> list[Moments]:
    """The moments of each layer over batches of token ids [batch, seq]."""
    totals: list[Moments | None] = [None] * model.config.num_hidden_layers

    def hook(attention: T6Attention, args, kwargs, output) -> None:
        new = layer_moments(attention, args[0], kwargs["position_embeddings"], kwargs["attention_mask"])
        old = totals[attention.layer_idx]
        if old is not None:
            new = Moments(old.keys + new.keys, old.queries + new.queries, old.values + new.values)
        totals[attention.layer_idx] = new

    with attention_hooks(model, hook):
        for ids in batches:
            model.model(ids, use_cache=False)
    return totals
