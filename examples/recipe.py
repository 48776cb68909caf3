# Copyright 2026 The T6 for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
How a T6 is initialised so that it learns as early as Llamas of its size: what `pretrain.py` does without `--paper`.

Attention to a position needs a part of queries and keys that is the same for all tokens. A matrix gives it as one product; two factors
that depend on the token give it as the product of two such parts, each small at first, so that heads that copy form late. So A starts as
a constant, the bias of its projection, and heads start with the size of Llama's. Formed queries and keys are normalised, as those of
the best twins are. docs/evidence.md has the runs.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from configuration.make_configs import count_parameters


BIASES = {"attention_bias": True, "attention_out_bias": False}


def attention_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def heads_as_llama(factor: float = 1.0, names: str = "qkv") -> Callable[[PreTrainedModel], None]:
    """Formed heads start with the size that Llama's have, times `factor`: B does."""

    @torch.no_grad()
    def prepare(model: PreTrainedModel) -> None:
        config = model.config
        target = config.initializer_range * config.hidden_size**0.5
        for layer in attention_layers(model):
            for name in names:
                if not all(hasattr(layer, f"{name}_{factor}_proj") for factor in "ab"):
                    continue
                a, b = getattr(layer, f"{name}_a_proj").weight, getattr(layer, f"{name}_b_proj").weight
                a_size, b_size = (x.square().mean().sqrt().item() for x in (a, b))
                # Of hidden states of size 1: (1 / R) times the root of R independent products.
                formed = config.hidden_size * a_size * b_size / getattr(layer, f"{name}_rank") ** 0.5
                b.mul_(factor * target / formed)

    return prepare


def constants_in_a(contextual: float = 0.0) -> Callable[[PreTrainedModel], None]:
    """
    A factors start as constants of every head and rank, the biases of their projections, of the size that projected ones have;
    the projections at `contextual` times their size. At 0 a new T6 is one with non-contextual A: heads are linear in the token.
    """

    @torch.no_grad()
    def prepare(model: PreTrainedModel) -> None:
        for layer in attention_layers(model):
            for name in "qkv":
                if (projection := getattr(layer, f"{name}_a_proj", None)) is not None:
                    size = model.config.hidden_size**0.5 * projection.weight.square().mean().sqrt().item()
                    projection.bias.normal_(std=size)
                    projection.weight.mul_(contextual)

    return prepare


def one_after_the_other(*steps: Callable[[PreTrainedModel], None]) -> Callable[[PreTrainedModel], None]:
    def prepare(model: PreTrainedModel) -> None:
        for step in steps:
            step(model)

    return prepare


WIDTH_MULTIPLE = 64  # of the MLP, whose products are slow at other sizes


def extras(config: PreTrainedConfig) -> dict:
    """
    The fields beside sizes that the recipe gives `config`, a T6 of the paper. No norm of formed heads where it leaves nothing but the sign
    of A, which is in rank 1 (keys of which learnt less with it), and where `config` is of a variant that cannot have it.
    """
    ranks = {config.q_rank, *(config.ranks(layer)[0] for layer in range(config.num_hidden_layers))}
    cannot = config.noncontextual_a or config.c_factor_dim
    return BIASES | ({} if 1 in ranks or cannot else {"qk_norm": "heads"})


def fields(config: PreTrainedConfig) -> dict:
    """
    The fields in which a T6 by the recipe differs from `config`, a T6 of the paper: `extras`, as many heads as MHA, and an MLP so much
    wider that the number of parameters stays.
    """
    new, heads = extras(config), max(1, config.hidden_size // config.head_dim)

    def parameters(width: int, **replaced) -> int:
        replaced |= {"intermediate_size": width}
        return count_parameters(type(config)(**config.to_dict() | replaced))

    few, more = (parameters(width, **new, num_attention_heads=heads) for width in (WIDTH_MULTIPLE, 2 * WIDTH_MULTIPLE))
    target = parameters(config.intermediate_size)
    width = max(1, round(1 + (target - few) / (more - few))) * WIDTH_MULTIPLE
    return {**new, "num_attention_heads": heads, "intermediate_size": width}


start = one_after_the_other(heads_as_llama(), constants_in_a())  # of the weights of a new model
