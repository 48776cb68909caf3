"""Alternating least squares on second moments: what the fits of keys and of values share."""

import torch


PERTURBATION = 0.3
CONVERGED = 1e-6  # relative gain of an iteration below which a fit ends
NOISE = 0.03  # relative errors of B that a fit is to stand: rounding to half precision, and steps of training
RIDGE = 1e-9  # relative to the mean of a diagonal: moments of few tokens are singular
CHECK = 5  # steps between two looks at whether a fit has ended
LARGE = 256  # matrices as large as this are solved with one by one: a GPU is busy with each


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
