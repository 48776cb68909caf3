"""
Models that normalise their keys, in a form that can have lower ranks. A converted Qwen3 normalises each row of B_K, and each row is a whole
head. With lower ranks a head is a mixture of rows, and a mixture of normalised rows is not normalised. The norm of each formed head
(`qk_norm="heads"`) is: it divides A by one number for each token and head. A then depends on the token and is cached. Its projections
start with zero weights, and with the constant A as biases.
"""

import copy

import torch

from modeling_t6 import T6ForCausalLM
from modeling_t6.modeling_t6 import T6Attention


def constant_factors(attention: T6Attention, side: str) -> torch.Tensor:
    """A_K (`side` k) or A_V (v) before any norm, a view of the parameter that holds it: [R, h], or [R, h_kv] of biases."""
    if attention.noncontextual_a:
        return getattr(attention, f"{side}_a").data
    return getattr(attention, f"{side}_a_proj").bias.data.view(-1, getattr(attention, f"{side}_rank")).T


def constant_state(attention: T6Attention, side: str, a: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameters of an attention with A [R, h] or [R, h_kv] in the place of its own, by their names."""
    if attention.noncontextual_a:
        return {f"{side}_a": a}
    name, columns = f"{side}_a_proj", attention.q_proj.in_features
    return {f"{name}.weight": a.new_zeros(a.numel(), columns), f"{name}.bias": a.T.flatten()}


@torch.no_grad()
def with_normed_heads(model: T6ForCausalLM) -> T6ForCausalLM:
    """
    A converted model with `qk_norm=True` as one with `qk_norm="heads"` that computes the same. The two share all parameters but those of
    attention.
    """
    result = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    config = result.config
    config.num_key_value_heads = config.k_rank
    config.noncontextual_a, config.qk_norm, config.attention_bias = False, "heads", True
    for old, layer in zip(model.model.layers, result.model.layers):
        attention, state = old.self_attn, old.self_attn.state_dict()
        with torch.device("meta"):
            new = T6Attention(config, attention.layer_idx)
        for side in "kv":
            a = state.pop(f"{side}_a")
            one_a_group = a.unflatten(1, (config.num_key_value_heads, -1))[..., 0]
            state |= constant_state(new, side, one_a_group)
        for name, parameter in new.named_parameters():
            if name not in state:  # biases that the other has not
                state[name] = torch.zeros_like(parameter, dtype=a.dtype, device=a.device)
        new.load_state_dict(state, assign=True)
        layer.self_attn = new.train(attention.training)
    result.model.row_layouts = [
        (layer.self_attn.key_layout, layer.self_attn.value_layout) for layer in result.model.layers
    ]
    return result
