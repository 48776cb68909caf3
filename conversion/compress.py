"""
Fewer key and value heads: the low-rank head factors that lose least on the activations of a text.

A converted Llama is non-contextual TPA of rank G, its number of key/value heads. RoPE rotates the feature axis alone,
the same way in every head, so it commutes with every mixture of heads (Theorem 3.1), and, feature pair by feature pair,
with every complex factor, since RoPE itself multiplies a pair, read as a complex number, by one. Keys of rank R < G are
therefore sought among

    K_i[f] = z_i[f] sum_r A[r, i] b_r[f],        b_r[f] = sum_g M[f, r, g] K_g[f]

for head i and feature pair f: M goes into the weights of B_K, conj(z) into those of the queries, A is the constant
factor. Values are not rotated and allow more, a matrix for each head that goes into the output projection:

    V_i = U_i sum_r A[r, i] b_r,                  b = M V

Both are fitted by alternating least squares on second moments of the activations: the error of a key is weighted by the
power of the queries that read it, the error of a value by what the output projection makes of it, and values are
averaged by the attention as in the model. Nothing is rotated differently, so RoPE stays exact at every position.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from tqdm import tqdm

from modeling_t6 import T6Config, T6ForCausalLM
from modeling_t6.attention_t6 import form_heads
from modeling_t6.modeling_t6 import T6Attention, apply_rotary_pos_emb

from .errors import ConversionError


METHODS = ("fit", "mean-pool")
Ranks = list[int] | None
ITERATIONS = 200
TRIAL_ITERATIONS = 30  # enough to compare ranks
PERTURBATION = 0.3
CONVERGED = 1e-5  # relative gain of an iteration below which a fit ends
RIDGE = 1e-9  # relative to the mean of a diagonal: moments of few tokens are singular
CANDIDATE_RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)
SENSITIVITY_TOKENS = 4096


# Feature pairs as complex numbers


def to_complex(x: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """
    Features [..., d] as complex numbers [..., d / 2], such that RoPE multiplies each by exp(i position frequency).
    What is not rotated is paired the same way: it commutes with everything.
    """
    pairs = [part.unflatten(-1, (2, -1)) for part in x.split([rotary_dim, x.shape[-1] - rotary_dim], dim=-1)]
    return torch.cat([torch.complex(pair[..., 0, :], pair[..., 1, :]) for pair in pairs], dim=-1)


def from_complex(x: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Features [..., d] of complex numbers [..., d / 2]."""
    parts = x.split([rotary_dim // 2, x.shape[-1] - rotary_dim // 2], dim=-1)
    return torch.cat([torch.cat([part.real, part.imag], dim=-1) for part in parts], dim=-1)


# Moments of the activations


@dataclass
class Moments:
    """
    Sums over the tokens of a text, of one layer with G keys and values for h heads of size d.

    Attributes:
        keys: sum of K[f] K[f]^H before RoPE, [d / 2, G, G], complex.
        queries: sum of |Q_i[f]|^2, [h, d / 2].
        values: sum over heads and tokens of (p V)(p V)^T, V the values of all groups side by side, [G d, G d].
    """

    keys: torch.Tensor
    queries: torch.Tensor
    values: torch.Tensor


def layer_moments(attention: T6Attention, hidden_states: torch.Tensor, position_embeddings, mask) -> Moments:
    """The moments of one batch of `hidden_states` [batch, seq, hidden]."""
    d, rotary_dim = attention.head_dim, attention.config.rotary_dim
    query = attention.q_proj(hidden_states).unflatten(-1, (-1, d))
    key = attention.k_b_proj(hidden_states).unflatten(-1, (-1, d))
    value = attention.v_b_proj(hidden_states)
    if attention.config.qk_norm:
        query, key = attention.q_norm(query), attention.k_norm(key)
    complex_key = to_complex(key.double(), rotary_dim).flatten(0, 1)
    powers = to_complex(query.double(), rotary_dim).flatten(0, 1).abs().square().sum(0)

    query, key = (apply_rotary_pos_emb(x, *position_embeddings) for x in (query, key))
    key = form_heads(attention.k_a, key).transpose(1, 2)
    # Every head reads the values of all groups, to see what the others' values would be to it.
    averages = F.scaled_dot_product_attention(
        query.transpose(1, 2), key, value[:, None].expand(-1, key.shape[1], -1, -1), attn_mask=mask,
        is_causal=mask is None, scale=attention.scaling,
    ).flatten(0, 2)  # fmt: skip
    return Moments(
        torch.einsum("tgf,tkf->fgk", complex_key, complex_key.conj()),
        powers,
        (averages.mT @ averages).double(),
    )


@torch.no_grad()
def collect_moments(model: T6ForCausalLM, batches: Iterable[torch.Tensor]) -> list[Moments]:
    """The moments of each layer over batches of token ids [batch, seq]."""
    totals: list[Moments | None] = [None] * model.config.num_hidden_layers

    def hook(attention: T6Attention, args, kwargs) -> None:
        new = layer_moments(attention, args[0], kwargs["position_embeddings"], kwargs["attention_mask"])
        old = totals[attention.layer_idx]
        if old is not None:
            new = Moments(old.keys + new.keys, old.queries + new.queries, old.values + new.values)
        totals[attention.layer_idx] = new

    hooks = [layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        for ids in batches:
            model.model(ids, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return totals


# Fits


@dataclass
class KeyFit:
    """Keys of rank R for h heads: A [R, h], z [h, d / 2] and M [d / 2, R, G], complex; the share of power lost."""

    a: torch.Tensor
    z: torch.Tensor
    m: torch.Tensor
    loss: float | None = None


@dataclass
class ValueFit:
    """Values of rank R for h heads: A [R, h], U [h, d, d] and M [R d, G d]; the share of power lost."""

    a: torch.Tensor
    u: torch.Tensor
    m: torch.Tensor
    loss: float | None = None


def solve(matrix: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """matrix^-1 rhs for positive semidefinite [..., n, n]."""
    size = matrix.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None].clamp(min=1e-300)
    return torch.linalg.solve(matrix / size + RIDGE * torch.eye(matrix.shape[-1]).to(matrix), rhs / size)


def matrix_power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of positive semidefinite [..., n, n], its small eigenvalues raised."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=RIDGE * values.amax().item() + 1e-300)
    return (vectors * values[..., None, :] ** exponent) @ vectors.mT


def contiguous_groups(num_groups: int, rank: int) -> torch.Tensor:
    """[G]: the part of `rank` parts in a row, as even as can be, in which each of G heads lies."""
    return torch.cat(
        [torch.full((len(part),), r) for r, part in enumerate(torch.arange(num_groups).tensor_split(rank))]
    )


def membership(labels: torch.Tensor, rank: int) -> torch.Tensor:
    """[R, G]: whether head g lies in part r."""
    return labels == torch.arange(rank)[:, None]


def similar_groups(similarity: torch.Tensor, rank: int) -> torch.Tensor:
    """[G]: parts of heads that are alike, by average linkage of their similarity [G, G]."""
    parts = [[g] for g in range(len(similarity))]
    table = similarity.tolist()
    while len(parts) > rank:
        _, i, j = max(
            (sum(table[g][k] for g in parts[i] for k in parts[j]) / (len(parts[i]) * len(parts[j])), i, j)
            for i in range(len(parts))
            for j in range(i)
        )
        parts[j] += parts.pop(i)
    labels = torch.empty(len(similarity), dtype=torch.long)
    for r, part in enumerate(parts):
        labels[part] = r
    return labels


def descend(
    step, starts: list[tuple[torch.Tensor, torch.Tensor]], iterations: int
) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Where the best of several descents ends. `step` makes the loss, A, the transforms of the heads and M from A and the
    transforms, and lowers the loss; between steps stands Nesterov's extrapolation, begun anew where it would raise it.
    """

    def go_on(state, previous, count, iterations):
        for _ in range(iterations):
            count += 1
            momentum = (count - 1) / (count + 2)
            new = step(*(now + momentum * (now - before) for now, before in zip(state[1:3], previous[1:3])))
            if new[0] > state[0]:
                count, new = 0, step(*state[1:3])
            gain = state[0] - new[0]
            previous, state = state, new
            if gain <= CONVERGED * state[0]:
                break
        return state, previous, count

    firsts = [step(*start) for start in starts]
    runs = [go_on(first, first, 0, iterations // 5) for first in firsts]
    return go_on(*min(runs, key=lambda run: run[0][0]), iterations)[0]


def perturbed(a: torch.Tensor) -> torch.Tensor:
    """Factors of ones and zeros are a saddle: each head stays where it was put."""
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0), dtype=a.dtype)
    return a + PERTURBATION * a.abs().max() * noise.to(a.device)


@torch.no_grad()
def fit_keys(moments: Moments, selection: torch.Tensor, rank: int, iterations: int = ITERATIONS) -> KeyFit:
    """
    The best of several descents for keys of one layer.

    Args:
        selection: [h, G], float64: the keys that the heads read now are `selection` times those of the groups.
    """
    c, weights = moments.keys, moments.queries.T  # [F, G, G], [F, h]
    s = selection.to(c)
    power = (s @ c @ s.T).diagonal(dim1=1, dim2=2).real  # [F, h]
    total = (weights * power).sum()

    def step(a: torch.Tensor, z: torch.Tensor):
        d = z.T[..., None] * a.T  # [F, h, R]
        weighted = d.conj().mT * weights[:, None]  # D^H W
        m = solve(weighted @ d, weighted @ s)
        c_b, cross = m @ c @ m.mH, s @ c @ m.mH  # E b b^H [F, R, R] and E K b^H [F, h, R]
        # A for each head, then its z.
        z2 = weights * z.T.abs().square()
        left = torch.einsum("fh,frk->hrk", z2, c_b.real)
        right = torch.einsum("fh,fhr->hr", weights, (z.T.conj()[..., None] * cross).real)
        a = solve(left, right[..., None])[..., 0].T
        product = torch.einsum("fhr,rh->fh", cross, a.to(cross))
        energy = torch.einsum("rh,frk,kh->fh", a, c_b.real, a).clamp(min=1e-300)
        z = (product / energy).T
        loss = (weights * (power - product.abs().square() / energy)).sum() / total
        scale = a.square().sum(0).sqrt().clamp(min=1e-300)
        return loss.item(), a / scale, z * scale[:, None], m  # the scale of A is free

    group_weights = weights @ selection.square()  # [F, G]
    root = group_weights.sqrt()
    whitened = root[..., None] * c * root[:, None]
    size = whitened.diagonal(dim1=1, dim2=2).real.sum(0)
    similarity = whitened.abs().sum(0) / (size[:, None] * size).sqrt().clamp(min=1e-300)

    starts = []
    for labels in (contiguous_groups(len(size), rank), similar_groups(similarity, rank)):
        # In a part, the best single key of each feature pair.
        member = membership(labels, rank).to(selection)
        top = torch.stack([torch.linalg.eigh(whitened * x * x[:, None])[1][..., -1] for x in member])  # [R, F, G]
        z = (top * member[:, None]).sum(0) / root.clamp(min=1e-300)  # [F, G]
        starts.append((perturbed(member @ selection.T), (z @ s.T).T))
    mixture = torch.linalg.eigh(whitened.real.sum(0))[1][:, -rank:]  # plain mixtures of heads
    starts.append((mixture.T @ selection.T, torch.ones_like(starts[0][1])))
    loss, a, z, m = descend(step, starts, iterations)
    return KeyFit(a, z, m, loss)


@torch.no_grad()
def fit_values(
    moments: Moments, selection: torch.Tensor, output: torch.Tensor, rank: int, iterations: int = ITERATIONS
) -> ValueFit:
    """
    The best of several descents for values of one layer.

    Args:
        selection: [h, G], float64: the values that the heads read now are `selection` times those of the groups.
        output: the output projection's weight, [hidden, h, d].
    """
    num_heads, num_groups = selection.shape
    d = output.shape[-1]
    c = moments.values.unflatten(1, (num_groups, d)).unflatten(0, (num_groups, d))  # [G, d, G, d]
    metric = torch.einsum("xhd,xhe->hde", output, output)  # [h, d, d]
    target = torch.einsum("hg,gdke->hdke", selection, c)  # E V_i V^T
    power = torch.einsum("hde,hdke,hk->", metric, target, selection)

    def step(a: torch.Tensor, u: torch.Tensor):
        weighted = u.mT @ metric  # U^T W, [h, e, d]
        squared = weighted @ u
        left = torch.einsum("rh,kh,hef->rekf", a, a, squared).flatten(2).flatten(0, 1)
        right = torch.einsum("rh,hg,hed->regd", a, selection, weighted).flatten(2).flatten(0, 1)
        m = solve(left, right)  # [R d, G d]
        c_b = (m @ moments.values @ m.T).unflatten(1, (rank, d)).unflatten(0, (rank, d))  # E b b^T
        cross = (target.flatten(2) @ m.T).unflatten(-1, (rank, d))  # E V_i b^T, [h, d, R, e]
        # A for each head, then its U.
        left = torch.einsum("hef,rekf->hrk", squared, c_b)
        right = torch.einsum("hed,hdre->hr", weighted, cross)
        a = solve(left, right[..., None])[..., 0].T
        a = a / a.square().sum(0).sqrt().clamp(min=1e-300)  # its scale is free
        product = torch.einsum("hdre,rh->hde", cross, a)
        energy = torch.einsum("rh,rekf,kh->hef", a, c_b, a)
        u = solve(energy, product.mT).mT
        explained = (metric * (2 * u @ product.mT - u @ energy @ u.mT)).sum()
        return (1 - explained / power).item(), a, u, m

    group_metric = torch.einsum("hg,hde->gde", selection.square(), metric)
    root, inverse = matrix_power(group_metric, 0.5), matrix_power(group_metric, -0.5)
    whitened = torch.einsum("gde,gekf,khf->gdkh", root, c, root)
    norms = whitened.square().sum((1, 3)).sqrt()
    similarity = norms / (norms.diagonal()[:, None] * norms.diagonal()).sqrt().clamp(min=1e-300)

    starts = []
    for labels in (contiguous_groups(num_groups, rank), similar_groups(similarity, rank)):
        # In a part, the d best directions of its values side by side.
        member = membership(labels, rank).to(selection)
        u = torch.zeros_like(group_metric)
        for part in (labels == r for r in range(rank)):
            block = whitened[part][:, :, part].flatten(2).flatten(0, 1)
            u[part] = torch.linalg.eigh(block)[1][:, -d:].unflatten(0, (-1, d))
        starts.append((perturbed(member @ selection.T), torch.einsum("hg,gde->hde", selection, inverse @ u)))
    mixture = torch.linalg.eigh(torch.einsum("gdkd->gk", whitened))[1][:, -rank:]
    starts.append((mixture.T @ selection.T, torch.eye(d).to(metric).repeat(num_heads, 1, 1)))
    loss, a, u, m = descend(step, starts, iterations)
    return ValueFit(a, u, m, loss)


def mean_pool(selection: torch.Tensor, head_dim: int, rank: int) -> tuple[KeyFit, ValueFit]:
    """The recipe of the GQA paper (arXiv 2305.13245): neighbouring heads share the mean of their keys and values."""
    member = membership(contiguous_groups(selection.shape[1], rank), rank).to(selection)
    mean = member / member.sum(1, keepdim=True)
    ones = torch.ones(len(selection), head_dim // 2).to(selection).to(torch.complex128)
    eye = torch.eye(head_dim).to(selection)
    keys = KeyFit(member @ selection.T, ones, mean.to(ones).expand(head_dim // 2, -1, -1))
    return keys, ValueFit(member @ selection.T, eye.repeat(len(selection), 1, 1), torch.kron(mean, eye))


# Models


def selections(attention: T6Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """What the heads read of the keys and of the values, [h, G] each, float64."""
    return attention.k_a.T.double() / attention.k_rank, attention.v_a.T.double() / attention.v_rank


def key_space(tensor: torch.Tensor, attention: T6Attention) -> torch.Tensor:
    """Weight [n d, hidden] or bias [n d] of a query or key projection as complex [n, hidden or 1, d / 2]."""
    rows = tensor.double().reshape(-1, attention.head_dim, tensor[0].numel())
    return to_complex(rows.mT, attention.config.rotary_dim)


def from_key_space(x: torch.Tensor, attention: T6Attention, shape: torch.Size) -> torch.Tensor:
    return from_complex(x, attention.config.rotary_dim).mT.reshape(-1, *shape[1:])


@torch.no_grad()
def compressed_attention(attention: T6Attention, keys: KeyFit | None, values: ValueFit | None) -> T6Attention:
    """A layer with other keys and values in place of its own; `None` keeps them."""
    config, state = copy.copy(attention.config), attention.state_dict()
    config.k_rank, config.v_rank = attention.k_rank, attention.v_rank
    parts = ["weight", "bias"] if config.attention_bias else ["weight"]
    if keys is not None:
        config.k_rank = len(keys.a)
        state["k_a"] = config.k_rank * keys.a
        for part in parts:
            query, key = state[f"q_proj.{part}"], state[f"k_b_proj.{part}"]
            new_query = key_space(query, attention) * keys.z.conj()[:, None]
            new_key = torch.einsum("frg,gxf->rxf", keys.m, key_space(key, attention))
            state[f"q_proj.{part}"] = from_key_space(new_query, attention, query.shape)
            state[f"k_b_proj.{part}"] = from_key_space(new_key, attention, key.shape)
    if values is not None:
        config.v_rank = len(values.a)
        state["v_a"] = config.v_rank * values.a
        for part in parts:
            state[f"v_b_proj.{part}"] = values.m @ state[f"v_b_proj.{part}"].double()
        output = state["o_proj.weight"].double().unflatten(1, (-1, attention.head_dim))
        state["o_proj.weight"] = torch.einsum("xhd,hde->xhe", output, values.u).flatten(1)
    with torch.device("meta"):
        result = T6Attention(config, attention.layer_idx)
    result.load_state_dict({name: tensor.to(attention.k_a.dtype) for name, tensor in state.items()}, assign=True)
    return result.train(attention.training)


@torch.no_grad()
def balance(attention: T6Attention) -> None:
    """
    Gives the two sides of each product weights of one size, in place, without a change of what the layer computes.

    The features of all B_K may be multiplied by any number, those of all B_V by any matrix, if queries and output
    projection undo it. A fit leaves that open; optimizers need weights of like size to train from it.
    """
    parts = ["weight", "bias"] if attention.config.attention_bias else ["weight"]
    if not attention.config.qk_norm:
        query, key = (key_space(proj.weight, attention) for proj in (attention.q_proj, attention.k_b_proj))
        factor = (query.abs().square().mean((0, 1)) / key.abs().square().mean((0, 1)).clamp(min=1e-300)) ** 0.25
        for projection, scale in ((attention.q_proj, 1 / factor), (attention.k_b_proj, factor)):
            for part in parts:
                tensor = getattr(projection, part)
                tensor.copy_(from_key_space(key_space(tensor, attention) * scale, attention, tensor.shape))

    d = attention.head_dim
    value = attention.v_b_proj.weight.double().unflatten(0, (-1, d))  # [R, d, hidden]
    output = attention.o_proj.weight.double().unflatten(1, (-1, d))  # [hidden, h, d]
    p = torch.einsum("rdx,rex->de", value, value) / len(value)
    q = torch.einsum("xhd,xhe->de", output, output) / output.shape[1]
    # T P T^T = T^-T Q T^-1 has the symmetric solution T = S^(1/2), S the geometric mean of P^-1 and Q.
    root, inverse = matrix_power(p, 0.5), matrix_power(p, -0.5)
    t = matrix_power(inverse @ matrix_power(root @ q @ root, 0.5) @ inverse, 0.5)
    attention.o_proj.weight.copy_((output @ torch.linalg.inv(t)).flatten(1))
    for part in parts:
        tensor = getattr(attention.v_b_proj, part)
        tensor.copy_((t @ tensor.double().reshape(-1, d, tensor[0].numel())).reshape(tensor.shape))


def rank_field(ranks: list[int]) -> int | list[int]:
    return ranks[0] if len(set(ranks)) == 1 else ranks


def compressed_model(model: T6ForCausalLM, layers: list[tuple[KeyFit | None, ValueFit | None]]) -> T6ForCausalLM:
    """A copy of the model with other keys and values."""
    result = copy.deepcopy(model)
    for layer, fits in zip(result.model.layers, layers):
        layer.self_attn = compressed_attention(layer.self_attn, *fits)
    attentions = [layer.self_attn for layer in result.model.layers]
    for attention in attentions:
        attention.config = result.config
    result.config.k_rank = rank_field([attention.k_rank for attention in attentions])
    result.config.v_rank = rank_field([attention.v_rank for attention in attentions])
    return result.requires_grad_(True)


# Ranks


@torch.no_grad()
def log_probabilities(model: T6ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits.float().log_softmax(-1)


def divergence(model: T6ForCausalLM, ids: torch.Tensor, expected: torch.Tensor) -> float:
    """Nats per token by which predictions for `ids` [batch, seq] differ from `expected` log-probabilities (KL)."""
    log_probs = log_probabilities(model, ids)
    return F.kl_div(log_probs, expected, log_target=True, reduction="sum").item() / ids.numel()


def choose_ranks(costs: list[dict[int, float]], budget: int) -> list[int]:
    """
    A rank for each part of the cache, their sum at most `budget`, for little total cost.

    Args:
        costs: of each part, the cost of each rank that it may have.
    """
    ranks = [max(cost) for cost in costs]
    while sum(ranks) > budget:
        moves = [
            ((cost[lower] - cost[rank]) / (rank - lower), part, lower)
            for part, (rank, cost) in enumerate(zip(ranks, costs))
            for lower in cost
            if lower < rank
        ]
        if not moves:
            raise ConversionError(f"no ranks are small enough: their sum is at least {sum(ranks)}, over {budget}")
        _, part, lower = min(moves)
        ranks[part] = lower
    while True:  # what the last step left over
        moves = [
            ((cost[rank] - cost[higher]) / (higher - rank), part, higher)
            for part, (rank, cost) in enumerate(zip(ranks, costs))
            for higher in cost
            if higher > rank and sum(ranks) - rank + higher <= budget and cost[higher] < cost[rank]
        ]
        if not moves:
            return ranks
        _, part, higher = max(moves)
        ranks[part] = higher


def check_options(config: T6Config, k_ranks: Ranks, v_ranks: Ranks, cache_ratio: float | None) -> None:
    """Raises a `ConversionError` for ranks that the model cannot have."""
    for option, ranks, full in (("--k-rank", k_ranks, config.k_rank), ("--v-rank", v_ranks, config.v_rank)):
        if ranks is not None and len(ranks) not in (1, config.num_hidden_layers):
            raise ConversionError(
                f"{option} has {len(ranks)} ranks: expected 1, or {config.num_hidden_layers} for the layers"
            )
        for rank in ranks or ():
            if not 1 <= rank <= full:
                raise ConversionError(f"{option} {rank}: expected 1 to {full}, the source's number of key/value heads")
    if config.qk_norm and k_ranks is not None and set(k_ranks) != {config.k_rank}:
        raise ConversionError(
            "--k-rank: this model normalises each key, which does not commute with mixing heads; its values "
            "alone can be compressed, by --v-rank"
        )
    if cache_ratio is not None:
        full, least = config.k_rank + config.v_rank, (config.k_rank if config.qk_norm else 1) + 1
        if not 1 <= cache_ratio <= full / least:
            raise ConversionError(f"--cache-ratio {cache_ratio:g}: expected 1 to {full / least:g} for this model")


@torch.no_grad()
def compress(
    model: T6ForCausalLM,
    calibration: torch.Tensor,
    k_ranks: Ranks = None,
    v_ranks: Ranks = None,
    cache_ratio: float | None = None,
    method: str = "fit",
    batch_size: int = 8,
    quiet: bool = False,
) -> T6ForCausalLM:
    """
    A copy of a converted model whose cache is smaller.

    Args:
        model: with constant A factors and queries of full rank, as `python -m conversion hf` makes them.
        calibration: token ids [n, seq] of the text on whose activations little is to be lost.
        k_ranks, v_ranks: one for all layers or one for each; `None` keeps the model's.
        cache_ratio: in place of ranks, how many times smaller the cache is to be; the ranks then differ from layer to
            layer, and between keys and values, where the predictions change less so than with equal ranks.
        batch_size: rows of `calibration` that go through the model at a time.
        method: `"fit"`, or `"mean-pool"` for the GQA paper's recipe.

    Raises:
        ConversionError: for ranks that the model cannot have.
    """
    check_options(model.config, k_ranks, v_ranks, cache_ratio)
    attentions = [layer.self_attn for layer in model.model.layers]
    batches = calibration.split(batch_size)
    moments = None
    if method == "fit":
        moments = collect_moments(model, tqdm(batches, desc="calibrating", unit="batch", disable=quiet))

    def fit(layer: int, side: str, rank: int, iterations: int = ITERATIONS) -> KeyFit | ValueFit | None:
        attention = attentions[layer]
        if rank == getattr(attention, f"{side}_rank"):
            return None
        selection = selections(attention)["kv".index(side)]
        if method == "mean-pool":
            return mean_pool(selection, attention.head_dim, rank)["kv".index(side)]
        if side == "k":
            return fit_keys(moments[layer], selection, rank, iterations)
        output = attention.o_proj.weight.double().unflatten(1, (-1, attention.head_dim))
        return fit_values(moments[layer], selection, output, rank, iterations)

    parts = [(layer, side) for layer in range(len(attentions)) for side in "kv"]
    full = [getattr(model.config, f"{side}_rank") for _, side in parts]

    def build(ranks: list[int]) -> T6ForCausalLM:
        fits = [fit(*part, rank) for part, rank in zip(parts, ranks)]
        result = compressed_model(model, list(zip(fits[::2], fits[1::2])))
        if method == "fit":
            for layer in result.model.layers:
                balance(layer.self_attn)
        return result

    if cache_ratio is None:
        chosen = []
        for layer, side in parts:
            ranks = (k_ranks if side == "k" else v_ranks) or [getattr(model.config, f"{side}_rank")]
            chosen.append(ranks[layer] if len(ranks) > 1 else ranks[0])
        return build(chosen)

    budget = int(sum(full) / cache_ratio)
    ids = calibration[: max(1, SENSITIVITY_TOKENS // calibration.shape[1])]
    expected = log_probabilities(model, ids)
    candidates = [
        [whole]
        if side == "k" and model.config.qk_norm
        else [rank for rank in CANDIDATE_RANKS if rank < whole] + [whole]
        for (_, side), whole in zip(parts, full)
    ]
    costs: list[dict[int, float]] = []
    with tqdm(total=sum(map(len, candidates)), desc="trying ranks", unit="rank", disable=quiet) as progress:
        for (layer, side), ranks in zip(parts, candidates):
            costs.append({})
            for rank in ranks:
                fitted = fit(layer, side, rank, TRIAL_ITERATIONS)
                if fitted is None:
                    costs[-1][rank] = 0.0
                else:
                    pair = (fitted, None) if side == "k" else (None, fitted)
                    module = model.model.layers[layer]
                    module.self_attn = compressed_attention(attentions[layer], *pair)
                    costs[-1][rank] = divergence(model, ids, expected)
                    module.self_attn = attentions[layer]
                progress.update()
    trials = [build(choose_ranks(costs, budget))]
    equal = [min(whole, int(budget / len(parts))) for whole in full]
    if all(rank in cost for rank, cost in zip(equal, costs)) and sum(equal) == budget:
        trials.append(build(equal))
    return min(trials, key=lambda trial: divergence(trial, ids, expected))
