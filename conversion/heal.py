"""Healing: a compressed model learns its source's predictions (knowledge distillation, KL on logits)."""

from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from .errors import ConversionError


class Windows(Dataset):
    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index]}


class DistillationTrainer(Trainer):
    """The loss is KL(teacher || model), in nats per token."""

    def __init__(self, *args, teacher: PreTrainedModel, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        self.model_accepts_loss_kwargs = False  # the loss is a mean already

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        with torch.no_grad():
            expected = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits.float().log_softmax(-1)
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        log_probs = outputs.logits.float().log_softmax(-1)
        loss = F.kl_div(log_probs, expected, log_target=True, reduction="sum") / inputs["input_ids"].numel()
        return (loss, outputs) if return_outputs else loss


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint: `trainer_state.json` is the file that `Trainer` writes last."""
    checkpoints = {
        int(path.parent.name.split("-")[1]): path.parent for path in folder.glob("checkpoint-*/trainer_state.json")
    }
    return checkpoints[max(checkpoints)] if checkpoints else None


class FiniteLoss(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None and not loss < float("inf"):
            raise ConversionError(
                f"healing failed at step {state.global_step}: the loss is {loss}; lower --heal-learning-rate"
            )


def heal(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    folder: Path,
    steps: int,
    batch_size: int,
    accumulation: int,
    learning_rate: float,
    seed: int,
    device: str,
) -> list[dict]:
    """
    Trains all weights of `model` in place, from the last checkpoint in `folder` if there is one.

    Args:
        ids: token ids [n, length], in passes of random order.
        folder: of checkpoints, which stay there.
        batch_size: windows in a batch; a step takes `accumulation` of them.
        learning_rate: the highest, after a warm-up of a twentieth of the steps; a cosine leads to a tenth of it.

    Returns:
        `Trainer`'s log.
    """
    on_gpu = device == "cuda"
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, steps // 20),
        weight_decay=0.0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        save_strategy="steps",
        save_steps=max(1, min(500, steps // 4)),
        save_total_limit=2,
        logging_steps=max(1, steps // 20),
        remove_unused_columns=False,
        seed=seed,
        report_to="none",
    )
    args._n_gpu = min(1, args.n_gpu)  # the teacher is on one device: without a launcher, no DataParallel
    use_cache = model.config.use_cache
    trainer = DistillationTrainer(
        model=model, args=args, train_dataset=Windows(ids), teacher=teacher, callbacks=[FiniteLoss()]
    )
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        print(f"healing goes on from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.config.use_cache = use_cache  # Trainer turns it off
    model.eval()
    return trainer.state.log_history
