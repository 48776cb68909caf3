"""The fits of all layers of a model, by either method."""

import torch

from modeling_t6.modeling_t6 import T6Attention

from .key_fits import KeyFit, KeyProblem
from .least_squares import contiguous_groups, membership
from .moments import Moments
from .normed_heads import constant_factors
from .value_fits import ValueFit, ValueProblem


MAX_MOMENTS = 2**23  # numbers in the moments of the layers that are fitted side by side, which take 30 times that


def selections(attention: T6Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """What the heads of A, h or h_kv, read of the keys and of the values, [h, G] each, float64."""
    k_a, v_a = (constant_factors(attention, side).T.double() for side in "kv")
    return k_a / attention.k_rank, v_a / attention.v_rank


def outputs(attention: T6Attention, num_heads: int) -> torch.Tensor:
    """What the output projection makes of each head of A_V, [outputs of all heads that share it, num_heads, d]."""
    weight = attention.o_proj.weight.unflatten(1, (num_heads, -1, attention.head_dim))
    return weight.transpose(1, 2).flatten(0, 1)


def mean_pool(selection: torch.Tensor, head_dim: int, rank: int) -> tuple[KeyFit, ValueFit]:
    """The recipe of the GQA paper (arXiv 2305.13245): neighbouring heads share the mean of their keys and values."""
    member = membership(contiguous_groups(selection.shape[1], rank), rank).to(selection)
    mean = member / member.sum(1, keepdim=True)
    ones = torch.ones(len(selection), head_dim // 2).to(selection).to(torch.complex128)
    eye = torch.eye(head_dim).to(selection)
    keys = KeyFit(member @ selection.T, ones, mean.to(ones).expand(head_dim // 2, -1, -1))
    return keys, ValueFit(member @ selection.T, eye.repeat(len(selection), 1, 1), torch.kron(mean, eye))


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
        count = max(1, MAX_MOMENTS // moments[0].values.numel())
        for start in range(0, len(moments), count):
            layers = range(start, min(start + count, len(moments)))
            attentions, part = self.attentions[layers.start : layers.stop], moments[layers.start : layers.stop]
            k_selections, v_selections = map(torch.stack, zip(*map(selections, attentions)))
            problems = {
                "k": KeyProblem(part, k_selections, turns=not attentions[0].qk_norm),
                "v": ValueProblem(part, v_selections, [outputs(x, v_selections.shape[1]) for x in attentions]),
            }
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
