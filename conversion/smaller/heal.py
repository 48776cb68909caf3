"""Healing: a compressed model learns its source's predictions and hidden states (knowledge distillation)."""

import contextlib
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput

from modeling_t6 import T6ForCausalLM

from ..files.errors import ConversionError
from ..files.folders import last_checkpoint, write_whole
from .muon import Muon
from .straight_through import rounded_rows
from .text import evenly_spaced


class Windows(Dataset):
    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index]}


# Steps from which on it is worth the time, up to a minute, that layers take to be compiled for a GPU: one by one, the operators of a
# step are thousands, most of which read and write all that they are given for a sum or a product of it.
COMPILED_STEPS = 1000
MAX_GRAPHS = 64  # of a layer that are compiled, one for each pair of ranks
# The loss is looked at after these parts of the steps, where the rate is highest. At a good rate it has risen a little by then; where
# it rises more, healing ends behind one at a lower rate, or worse than it began. So few nats may come of rounding alone.
PROBED_AT, PROBED_BATCHES = (0.05, 0.1, 0.2), 16
MAX_RISE, SMALL_RISE = 1.5, 0.02
MAX_HALVINGS = 6  # of the rate
RATE = "learning_rate"  # the file beside the checkpoints that has it, if it was lowered


def distillation_loss(
    logits: torch.Tensor,
    expected_logits: torch.Tensor,
    states: Sequence[torch.Tensor],
    expected_states: Sequence[torch.Tensor],
    ids: torch.Tensor,
    cross_entropy: float,
) -> torch.Tensor:
    """
    KL(teacher || model), in nats per token, plus the error of the hidden states behind each layer as a part of their power: with
    it, the same number of tokens heals more than by KL alone. To these, `cross_entropy` times the loss on the text itself may
    come.

    Args:
        logits, expected_logits: of model and teacher, [batch, seq, vocab].
        states, expected_states: of each layer, [batch, seq, hidden].
        ids: [batch, seq].
    """
    log_probs, expected_log_probs = (x.log_softmax(-1, dtype=torch.float32) for x in (logits, expected_logits))
    loss = F.kl_div(log_probs, expected_log_probs, log_target=True, reduction="sum") / ids.numel()
    errors = [
        F.mse_loss(state.float(), target.float()) / target.float().square().mean()
        for state, target in zip(states, expected_states)
    ]
    loss = loss + sum(errors) / len(errors)
    if cross_entropy > 0:
        loss = loss + cross_entropy * F.nll_loss(log_probs[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return loss


class DistillationTrainer(Trainer):
    """The loss is `loss_function`, by default `distillation_loss`."""

    def __init__(
        self, *args, teacher: PreTrainedModel, cross_entropy: float = 0.0, loss_function=distillation_loss, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.teacher, self.cross_entropy = teacher.to(self.args.device).eval(), cross_entropy
        self.loss_function = loss_function
        self.model_accepts_loss_kwargs = False  # the loss is a mean already

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        with torch.no_grad(), self.accelerator.autocast():  # as Trainer runs the model
            expected, expected_states = run(self.teacher, ids)
        outputs, states = run(model, ids)
        loss = self.loss_function(outputs.logits, expected.logits, states, expected_states, ids, self.cross_entropy)
        return (loss, outputs) if return_outputs else loss


def run(model: PreTrainedModel, ids: torch.Tensor) -> tuple[ModelOutput, list[torch.Tensor]]:
    """
    What a model makes of `ids` [batch, seq], and `hidden_states[1:]` of it. The hooks of Transformers that find these are within
    layers, too, which would be compiled in pieces.
    """
    states: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda *call: states.append(call[-1])) for layer in model.base_model.layers[:-1]
    ]
    handles.append(model.base_model.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state)))
    try:
        return model(ids, use_cache=False), states
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def compiled_layers(*models: PreTrainedModel, **options) -> Iterator[None]:
    """
    In the block, the layers of models are compiled, each by itself: those with the same ranks are one graph. What does not compile
    runs as it is.

    Args:
        options: of `torch.compile`.
    """
    layers = [layer for model in models for layer in model.base_model.layers]
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False, **options)  # and not its hooks
    try:
        with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS, suppress_errors=True):
            yield
    finally:
        for layer in layers:
            del layer.forward


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers as one for `Trainer`, which sees their parameter groups and saves their states."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"]):
            optimizer.load_state_dict(state)  # which makes new groups
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def join_optimizers(adamw: list[dict], muon: list[dict], fused: bool = False) -> torch.optim.Optimizer:
    """AdamW and Muon for the groups of parameters of each, of which there may be none."""
    optimizers = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, betas=(0.9, 0.95), weight_decay=0.0, fused=fused))
    if muon:
        optimizers.append(Muon(muon))
    return optimizers[0] if len(optimizers) == 1 else JointOptimizer(*optimizers)


def make_optimizer(model: PreTrainedModel, name: str, learning_rate: float, fused: bool) -> torch.optim.Optimizer:
    """
    Args:
        name: `"adamw"`, or `"muon"` for the weights of linear layers with AdamW, at a third of the rate, for the others.
        learning_rate: that of attention; the rest, which compression left as it was, has a third of it.
    """
    by_adamw, by_muon = defaultdict(list), defaultdict(list)  # parameters of each rate
    for path, parameter in model.named_parameters():
        rate = learning_rate if ".self_attn." in path else learning_rate / 3
        if name == "adamw":
            by_adamw[rate].append(parameter)
        elif path.endswith("proj.weight"):
            by_muon[rate].append(parameter)
        else:
            by_adamw[rate / 3].append(parameter)
    adamw_groups, muon_groups = (
        [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()] for by_rate in (by_adamw, by_muon)
    )
    return join_optimizers(adamw_groups, muon_groups, fused)


class LossHasRisen(ConversionError):
    """The rate of healing was too high."""


class LossMustNotRise(TrainerCallback):
    """
    Ends a training at a rate that is too high, by a `LossHasRisen`.

    Args:
        measure: the loss of the model as it is, of windows that are always the same.
    """

    def __init__(self, measure: Callable[[], float]):
        self.measure, self.before, self.at = measure, measure(), list(PROBED_AT)
        if not math.isfinite(self.before):
            raise ConversionError(f"cannot heal: the loss is {self.before} before the first step")

    def on_step_end(self, args, state, control, **kwargs):
        passed = [part for part in self.at if state.global_step >= part * state.max_steps]
        if passed:
            self.at = self.at[len(passed) :]
            self.check(state.global_step, self.measure(), max(MAX_RISE * self.before, self.before + SMALL_RISE))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.check(state.global_step, (logs or {}).get("loss", 0.0), torch.finfo(torch.float32).max)

    def check(self, step: int, loss: float, most: float) -> None:
        if not loss <= most:  # or is not a number
            raise LossHasRisen(f"the loss is {loss:.4g} at step {step}, and was {self.before:.4g} before healing")


def healed(
    load: Callable[[], T6ForCausalLM],
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    folder: Path,
    *,
    learning_rate: float,
    **options,
) -> tuple[T6ForCausalLM, int]:
    """
    A model that `load` returns, healed as by [`heal`], and the number of the last step: where the loss rises too much, from the start
    again at half the rate.

    Args:
        learning_rate: the first that is tried.
        options: of `heal`.

    Raises:
        LossHasRisen: the loss rises at the lowest of `MAX_HALVINGS` lower rates, too.
    """
    record = folder / RATE
    rate = float(record.read_text(encoding="utf-8")) if record.exists() else learning_rate
    while True:
        model = load()
        try:
            return model, heal(model, teacher, ids, folder, learning_rate=rate, **options)
        except LossHasRisen as error:
            if rate / 2 < learning_rate / 2**MAX_HALVINGS:
                raise LossHasRisen(f"at a learning rate of {rate:g} {error}: lower --heal-learning-rate") from error
            print(f"at a learning rate of {rate:g} {error}: healing begins anew at half of it", flush=True)
        del model
        rate /= 2
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_whole(record, f"{rate!r}\n")


def heal(
    model: T6ForCausalLM,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    optimizer: str,
    learning_rate: float,
    device: str,
    accumulation: int = 1,
    cross_entropy: float = 0.0,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
    compiled: bool = False,
) -> int:
    """
    Trains all weights of `model` in place, from the last checkpoint in `folder` if there is one. It reads its keys and values as
    rows of its `cache_dtype` hold them.

    Args:
        ids: token ids [n, length], in passes of random order.
        folder: of checkpoints, which stay there.
        batch_size: windows in a batch; a step takes `accumulation` of them.
        optimizer, learning_rate: see `make_optimizer`. The rate is the highest, after a warm-up of a twentieth of the
            steps; a cosine leads to zero.
        cross_entropy: the weight of the loss on the text beside that of the teacher's predictions.
        callbacks: of `Trainer`, which may end it sooner.
        compiled: whether layers and loss are compiled first.

    Returns:
        The number of the last step.

    Raises:
        LossHasRisen: the rate is too high.
    """
    on_gpu = torch.device(device).type == "cuda"
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        max_grad_norm=1.0,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        save_strategy="steps",
        save_steps=max(1, min(500, steps // 4)),
        save_total_limit=2,
        logging_steps=max(1, steps // 20),
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        remove_unused_columns=False,
        dataloader_drop_last=compiled and len(ids) >= batch_size,  # a smaller batch would be compiled again
        seed=seed,
        report_to="none",
    )
    args._n_gpu = min(1, args.n_gpu)  # the teacher is on one device: without a launcher, no DataParallel
    use_cache = model.config.use_cache
    trainer = DistillationTrainer(
        model=model,
        args=args,
        train_dataset=Windows(ids),
        teacher=teacher,
        cross_entropy=cross_entropy,
        loss_function=torch.compile(distillation_loss, dynamic=False) if compiled else distillation_loss,
        callbacks=list(callbacks),
        optimizers=(make_optimizer(model, optimizer, learning_rate, fused=on_gpu), None),
    )
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        print(f"healing goes on from {checkpoint.name}")

    # Whole batches: a smaller one would be compiled again. Of all windows, the last of which may be questions.
    count = batch_size * max(1, min(PROBED_BATCHES, len(ids) // batch_size))
    probed = evenly_spaced(ids, count).to(trainer.args.device).split(batch_size)

    def measure() -> float:
        """With gradients, which are not computed: without, layers would be compiled once more."""
        model.train()
        with trainer.accelerator.autocast():
            losses = [trainer.compute_loss(model, {"input_ids": batch}).item() for batch in probed]
        return sum(losses) / len(losses)

    with rounded_rows(model), compiled_layers(model, teacher) if compiled else contextlib.nullcontext():
        trainer.add_callback(LossMustNotRise(measure))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.config.use_cache = use_cache  # Trainer turns it off
    for name in ("forward", "_original_forward"):  # accelerate's, under autocast
        vars(model).pop(name, None)
    model.eval()
    return trainer.state.global_step
