"""Keys of a lower rank: a complex factor for each head and feature pair, and a mixture of heads for each pair."""

from dataclasses import dataclass

import torch

from .least_squares import add_noise, contiguous_groups, descend, eigh, membership, perturbed, similar_groups, solve
from .moments import Moments


KEY_ITERATIONS = 600  # they are cheap


@dataclass
class KeyFit:
    """Keys of rank R for h heads of A: A [R, h], z [h, d / 2] and M [d / 2, R, G], complex; the share of power lost."""

    a: torch.Tensor
    z: torch.Tensor
    m: torch.Tensor
    loss: float | None = None


class KeyProblem:
    """
    Keys of L layers, to be fitted.

    Args:
        moments: of each layer.
        selections: [L, h, G], float64: the keys that the heads read now are `selections` times those of the groups.
        turns: whether queries may undo a z of each head; else it is 1.
    """

    def __init__(self, moments: list[Moments], selections: torch.Tensor, turns: bool = True):
        self.turns = turns
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
            if not self.turns:
                loss = (weights * (power - 2 * product.real + energy)).sum((-2, -1)) / total
                return loss, a, z, m
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
            z = (z @ s[:, 0].mT).mT
            starts.append((perturbed(member @ selections.mT), z if self.turns else torch.ones_like(z)))
        mixture = self.mixtures[layers, :, -rank:]  # plain mixtures of heads
        starts.append((mixture.mT @ selections.mT, torch.ones_like(starts[0][1])))
        loss, a, z, m = descend(step, tuple(map(torch.stack, zip(*starts))), iterations)
        return [KeyFit(*one) for one in zip(a, z, m, loss.tolist())]
