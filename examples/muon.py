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
from torch.optim import Optimizer


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the page above: singular values come near to 1, fast
STEPS = 5
ADAM_RMS = 0.2  # of AdamW's updates, so that both take one learning rate (arXiv 2502.16982)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """About U V^T of the singular value decompositions U S V^T of `matrices` [n, rows, columns], in bfloat16 on a GPU."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """
    Args:
        parameters: matrices, or groups of them, as every optimizer takes them.
        lr: `float`, or a tensor that a captured CUDA graph reads. Updates have the root mean square of AdamW's.
        split: what makes of a parameter [rows, columns] the matrices [n, rows, columns] that it holds, a view; whole if `None`.
    """

    def __init__(
        self,
        parameters: Iterable,
        lr: float | torch.Tensor,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        split: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "split": split})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._step_alike(parameters, group)

    def _step_alike(self, parameters: list[torch.Tensor], group: dict) -> None:
        """Parameters of one shape, together."""
        momentum, updates = group["momentum"], []
        for parameter in parameters:
            if not (state := self.state[parameter]):
                state["momentum"] = torch.zeros_like(parameter)
            buffer = state["momentum"]
            buffer.lerp_(parameter.grad, 1 - momentum)
            update = parameter.grad.lerp(buffer, momentum)  # Nesterov's
            updates.append(update[None] if group["split"] is None else group["split"](update))
        matrices = torch.cat(updates)
        moves = orthogonalize(matrices) * (ADAM_RMS * max(matrices.shape[-2:]) ** 0.5 * group["lr"])
        for parameter, move in zip(parameters, moves.split([len(update) for update in updates])):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            target = parameter[None] if group["split"] is None else group["split"](parameter)
            target.sub_(move)
