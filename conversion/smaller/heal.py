"""Healing: a compressed model learns its source's predictions and hidden states (knowledge distillation)."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from modeling_t6 import T6ForCausalLM

from ..files.errors import ConversionError
from ..files.folders import last_checkpoint
from .muon import Muon
from .straight_through import rounded_rows


class Windows(Dataset):
    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index]}


class DistillationTrainer(Trainer):
    """
    The loss is KL(teacher || model), in nats per token, plus the error of the hidden states behind each layer as a part
    of their power: with it, the same number of tokens heals more than by KL alone. To these, `cross_entropy` times
    the loss on the text itself may come.
    """

    def __init__(self, *args, teacher: PreTrainedModel, cross_entropy: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.cross_entropy = teacher.to(self.args.device).eval(), cross_entropy
        self.model_accepts_loss_kwargs = False  # the loss is a mean already

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        options = {"input_ids": inputs["input_ids"], "use_cache": False, "output_hidden_states": True}
        with torch.no_grad(), self.accelerator.autocast():  # as Trainer runs the model
            expected = self.teacher(**options)
        outputs = model(**options)
        log_probs, expected_log_probs = (x.logits.log_softmax(-1, dtype=torch.float32) for x in (outputs, expected))
        ids = inputs["input_ids"]
        loss = F.kl_div(log_probs, expected_log_probs, log_target=True, reduction="sum") / ids.numel()
        errors = [
            F.mse_loss(state.float(), target.float()) / target.float().square().mean()
            for state, target in zip(outputs.hidden_states[1:], expected.hidden_states[1:])
        ]
        loss = loss + sum(errors) / len(errors)
        if self.cross_entropy > 0:
            loss = loss + self.cross_entropy * F.nll_loss(log_probs[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class Together(torch.optim.Optimizer):
    """Optimizers that are one to `Trainer`: it sees their groups of parameters, and saves their states."""

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
    return optimizers[0] if len(optimizers) == 1 else Together(*optimizers)


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


class FiniteLoss(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None and not loss < float("inf"):
            raise ConversionError(
                f"healing failed at step {state.global_step}: the loss is {loss}; lower --heal-learning-rate"
            )


def heal(
    model: T6ForCausalLM,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    folder: Path,
    steps: int,
    batch_size: int,
    accumulation: int,
    optimizer: str,
    learning_rate: float,
    cross_entropy: float,
    seed: int,
    device: str,
    callbacks: Sequence[TrainerCallback] = (),
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

    Returns:
        The number of the last step.
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
        callbacks=[FiniteLoss(), *callbacks],
        optimizers=(make_optimizer(model, optimizer, learning_rate, fused=on_gpu), None),
    )
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        print(f"healing goes on from {checkpoint.name}")
    with rounded_rows(model):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.config.use_cache = use_cache  # Trainer turns it off
    model.eval()
    return trainer.state.global_step
