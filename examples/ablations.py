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
What `diagnose.py` trains: attention mechanisms, and T6 with one thing changed at a time. The models of `compare.py` are described so, too.

A change is of the architecture (fields of the configuration), of the first weights, or of how parts of them learn. Parts are
the factors (`a_q`, `b_q`, `a_k`, ...; of MLA the two projections of queries are called so, too), the projections of mechanisms
without factors (`q`, `k`, `v`), `o`, `gate`, `mlp`, `norm` and `embedding`.
"""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import pretrain
from architectures import architectures
from configuration.make_configs import count_parameters
from muon import Muon
from recipe import BIASES, constants_in_a, heads_as_llama, one_after_the_other
from twins import add_extras


EXTRAS = ("attention_bias", "qk_norm", "output_gate")  # which twins have by `twins.py`
FACTORS = tuple(f"{factor}_{name}" for name in "qkv" for factor in "ab")


@dataclass(frozen=True)
class Ablation:
    """
    Attributes:
        base: an architecture of `architectures.architectures`, with as many heads as bring its parameters nearest to MHA's.
        fields: of its configuration, replaced; of a twin, `EXTRAS` are those of `twins.py`.
        groups: query heads to a head of keys and values, of T6.
        heads_of_mha: it has as many heads as MHA, and other parameters.
        widened: it has as many heads as MHA, and an MLP as wide, in multiples of 16, as brings parameters nearest to MHA's.
        prepare: what is done to the weights of a new model.
        rates, decays: what the learning rate and the weight decay of parts are multiplied by.
        rate, warmup: the learning rate and the steps of warm-up are multiplied by.
        optimizer: "adamw"; "muon" of all matrices but the embedding, "muon of blocks" with the factors by rank; both AdamW of the
            rest.
    """

    base: str
    fields: dict = field(default_factory=dict)
    groups: int = 1
    heads_of_mha: bool = False
    widened: bool = False
    prepare: Callable[[PreTrainedModel], None] | None = None
    rates: dict[str, float] = field(default_factory=dict)
    decays: dict[str, float] = field(default_factory=dict)
    rate: float = 1.0
    warmup: float = 1.0
    optimizer: str = "adamw"


def part_of(name: str) -> str:
    """The part that a parameter is of, by its name."""
    if match := re.search(r"\.([qkv])_([abc])(_proj\.|$)", name):
        return f"{match[2]}_{match[1]}"
    for pattern, part in (
        (r"\.gate\.|o_gate_proj", "gate"), ("norm", "norm"), (r"\.mlp\.", "mlp"), (r"\.o_proj\.", "o"),
        (r"\.q_\w*proj\.", "q"), (r"\.k\w*_proj\w*\.", "k"), (r"\.v_proj\.", "v"), ("embed|lm_head", "embedding"),
    ):  # fmt: skip
        if re.search(pattern, name):
            return part
    raise ValueError(f"{name} is of no part that is known")


# First weights


@torch.no_grad()
def _multiply(model: PreTrainedModel, parts: dict[str, float]) -> None:
    for name, parameter in model.named_parameters():
        parameter.mul_(parts.get(part_of(name), 1.0))


@torch.no_grad()
def outputs_as_llama(model: PreTrainedModel) -> None:
    """The projections that write to the residual stream start as Llama's, not at zero."""
    for name, parameter in model.named_parameters():
        if name.endswith((".o_proj.weight", ".down_proj.weight")):
            parameter.normal_(std=model.config.initializer_range)


NORM = {"qk_norm": "heads"}


def without_scaling(ranks: dict[str, int]) -> Ablation:
    """
    T6 without 1/R. To AdamW it is B of R times the size, that learns R times as fast and decays as before: what the factor does
    to a weight, its gradient does to a step.
    """

    @torch.no_grad()
    def prepare(model: PreTrainedModel) -> None:
        _multiply(model, {f"b_{name}": rank for name, rank in ranks.items()})

    rates = {f"b_{name}": float(rank) for name, rank in ranks.items()}
    return Ablation("TPA", prepare=prepare, rates=rates, decays={name: 1 / rate for name, rate in rates.items()})


# All of them


def ablations() -> dict[str, Ablation]:
    """Every ablation by its name in the results."""
    tpa, a, b = Ablation("TPA"), FACTORS[::2], FACTORS[1::2]
    constant = replace(tpa, fields=BIASES, prepare=constants_in_a())
    constant_as_llama = one_after_the_other(heads_as_llama(), constants_in_a())

    def rates(factor: float, *parts: str) -> Ablation:
        return replace(tpa, rates=dict.fromkeys(parts, factor))

    named = {name: Ablation(name) for name in ("MHA", "MQA", "GQA", "MLA", "TPA-KVonly", "TPA")}
    named |= {
        "TPA, heads of MHA": replace(tpa, heads_of_mha=True),
        # Twins with what T6 may have, too.
        "MHA, QK norm": Ablation("MHA", {"qk_norm": True}),
        "MHA, gate": Ablation("MHA", {"output_gate": True}),
        "MHA, QK norm, gate": Ablation("MHA", {"qk_norm": True, "output_gate": True}),
        "GQA, QK norm": Ablation("GQA", {"qk_norm": True}),
        "GQA, gate": Ablation("GQA", {"output_gate": True}),
        "MQA, QK norm": Ablation("MQA", {"qk_norm": True}),
        "MLA, gate": Ablation("MLA", {"output_gate": True}),
        "MHA, Muon": Ablation("MHA", optimizer="muon"),
        "GQA, Muon": Ablation("GQA", optimizer="muon"),
        "MHA, outputs not zero": Ablation("MHA", prepare=outputs_as_llama),
        # Scale of T6's heads.
        "TPA, no 1/R": without_scaling({"q": 6, "k": 2, "v": 2}),
        "TPA, QKV as Llama's": replace(tpa, prepare=heads_as_llama()),
        "TPA, QK as Llama's": replace(tpa, prepare=heads_as_llama(names="qk")),
        "TPA, V as Llama's": replace(tpa, prepare=heads_as_llama(names="v")),
        "TPA, QKV twice Llama's": replace(tpa, prepare=heads_as_llama(2.0)),
        "TPA, A / 4, B x 4": replace(
            tpa, prepare=lambda model: _multiply(model, dict.fromkeys(a, 0.25) | dict.fromkeys(b, 4.0))
        ),
        "TPA, outputs not zero": replace(tpa, prepare=outputs_as_llama),
        # How its factors learn.
        "TPA, rate of A x 0.5": rates(0.5, *a),
        "TPA, rate of A x 2": rates(2.0, *a),
        "TPA, rate of A x 4": rates(4.0, *a),
        "TPA, rate of B x 0.5": rates(0.5, *b),
        "TPA, rate of B x 2": rates(2.0, *b),
        "TPA, rate of Q x 2": rates(2.0, "a_q", "b_q"),
        "TPA, rate of factors x 0.5": rates(0.5, *FACTORS),
        "TPA, rate of factors x 2": rates(2.0, *FACTORS),
        "TPA, no decay of factors": replace(tpa, decays=dict.fromkeys(FACTORS, 0.0)),
        "TPA, warm-up x 4": replace(tpa, warmup=4.0),
        "TPA, warm-up / 4": replace(tpa, warmup=0.25),
        "TPA, Muon": replace(tpa, optimizer="muon"),
        "TPA, Muon of blocks": replace(tpa, optimizer="muon of blocks"),
        # What of A does not depend on the token.
        "TPA, biases": replace(tpa, fields=BIASES),
        "TPA, A starts constant": constant,
        "TPA, A starts half constant": replace(constant, prepare=constants_in_a(1.0)),
        "TPA, A starts constant, QKV as Llama's": replace(constant, prepare=constant_as_llama),
        "TPA, A starts constant, rate of A x 2": replace(constant, rates=dict.fromkeys(a, 2.0)),
        "TPA, A starts constant, QK norm": replace(constant, fields=NORM | BIASES),
        "TPA, A starts constant, QK norm, gate": replace(constant, fields=NORM | BIASES | {"output_gate": True}),
        "TPA, A starts constant, 4 to a KV head": replace(constant, groups=4),
        "TPA, A starts constant, QK norm, 4 to a KV head": replace(constant, fields=NORM | BIASES, groups=4),
        "TPA, A starts constant, heads of MHA": replace(constant, heads_of_mha=True),
        "TPA, A constant": replace(tpa, fields={"noncontextual_a": True}),
        "TPA, sigmoid of A": replace(tpa, fields={"head_factor_act": "sigmoid"}),
        "TPA, softmax of A": replace(tpa, fields={"head_factor_act": "softmax"}),
        "TPA-KVonly, A starts constant": Ablation("TPA-KVonly", BIASES, prepare=constants_in_a()),
        "TPA, biases, QK norm": replace(tpa, fields=NORM | BIASES),
        "TPA, biases, QK norm, 4 to a KV head": replace(tpa, fields=NORM | BIASES, groups=4),
        "MHA, biases": Ablation("MHA", {"attention_bias": True}),
        "MHA, biases, QK norm": Ablation("MHA", {"attention_bias": True, "qk_norm": True}),
        "GQA, biases": Ablation("GQA", {"attention_bias": True}),
        "GQA, biases, QK norm": Ablation("GQA", {"attention_bias": True, "qk_norm": True}),
        # Its architecture.
        "TPA, QK norm of rows": replace(tpa, fields={"qk_norm": True}),
        "TPA, QK norm of heads": replace(tpa, fields={"qk_norm": "heads"}),
        "TPA, gate": replace(tpa, fields={"output_gate": True}),
        "TPA, head norm": replace(tpa, fields={"head_norm": True}),
        "TPA, 2 to a KV head": replace(tpa, groups=2),
        "TPA, 4 to a KV head": replace(tpa, groups=4),
        "TPA, rank 1": replace(tpa, fields={"k_rank": 1, "v_rank": 1}),
        "TPA, rank 4": replace(tpa, fields={"k_rank": 4, "v_rank": 4}),
        "TPA, Q of rank 12": replace(tpa, fields={"q_rank": 12}),
        "TPA-KVonly, QK norm of heads": Ablation("TPA-KVonly", {"qk_norm": "heads"}),
        "TPA-KVonly, gate": Ablation("TPA-KVonly", {"output_gate": True}),
        "TPA-KVonly, KV as Llama's": Ablation("TPA-KVonly", prepare=heads_as_llama(names="kv")),
        "TPA-KVonly, 4 to a KV head": Ablation("TPA-KVonly", groups=4),
        "TPA-KVonly, rank 4, 4 to a KV head": Ablation("TPA-KVonly", {"k_rank": 4, "v_rank": 4}, groups=4),
    }
    return named


# Models and optimizers


class Configurations:
    """The configuration of every ablation."""

    def __init__(self, settings: dict, tokenizer: PreTrainedTokenizerBase):
        self.settings, self.tokenizer = settings, tokenizer
        self.architectures = architectures(settings)
        self.heads_of_mha = settings["hidden_size"] // settings["head_dim"]
        self.target = self._parameters(Ablation("MHA"), self.heads_of_mha)

    def _config(self, folder: str, fields: dict) -> PreTrainedConfig:
        if "intermediate_size" in self.settings:
            fields = {"intermediate_size": self.settings["intermediate_size"]} | fields
        options = argparse.Namespace(architecture=folder, set=list(fields.items()))
        return pretrain.make_config(options, self.tokenizer)

    def _with_heads(self, ablation: Ablation, heads: int, width: int | None = None) -> PreTrainedConfig:
        folder, fields = self.architectures[ablation.base]
        is_t6 = ablation.base.startswith("TPA")
        fields = fields | {"num_attention_heads": heads}
        fields |= {"intermediate_size": width} if width else {}
        fields |= {name: value for name, value in ablation.fields.items() if is_t6 or name not in EXTRAS}
        if is_t6:
            fields["num_key_value_heads"] = heads // ablation.groups
        elif ablation.base in ("MHA", "MLA"):
            fields["num_key_value_heads"] = heads
        if ablation.base == "MHA" and self.settings["hidden_size"] % heads:
            folder = "llama-gqa-small"  # LlamaConfig refuses such heads; Mistral is the same model
        return self._config(folder, fields)

    def _parameters(self, ablation: Ablation, heads: int, width: int | None = None) -> int:
        """Gates of twins included."""
        is_gated_twin = not ablation.base.startswith("TPA") and ablation.fields.get("output_gate", False)
        sizes = [self.settings[name] for name in ("num_layers", "hidden_size", "head_dim")]
        return count_parameters(self._with_heads(ablation, heads, width)) + is_gated_twin * heads * math.prod(sizes)

    def of(self, ablation: Ablation) -> PreTrainedConfig:
        if ablation.heads_of_mha or ablation.widened:
            heads = self.heads_of_mha
        else:
            step = 2 if ablation.base == "GQA" else ablation.groups
            few, more = (self._parameters(ablation, heads) for heads in (step, 2 * step))
            heads = max(1, round(1 + (self.target - few) / (more - few))) * step
        width = None
        if ablation.widened:
            few, more = (self._parameters(ablation, heads, width) for width in (16, 32))
            width = max(1, round(1 + (self.target - few) / (more - few))) * 16
        return self._with_heads(ablation, heads, width)


def make_model(ablation: Ablation, config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    model = pretrain.make_model(config, attention)
    if not ablation.base.startswith("TPA"):
        add_extras(model, **{name: ablation.fields.get(name, False) for name in EXTRAS})
    if ablation.prepare is not None:
        ablation.prepare(model)
    return model


def make_optimizer(
    ablation: Ablation, model: PreTrainedModel, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """An optimizer whose groups say by `base_lr` what they learn with when the schedule is at its highest."""
    groups = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        is_matrix = ablation.optimizer != "adamw" and part not in ("embedding", "norm") and parameter.ndim == 2
        matrices = int(is_matrix)
        if is_matrix and ablation.optimizer == "muon of blocks" and part in FACTORS:
            matrices = getattr(model.get_submodule(name.rsplit(".", 2)[0]), f"{part[-1]}_rank")
        is_decayed = part != "norm" and not name.endswith(".bias")  # as `Trainer`: the embedding, too
        groups.setdefault((part, matrices, is_decayed), []).append(parameter)
    device = next(model.parameters()).device
    made = []
    for (part, matrices, is_decayed), parameters in groups.items():
        rate = learning_rate * ablation.rates.get(part, 1.0)
        made.append(
            {
                "params": parameters,
                # A captured CUDA graph reads the rate where it lies.
                "lr": torch.tensor(rate, device=device) if device.type == "cuda" else rate,
                "base_lr": rate,
                "weight_decay": weight_decay * ablation.decays.get(part, 1.0) * is_decayed,
                "matrices": matrices,
                "interleaved": part.startswith("a_"),  # A is head-major, [h, R], B is [R, d]
            }
        )
    options = {"fused": True, "capturable": True} if device.type == "cuda" else {}
    return Muon(made, lr=learning_rate, betas=(0.9, 0.95), **options)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets all learning rates to `factor` times their highest."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(factor * group["base_lr"])
        else:
            group["lr"] = factor * group["base_lr"]


def schedule(step: int, warmup: int, steps: int, end: float = 0.1) -> float:
    """What the learning rate is multiplied by at a step, from 0: linear warm-up, then a cosine to `end`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
