"""Tokens per second and FLOP utilisation of a training run, in `Trainer`'s logs and in a log file."""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, Trainer, TrainerCallback


# Dense bf16 products of one device by its vendor's data sheet, in FLOP/s; the first name that matches counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


def training_flops(config: PreTrainedConfig, block_length: int) -> float:
    """
    Operations of one training token: thrice those of the forward pass's matrix products, attention over the whole square
    of positions (the usual convention, PaLM's appendix B). Recomputed activations do not count.
    """
    config = copy.deepcopy(config)  # a model of the caller's would attend as the one that is counted does
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        # A mask that is made already: making one reads numbers, which meta tensors do not have.
        mask = torch.zeros(1, 1, block_length, block_length)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, block_length, dtype=torch.long), attention_mask=mask, use_cache=False)
    return 3 * counter.get_total_flops() / block_length


def peak_flops(args: argparse.Namespace) -> float | None:
    """Of one device; `None` if it is not known."""
    if args.peak_tflops:
        return 1e12 * args.peak_tflops
    name = torch.cuda.get_device_name() if torch.cuda.is_available() and not args.cpu else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


class PackedTrainer(Trainer):
    """`Trainer` on windows that come in order already, with throughput in its logs and a log file of its own."""

    def __init__(self, *args, flops_per_token: float, peak: float | None, tokens_per_step: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_file = Path(self.args.output_dir) / "log.jsonl"
        self.flops_per_token, self.peak, self.tokens_per_step = flops_per_token, peak, tokens_per_step
        self.start_clock()

    def start_clock(self) -> None:
        self.clock, self.clock_step = time.perf_counter(), self.state.global_step

    def get_train_dataloader(self) -> DataLoader:
        # No workers: the state of the data is then that of the batches which the model has seen.
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            drop_last=True,
        )

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with torch.compiler.set_stance("force_eager"):  # its batches are of other sizes, for which nothing is compiled
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The first step compiles and tunes: it does not count.
        steps, seconds = self.state.global_step - self.clock_step, time.perf_counter() - self.clock
        if "loss" in logs:
            logs["tokens"] = self.state.global_step * self.tokens_per_step
            if steps > 0:
                speed = steps * self.tokens_per_step / seconds
                logs["tokens_per_second"], logs["step_seconds"] = speed, seconds / steps
                if self.peak:
                    logs["mfu"] = speed * self.flops_per_token / self.peak / self.args.world_size
            if torch.cuda.is_available() and not self.args.use_cpu:
                logs["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        logs.pop("eval_loss", None)  # a mean over batches, the last of which is smaller; ours is over tokens
        super().log(logs, start_time)
        if self.is_world_process_zero() and ("loss" in logs or "eval_loss_per_token" in logs):
            with self.log_file.open("a") as file:
                file.write(json.dumps({"step": self.state.global_step, **logs}) + "\n")


class Clock(TrainerCallback):
    """Throughput is that of training steps: the clock starts again after all that is not one."""

    trainer: PackedTrainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.first_step:
            self.first_step = False
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.trainer.start_clock()

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = True

    def on_log(self, args, state, control, **kwargs):
        self.trainer.start_clock()

    on_evaluate = on_save = on_log
