"""How much a change of a model changes its predictions, on a text and on answers to questions about what it has read."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from modeling_t6 import T6Cache, T6ForCausalLM
from modeling_t6.cache_t6 import CACHE_NAME

from .questions import Questions


TEXT_TOKENS, TEXT_POSITIONS = 4096, 1024  # read, and looked at
ANSWER_TOKENS = 8192  # read to be asked


class Replay(nn.Module):
    """Replaces a layer: returns its known output, or passes its input on."""

    def __init__(self, states: torch.Tensor | None = None):
        super().__init__()
        self.states = states

    def forward(self, states: torch.Tensor, **kwargs) -> torch.Tensor:
        return states if self.states is None else self.states


@contextlib.contextmanager
def starting_at(model: T6ForCausalLM, first: int, states: torch.Tensor) -> Iterator[None]:
    """In the block, the layers before the `first` are not computed: `states` [batch, seq, hidden] enter it."""
    layers = model.model.layers
    before = list(layers[:first])
    try:
        for index in range(first):
            layers[index] = Replay(states if index == first - 1 else None)
        yield
    finally:
        for index, layer in enumerate(before):
            layers[index] = layer


class Probe:
    """
    Compares models with `model`, as it is now.

    Args:
        text: token ids [n, seq], of which the first are read.
        questions: windows that end in answers, of which the first are read; `None` compares on the text alone.
    """

    @torch.no_grad()
    def __init__(self, model: T6ForCausalLM, text: torch.Tensor, questions: Questions | None = None):
        ids = text[: max(1, TEXT_TOKENS // text.shape[1])]
        looked_at = torch.zeros_like(ids, dtype=torch.bool)
        looked_at.view(-1)[:: max(1, ids.numel() // TEXT_POSITIONS)] = True
        self.parts = [(ids, looked_at)]
        if questions is not None:
            some = slice(max(1, ANSWER_TOKENS // questions.ids.shape[1]))
            # The prediction of a token is made at the one before it.
            self.parts.append((questions.ids[some], questions.asked[some].roll(-1, 1)))
        entering: list[torch.Tensor] = []  # the states before each layer, of one part after the other
        layers = model.model.layers
        hooks = [layer.register_forward_pre_hook(lambda _, args: entering.append(args[0])) for layer in layers]
        self.expected = [self._log_probabilities(model, *part) for part in self.parts]
        for hook in hooks:
            hook.remove()
        self.entering = [entering[start : start + len(layers)] for start in range(0, len(entering), len(layers))]

    @staticmethod
    def _log_probabilities(
        model: T6ForCausalLM, ids: torch.Tensor, looked_at: torch.Tensor, dtype: str | None = None
    ) -> torch.Tensor:
        cached = {"use_cache": False}
        if dtype is not None:
            cached = {"use_cache": True, CACHE_NAME: T6Cache(config=model.config, dtype=dtype)}
        states = model.model(ids, **cached).last_hidden_state
        return model.lm_head(states[looked_at]).float().log_softmax(-1)

    @torch.no_grad()
    def divergence(self, model: T6ForCausalLM, dtype: str | None = None, first: int = 0) -> torch.Tensor:
        """
        KL(model as it was || model now) in nats, the mean over tokens of the text plus the mean over tokens of answers; a scalar on the
        model's device.

        Args:
            dtype: of the rows of a cache through which the model reads, a `cache_dtype`; `None` for no cache.
            first: the first layer that has changed. Those before it are not computed again.
        """
        total = 0.0
        for part, states, old in zip(self.parts, self.entering, self.expected):
            with starting_at(model, first, states[first]):
                new = self._log_probabilities(model, *part, dtype)
            total = total + F.kl_div(new, old, log_target=True, reduction="sum") / len(old)
        return total
