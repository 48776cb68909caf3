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
"""Muon: matrices move by the orthogonal factor of their momentum, as https://kellerjordan.github.io/posts/muon says."""

from collections.abc import Callable, Iterable

import torch
from torch.optim import AdamW

from conversion.smaller.muon import AS_ADAMW, MOMENTUM, orthogonal


class Muon(AdamW):
    """
    Muon of the groups of matrices, AdamW of the others: one optimizer, as `Trainer` and its checkpoints want it.

    A group may have two fields more than AdamW's. `matrices`: how many matrices [rows, columns] a parameter of it holds,
    0 (AdamW) where it is not given. `interleaved`: whether the rows of those take turns, or else follow each other. Updates have
    the root mean square of AdamW's, so that both take one learning rate, `float`, or a tensor that a captured CUDA graph reads.

    Args:
        momentum: of matrices, Nesterov's.
    """

    def __init__(self, parameters: Iterable, momentum: float = MOMENTUM, **kwargs):
        self.momentum = momentum
        super().__init__(parameters, **kwargs)

    def step(self, closure: Callable | None = None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("matrices")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        with torch.no_grad():
            for group in groups:
                if group.get("matrices"):
                    self._step_of_matrices(group)
        return loss

    def _step_of_matrices(self, group: dict) -> None:
        by_shape = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for parameters in by_shape.values():  # those of one shape together
            updates = []
            for parameter in parameters:
                if not (state := self.state[parameter]):
                    state["step"] = torch.zeros(())  # unused, but AdamW looks for it when it is loaded
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
                updates.append(_matrices(parameter.grad.lerp(state["momentum"], self.momentum), group))
            moves = orthogonal(torch.cat(updates))
            moves = moves * (AS_ADAMW * max(moves.shape[-2:]) ** 0.5 * group["lr"])
            for parameter, move in zip(parameters, moves.split(group["matrices"])):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                _matrices(parameter, group).sub_(move)


def _matrices(parameter: torch.Tensor, group: dict) -> torch.Tensor:
    """The matrices [n, rows, columns] of a parameter, a view."""
    if group.get("interleaved"):
        return parameter.unflatten(0, (-1, group["matrices"])).transpose(0, 1)
    return parameter.unflatten(0, (group["matrices"], -1))
