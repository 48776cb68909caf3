"""What attention looks at, measured as it attends."""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


COPIED = 64  # tokens, which a sequence has twice


class MeasuredAttention:
    """
    An attention function, `sdpa` that looks at what it is given. While `layers` is a list, each call adds to it the
    mean entropy of attention, in nats; the roots of the mean square of queries, keys and values; the directions that the
    keys and the values of all heads use together, tr(C)^2 / tr(C^2) of their covariance C; and of the head that has most of
    it, the attention to the token before, and to the one after the token's last occurrence `COPIED` tokens ago.
    """

    def __init__(self):
        self.layers = None

    def __call__(self, module: nn.Module, query, key, value, attention_mask, **kwargs):
        if self.layers is not None:
            self.layers.append(self.look(query.float(), key.float(), value.float(), kwargs.get("scaling")))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    @staticmethod
    def look(query, key, value, scaling) -> dict[str, float]:
        groups, length = query.shape[1] // key.shape[1], query.shape[2]
        scores = query @ key.repeat_interleave(groups, 1).mT * (scaling or query.shape[-1] ** -0.5)
        hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        entropy = -(shares * shares.clamp(min=1e-30).log()).sum(-1)
        by_head = {
            "to_previous": shares.diagonal(-1, -2, -1).mean((0, 2)).max(),
            "to_copied": shares.diagonal(1 - COPIED, -2, -1)[..., 1:].mean((0, 2)).max(),
        }

        def directions(x: torch.Tensor) -> torch.Tensor:
            x = x.transpose(1, 2).flatten(0, 1).flatten(1)
            covariance = x.mT @ x
            return covariance.trace() ** 2 / covariance.square().sum()

        numbers = {
            "entropy": entropy.mean(),
            **by_head,
            **{name: x.square().mean().sqrt() for name, x in (("q", query), ("k", key), ("v", value))},
            "k_directions": directions(key),
            "v_directions": directions(value),
        }
        return {name: round(number.item(), 4) for name, number in numbers.items()}


measured = MeasuredAttention()
AttentionInterface.register("measured", measured)
AttentionMaskInterface.register("measured", lambda *args, **kwargs: None)  # windows are full: causal, and nothing else
