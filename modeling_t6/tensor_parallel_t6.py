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
"""Tensor parallelism: each process has a share of the heads, and a replica of what the heads share (B factors, norms)"""

from contextlib import contextmanager

import torch
from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.utils import is_torch_distributed_available


if is_torch_distributed_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def sum_gradients(x: torch.Tensor, mesh) -> torch.Tensor:
    """
    The identity, for an `x` that is replicated over `mesh` and read by the heads of this process. In the backward pass, the
    gradients of all processes are summed.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def softmax_over_heads(a: torch.Tensor, mesh) -> torch.Tensor:
    """Softmax over all heads of `mesh` of the A [batch, seq, R, local h] of this process, of the same shape."""
    a = DTensor.from_local(a, mesh, [Shard(-1)], run_check=False).softmax(-1)
    return a.redistribute(placements=[Shard(-1)]).to_local()


class SharedOutput(TensorParallelLayer):
    """A replicated layer whose output the heads of all processes read: a projection to B or c."""

    def transform_output_post_forward(self, module: nn.Module, output: torch.Tensor, mesh) -> torch.Tensor:
        return sum_gradients(output, mesh)


class SharedParameters(TensorParallelLayer):
    """A layer with parameters of its own, replicated or sharded by heads, that it applies to the heads of this process."""

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
    """The attention layer itself: it has the constant factors, and the softmax over all heads."""

    def install_forward(self, module: nn.Module, mesh) -> nn.Module:
        module.head_mesh = mesh
        return super().install_forward(module, mesh)


def shared_factors_plan(model: nn.Module) -> dict[str, str]:
    """The plan for Transformers, by module: that of `T6Config` for the heads, and the styles above for what the heads share."""
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
