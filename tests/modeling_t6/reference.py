"""
The T6 model in plain float64, written from sections 2 and 3 and appendices C and G of the paper, one token, one head and
one rank at a time.

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
    h_kv: int | None = None,
    rotary_dim: int,
    theta: float = 10000.0,
    eps: float = 1e-6,
    windows: list[int | None] | None = None,
    head_factor_act: str | None = None,
    norms_key_heads: bool = False,
) -> torch.Tensor:
    """Logits [seq, vocab] of one sequence without padding. What the model has is read off the names and shapes."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    def norm_if_any(x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        return rms_norm(x, w[f"{name}.weight"], eps) if f"{name}.weight" in w else x

    def factors(x: torch.Tensor, name: str, row_norm: str | None = None, position: int | None = None) -> torch.Tensor:
        """
        [h, d], of queries, or [h_kv, d] = (1 / R) sum_r a_r (x) b_r, with b_r rotated at `position` unless that is None. A norm is of each b_r, or
        of the sum: values that share B then get its weight alone.
        """
        is_key, num_heads = name.endswith("k"), h if name.endswith("q") else h_kv or h
        a = w[f"{name}_a"].T if f"{name}_a" in w else linear(x, f"{name}_a_proj").view(num_heads, -1)  # head-major
        if head_factor_act == "sigmoid":
            a = 1 / (1 + torch.exp(-a))
        elif head_factor_act == "softmax":
            a = torch.exp(a) / torch.exp(a).sum(0)
        rank = a.shape[1]
        if f"{name}_b" not in w and f"{name}_b_proj.weight" not in w:  # the values' are the keys'
            name = name[:-1] + "k"
            row_norm = f"{name}_norm"
        b = w[f"{name}_b"] if f"{name}_b" in w else linear(x, f"{name}_b_proj").view(rank, -1)
        c = linear(x, f"{name}_c_proj").view(rank, -1) if f"{name}_c_proj.weight" in w else torch.ones(rank, 1)
        total = torch.zeros(num_heads, d, dtype=torch.float64)
        for r in range(rank):
            b_r = b[r]
            if row_norm is not None and norms_key_heads:
                b_r = b_r if is_key else b_r * w[f"{row_norm}.weight"]
            elif row_norm is not None:
                b_r = norm_if_any(b_r, row_norm, eps)
            b_r = b_r if position is None or norms_key_heads else rotate(b_r, position, theta, rotary_dim)
            total += torch.outer(a[:, r], torch.cat([c_rj * b_r for c_rj in c[r]]))  # the columns of b c^T
        if norms_key_heads and is_key:
            heads = [rms_norm(head, w[f"{row_norm}.weight"], eps) for head in total / rank]
            return torch.stack([rotate(head, position, theta, rotary_dim) for head in heads])
        return total / rank

    def rotate_head(head: torch.Tensor, position: int, name: str) -> torch.Tensor:
        """Third-order features are d_c vectors of size d_b, each of which RoPE rotates (theorem C.1)."""
        d_b = d
        if f"{name}.k_c_proj.weight" in w:
            # Of R d_b and R d_c rows, with d_b d_c = d.
            d_b = math.isqrt(d * len(w[f"{name}.k_b_proj.weight"]) // len(w[f"{name}.k_c_proj.weight"]))
        return torch.cat([rotate(part, position, theta, rotary_dim) for part in head.split(d_b)])

    x = [w["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        inputs, queries, keys, values = [], [], [], []
        for t, x_t in enumerate(x):
            normed = rms_norm(x_t, w[f"{prefix}.input_layernorm.weight"], eps)
            inputs.append(normed)
            name = f"{prefix}.self_attn"
            if f"{name}.q_proj.weight" in w:
                heads = linear(normed, f"{name}.q_proj").view(h, d)
            else:
                heads = factors(normed, f"{name}.q")
            heads = [norm_if_any(head, f"{name}.q_norm", eps) for head in heads]
            queries.append(torch.stack([rotate_head(head, t, name) for head in heads]))
            keys.append(factors(normed, f"{name}.k", row_norm=f"{name}.k_norm", position=t))
            values.append(factors(normed, f"{name}.v"))
        window = len(x) if windows is None or windows[layer] is None else windows[layer]
        for t in range(len(x)):
            heads = []
            for i in range(h):
                seen = range(max(0, t + 1 - window), t + 1)
                group = i // (h // (h_kv or h))  # heads that follow each other share keys and values
                scores = torch.stack([queries[t][i] @ keys[s][group] / math.sqrt(d) for s in seen])
                probabilities = torch.exp(scores - scores.max())
                probabilities = probabilities / probabilities.sum()
                head = sum(p * values[s][group] for s, p in zip(seen, probabilities))
                heads.append(norm_if_any(head, f"{prefix}.self_attn.head_norm", 1e-5))
            heads = torch.cat(heads)
            if f"{prefix}.self_attn.o_gate_proj.weight" in w:
                heads = heads / (1 + torch.exp(-linear(inputs[t], f"{prefix}.self_attn.o_gate_proj")))
            x[t] = x[t] + linear(heads, f"{prefix}.self_attn.o_proj")
        for t in range(len(x)):
            normed = rms_norm(x[t], w[f"{prefix}.post_attention_layernorm.weight"], eps)
            gate, up = linear(normed, f"{prefix}.mlp.gate_proj"), linear(normed, f"{prefix}.mlp.up_proj")
            x[t] = x[t] + linear(gate / (1 + torch.exp(-gate)) * up, f"{prefix}.mlp.down_proj")
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return torch.stack([head @ rms_norm(x_t, w["model.norm.weight"], eps) for x_t in x])
