"""Muon for batches of matrices beside PyTorch's."""

import copy

import pytest
import torch

from conversion.smaller.muon import Muon


pytestmark = pytest.mark.once


def test_steps_are_those_of_pytorch():
    torch.manual_seed(0)
    shapes = [(24, 40), (40, 24), (24, 40), (40, 24), (7, 40)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    starts, theirs = copy.deepcopy(ours), copy.deepcopy(ours)

    def groups(parameters):
        return [{"params": parameters[:2], "lr": 0.01}, {"params": parameters[2:], "lr": 0.03}]

    optimizers = [
        Muon(groups(ours)), torch.optim.Muon(groups(theirs), weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    ]  # fmt: skip
    for _ in range(4):
        for mine, other in zip(ours, theirs):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start, mine, other in zip(starts, ours, theirs):  # theirs computes in bfloat16 everywhere
        assert (mine - other).norm() < 0.02 * (other - start).norm()
    restored = Muon(groups(ours))
    restored.load_state_dict(optimizers[0].state_dict())
    for parameter in ours:
        assert torch.equal(restored.state[parameter]["momentum"], optimizers[0].state[parameter]["momentum"])
