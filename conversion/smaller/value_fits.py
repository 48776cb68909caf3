"""Values of a lower rank: a matrix for each head, and a mixture of all features of all heads."""

from dataclasses import dataclass

import torch

from .least_squares import (
    RIDGE,
    add_noise,
    contiguous_groups,
    descend,
    eigh,
    matrix_powers,
    membership,
    perturbed,
    similar_groups,
    solve,
)
from .moments import Moments


VALUE_ITERATIONS = 200
SUBSPACE_ITERATIONS = 8


@dataclass
class ValueFit:
    """Values of rank R for h heads: A [R, h], U [h, d, d] and M [R d, G d]; the share of power lost."""

    a: torch.Tensor
    u: torch.Tensor
    m: torch.Tensor
    loss: float | None = None


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
