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
Biases, QK norm and output gates for Llama and Mistral, output gates for MLA: a T6 that has them is compared with twins that have
them, too.
"""

import torch
from torch import nn
from transformers import PreTrainedModel


class NormedHeads(nn.Linear):
    """A projection [hidden_size] -> [h d], whose heads go through an RMS norm of size d: Qwen3's, before RoPE."""

    @classmethod
    def of(cls, projection: nn.Linear, head_dim: int, eps: float) -> "NormedHeads":
        new = cls(projection.in_features, projection.out_features, bias=projection.bias is not None, device="meta")
        new.weight, new.bias = projection.weight, projection.bias
        new.norm = nn.RMSNorm(head_dim, eps=eps, device=projection.weight.device)
        return new

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        heads = super().forward(hidden_states).unflatten(-1, (-1, *self.norm.normalized_shape))
        return self.norm(heads.float()).to(heads.dtype).flatten(-2)


class GatedOutput(nn.Linear):
    """
    An output projection of heads' outputs times sigmoid(W x), x the input of the layer: T6's `output_gate`
    (arXiv 2505.06708).
    """

    @classmethod
    def of(cls, attention: nn.Module) -> "GatedOutput":
        old = attention.o_proj
        new = cls(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        new.weight, new.bias = old.weight, old.bias
        new.gate = nn.Linear(old.out_features, old.in_features, bias=False, device=old.weight.device)
        nn.init.normal_(new.gate.weight, std=attention.config.initializer_range)

        def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
            new.layer_input = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        attention.register_forward_pre_hook(keep_input, with_kwargs=True)
        return new

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        return super().forward(heads * torch.sigmoid(self.gate(self.layer_input)))


def add_extras(
    model: PreTrainedModel, attention_bias: bool = False, qk_norm: bool = False, output_gate: bool = False
) -> None:
    """
    Gives every attention layer of a new model biases of queries, keys and values (Qwen2's, which start at zero), the norm of
    queries' and keys' heads, and the gate.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        if attention_bias:
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.bias = nn.Parameter(projection.weight.new_zeros(projection.out_features))
        if qk_norm:
            for name in ("q_proj", "k_proj"):
                old = getattr(attention, name)
                setattr(attention, name, NormedHeads.of(old, attention.head_dim, model.config.rms_norm_eps))
        if output_gate:
            attention.o_proj = GatedOutput.of(attention)
