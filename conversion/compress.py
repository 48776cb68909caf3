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
averaged by the attention as in the model. Small relative errors of B count, too: without them, heads come out as small
differences of large B, which rounding to half precision damages and from which training diverges. Nothing is rotated
differently, so RoPE stays exact at every position.
"""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from tqdm import tqdm

from modeling_t6 import T6Config, T6ForCausalLM
from modeling_t6.factors_t6 import apply_rotary_pos_emb, form_heads
from modeling_t6.modeling_t6 import T6Attention

from .errors import ConversionError
from .stages import stage


METHODS = ("fit", "mean-pool")
Ranks = list[int] | None
KEY_ITERATIONS = 600  # they are cheap
VALUE_ITERATIONS = 200
TRIAL_ITERATIONS = 30  # enough to compare ranks
PERTURBATION = 0.3
CONVERGED = 1e-6  # relative gain of an iteration below which a fit ends
NOISE = 0.03  # relative errors of B that a fit is to stand: rounding to half precision, and steps of training
RIDGE = 1e-9  # relative to the mean of a diagonal: moments of few tokens are singular
CHECK = 5  # steps between two looks at whether a fit has ended
SUBSPACE_ITERATIONS = 8
LARGE = 256  # matrices as large as this are solved with one by one: a GPU is busy with each
TOGETHER = 2**23  # numbers in the moments of the layers that are fitted side by side, which take 30 times that
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
    )  # fmt: skip
    # Sums of products in float32 are positive definite to its rounding only.
    values = sum(row.mT @ row for row in (row.flatten(0, 1).double() for row in averages))
    complex_key = complex_key.permute(2, 1, 0)  # [F, G, tokens]
    return Moments(complex_key @ complex_key.mH, powers, values)


@contextlib.contextmanager
def attention_hooks(model: T6ForCausalLM, hook: Callable) -> Iterator[None]:
    """Calls `hook(attention, args, kwargs, output)` for each attention that runs in the block."""
    handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect_moments(model: T6ForCausalLM, batches: Iterable[torch.Tensor]) -> list[Moments]:
    """The moments of each layer over batches of token ids [batch, seq]."""
    totals: list[Moments | None] = [None] * model.config.num_hidden_layers

    def hook(attention: T6Attention, args, kwargs, output) -> None:
        new = layer_moments(attention, args[0], kwargs["position_embeddings"], kwargs["attention_mask"])
        old = totals[attention.layer_idx]
        if old is not None:
            new = Moments(old.keys + new.keys, old.queries + new.queries, old.values + new.values)
        totals[attention.layer_idx] = new

    with attention_hooks(model, hook):
        for ids in batches:
            model.model(ids, use_cache=False)
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
    """
    matrix^-1 rhs for positive semidefinite [..., n, n], by Cholesky. Where rounding makes a matrix indefinite, the result
    means nothing: a descent does not follow it.
    """
    size = matrix.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None].clamp(min=1e-300)
    ridge = RIDGE * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    matrix, rhs = matrix / size + ridge, rhs / size
    if matrix.shape[-1] > LARGE:
        flat = zip(matrix.flatten(0, -3), rhs.flatten(0, -3))
        result = torch.stack([cholesky_solve(*one) for one in flat])
        return result.unflatten(0, matrix.shape[:-2])
    return cholesky_solve(matrix, rhs)


def cholesky_solve(matrix: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    factor = torch.linalg.cholesky_ex(matrix).L  # waits for no check on a GPU
    half = torch.linalg.solve_triangular(factor, rhs, upper=False)
    return torch.linalg.solve_triangular(factor.mH, half, upper=True)


def add_noise(moments: torch.Tensor) -> torch.Tensor:
    """Makes second moments [..., n, n], in place, those of numbers with independent errors, `NOISE` of their size."""
    moments.diagonal(dim1=-2, dim2=-1).mul_(1 + NOISE**2)
    return moments


def eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a head's size, these are found sooner on the CPU than on a GPU, whose algorithms work on both."""
    values, vectors = torch.linalg.eigh(matrix.cpu())
    return values.to(matrix.device), vectors.to(matrix.device)


def matrix_powers(matrix: torch.Tensor, *exponents: float) -> list[torch.Tensor]:
    """Powers of positive semidefinite [..., n, n], its small eigenvalues raised."""
    values, vectors = eigh(matrix)
    values = values.clamp(min=1e-300).maximum(RIDGE * values.amax())
    return [(vectors * values[..., None, :] ** exponent) @ vectors.mT for exponent in exponents]


def contiguous_groups(num_groups: int, rank: int) -> torch.Tensor:
    """[G]: the part of `rank` parts in a row, as even as can be, in which each of G heads lies."""
    return torch.cat(
        [torch.full((len(part),), r) for r, part in enumerate(torch.arange(num_groups).tensor_split(rank))]
    )


def membership(labels: torch.Tensor, rank: int) -> torch.Tensor:
    """[..., R, G]: whether head g of labels [..., G] lies in part r."""
    return labels[..., None, :] == torch.arange(rank, device=labels.device)[:, None]


def similar_groups(similarity: torch.Tensor) -> torch.Tensor:
    """[G, G]: row R - 1 has R parts of heads that are alike, by average linkage of their similarity [G, G]."""
    sums = similarity.cpu().double().clone()  # between parts, one a row
    sizes = torch.ones(len(sums), dtype=torch.double)
    labels = [torch.arange(len(sums))]
    while len(sums) > 1:
        means = (sums / (sizes[:, None] * sizes)).tril(-1).masked_fill(torch.ones_like(sums).triu().bool(), -torch.inf)
        i, j = divmod(means.argmax().item(), len(sums))  # j < i
        sums[j] += sums[i]
        sums[:, j] += sums[:, i]
        sizes[j] += sizes[i]
        rest = torch.arange(len(sums)) != i
        sums, sizes = sums[rest][:, rest], sizes[rest]
        last = labels[-1]
        labels.append(torch.where(last == i, j, last - (last > i).long()))
    return torch.stack(labels[::-1])


def descend(step, starts: tuple[torch.Tensor, torch.Tensor], iterations: int) -> tuple[torch.Tensor, ...]:
    """
    Where the best of several descents ends, for each of L layers. `step` makes losses, A, the transforms of the heads and
    M from A and the transforms, and lowers the losses; between steps stands Nesterov's extrapolation, begun anew where it
    would raise a loss. All layers and starts go side by side, and a GPU is waited for at every `CHECK`th step only.

    Args:
        starts: A and the transforms, [starts, L, ...] each.

    Returns:
        Losses [L], A, the transforms and M, [L, ...] each.
    """

    def choose(mask: torch.Tensor, new: tuple, old: tuple) -> tuple:
        return tuple(torch.where(mask[(...,) + (None,) * (x.dim() - mask.dim())], x, y) for x, y in zip(new, old))

    def go_on(state: tuple, previous: tuple, count: torch.Tensor, iterations: int):
        converged = torch.zeros_like(state[0], dtype=torch.bool)
        for i in range(iterations):
            momentum = count / (count + 3)
            new = step(*(
                now + momentum[(...,) + (None,) * (now.dim() - momentum.dim())] * (now - before)
                for now, before in zip(state[1:3], previous[1:3])
            ))  # fmt: skip
            better = new[0] <= state[0]
            # Without momentum, no step raises the loss but by rounding.
            converged |= torch.where(better, state[0] - new[0] <= CONVERGED * state[0], count == 0)
            previous, state = state, choose(better, new, state)
            count = torch.where(better, count + 1, torch.zeros_like(count))
            if i % CHECK == CHECK - 1 and converged.all():
                break
        return state, previous, count

    first = step(*starts)
    state, previous, count = go_on(first, first, torch.zeros_like(first[0]), iterations // 5)
    best = state[0].nan_to_num(torch.inf).argmin(0), torch.arange(state[0].shape[1], device=state[0].device)
    state, previous = (tuple(x[best] for x in part) for part in (state, previous))
    return go_on(state, previous, count[best], iterations)[0]


def perturbed(a: torch.Tensor) -> torch.Tensor:
    """Factors of ones and zeros [..., R, h] are a saddle: each head stays where it was put."""
    noise = torch.randn(a.shape[-2:], generator=torch.Generator().manual_seed(0), dtype=a.dtype)
    return a + PERTURBATION * a.abs().amax((-2, -1), keepdim=True) * noise.to(a.device)


class KeyProblem:
    """
    Keys of L layers, to be fitted.

    Args:
        moments: of each layer.
        selections: [L, h, G], float64: the keys that the heads read now are `selections` times those of the groups.
    """

    def __init__(self, moments: list[Moments], selections: torch.Tensor):
        self.moments = torch.stack([moment.keys for moment in moments])  # [L, F, G, G]
        self.weights = torch.stack([moment.queries.T for moment in moments])  # [L, F, h]
        self.selections = selections
        self.root = (self.weights @ selections.square()).sqrt()  # [L, F, G]
        whitened = self.whitened(slice(None))
        size = whitened.diagonal(dim1=-2, dim2=-1).real.sum(1)
        similarity = whitened.abs().sum(1) / (size[:, :, None] * size[:, None]).sqrt().clamp(min=1e-300)
        self.similar = torch.stack([similar_groups(table) for table in similarity]).to(size.device)
        self.mixtures = eigh(whitened.real.sum(1))[1]

    def whitened(self, layers: list[int] | slice) -> torch.Tensor:
        """Moments weighted by the power of the queries."""
        root = self.root[layers]
        return root[..., None] * self.moments[layers] * root[..., None, :]

    @torch.no_grad()
    def fit(self, rank: int, iterations: int = KEY_ITERATIONS, layers: list[int] | None = None) -> list[KeyFit]:
        """The best of several descents for each of `layers`, or for all."""
        layers = list(range(len(self.moments))) if layers is None else layers
        c, weights, selections = self.moments[layers], self.weights[layers], self.selections[layers]
        s = selections[:, None].to(c)
        power = (s @ c @ s.mT).diagonal(dim1=-2, dim2=-1).real  # [L, F, h]
        total = (weights * power).sum((-2, -1))

        def step(a: torch.Tensor, z: torch.Tensor):
            """Of A [..., L, R, h] and z [..., L, h, F]."""
            d = z.mT[..., None] * a.mT[..., None, :, :]  # [F, h, R]
            weighted = d.mH * weights[..., None, :]  # D^H W
            m = solve(add_noise(weighted @ d), weighted @ s)
            c_m = c @ m.mH
            c_b, cross = add_noise(m @ c_m), s @ c_m  # E b b^H [F, R, R] and E K b^H [F, h, R]
            # A for each head, then its z.
            z2 = weights * z.mT.abs().square()
            left = torch.einsum("...fh,...frk->...hrk", z2, c_b.real)
            right = torch.einsum("...fh,...fhr->...hr", weights, (z.mT.conj()[..., None] * cross).real)
            a = solve(left, right[..., None])[..., 0].mT
            product = (cross * a.mT[..., None, :, :]).sum(-1)  # [F, h]
            energy = ((a.mT[..., None, :, :] @ c_b.real) * a.mT[..., None, :, :]).sum(-1).clamp(min=1e-300)
            loss = (weights * (power - product.abs().square() / energy)).sum((-2, -1)) / total
            scale = a.square().sum(-2, keepdim=True).sqrt().clamp(min=1e-300)  # the scale of A is free
            return loss, a / scale, (product / energy).mT * scale.mT, m

        root, whitened = self.root[layers], self.whitened(layers)
        starts = []
        for labels in (
            contiguous_groups(root.shape[-1], rank).to(root.device).expand(len(layers), -1),
            self.similar[layers, rank - 1],
        ):
            # In a part, about the best single key of each feature pair: all parts go through the power method at once.
            same = (labels[:, :, None] == labels[:, None])[:, None].to(whitened)  # [L, 1, G, G]
            matrix = whitened * same
            for _ in range(5):
                size = same @ matrix.diagonal(dim1=-2, dim2=-1)[..., None]
                matrix = matrix / size.real.clamp(min=1e-300)
                matrix = matrix @ matrix
            top = matrix.sum(-1)
            norm = (same.real @ top.abs().square()[..., None])[..., 0].sqrt()
            z = top / (norm * root).clamp(min=1e-300)  # [L, F, G]
            member = membership(labels, rank).to(selections)
            starts.append((perturbed(member @ selections.mT), (z @ s[:, 0].mT).mT))
        mixture = self.mixtures[layers, :, -rank:]  # plain mixtures of heads
        starts.append((mixture.mT @ selections.mT, torch.ones_like(starts[0][1])))
        loss, a, z, m = descend(step, tuple(map(torch.stack, zip(*starts))), iterations)
        return [KeyFit(*one) for one in zip(a, z, m, loss.tolist())]


class ValueProblem:
    """
    Values of L layers, to be fitted.

    Args:
        moments: of each layer.
        selections: [L, h, G], float64: the values that the heads read now are `selections` times those of the groups.
        outputs: the weight of each layer's output projection, [hidden, h, d].
    """

    def __init__(self, moments: list[Moments], selections: torch.Tensor, outputs: list[torch.Tensor]):
        self.moments = torch.stack([moment.values for moment in moments])  # [L, G d, G d]
        self.selections = selections
        self.metrics = torch.stack([torch.einsum("xhd,xhe->hde", w, w) for w in map(torch.Tensor.double, outputs)])
        group_metrics = torch.einsum("lhg,lhde->lgde", selections.square(), self.metrics)
        roots = [matrix_powers(metric, 0.5, -0.5) for metric in group_metrics]
        self.root, self.inverse = map(torch.stack, zip(*roots))  # [L, G, d, d]
        whitened = self.whitened(slice(None))
        norms = whitened.square().sum((2, 4)).sqrt()
        diagonal = norms.diagonal(dim1=1, dim2=2)
        similarity = norms / (diagonal[:, :, None] * diagonal[:, None]).sqrt().clamp(min=1e-300)
        self.similar = torch.stack([similar_groups(table) for table in similarity]).to(norms.device)
        self.mixtures = eigh(torch.einsum("lgdkd->lgk", whitened))[1]

    def whitened(self, layers: list[int] | slice) -> torch.Tensor:
        """Moments of values as the output projection sees them, [L, G, d, G, d]."""
        root = self.root[layers]
        (groups, d), c = root.shape[1:3], self.moments[layers]
        half = root @ c.unflatten(1, (groups, d)).flatten(3)  # [L, G, d, G d]
        return torch.einsum("lgdke,lkef->lgdkf", half.unflatten(-1, (groups, d)), root)

    @torch.no_grad()
    def fit(self, rank: int, iterations: int = VALUE_ITERATIONS, layers: list[int] | None = None) -> list[ValueFit]:
        """The best of several descents for each of `layers`, or for all."""
        layers = list(range(len(self.moments))) if layers is None else layers
        c, metric, selections = self.moments[layers], self.metrics[layers], self.selections[layers]
        num_groups, d = self.root.shape[1:3]
        target = torch.einsum("lhg,lgdke->lhdke", selections, c.unflatten(2, (-1, d)).unflatten(1, (-1, d)))
        power = torch.einsum("lhde,lhdke,lhk->l", metric, target, selections)
        del target

        def step(a: torch.Tensor, u: torch.Tensor):
            """Of A [..., L, R, h] and U [..., L, h, d, d]."""
            weighted = u.mT @ metric  # U^T W, [h, e, d]
            squared = weighted @ u
            left = torch.einsum("...hrk,...hef->...rekf", a.mT[..., None] * a.mT[..., None, :], squared)
            right = torch.einsum("...rhg,...hed->...regd", a[..., None] * selections[:, None], weighted)
            m = solve(add_noise(left.flatten(-4, -3).flatten(-2)), right.flatten(-4, -3).flatten(-2))  # [R d, G d]
            m_c = m @ c
            c_b = add_noise(m_c @ m.mT).unflatten(-1, (rank, d)).unflatten(-3, (rank, d))  # E b b^T
            cross = m_c.unflatten(-1, (num_groups, d)).unflatten(-3, (rank, d))
            cross = torch.einsum("...hg,...regd->...hdre", selections, cross)  # E V_i b^T
            # A for each head, then its U.
            left = torch.einsum("...hef,...rekf->...hrk", squared, c_b)
            right = torch.einsum("...hed,...hdre->...hr", weighted, cross)
            a = solve(left, right[..., None])[..., 0].mT
            a = a / a.square().sum(-2, keepdim=True).sqrt().clamp(min=1e-300)  # its scale is free
            product = torch.einsum("...hdre,...rh->...hde", cross, a)
            energy = torch.einsum("...hrk,...rekf->...hef", a.mT[..., None] * a.mT[..., None, :], c_b)
            u = solve(energy, product.mT).mT
            explained = (metric * (2 * u @ product.mT - u @ energy @ u.mT)).sum((-3, -2, -1))
            return 1 - explained / power, a, u, m

        whitened = self.whitened(layers)
        starts = []
        for labels in (
            contiguous_groups(num_groups, rank).to(c.device).expand(len(layers), -1),
            self.similar[layers, rank - 1],
        ):
            # In a part, about the d best directions of its values side by side: subspace iteration, all parts at once.
            same = (labels[:, :, None] == labels[:, None]).to(c)  # [L, G, G]
            matrix = (whitened * same[:, :, None, :, None]).flatten(3).flatten(1, 2)
            u = torch.randn(num_groups, d, d, generator=torch.Generator().manual_seed(0), dtype=c.dtype)
            u = u.to(c.device).expand(len(layers), -1, -1, -1)
            for _ in range(SUBSPACE_ITERATIONS):
                u = (matrix @ u.flatten(1, 2)).unflatten(1, (num_groups, d))
                gram = torch.einsum("lgk,lkde->lgde", same, u.mT @ u)
                u = u / gram.diagonal(dim1=-2, dim2=-1).mean(-1).sqrt().clamp(min=1e-150)[..., None, None]
                gram = torch.einsum("lgk,lkde->lgde", same, u.mT @ u)
                ridge = RIDGE * torch.eye(d, dtype=c.dtype, device=c.device)
                u = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram + ridge).L, u.mT, upper=False).mT
            member = membership(labels, rank).to(selections)
            u = torch.einsum("lhg,lgde->lhde", selections, self.inverse[layers] @ u)
            starts.append((perturbed(member @ selections.mT), u))
        mixture = self.mixtures[layers, :, -rank:]
        starts.append((mixture.mT @ selections.mT, torch.eye(d).to(c).expand_as(starts[0][1])))
        loss, a, u, m = descend(step, tuple(map(torch.stack, zip(*starts))), iterations)
        return [ValueFit(*one) for one in zip(a, u, m, loss.tolist())]


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
        size = keys.z.abs().square().mean(1).sqrt().clamp(min=1e-300)  # free between A and z
        state["k_a"] = config.k_rank * keys.a * size
        for part in parts:
            query, key = state[f"q_proj.{part}"], state[f"k_b_proj.{part}"]
            new_query = key_space(query, attention) * (keys.z.conj() / size[:, None])[:, None]
            new_key = torch.einsum("frg,gxf->rxf", keys.m, key_space(key, attention))
            state[f"q_proj.{part}"] = from_key_space(new_query, attention, query.shape)
            state[f"k_b_proj.{part}"] = from_key_space(new_key, attention, key.shape)
    if values is not None:
        config.v_rank = len(values.a)
        size = values.u.square().mean((1, 2)).mul(attention.head_dim).sqrt().clamp(min=1e-300)  # 1 of a rotation
        state["v_a"] = config.v_rank * values.a * size
        for part in parts:
            state[f"v_b_proj.{part}"] = values.m @ state[f"v_b_proj.{part}"].double()
        output = state["o_proj.weight"].double().unflatten(1, (-1, attention.head_dim))
        state["o_proj.weight"] = torch.einsum("xhd,hde->xhe", output, values.u / size[:, None, None]).flatten(1)
    with torch.device("meta"):
        result = T6Attention(config, attention.layer_idx)
    result.load_state_dict({name: tensor.to(attention.k_a.dtype) for name, tensor in state.items()}, assign=True)
    return result.train(attention.training)


def mix_factors(projection: torch.nn.Linear, mixture: torch.Tensor) -> None:
    """Puts mixture [R, R] times B in the place of the factors B [R, d] that a projection gives."""
    for tensor in projection.parameters():
        tensor.copy_((mixture @ tensor.double().reshape(len(mixture), -1)).reshape(tensor.shape))


def orthogonalize(a: torch.Tensor, projection: torch.nn.Linear) -> None:
    """Gives constant factors A [R, h] orthogonal rows, in place, and the projection of B what undoes it."""
    rows, mixture = torch.linalg.qr(a.double().T)  # A = mixture^T rows^T
    size = a.numel() ** 0.5  # A of an exact conversion has such rows if each B has as many heads
    a.copy_(size * rows.T)
    mix_factors(projection, mixture / size)


def even_rows(a: torch.Tensor, projection: torch.nn.Linear) -> None:
    """Gives the rows of constant factors A [R, h] one size, in place, and the projection of B what undoes it."""
    size = a.double().norm(dim=1) / a.numel() ** 0.5  # as `orthogonalize` leaves them
    a.copy_(a.double() / size[:, None])
    mix_factors(projection, size.diag())


@torch.no_grad()
def balance(attention: T6Attention) -> None:
    """
    Gives the two sides of each product weights of one size, in place, without a change of what the layer computes.

    The rows of A may be multiplied by any matrix, if B undoes it, the features of all B_K by any number, and those of all
    B_V by any matrix, if queries and output projection undo it. A fit leaves that open, and its heads can be small
    differences of large B: rounding to half precision, and every step of an optimizer, are then as large as the heads.
    With orthogonal rows, A_V passes neither on enlarged. Those of A_K keep their directions: some B_K are a hundred times as
    large as others in a feature pair, of which a fit gives none to heads that read it small, and a mixture some to all.
    """
    orthogonalize(attention.v_a, attention.v_b_proj)
    if not attention.config.qk_norm:
        even_rows(attention.k_a, attention.k_b_proj)
        query, key = (key_space(proj.weight, attention) for proj in (attention.q_proj, attention.k_b_proj))
        factor = (query.abs().square().mean((0, 1)) / key.abs().square().mean((0, 1)).clamp(min=1e-300)) ** 0.25
        for projection, scale in ((attention.q_proj, 1 / factor), (attention.k_b_proj, factor)):
            for tensor in projection.parameters():
                tensor.copy_(from_key_space(key_space(tensor, attention) * scale, attention, tensor.shape))

    d = attention.head_dim
    value = attention.v_b_proj.weight.double().unflatten(0, (-1, d))  # [R, d, hidden]
    output = attention.o_proj.weight.double().unflatten(1, (-1, d))  # [hidden, h, d]
    p = torch.einsum("rdx,rex->de", value, value) / len(value)
    q = torch.einsum("xhd,xhe->de", output, output) / output.shape[1]
    # T P T^T = T^-T Q T^-1 has the symmetric solution T = S^(1/2), S the geometric mean of P^-1 and Q.
    root, inverse = matrix_powers(p, 0.5, -0.5)
    (middle,) = matrix_powers(root @ q @ root, 0.5)
    (t,) = matrix_powers(inverse @ middle @ inverse, 0.5)
    attention.o_proj.weight.copy_((output @ torch.linalg.inv(t)).flatten(1))
    for tensor in attention.v_b_proj.parameters():
        tensor.copy_((t @ tensor.double().reshape(-1, d, tensor[0].numel())).reshape(tensor.shape))


class HeadFits:
    """
    Keys and values of other ranks for the layers of a model, many layers at a time.

    Args:
        attentions: of the model's layers.
        method: one of `METHODS`; `"fit"` needs moments, given to `use`.
    """

    def __init__(self, attentions: list[T6Attention], method: str):
        self.attentions, self.method = attentions, method
        self.problems: list[tuple[range, dict[str, KeyProblem | ValueProblem]]] = []

    def use(self, moments: list[Moments]) -> None:
        d = self.attentions[0].head_dim
        count = max(1, TOGETHER // moments[0].values.numel())
        for start in range(0, len(moments), count):
            layers = range(start, min(start + count, len(moments)))
            attentions, part = self.attentions[layers.start : layers.stop], moments[layers.start : layers.stop]
            k_selections, v_selections = map(torch.stack, zip(*map(selections, attentions)))
            outputs = [attention.o_proj.weight.unflatten(1, (-1, d)) for attention in attentions]
            problems = {"k": KeyProblem(part, k_selections), "v": ValueProblem(part, v_selections, outputs)}
            self.problems.append((layers, problems))

    def __call__(
        self, side: str, rank: int, iterations: int, layers: list[int] | None = None
    ) -> list[KeyFit | ValueFit | None]:
        """Fits of the keys (`side` k) or values (v) of `layers`, or of all; `None` for a layer that has this rank."""
        layers = list(range(len(self.attentions))) if layers is None else layers
        changed = [layer for layer in layers if getattr(self.attentions[layer], f"{side}_rank") != rank]
        fits = {}
        if self.method == "mean-pool":
            for layer in changed:
                attention = self.attentions[layer]
                selection = selections(attention)["kv".index(side)]
                fits[layer] = mean_pool(selection, attention.head_dim, rank)["kv".index(side)]
        for those, problems in self.problems:
            some = [layer for layer in changed if layer in those]
            if some:
                found = problems[side].fit(rank, iterations, [layer - those.start for layer in some])
                fits |= zip(some, found)
        return [fits.get(layer) for layer in layers]


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
    fits = HeadFits(attentions, method)
    if method == "fit":
        batches = calibration.split(batch_size)
        with stage("calibrating", quiet):
            fits.use(collect_moments(model, tqdm(batches, desc="calibrating", unit="batch", disable=quiet)))

    parts = [(layer, side) for layer in range(len(attentions)) for side in "kv"]
    full = [getattr(model.config, f"{side}_rank") for _, side in parts]

    def build(ranks: list[int]) -> T6ForCausalLM:
        layers = defaultdict(list)  # of each side and rank
        for (layer, side), rank in zip(parts, ranks):
            layers[side, rank].append(layer)
        found = {}
        with stage("fitting", quiet):
            for (side, rank), some in tqdm(layers.items(), desc="fitting", unit="rank", disable=quiet):
                iterations = KEY_ITERATIONS if side == "k" else VALUE_ITERATIONS
                found |= {(layer, side): fit for layer, fit in zip(some, fits(side, rank, iterations, some))}
        result = compressed_model(model, [(found[layer, "k"], found[layer, "v"]) for layer in range(len(attentions))])
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
    costs: list[dict[int, float]] = [{} for _ in parts]
    count = sum(map(len, candidates))
    with (
        stage("trying ranks", quiet),
        tqdm(total=count, desc="trying ranks", unit="rank", disable=quiet) as progress,
    ):
        for side, rank in sorted({(side, rank) for (_, side), ranks in zip(parts, candidates) for rank in ranks}):
            places = [place for place, part in enumerate(parts) if part[1] == side]
            for place, fitted in zip(places, fits(side, rank, TRIAL_ITERATIONS)):
                layer = parts[place][0]
                if fitted is None:
                    costs[place][rank] = 0.0
                else:
                    pair = (fitted, None) if side == "k" else (None, fitted)
                    module = model.model.layers[layer]
                    module.self_attn = compressed_attention(attentions[layer], *pair)
                    costs[place][rank] = divergence(model, ids, expected)
                    module.self_attn = attentions[layer]
                progress.update()
    trials = [build(choose_ranks(costs, budget))]
    equal = [min(whole, int(budget / len(parts))) for whole in full]
    if all(rank in cost for rank, cost in zip(equal, costs)) and sum(equal) == budget:
        trials.append(build(equal))
    return min(trials, key=lambda trial: divergence(trial, ids, expected))
