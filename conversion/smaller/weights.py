"""Fits put into the weights of a model, and these balanced."""

import copy

import torch

from modeling_t6 import T6ForCausalLM
from modeling_t6.modeling_t6 import T6Attention

from .key_fits import KeyFit
from .least_squares import matrix_powers
from .moments import from_complex, to_complex
from .normed_heads import constant_factors, constant_state
from .value_fits import ValueFit


def key_space(tensor: torch.Tensor, attention: T6Attention) -> torch.Tensor:
    """Weight [n d, hidden] or bias [n d] of a query or key projection as complex [n, hidden or 1, d / 2]."""
    rows = tensor.double().reshape(-1, attention.head_dim, tensor[0].numel())
    return to_complex(rows.mT, attention.config.rotary_dim)


def from_key_space(x: torch.Tensor, attention: T6Attention, shape: torch.Size) -> torch.Tensor:
    return from_complex(x, attention.config.rotary_dim).mT.reshape(-1, *shape[1:])


@torch.no_grad()
def compressed_attention(attention: T6Attention, keys: KeyFit | None, values: ValueFit | None) -> T6Attention:
    """A layer with other keys and values in place of its own; `None` keeps them."""
    config, state = copy.copy(attention.config), attention.state_dict()
    config.k_rank, config.v_rank = attention.k_rank, attention.v_rank
    parts = ["weight", "bias"] if config.attention_bias else ["weight"]
    if keys is not None:
        config.k_rank = len(keys.a)
        size = keys.z.abs().square().mean(1).sqrt().clamp(min=1e-300)  # free between A and z
        state |= constant_state(attention, "k", config.k_rank * keys.a * size)
        for part in parts:
            query, key = state[f"q_proj.{part}"], state[f"k_b_proj.{part}"]
            new_key = torch.einsum("frg,gxf->rxf", keys.m, key_space(key, attention))
            state[f"k_b_proj.{part}"] = from_key_space(new_key, attention, key.shape)
            if not attention.qk_norm:  # else z is 1: queries are normed, too
                new_query = key_space(query, attention) * (keys.z.conj() / size[:, None])[:, None]
                state[f"q_proj.{part}"] = from_key_space(new_query, attention, query.shape)
    if values is not None:
        config.v_rank = len(values.a)
        size = values.u.square().mean((1, 2)).mul(attention.head_dim).sqrt().clamp(min=1e-300)  # 1 of a rotation
        state |= constant_state(attention, "v", config.v_rank * values.a * size)
        for part in parts:
            state[f"v_b_proj.{part}"] = values.m @ state[f"v_b_proj.{part}"].double()
        output = state["o_proj.weight"].double().unflatten(1, (len(size), -1, attention.head_dim))
        output = torch.einsum("xgid,gde->xgie", output, values.u / size[:, None, None])
        state["o_proj.weight"] = output.flatten(1)
    with torch.device("meta"):
        result = T6Attention(config, attention.layer_idx)
    result.load_state_dict(
        {name: tensor.to(attention.q_proj.weight.dtype) for name, tensor in state.items()}, assign=True
    )
    return result.train(attention.training)


def mix_factors(projection: torch.nn.Linear, mixture: torch.Tensor) -> None:
    """Puts mixture [R, R] times B in the place of the factors B [R, d] that a projection gives."""
    for tensor in projection.parameters():
        tensor.copy_((mixture @ tensor.double().reshape(len(mixture), -1)).reshape(tensor.shape))


def orthogonalize(a: torch.Tensor, projection: torch.nn.Linear) -> None:
    """Gives constant factors A [R, h] orthogonal rows, in place, and the projection of B what undoes it."""
    rows, mixture = torch.linalg.qr(a.double().T)  # A = mixture^T rows^T
    size = a.numel() ** 0.5  # A of an exact conversion has such rows if each B has as many heads
    a.copy_(size * rows.T)
    mix_factors(projection, mixture / size)


def even_rows(a: torch.Tensor, projection: torch.nn.Linear) -> None:
    """Gives the rows of constant factors A [R, h] one size, in place, and the projection of B what undoes it."""
    size = a.double().norm(dim=1) / a.numel() ** 0.5  # as `orthogonalize` leaves them
    a.copy_(a.double() / size[:, None])
    mix_factors(projection, size.diag())


def size_before_norm(attention: T6Attention, states: torch.Tensor | float) -> None:
    """
    Gives B_K a size of about 1 where the norm of heads follows, in place. It takes out the size that heads have, but for its epsilon,
    and divides A by it: rows of 8 bits would have room for neither of 1,000 and 1 / 1,000.

    Args:
        states: about the size of each feature that the layer reads, [hidden].
    """
    projection = attention.k_b_proj
    power = (projection.weight.double() * states).square().sum(1) + projection.bias.double().square()
    size = power.mean().sqrt().clamp(min=1e-300)
    for tensor in projection.parameters():
        tensor.copy_(tensor.double() / size)


@torch.no_grad()
def balance(attention: T6Attention, values: bool = True, states: torch.Tensor | float = 1.0) -> None:
    """
    Gives the two sides of each product weights of one size, in place, without a change of what the layer computes, but for the
    epsilon of a norm of heads.

    The rows of A may be multiplied by any matrix, if B undoes it, the features of all B_K by any number, and those of all
    B_V by any matrix, if queries and output projection undo it. A fit leaves that open, and its heads can be small
    differences of large B: rounding to half precision, and every step of an optimizer, are then as large as the heads.
    With orthogonal rows, A_V passes neither on enlarged. Those of A_K keep their directions: some B_K are a hundred times as
    large as others in a feature pair, of which a fit gives none to heads that read it small, and a mixture some to all.

    Args:
        values: whether those are balanced, too. A source's own lose less in 8 and 4 bits as they are.
        states: about the size of each feature that the layer reads, [hidden].
    """
    if attention.qk_norm is not True:
        even_rows(constant_factors(attention, "k"), attention.k_b_proj)
    if attention.qk_norm == "heads":
        size_before_norm(attention, states)
    if not attention.qk_norm:
        query, key = (key_space(proj.weight, attention) for proj in (attention.q_proj, attention.k_b_proj))
        factor = (query.abs().square().mean((0, 1)) / key.abs().square().mean((0, 1)).clamp(min=1e-300)) ** 0.25
        for projection, scale in ((attention.q_proj, 1 / factor), (attention.k_b_proj, factor)):
            for tensor in projection.parameters():
                tensor.copy_(from_key_space(key_space(tensor, attention) * scale, attention, tensor.shape))

    if not values:
        return
    orthogonalize(constant_factors(attention, "v"), attention.v_b_proj)
    d = attention.head_dim
    value = attention.v_b_proj.weight.double().unflatten(0, (-1, d))  # [R, d, hidden]
    output = attention.o_proj.weight.double().unflatten(1, (-1, d))  # [hidden, h, d]
    p = torch.einsum("rdx,rex->de", value, value) / len(value)
    q = torch.einsum("xhd,xhe->de", output, output) / output.shape[1]
    # T P T^T = T^-T Q T^-1 has the symmetric solution T = S^(1/2), S the geometric mean of P^-1 and Q.
    root, inverse = matrix_powers(p, 0.5, -0.5)
    (middle,) = matrix_powers(root @ q @ root, 0.5)
    (t,) = matrix_powers(inverse @ middle @ inverse, 0.5)
    attention.o_proj.weight.copy_((output @ torch.linalg.inv(t)).flatten(1))
    for tensor in attention.v_b_proj.parameters():
        tensor.copy_((t @ tensor.double().reshape(-1, d, tensor[0].numel())).reshape(tensor.shape))


def rank_field(ranks: list[int]) -> int | list[int]:
    return ranks[0] if len(set(ranks)) == 1 else ranks


def compressed_model(model: T6ForCausalLM, layers: list[tuple[KeyFit | None, ValueFit | None]]) -> T6ForCausalLM:
    """A copy of the model with other keys and values."""
    result = copy.deepcopy(model)
    for layer, fits in zip(result.model.layers, layers):
        layer.self_attn = compressed_attention(layer.self_attn, *fits)
    attentions = [layer.self_attn for layer in result.model.layers]
    for attention in attentions:
        attention.config = result.config
    result.config.k_rank = rank_field([attention.k_rank for attention in attentions])
    result.config.v_rank = rank_field([attention.v_rank for attention in attentions])
    result.model.row_layouts = [(attention.key_layout, attention.value_layout) for attention in attentions]
    return result.requires_grad_(True)
