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
"""Tensor parallelism: a process has its share of the heads, and like every other all that the heads have in common"""

from contextlib import contextmanager

import torch
from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.utils import is_torch_distributed_available


if is_torch_distributed_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def sum_gradients(x: torch.Tensor, mesh) -> torch.Tensor:
    """
    `x`, the same in all processes of `mesh`, for the heads of this one. The gradient that goes back is the sum of those
    that the heads of all processes have for it.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def softmax_over_heads(a: torch.Tensor, mesh) -> torch.Tensor:
    """Softmax of A [batch, seq, R, h] over all heads, of which this process has the given ones, and gets those."""
    a = DTensor.from_local(a, mesh, [Shard(-1)], run_check=False).softmax(-1)
    return a.redistribute(placements=[Shard(-1)]).to_local()


class SharedOutput(TensorParallelLayer):
    """A layer that every process has whole, and whose output the heads of all of them read: a projection to B or c."""

    def transform_output_post_forward(self, module: nn.Module, output: torch.Tensor, mesh) -> torch.Tensor:
        return sum_gradients(output, mesh)


class SharedParameters(TensorParallelLayer):
    """A layer that computes with this process's heads, by parameters of its own that all heads share, or of these heads."""

    @contextmanager
    def context_around_forward(self, module: nn.Module, mesh):
        originals = dict(module._parameters)
        for name, parameter in originals.items():
            is_of_heads = isinstance(parameter, DTensor)
            module._parameters[name] = parameter.to_local() if is_of_heads else sum_gradients(parameter, mesh)
        try:
            yield
        finally:
            module._parameters.update(originals)


class SharedAttention(SharedParameters):
    """The attention layer itself: with its constant factors, and the softmax over all heads."""

    def install_forward(self, module: nn.Module, mesh) -> nn.Module:
        module.head_mesh = mesh
        return super().install_forward(module, mesh)


def shared_factors_plan(model: nn.Module) -> dict[str, str]:
    """What `T6Config.base_model_tp_plan`, for any engine, leaves to add for Transformers: who sums whose gradients, too."""
    styles = {"self_attn": "t6_attention"}
    for name in ("q_norm", "k_norm", "head_norm"):
        styles[f"self_attn.{name}"] = "t6_shared_parameters"
    for name in ("q", "k", "v"):
        styles |= {f"self_attn.{name}_{factor}_proj": "t6_shared_output" for factor in ("b", "c")}
    names = {name for name, _ in model.layers[0].named_modules()}
    styles = {f"layers.*.{name}": style for name, style in styles.items() if name in names}
    return model.config.heads_tp_plan | styles


if is_torch_distributed_available():
    ALL_PARALLEL_STYLES.register("t6_shared_output", SharedOutput())
    ALL_PARALLEL_STYLES.register("t6_shared_parameters", SharedParameters())
    ALL_PARALLEL_STYLES.register("t6_attention", SharedAttention())
