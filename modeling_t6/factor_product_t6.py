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
"""The factor projections of a layer as one product: their weights one below the other, filled up to whole tiles"""

import contextlib
from collections.abc import Collection

import torch
from torch import nn


# Rows of the product's weight are a multiple of this. 68 or 34 outputs in half precision are no whole number of 16 bytes,
# and fall to slow kernels, forward and twice backward; more than 8 gains nothing: kernels' tiles are cut at any 16 bytes.
ROW_MULTIPLE = 8
# Of so few tokens (a decoded one, or some that are verified) products take no longer than putting their weights together.
MAX_TOKENS_ONE_BY_ONE = 8


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """
    A context in which `device` computes in the dtypes of the tensors that it is given. Autocast puts tensors of its own
    dtype and of float32 together, and fails on others: float8, or another half precision of the model.
    """
    enabled = device.type != "meta" and torch.is_autocast_enabled(device.type)  # "meta" has none
    return torch.autocast(device.type, enabled=False) if enabled else contextlib.nullcontext()


def _are_plain(projections: Collection[nn.Module]) -> bool:
    """Whether the projections are `nn.Linear`, with nothing added, whose weights and biases can be put together."""
    if not all(type(projection) is nn.Linear and not _is_extended(projection) for projection in projections):
        return False
    weights = [parameter for projection in projections for parameter in (projection.weight, projection.bias)]
    first, biases = weights[0], weights[1::2]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        return False
    kind = first.dtype, first.device
    return first.device.type != "meta" and all(
        type(weight) in (nn.Parameter, torch.Tensor) and (weight.dtype, weight.device) == kind
        for weight in weights
        if weight is not None
    )


def _is_extended(module: nn.Module) -> bool:
    """Whether a call does more than the class's `forward`: hooks, or one of its own, as accelerate and sharding set it."""
    return bool(
        "forward" in module.__dict__
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def _concatenate(parameters: list[torch.Tensor], padding: int) -> torch.Tensor:
    """The rows of all, then `padding` rows of zeros."""
    if padding:
        parameters = [*parameters, parameters[0].new_zeros(padding, *parameters[0].shape[1:])]
    with without_autocast(parameters[0].device):
        return torch.cat(parameters)


class FactorProjections(nn.Module):
    """
    A layer whose `q_b_proj`, `k_b_proj`, ..., `v_a_proj` are `nn.Linear` of the same hidden states. They stay the modules and
    parameters that they are, and are computed together where that gives the same: see [`project_factors`].
    """

    def project_factors(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The outputs [..., out_features] of all factor projections of `hidden_states` [..., hidden_size], by their names.

        They are slices of one product, B's first, so that these start on 16 bytes. Projections that are more than their
        weights (quantised, with adapters, sharded, offloaded, with hooks) are called one by one, and so are those of a few
        tokens without gradients, where putting the weights together costs more than it saves.
        """
        projections = {name: getattr(self, name) for name in self._factor_projections()}
        is_few = not torch.is_grad_enabled() and hidden_states.shape[-2] <= MAX_TOKENS_ONE_BY_ONE
        if is_few or len(projections) < 2 or not _are_plain(projections.values()):
            return {name: projection(hidden_states) for name, projection in projections.items()}
        weights = [projection.weight for projection in projections.values()]
        biases = [projection.bias for projection in projections.values()]
        sizes = [weight.shape[0] for weight in weights]
        padding = -sum(sizes) % ROW_MULTIPLE
        weight = _concatenate(weights, padding)
        bias = None if biases[0] is None else _concatenate(biases, padding)
        outputs = nn.functional.linear(hidden_states, weight, bias).split([*sizes, padding], dim=-1)
        return dict(zip(projections, outputs))

    def _factor_projections(self) -> list[str]:
        names = (f"{name}_{factor}_proj" for factor in "bca" for name in "qkv")
        return [name for name in names if name in self._modules]
