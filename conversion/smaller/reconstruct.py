"""
Reconstruction: each compressed attention learns, by itself, the output of the one whose place it takes.

A fit mixes the heads of the source. This goes on from there: on the calibration text, the projections of a layer's attention
are trained for the output that the source's attention has for the same input (block reconstruction, as BRECQ, arXiv
2102.05426, does it for quantised blocks). No layer waits for another, so that all of them learn side by side; no logits are
needed, and the same few windows of text serve many times. Muon takes steps as large for a wide layer as for a narrow one, in
parts of its weights.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from modeling_t6 import T6ForCausalLM
from modeling_t6.cache_t6 import FactorLayout
from modeling_t6.factors_t6 import apply_rotary_pos_emb, norm_key_heads
from modeling_t6.modeling_t6 import T6Attention

from .moments import attention_hooks
from .muon import MOMENTUM, orthogonal
from .normed_heads import constant_factors
from .questions import Questions
from .stages import stage
from .straight_through import as_read


MAX_STEP = 0.02  # the longest, as a part of the root mean square of the weights that it changes
ROUNDED = 0.25  # part of it for layers whose ranks are the source's: there is but rounding to learn
WINDOWS_PER_STEP = 2  # of text in a step: many small steps are worth more than few large ones
STEPS_AHEAD = 4  # steps whose windows the source reads at once: a GPU is busy with two no longer than with eight
MIN_ERROR = 1e-4  # error below which there is nothing to learn: bfloat16 leaves a tenth of it
CHECKED = 10  # every tenth window is not learnt from, and says whether a layer is better than before
MAX_STATES = 2**29  # numbers in the states of the layers that learn side by side


class StackedWeights(nn.Module):
    """
    The same weight of several layers, [layers, out, in]: fixed sizes times parameters of about one.

    Args:
        by_rows: the sizes are of rows, not of whole weights. In queries and keys of a fit, some features are a thousand times as
            large as others, and a step that is small beside those would be the end of these.
    """

    def __init__(self, weights: torch.Tensor, by_rows: bool = False):
        super().__init__()
        kept = -1 if by_rows else tuple(range(1, weights.dim()))
        size = weights.square().mean(kept, keepdim=True).sqrt()
        least = 1e-6 * size.amax(tuple(range(1, size.dim())), keepdim=True)
        self.register_buffer("size", size.maximum(least).clamp(min=torch.finfo(size.dtype).tiny))
        self.numbers = nn.Parameter(weights / self.size)

    def forward(self) -> torch.Tensor:
        return self.size * self.numbers


class StackedAttentions(nn.Module):
    """
    The attentions of several layers as one module: from states [layers, batch, seq, hidden] to outputs of that shape. A is constant but for the
    norm of heads. Layers of a lower rank than others are padded with zeros, which stay. Keys and values are read as rows of the model's
    `cache_dtype` hold them.

    Args:
        sources: the attentions that these take the place of.
    """

    def __init__(self, attentions: list[T6Attention], sources: list[T6Attention], dtype: torch.dtype):
        super().__init__()
        whole = [(new.k_rank, new.v_rank) == (old.k_rank, old.v_rank) for new, old in zip(attentions, sources)]
        rates = torch.where(torch.tensor(whole), ROUNDED, 1.0)
        self.register_buffer(
            "rates", rates.to(attentions[0].q_proj.weight.device, dtype)[:, None, None], persistent=False
        )
        first = self.first = attentions[0]
        self.head_dim, self.scaling = first.head_dim, first.scaling
        self.cache_dtype = first.config.cache_dtype
        self.layouts = ()
        for side in "kv":  # A / R, whose smallest entries a fit multiplies by its largest B
            factors = [constant_factors(attention, side).to(dtype) for attention in attentions]
            rank = max(map(len, factors))
            stacked = torch.stack([F.pad(a / len(a), (0, 0, 0, rank - len(a))) for a in factors])
            self.register_buffer(f"{side}_a", stacked)
            ranks = torch.tensor([len(a) for a in factors]).to(stacked)
            self.register_buffer(f"{side}_ranks", ranks[:, None, None, None])
            self.layouts += (FactorLayout(rank, first.key_layout.num_heads, self.head_dim),)
        self.weights = nn.ModuleDict()
        for name, tensor in first.state_dict().items():
            if name.startswith(("k_a", "v_a")):
                continue
            all_tensors = [attention.state_dict()[name].to(dtype) for attention in attentions]
            rows = max(len(tensor) for tensor in all_tensors)
            stacked = torch.stack([F.pad(x.T, (0, rows - len(x))).T if x.dim() > 1 else F.pad(x, (0, rows - len(x)))
                                   for x in all_tensors])  # fmt: skip
            if "norm" in name:
                self.register_buffer(name.replace(".", "_"), stacked)
            else:
                by_rows = name in ("q_proj.weight", "k_b_proj.weight")
                self.weights[name.replace(".", "_")] = StackedWeights(stacked, by_rows)

    def _project(self, name: str, states: torch.Tensor) -> torch.Tensor:
        result = states.flatten(1, 2) @ self.weights[f"{name}_weight"]().mT
        if f"{name}_bias" in self.weights:
            result = result + self.weights[f"{name}_bias"]()[:, None]
        return result.unflatten(1, states.shape[1:3])

    def _heads(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return self._project(name, states).unflatten(-1, (-1, self.head_dim))

    def _norm(self, name: str, heads: torch.Tensor) -> torch.Tensor:
        weight = getattr(self, f"{name}_weight")[:, None, None, None]
        return F.rms_norm(heads, (self.head_dim,), eps=getattr(self.first, name).variance_epsilon) * weight

    def _form(self, index: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Keys (`index` 0) or values (1), [layers, batch, h, seq, d], of A / R [layers, R, h], or of each token's [..., seq, R, h_kv]."""
        is_constant = self.layouts[index].num_heads == 0
        if self.cache_dtype is not None:
            ranks = self.v_ranks if index else self.k_ranks
            rows = None if is_constant else (a * ranks[..., None]).flatten(0, 1)
            rows, read = as_read(rows, b.flatten(0, 1), self.layouts, index, self.cache_dtype)
            a, b = (
                a if is_constant else rows.unflatten(0, b.shape[:2]) / ranks[..., None],
                read.unflatten(0, b.shape[:2]),
            )
        if is_constant:
            return torch.einsum("lrh,lbsrd->lbhsd", a, b)
        return torch.einsum("lbsrh,lbsrd->lbhsd", a, b).repeat_interleave(self.first.num_key_value_groups, dim=2)

    def forward(self, states: torch.Tensor, rotation, mask: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            rotation: cos and sin [batch or 1, seq, rotary_dim].
            mask: [layers, batch or 1, 1, seq, seq], or `None` for that of a text.
        """
        query, key, value = (self._heads(name, states) for name in ("q_proj", "k_b_proj", "v_b_proj"))
        k_a, v_a = self.k_a, self.v_a
        if self.first.qk_norm:
            query = self._norm("q_norm", query)
        if self.first.qk_norm == "heads":
            rank, weight = key.shape[-2], self.k_norm_weight[:, None, None, None]
            k_a, key = norm_key_heads(k_a[:, None, None] * rank, key, weight, self.first.k_norm.variance_epsilon)
            k_a, v_a = k_a / rank, v_a[:, None, None].expand(*value.shape[:-1], -1)
        elif self.first.qk_norm:
            key = self._norm("k_norm", key)
        query, key = (apply_rotary_pos_emb(x, *rotation) for x in (query, key))
        key, value = self._form(0, k_a, key), self._form(1, v_a, value)
        query, key, value = (x.flatten(0, 1) for x in (query.transpose(2, 3), key, value))
        mask = None if mask is None else mask.expand(-1, states.shape[1], -1, -1, -1).flatten(0, 1)
        output = F.scaled_dot_product_attention(
            query,
            key.to(query.dtype),
            value.to(query.dtype),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scaling,
        )
        return self._project("o_proj", output.transpose(1, 2).flatten(2).unflatten(0, states.shape[:2]))

    def copy_to(self, attention: T6Attention, index: int) -> None:
        """Puts the weights of layer `index` into `attention`."""
        for name, parameter in attention.named_parameters():
            if (key := name.replace(".", "_")) in self.weights:
                parameter.data.copy_(self.weights[key]()[index][: len(parameter)])


class MuonAndAdamW:
    """Muon for matrices, AdamW for biases, in steps that are the same fraction of all weights."""

    def __init__(self, students: list[StackedAttentions], count: int):
        parameters = [(parameter, student.rates) for student in students for parameter in student.parameters()]
        self.matrices = [(*pair, torch.zeros_like(pair[0])) for pair in parameters if pair[0].dim() == 3]
        biases = [parameter for parameter, _ in parameters if parameter.dim() == 2]
        self.adam = torch.optim.AdamW(biases, betas=(0.9, 0.95), weight_decay=0.0) if biases else None
        self.done, self.count = 0, count

    @property
    def size(self) -> float:
        """Size of the next step: a linear warm-up, then half a cosine."""
        warmup = max(1, self.count // 20)
        if self.done < warmup:
            return MAX_STEP * self.done / warmup
        return MAX_STEP * 0.5 * (1 + math.cos(math.pi * (self.done - warmup) / max(1, self.count - warmup)))

    @torch.no_grad()
    def step(self) -> None:
        for parameter, rates, momentum in self.matrices:
            momentum.lerp_(parameter.grad, 1 - MOMENTUM)
            update = orthogonal(parameter.grad.lerp(momentum, MOMENTUM))
            parameter.addcmul_(update, rates, value=-self.size * max(parameter.shape[1:]) ** 0.5)
            parameter.grad = None
        if self.adam is not None:
            self.adam.param_groups[0]["lr"] = self.size
            self.adam.step()
            self.adam.zero_grad()
        self.done += 1


def stack_masks(masks: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Masks of some layers, [layers, batch or 1, 1, seq, seq], or `None` if none has one; bool, or to be added to scores."""
    others = [mask for mask in masks if mask is not None]
    if not others:
        return None
    seen = torch.ones_like(others[0], dtype=torch.bool).tril()
    if others[0].dtype != torch.bool:
        seen = torch.zeros_like(others[0]).masked_fill(~seen, torch.finfo(others[0].dtype).min)
    return torch.stack([seen if mask is None else mask for mask in masks])


class ShuffledBatches:
    """Indices of `batch` of `count` windows, shuffled anew for each pass."""

    def __init__(self, count: int, batch: int, generator: torch.Generator):
        self.count, self.batch, self.generator = count, min(batch, count), generator
        self.order = torch.empty(0, dtype=torch.long)

    def next(self) -> torch.Tensor:
        if len(self.order) < self.batch:
            self.order = torch.randperm(self.count, generator=self.generator)
        indices, self.order = self.order[: self.batch], self.order[self.batch :]
        return indices


class Targets(NamedTuple):
    """
    What the attentions of some layers of the source read of a batch of windows, and what they make of it.

    Attributes:
        states, outputs: [layers, batch, seq, hidden].
        rotation: cos and sin [batch or 1, seq, rotary_dim].
        mask: [layers, batch or 1, 1, seq, seq], or `None` for that of a text.
    """

    states: torch.Tensor
    outputs: torch.Tensor
    rotation: list[torch.Tensor]
    mask: torch.Tensor | None

    def of_windows(self, windows: slice) -> "Targets":
        rotation = [x if len(x) == 1 else x[windows] for x in self.rotation]
        mask = self.mask if self.mask is None or self.mask.shape[1] == 1 else self.mask[:, windows]
        return Targets(self.states[:, windows], self.outputs[:, windows], rotation, mask)


class Students:
    """
    The attentions of all layers of a model, which learn the outputs of its source's: in groups of layers, many at once.

    Args:
        tokens: of a step.
    """

    def __init__(self, model: T6ForCausalLM, source: T6ForCausalLM, tokens: int):
        self.source = source
        self.attentions = [layer.self_attn for layer in model.model.layers]
        is_half, self.on_gpu = source.dtype.itemsize == 2, source.device.type == "cuda"
        self.autocast_dtype, self.uses_autocast = source.dtype if is_half else torch.bfloat16, is_half or self.on_gpu
        self.dtype = torch.float32 if is_half else source.dtype  # of what learns
        count, layers = max(1, MAX_STATES // (tokens * 6 * model.config.hidden_size)), len(self.attentions)
        self.groups = [range(start, min(start + count, layers)) for start in range(0, layers, count)]
        originals = [layer.self_attn for layer in source.model.layers]
        self.students = [
            StackedAttentions(
                self.attentions[group.start : group.stop], originals[group.start : group.stop], self.dtype
            )
            for group in self.groups
        ]

    def targets(self, ids: torch.Tensor) -> list[Targets]:
        """Of each group, what the source reads and makes of the windows `ids` [batch, seq]."""
        states, outputs, masks, rotations = [], [], [], []

        def hook(attention, args, kwargs, output) -> None:
            states.append(args[0])
            outputs.append(output[0])
            masks.append(kwargs["attention_mask"])
            rotations.append(kwargs["position_embeddings"])

        autocast = torch.autocast("cuda", self.autocast_dtype, enabled=self.on_gpu)
        with torch.no_grad(), attention_hooks(self.source, hook), autocast:
            self.source.model(ids, use_cache=False)
        return [
            Targets(
                torch.stack(states[part]), torch.stack(outputs[part]), rotations[part.start], stack_masks(masks[part])
            )
            for part in (slice(group.start, group.stop) for group in self.groups)
        ]

    def errors(self, targets: list[Targets], weights: torch.Tensor, learn: bool = False) -> torch.Tensor:
        """The error of each layer, tokens counting by `weights` [batch, seq]; with `learn`, its gradients are in the parameters afterwards."""
        errors = []
        for (states, outputs, rotation, mask), student in zip(targets, self.students):
            autocast = torch.autocast(self.source.device.type, self.autocast_dtype, enabled=self.uses_autocast)
            with torch.set_grad_enabled(learn), autocast:
                new = student(states, rotation, mask)
            with torch.set_grad_enabled(learn):
                expected = outputs.to(self.dtype)
                power = (weights * expected.square().mean(-1)).sum((1, 2)).clamp(min=torch.finfo(self.dtype).tiny)
                error = (weights * (new.to(self.dtype) - expected).square().mean(-1)).sum((1, 2)) / power
                if learn:
                    error.sum().backward()
            errors.append(error.detach())
        return torch.cat(errors)

    def mean_errors(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
        """Of each layer, over batches of windows and weights."""
        total = sum(ids.numel() for ids, _ in batches)
        errors = (ids.numel() * self.errors(self.targets(ids), weights) for ids, weights in batches)
        return (sum(errors) / total).tolist()

    @torch.no_grad()
    def copy_layers(self, is_better: list[bool]) -> None:
        """Puts what some layers have learnt into the model."""
        for group, student in zip(self.groups, self.students):
            for layer in group:
                if is_better[layer]:
                    student.copy_to(self.attentions[layer], layer - group.start)


def reconstruct(
    model: T6ForCausalLM,
    source: T6ForCausalLM,
    ids: torch.Tensor,
    steps: int,
    seed: int = 0,
    quiet: bool = False,
    questions: Questions | None = None,
) -> list[tuple[float, float]]:
    """
    Trains the projections of the attention of each layer of `model`, in place; the constant A stay. A layer that did not come
    closer to its source on windows that it did not learn from, a tenth of them, stays as it was.

    Args:
        source: the model that was compressed, with as many layers.
        ids: token ids [n, seq].
        steps: of two windows each or, in turn with them, of as many tokens of `questions`.
        questions: windows in which the tokens that are answered with weigh as much as all others.

    Returns:
        Of each layer, the mean squared error of its output as a part of the output's power, before and after.
    """
    tokens = WINDOWS_PER_STEP * ids.shape[1]
    students = Students(model, source, tokens)
    texts = [(ids, torch.ones_like(ids, dtype=students.dtype))]
    if questions is not None:
        # An answer's token is predicted at the one before it.
        asked = questions.asked.roll(-1, 1).to(students.dtype)
        texts.append((questions.ids, 1 + asked * (asked.numel() / asked.sum().clamp(min=1))))
    checked, learnt = [], []
    for windows, weights in texts:
        is_checked = torch.arange(len(windows)) % CHECKED == 0
        batch = max(1, tokens // windows.shape[1])
        checked += zip(windows[is_checked].split(batch), weights[is_checked].split(batch))
        learnt.append((windows[~is_checked], weights[~is_checked]) if len(windows) > 1 else (windows, weights))

    before = students.mean_errors(checked)
    optimizer = MuonAndAdamW(students.students, steps)
    generator = torch.Generator().manual_seed(seed)
    orders = [ShuffledBatches(len(windows), max(1, tokens // windows.shape[1]), generator) for windows, _ in learnt]
    waiting: list[list[tuple[list[Targets], torch.Tensor]]] = [[] for _ in learnt]  # steps whose targets are known
    with stage("reconstructing", quiet):
        for index in tqdm(range(steps), desc="reconstructing", unit="step", disable=quiet):
            kind = index % len(learnt)
            if not waiting[kind]:
                batches = [orders[kind].next() for _ in range(STEPS_AHEAD)]
                places, (windows, weights) = torch.cat(batches).to(ids.device), learnt[kind]
                targets, weights, end = students.targets(windows[places]), weights[places], 0
                for batch in batches:
                    start, end = end, end + len(batch)
                    part = slice(start, end)
                    waiting[kind].append(([group.of_windows(part) for group in targets], weights[part]))
            students.errors(*waiting[kind].pop(0), learn=True)
            optimizer.step()
    after = students.mean_errors(checked)
    students.copy_layers([old > MIN_ERROR and new < old for old, new in zip(before, after)])
    return [(old, min(old, new) if old > MIN_ERROR else old) for old, new in zip(before, after)]
