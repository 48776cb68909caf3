"""
The T6 model in plain float64, written from sections 2 and 3 of the paper, one token, one head and one rank at a time.

Shares nothing with `modeling_t6` but the names of the weights.
"""

import math

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(b: torch.Tensor, position: int, theta: float, rotary_dim: int) -> torch.Tensor:
    """RoPE of one feature vector [d]; the angle in float32, as every Transformers model computes it."""
    half = rotary_dim // 2
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    angle = torch.tensor(float(position), dtype=torch.float32) * (1.0 / theta**exponents)
    cos, sin = angle.cos().double(), angle.sin().double()
    first, second, rest = b[:half], b[half:rotary_dim], b[rotary_dim:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest])


def t6_logits(
    weights: dict[str, torch.Tensor],
    ids: list[int],
    *,
    num_layers: int,
    h: int,
    d: int,
    ranks: tuple[int | None, int, int],
    rotary_dim: int,
    theta: float = 10000.0,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Logits [seq, vocab] of one sequence without padding."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    def factors(x: torch.Tensor, name: str, rank: int, position: int | None) -> torch.Tensor:
        """[h, d] = (1 / R) sum_r a_r (x) b_r, with b_r rotated at `position` unless that is None."""
        a = linear(x, f"{name}_a_proj").view(h, rank)  # head-major
        b = linear(x, f"{name}_b_proj").view(rank, d)
        total = torch.zeros(h, d, dtype=torch.float64)
        for r in range(rank):
            b_r = b[r] if position is None else rotate(b[r], position, theta, rotary_dim)
            total += torch.outer(a[:, r], b_r)
        return total / rank

    x = [w["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        queries, keys, values = [], [], []
        for t, x_t in enumerate(x):
            normed = rms_norm(x_t, w[f"{prefix}.input_layernorm.weight"], eps)
            name = f"{prefix}.self_attn"
            if ranks[0] is None:
                heads = linear(normed, f"{name}.q_proj").view(h, d)
                queries.append(torch.stack([rotate(head, t, theta, rotary_dim) for head in heads]))
            else:
                queries.append(factors(normed, f"{name}.q", ranks[0], t))
            keys.append(factors(normed, f"{name}.k", ranks[1], t))
            values.append(factors(normed, f"{name}.v", ranks[2], None))
        for t in range(len(x)):
            heads = []
            for i in range(h):
                scores = torch.stack([queries[t][i] @ keys[s][i] / math.sqrt(d) for s in range(t + 1)])
                probabilities = torch.exp(scores - scores.max())
                probabilities = probabilities / probabilities.sum()
                heads.append(sum(p * values[s][i] for s, p in enumerate(probabilities)))
            x[t] = x[t] + linear(torch.cat(heads), f"{prefix}.self_attn.o_proj")
        for t in range(len(x)):
            normed = rms_norm(x[t], w[f"{prefix}.post_attention_layernorm.weight"], eps)
            gate, up = linear(normed, f"{prefix}.mlp.gate_proj"), linear(normed, f"{prefix}.mlp.up_proj")
            x[t] = x[t] + linear(gate / (1 + torch.exp(-gate)) * up, f"{prefix}.mlp.down_proj")
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return torch.stack([head @ rms_norm(x_t, w["model.norm.weight"], eps) for x_t in x])
