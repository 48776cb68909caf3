"""
Reconstruction: each compressed attention learns, by itself, the output of the one whose place it takes.

A fit mixes the heads of the source. This goes on from there: on the calibration text, the projections of a layer's attention
are trained for the output that the source's attention has for the same input (block reconstruction, as BRECQ, arXiv
2102.05426, does it for quantised blocks). No layer waits for another, no logits are needed, and the same few windows of
text serve many times. Muon takes steps as large for a wide layer as for a narrow one, in parts of its weights.
"""

import copy

import torch
from torch.nn import functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from modeling_t6 import T6ForCausalLM

from .heal import join_optimizers
from .moments import attention_hooks
from .stages import stage


STEP = 0.02  # the longest, as a part of the root mean square of the weights that it changes
MUON_SIZE = 0.2  # root mean square of the steps of `torch.optim.Muon`, as a part of its rate
WINDOWS = 2  # in a step: many small steps are worth more than few large ones
CHECKED = 10  # every tenth window is not learnt from, and says whether a layer is better than before


class RowSizes(torch.nn.Module):
    """
    A weight as the sizes of its rows, which stay, times rows of one size, which learn. In queries and keys of a fit, some
    features are a thousand times as large as others, and a step that is small beside those would be the end of these.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        size = weight.detach().norm(dim=1, keepdim=True)
        self.register_buffer("size", size.clamp(min=1e-6 * size.amax().item() + torch.finfo(size.dtype).tiny))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.size * rows

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / self.size


def reconstruct(
    model: T6ForCausalLM,
    source: T6ForCausalLM,
    ids: torch.Tensor,
    steps: int,
    seed: int = 0,
    quiet: bool = False,
) -> list[tuple[float, float]]:
    """
    Trains the projections of the attention of each layer of `model`, in place; the constant A stay, whose smallest entries a
    fit multiplies by its largest B. A layer that did not come closer to its source on windows that it did not learn from, a
    tenth of `ids`, stays as it was.

    Args:
        source: the model that was compressed, with as many layers.
        ids: token ids [n, seq].
        steps: of two windows each.

    Returns:
        Of each layer, the mean squared error of its output as a part of the output's power, before and after.
    """
    attentions = [layer.self_attn for layer in model.model.layers]
    half = source.dtype.itemsize == 2
    dtype = torch.float32 if half else source.dtype
    students = [copy.deepcopy(attention).to(dtype).requires_grad_(True) for attention in attentions]
    kept = torch.arange(len(ids)) % CHECKED == 0
    checked, learnt = ids[kept], ids[~kept] if len(ids) > 1 else ids

    def visit(batch: torch.Tensor, learn: bool) -> torch.Tensor:
        """The error of each layer; with `learn`, its gradients are in the weights afterwards."""
        found = torch.zeros(len(students), dtype=dtype, device=source.device)

        def hook(attention, args, kwargs, output) -> None:
            with torch.set_grad_enabled(learn), torch.autocast(source.device.type, source.dtype, enabled=half):
                new, expected = students[attention.layer_idx](*args, **kwargs)[0].to(dtype), output[0].to(dtype)
                error = F.mse_loss(new, expected) / expected.square().mean().clamp(min=torch.finfo(dtype).tiny)
            if learn:
                error.backward()
            found[attention.layer_idx] = error.detach()

        with torch.no_grad(), attention_hooks(source, hook):
            source.model(batch, use_cache=False)
        return found

    def errors() -> list[float]:
        return (
            sum(len(batch) * visit(batch, learn=False) for batch in checked.split(WINDOWS)) / len(checked)
        ).tolist()

    by_rows = [projection for student in students for projection in (student.q_proj, student.k_b_proj)]
    for projection in by_rows:
        parametrize.register_parametrization(projection, "weight", RowSizes(projection.weight))
    matrices, others = [], []
    for student in students:
        for name, parameter in student.named_parameters():
            size = parameter.detach().square().mean().sqrt().item()
            if name in ("k_a", "v_a"):
                parameter.requires_grad_(False)
            elif parameter.dim() == 2:
                matrices.append({"params": [parameter], "lr": STEP * size / MUON_SIZE})
            else:
                others.append({"params": [parameter], "lr": STEP * size})
    optimizer = join_optimizers(others, matrices)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    generator = torch.Generator().manual_seed(seed)
    before, order = errors(), torch.empty(0, dtype=torch.long)
    with stage("reconstructing", quiet):
        for _ in tqdm(range(steps), desc="reconstructing", unit="step", disable=quiet):
            if len(order) < min(WINDOWS, len(learnt)):
                order = torch.randperm(len(learnt), generator=generator)
            visit(learnt[order[:WINDOWS]], learn=True)
            order = order[WINDOWS:]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    after = errors()
    for projection in by_rows:
        parametrize.remove_parametrizations(projection, "weight")
    for attention, student, old, new in zip(attentions, students, before, after):
        if new < old:
            attention.load_state_dict(student.state_dict())  # in the dtype of the model
    return [(old, min(old, new)) for old, new in zip(before, after)]
