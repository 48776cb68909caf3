"""Phi-3, whose projections are fused."""

import torch
from transformers import PreTrainedConfig

from .llama import plan_llama_shaped
from .plan import Plan, Transform


def plan_phi3(config: PreTrainedConfig) -> Plan:
    """Phi-3's queries, keys and values are one projection, its gate and up another."""
    plan = plan_llama_shaped(config, partial_rope=True, sliding_window=config.sliding_window)
    t6 = plan.config
    queries, keys = t6.num_attention_heads * t6.head_dim, t6.k_rank * t6.head_dim

    def rows(start: int, end: int, total: int) -> Transform:
        def cut(weight: torch.Tensor) -> torch.Tensor:
            if weight.shape[0] != total:
                raise ValueError(f"expected {total} rows")
            return weight[start:end]

        return cut

    total, inner = queries + 2 * keys, t6.intermediate_size
    for layer in range(t6.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for fused, parts in (
            ("self_attn.qkv_proj", {
                "q_proj": ("self_attn.q_proj", rows(0, queries, total)),
                "k_proj": ("self_attn.k_b_proj", rows(queries, queries + keys, total)),
                "v_proj": ("self_attn.v_b_proj", rows(queries + keys, total, total)),
            }),
            ("mlp.gate_up_proj", {
                "gate_proj": ("mlp.gate_proj", rows(0, inner, 2 * inner)),
                "up_proj": ("mlp.up_proj", rows(inner, 2 * inner, 2 * inner)),
            }),
        ):  # fmt: skip
            module = fused.split(".")[0]
            for name, (target, cut) in parts.items():
                del plan.moves[f"{prefix}.{module}.{name}.weight"]
                plan.move(f"{prefix}.{fused}.weight", f"{prefix}.{target}.weight", cut)
    return plan
