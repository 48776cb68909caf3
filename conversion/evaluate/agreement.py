"""How close a model's predictions are to those of its source."""

import torch
from torch.nn import functional as F


class Agreement:
    """KL(source || model), in nats per token, and the part of tokens after which both have the same first choice."""

    def __init__(self):
        self.divergence, self.same, self.count = 0.0, 0, 0

    def add(self, logits: torch.Tensor, expected: torch.Tensor) -> None:
        """Logits of the model and of the source, both [batch, piece, vocab]."""
        log_probs, expected_log_probs = (x.float().log_softmax(-1) for x in (logits, expected))
        divergence = F.kl_div(log_probs, expected_log_probs, log_target=True, reduction="none").sum(-1)
        self.divergence += divergence.double().sum().item()
        self.same += (logits.argmax(-1) == expected.argmax(-1)).sum().item()
        self.count += divergence.numel()

    @property
    def kl(self) -> float:
        return self.divergence / self.count

    @property
    def first_choice(self) -> float:
        return self.same / self.count
