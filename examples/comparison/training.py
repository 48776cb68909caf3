"""A run of the comparison, and the process of several that does it."""

import math
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import captured
from ablations import Configurations
from configuration.make_configs import cache_numbers
from pretraining_data import held_out_of_kinds, open_prepared

from .plan import Run, models


HELD_OUT_WINDOWS = 160  # of each kind of text, at the end; a quarter of them on the way
TRIAL_STEPS = 20  # by which a run is judged first whether it ends in time
GRACE = 10.0  # seconds: a run that would end so late after the deadline goes on


AttentionInterface.register("causal", sdpa_attention_forward)
AttentionMaskInterface.register("causal", lambda *args, **kwargs: None)  # windows are full: causal, and nothing else


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[tokens], in nats."""
    logits = nn.functional.linear(hidden, weight).float()
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def held_out_windows(folder: Path, tokens: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
    """Windows [number, length + 1] of each kind of text, which `prepare.py` writes one after the other, evenly spaced."""
    _, facts = open_prepared(folder)
    windows = {}
    for kind, of_kind in held_out_of_kinds(folder, facts, tokens).items():
        if len(of_kind) > length:
            windows[kind] = captured.evenly_spaced(of_kind, length + 1, length, HELD_OUT_WINDOWS)
    return windows


class Training(captured.CapturedTraining):
    """A run, in bfloat16 where the device is a GPU; layers, norm and loss may be compiled."""

    def __init__(
        self,
        run: Run,
        configurations: Configurations,
        tokens: torch.Tensor,
        held_out: dict[str, torch.Tensor],
        is_compiled: bool,
    ):
        ablation, window = models(configurations.settings)[run.model], configurations.settings["block_length"] + 1
        super().__init__(ablation, configurations, run, run.steps, tokens, window, "causal")
        self.held_out, self.head_loss, self.is_compiled = held_out, head_loss, is_compiled
        if is_compiled:
            torch._dynamo.reset()
            for module in (*self.model.model.layers, self.model.model.norm):
                module.compile(dynamic=False)
            self.head_loss = torch.compile(head_loss, dynamic=False)

    def losses(self, ids: torch.Tensor, loss_of_hidden=head_loss) -> torch.Tensor:
        """Of windows [batch, length + 1], [batch * length], in nats."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_on_gpu):
            hidden = self.model.model(ids[:, :-1]).last_hidden_state
            return loss_of_hidden(hidden.flatten(0, 1), self.model.lm_head.weight, ids[:, 1:].flatten())

    def loss_of(self, ids: torch.Tensor) -> torch.Tensor:
        return self.losses(ids, self.head_loss).mean()

    @torch.no_grad()
    def evaluate(self, every: int = 1) -> dict[str, float]:
        """The mean loss of each kind of text, of one in `every` window, and by its tokens of all. Nothing is compiled for it."""
        of_kind, size = {}, max(1, min(32, self.settings["sequences_per_step"]))
        with torch.compiler.set_stance("force_eager"):
            for kind, windows in self.held_out.items():
                parts = [self.losses(part).double().sum() for part in windows[::every].split(size)]
                of_kind[kind] = torch.stack(parts).sum(), windows[::every, 1:].numel()
        total = sum(nats for nats, _ in of_kind.values()) / sum(count for _, count in of_kind.values())
        found = {"loss": total} | {kind: nats / count for kind, (nats, count) in of_kind.items()}
        return {name: round(value.item(), 5) for name, value in found.items()}

    def train(self, deadline: float, checkpoint: Path) -> dict | None:
        """
        Returns what the results have of a run, or `None` if it would end after the deadline: at once where its first steps show that,
        else with a checkpoint, which a later call goes on from.
        """
        started, index, curve, times = time.monotonic(), 0, [], []
        steps, eval_steps = self.run.steps, self.settings["eval_steps"]
        if checkpoint.exists():
            index, curve, spent, state = torch.load(checkpoint, map_location=self.device, weights_only=True)
            started -= spent
            with torch.no_grad():
                for old, new in zip(self.state(), state, strict=True):
                    old.copy_(new)
        first = index
        while index < steps:
            end = min((index // eval_steps + 1) * eval_steps, first + TRIAL_STEPS if index == first else steps, steps)
            began, before = time.monotonic(), index
            while index < end:
                self.load(index)
                self.take_step()
                index += 1
            if not math.isfinite(self.loss.item()):
                raise RuntimeError(f"the loss is {self.loss.item()} at step {index}")
            times.append((time.monotonic() - began) / (index - before))
            if index % eval_steps == 0 and index < steps:
                curve.append({"step": index, **self.evaluate(every=4)})
            ends_at = time.time() + statistics.median(times) * (steps - index)
            if index == steps or ends_at <= deadline + GRACE:
                continue
            if len(times) == 1:
                return None
            if time.time() >= deadline:  # until then it may yet be faster
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                partial = checkpoint.with_suffix(".partial")
                torch.save((index, curve, time.monotonic() - started, self.state()), partial)
                partial.replace(checkpoint)
                return None
        checkpoint.unlink(missing_ok=True)
        curve.append({"step": steps, **self.evaluate(every=4)})
        # The process beside this one compiles now and then, and slows it.
        return self.result(curve, min(times[1:] or times), started)

    def result(self, curve: list[dict], seconds: float, started: float) -> dict:
        """What the results have of a run, of `seconds` a step, that `started` as `time.monotonic()`."""
        final, steps = self.evaluate(), self.run.steps
        embedding = self.model.get_input_embeddings().weight.numel()
        tokens_per_step = self.settings["block_length"] * self.settings["sequences_per_step"]
        return {
            "name": self.run.model,
            "learning_rate": self.run.learning_rate,
            "seed": self.run.seed,
            "steps": steps,
            "tokens": steps * tokens_per_step,
            "loss": final.pop("loss"),
            "loss_by_kind": final,
            "non_embedding_parameters": self.model.num_parameters() - embedding,
            "heads": self.config.num_attention_heads,
            "key_value_heads": self.config.num_key_value_heads,
            "intermediate_size": self.config.intermediate_size,
            "cache_bytes_per_token": 2 * cache_numbers(self.config)[1],
            "ms_per_step": round(1e3 * seconds, 3),
            "tokens_per_second": round(tokens_per_step / seconds),
            "seconds": round(time.monotonic() - started, 2),
            "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.is_on_gpu else None,
            "is_compiled": self.is_compiled,
            "is_captured": self.is_captured,
            "device": torch.cuda.get_device_name() if self.is_on_gpu else "cpu",
            "gpu": str(torch.cuda.get_device_properties().uuid) if self.is_on_gpu else None,
            "torch": torch.__version__,
            "curve": curve,
        }


def checkpoint_of(run: Run, folder: Path) -> Path:
    return folder / f"{run.key.replace(' ', '-').replace(',', '')}.pt"


class Worker(captured.Worker):
    """One of two of a GPU: the next run is compiled while the other's has its turn."""

    def __init__(
        self, data: Path, settings: dict, may_compile: bool, checkpoints: Path, deadline: float, device, turn
    ):
        super().__init__(data, settings, may_compile, True, device)
        self.checkpoints, self.deadline, self.turn = checkpoints, deadline, turn
        torch.set_float32_matmul_precision("high")
        self.windows = held_out_windows(data, self.tokens["held_out"], settings["block_length"])

    def new_training(self, run: Run, is_compiled: bool) -> Training:
        return Training(run, self.configurations, self.tokens["train"], self.windows, is_compiled)

    def do(self, run: Run) -> dict | None:
        training = self.prepared(run)
        with self.turn:  # so that times are those of one run alone
            return training.train(self.deadline, checkpoint_of(run, self.checkpoints))
