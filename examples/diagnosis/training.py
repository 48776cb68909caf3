"""A run of the diagnosis, and the process of several that does it."""

import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import captured
from ablations import Configurations, ablations, part_of
from configuration.make_configs import cache_numbers

from .attention import COPIED, measured


HELD_OUT_WINDOWS = 64  # evenly spaced in the held-out text


class Run(NamedTuple):
    variant: str
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.variant} lr {self.learning_rate:g} seed {self.seed}"


def norms(tensors: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """Of each part, the root of the mean square."""
    total = {part: sum(x.float().square().sum() for x in of) for part, of in tensors.items()}
    return {part: (total[part] / sum(x.numel() for x in of)).sqrt().item() for part, of in tensors.items()}


class Training(captured.CapturedTraining):
    """A run that is measured as it goes."""

    def __init__(self, run: Run, configurations: Configurations, tokens: dict[str, torch.Tensor]):
        self.start = time.monotonic()
        settings, tokenizer = configurations.settings, configurations.tokenizer
        steps, length = settings["max_steps"], settings["block_length"]
        super().__init__(ablations()[run.variant], configurations, run, steps, tokens["train"], length, "measured")
        self.held_out = captured.evenly_spaced(tokens["held_out"], length, length, HELD_OUT_WINDOWS)
        generator = torch.Generator().manual_seed(0)
        random = torch.randint(len(tokenizer) // 2, len(tokenizer), (16, COPIED), generator=generator)
        self.copied = random.repeat(1, 2).to(self.device)
        self.parts = {}
        for name, parameter in self.model.named_parameters():
            self.parts.setdefault(part_of(name), []).append(parameter)

    def losses(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, seq - 1], in nats."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_on_gpu):
            logits = self.model(ids[:, :-1]).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")

    def loss_of(self, ids: torch.Tensor) -> torch.Tensor:
        return self.losses(ids).mean()

    @torch.no_grad()
    def evaluate(self) -> dict:
        self.model.eval()
        held_out = self.losses(self.held_out).mean()
        copying = self.losses(self.copied).view(len(self.copied), -1)
        self.model.train()
        # The first tokens of the second half have little before them that says where they are copied from.
        first, second = copying[:, 8 : COPIED - 1].mean(), copying[:, COPIED + 8 :].mean()
        return {"loss": held_out.item(), "new": first.item(), "copied": second.item()}

    @torch.no_grad()
    def measure(self) -> dict:
        """What `MeasuredAttention` sees, of held-out text, and of the attention to what is copied, in copied text."""
        numbers = {}
        for name, ids in (("text", self.held_out[:4]), ("copied", self.copied)):
            measured.layers = []
            self.losses(ids)
            layers, measured.layers = measured.layers, None
            if name == "text":
                numbers = {field: [layer[field] for layer in layers] for field in layers[0] if field != "to_copied"}
            else:
                numbers["to_copied"] = [layer["to_copied"] for layer in layers]
        return numbers

    def train(self) -> dict:
        """Returns what the results have of a run."""
        settings, ready = self.settings, time.monotonic()
        curve, changes, looks, training = [], [], [], []
        for index in range(settings["max_steps"]):
            if index % settings["eval_steps"] == 0:
                curve.append({"step": index, **self.evaluate()})
            if is_measured := index % settings["measure_steps"] == 0:
                looks.append({"step": index, **self.measure()})
                before = {part: [x.detach().clone() for x in of] for part, of in self.parts.items()}
            self.load(index)
            self.take_step()
            if is_measured:
                moved = {p: [x.detach() - y for x, y in zip(self.parts[p], of)] for p, of in before.items()}
                gradients = {part: [x.grad for x in of] for part, of in self.parts.items()}
                for name, of in (("gradient", gradients), ("update", moved), ("weight", before)):
                    rounded = {part: float(f"{value:.3g}") for part, value in norms(of).items()}
                    changes.append({"step": index, "of": name, **rounded})
                training.append(round(self.loss.item(), 4))
        curve.append({"step": settings["max_steps"], **self.evaluate()})
        looks.append({"step": settings["max_steps"], **self.measure()})
        embedding = self.model.get_input_embeddings().weight.numel()
        return {
            "variant": self.run.variant,
            "learning_rate": self.run.learning_rate,
            "seed": self.run.seed,
            "loss": curve[-1]["loss"],
            "parameters": self.model.num_parameters() - embedding,
            "heads": self.config.num_attention_heads,
            "key_value_heads": self.config.num_key_value_heads,
            "cache_bytes_per_token": 2 * cache_numbers(self.config)[1],
            "seconds": round(time.monotonic() - self.start, 2),
            "ms_per_step": round(1e3 * (time.monotonic() - ready) / settings["max_steps"], 3),
            "graphs": self.is_captured,
            "curve": [{name: round(value, 4) for name, value in entry.items()} for entry in curve],
            "looks": looks,
            "norms": changes,
            "training": training,
        }


class Worker(captured.Worker):
    """One of several that train at once: the models are too small for a GPU of their own."""

    def __init__(self, data: Path, settings: dict, may_capture: bool, device, turn):
        super().__init__(data, settings, False, may_capture, device)
        torch.set_num_threads(1)

    def new_training(self, run: Run, is_compiled: bool) -> Training:
        return Training(run, self.configurations, self.tokens)

    def do(self, run: Run) -> dict:
        return self.prepared(run).train()
