"""The research code's model, read from the facts about it: float64, one head at a time, its checkpoints' names."""

import math

import torch


def random_checkpoint(
    *, heads: int, head_dim: int, q_rank: int | None, rank: int, layers: int = 2, hidden: int = 48, inner: int = 128,
    vocab: int = 83, head_norm: bool = False, partial: float | None = None,
) -> tuple[dict, dict[str, torch.Tensor]]:  # fmt: skip
    arguments = {
        "n_layer": layers, "n_head": heads, "head_dim": head_dim, "n_embd": hidden, "rank": rank, "q_rank": q_rank or 6,
        "vocab_size": vocab, "block_size": 64, "using_groupnorm": head_norm,
    }  # fmt: skip
    if partial is not None:
        arguments["rope_partial_factor"] = partial
    shapes = {"transformer.wte": (vocab, hidden), "lm_head": (vocab, hidden)}
    for n in range(layers):
        attn, mlp = f"transformer.h.{n}.attn", f"transformer.h.{n}.mlp"
        for x, r in (("q", q_rank), ("k", rank), ("v", rank)):
            if r is not None:
                shapes[f"{attn}.c_qkv.W_A_{x}"] = (heads * r, hidden)
                shapes[f"{attn}.c_qkv.W_B_{x}"] = (r * head_dim, hidden)
        if q_rank is None:
            shapes[f"{attn}.c_qkv.c_q"] = (heads * head_dim, hidden)
        if head_norm:
            shapes[f"{attn}.subln"] = (head_dim,)
        shapes[f"{attn}.c_proj"] = (hidden, heads * head_dim)
        shapes |= {f"{mlp}.c_fc1": (inner, hidden), f"{mlp}.c_fc2": (inner, hidden), f"{mlp}.c_proj": (hidden, inner)}
    generator = torch.Generator().manual_seed(heads)
    state = {
        f"{name}.weight": torch.rand(shape, generator=generator) + 0.5
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 1.5 * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return arguments, state


def rotate(x: torch.Tensor, position: int, size: int) -> torch.Tensor:
    half = size // 2
    out = x.clone()
    for i in range(half):
        # cos and sin in float32, of an angle in float32
        angle = torch.tensor(float(position)) * (1.0 / 10000.0 ** (torch.tensor(2.0 * i) / size))
        c, s = angle.cos().double(), angle.sin().double()
        out[..., i] = x[..., i] * c + x[..., half + i] * s
        out[..., half + i] = x[..., half + i] * c - x[..., i] * s
    return out


def norm(x: torch.Tensor, eps: float = 2**-23) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def logits(arguments: dict, state: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """[seq, vocab] in float64."""
    w = {name.removesuffix(".weight"): tensor.double() for name, tensor in state.items()}
    h, d = arguments["n_head"], arguments["head_dim"]
    size = d
    if "rope_partial_factor" in arguments:
        size = int(d * arguments["rope_partial_factor"])
        size -= size % 2
    xs = [w["transformer.wte"][i] for i in ids]
    for n in range(arguments["n_layer"]):
        attn, mlp = f"transformer.h.{n}.attn", f"transformer.h.{n}.mlp"
        rows: dict[str, list] = {"q": [], "k": [], "v": []}
        for t, x in enumerate(xs):
            y = norm(x)
            for name, tokens in rows.items():
                if f"{attn}.c_qkv.W_A_{name}" in w:
                    a = (w[f"{attn}.c_qkv.W_A_{name}"] @ y).reshape(h, -1)
                    b = (w[f"{attn}.c_qkv.W_B_{name}"] @ y).reshape(-1, d)
                    rows_b = b if name == "v" else rotate(b, t, size)
                    tokens.append(
                        torch.stack([sum(a[i, r] * rows_b[r] for r in range(len(b))) for i in range(h)]) / len(b)
                    )
                else:
                    tokens.append(rotate((w[f"{attn}.c_qkv.c_q"] @ y).reshape(h, d), t, size))
        new = []
        for t, x in enumerate(xs):
            outputs = []
            for i in range(h):
                scores = torch.stack([rows["q"][t][i].dot(rows["k"][s][i]) for s in range(t + 1)]) / math.sqrt(d)
                p = torch.softmax(scores, 0)
                o = sum(p[s] * rows["v"][s][i] for s in range(t + 1))
                outputs.append(norm(o, 1e-5) * w[f"{attn}.subln"] if f"{attn}.subln" in w else o)
            new.append(x + w[f"{attn}.c_proj"] @ torch.cat(outputs))
        xs = []
        for x in new:
            y = norm(x)
            gate = w[f"{mlp}.c_fc1"] @ y
            xs.append(x + w[f"{mlp}.c_proj"] @ (gate * torch.sigmoid(gate) * (w[f"{mlp}.c_fc2"] @ y)))
    return torch.stack([w["transformer.wte"] @ norm(x) for x in xs])
