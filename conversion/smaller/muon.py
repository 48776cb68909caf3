"""Muon (arXiv 2502.16982) for many matrices at a time: one by one, a GPU would wait for each of its products."""

from collections import defaultdict
from collections.abc import Iterable

import torch


MOMENTUM = 0.95
ORTHOGONAL = (3.4445, -4.7750, 2.0315), 5  # coefficients and iterations of its polynomial
AS_ADAMW = 0.2  # the root mean square of AdamW's steps, as parts of its rate


@torch.no_grad()
def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """About U V^T of a matrix U S V^T [m, n], or of many [matrices, m, n], all at once."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x.bfloat16() if x.is_cuda else x
    x = x / x.float().norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30).to(x.dtype)
    (a, b, c), iterations = ORTHOGONAL
    add_product = torch.baddbmm if x.dim() == 3 else torch.addmm
    for _ in range(iterations):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """
    `torch.optim.Muon(weight_decay=0.0, adjust_lr_fn="match_rms_adamw")`, matrices of one shape as one batch.

    Args:
        params: matrices [m, n], or groups of them with an `lr` each.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                for parameter in parameters:
                    if not self.state[parameter]:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                momenta = [self.state[parameter]["momentum"] for parameter in parameters]
                grads = [parameter.grad for parameter in parameters]
                torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
                updates = orthogonal(torch.stack(torch._foreach_lerp(grads, momenta, MOMENTUM)))
                torch._foreach_add_(parameters, updates.unbind(), alpha=-group["lr"] * AS_ADAMW * max(shape) ** 0.5)
