"""What a conversion is: a configuration, and what becomes of each tensor."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from modeling_t6 import T6Config

from ..files.errors import ConversionError
from ..files.names import listed


Transform = Callable[[torch.Tensor], torch.Tensor]


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass
class Plan:
    """
    Attributes:
        config: of the T6 model.
        moves: for each tensor of the source, the tensors of the T6 model that come from it.
        constants: tensors of the T6 model that come from no tensor of the source.
        ignored: endings of the names of tensors that the source may hold and that are not needed.
        notes: what the user is to be told.
        rounds: whether a transform multiplies or adds, which is exact enough in float32 only.
    """

    config: T6Config
    moves: dict[str, list[tuple[str, Transform]]] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    rounds: bool = False

    def move(self, source: str, target: str, transform: Transform = unchanged) -> None:
        self.moves.setdefault(source, []).append((target, transform))

    def check_names(self, names: set[str]) -> None:
        """Raises a `ConversionError` that names the tensors that are missing, or that have no place."""
        missing = set(self.moves) - names
        if missing:
            raise ConversionError(f"missing from the checkpoint: {listed(missing)}")
        unexpected = [name for name in names - set(self.moves) if not name.endswith(self.ignored or ("\0",))]
        if unexpected:
            raise ConversionError(f"unexpected in the checkpoint: {listed(unexpected)}")
