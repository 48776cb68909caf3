"""Loss by the number of tokens before: where it falls, a later token still gains from an earlier one."""

import torch
from torch.nn import functional as F


class LossByPosition:
    """
    Mean loss, in nats, of tokens with 1, 2 to 3, 4 to 7, 8 to 15, ... others before them in their window.

    Args:
        length: of the windows.
    """

    def __init__(self, length: int):
        self.buckets = [(1 << power, min((2 << power) - 1, length - 1)) for power in range((length - 1).bit_length())]
        self.totals = torch.zeros(length - 1, dtype=torch.float64)
        self.windows = 0

    def add(self, logits: torch.Tensor, targets: torch.Tensor, start: int) -> None:
        """
        Args:
            logits: [batch, piece, vocab], of the tokens at `start` and after it in the window.
            targets: [batch, piece], the ids that follow.
        """
        losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none").double()
        self.totals[start : start + targets.shape[1]] += losses.sum(0).cpu()
        self.windows += len(targets) if start == 0 else 0

    @property
    def loss(self) -> float:
        return (self.totals.mean() / self.windows).item()

    def by_position(self) -> list[dict]:
        """For each bucket the least and most tokens before, and the mean loss."""
        losses = self.totals / self.windows
        return [
            {"first": first, "last": last, "loss": losses[first - 1 : last].mean().item()}
            for first, last in self.buckets
        ]
