# Copyright 2026 The T6 for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Training of small models with almost no work on the host: a step is captured as a CUDA graph, and the tokens lie on the device.
"""

import contextlib
import itertools
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

import ablations
from conversion.smaller import text
from pretraining_data import open_prepared


WEIGHT_DECAY = 0.1


def read_tokens(folder: Path, device: torch.device) -> tuple[PreTrainedTokenizerBase, dict[str, torch.Tensor]]:
    tokenizer, facts = open_prepared(folder)
    tokens = {}
    for name in ("train", "held_out"):
        numbers = np.fromfile(folder / f"{name}.bin", dtype=facts["dtype"])
        tokens[name] = torch.from_numpy(numbers.astype("int32")).to(device)
    return tokenizer, tokens


def batch_starts(num_tokens: int, settings: dict, seed: int) -> torch.Tensor:
    """
    Where the windows of each step begin, [steps, sequences]: passes over the text, each shuffled and cut at other places. Windows may be
    one token longer than `block_length`.
    """
    length, needed = settings["block_length"], settings["max_steps"] * settings["sequences_per_step"]
    generator, starts = torch.Generator().manual_seed(seed), []
    while sum(map(len, starts)) < needed:
        windows = num_tokens // length - 1
        offset = torch.randint(num_tokens - windows * length, (1,), generator=generator)
        starts.append(offset + length * torch.randperm(windows, generator=generator))
    return torch.cat(starts)[:needed].view(settings["max_steps"], -1)


def evenly_spaced(tokens: torch.Tensor, window: int, stride: int, number: int) -> torch.Tensor:
    """Of the windows [n, window] that begin every `stride` tokens, `number` that are evenly spaced, or all if there are fewer."""
    return text.evenly_spaced(tokens.unfold(0, window, stride), number).long()


class CapturedTraining:
    """
    One run on one device. Subclasses define `loss_of`: the mean loss, in nats, of token ids [sequences, window].

    Args:
        ablation: the model.
        run: has the `learning_rate`, which `ablation` may scale for some parameters, and the `seed` of the weights.
        steps: of the run; other settings are those of `configurations`.
        tokens: the training text, from which windows of `window` tokens are taken.
        attention: the attention function of Transformers.
    """

    def __init__(
        self,
        ablation: ablations.Ablation,
        configurations: ablations.Configurations,
        run: NamedTuple,
        steps: int,
        tokens: torch.Tensor,
        window: int,
        attention: str,
    ):
        self.settings, self.config = configurations.settings | {"max_steps": steps}, configurations.of(ablation)
        self.run, self.tokens, self.device = run, tokens, tokens.device
        self.is_on_gpu = self.device.type == "cuda"
        torch.manual_seed(run.seed)
        self.model = ablations.make_model(ablation, self.config, attention).to(self.device).train()
        self.model.config.use_cache = False
        self.optimizer = ablations.make_optimizer(ablation, self.model, run.learning_rate, WEIGHT_DECAY)
        self.warmup = max(1, round(self.settings["warmup_steps"] * ablation.warmup))
        self.starts = batch_starts(len(tokens), self.settings, 0).to(self.device)
        self.places = torch.arange(window, device=self.device)
        self.batch = torch.zeros(self.starts.shape[1], window, dtype=torch.long, device=self.device)
        self.loss = torch.zeros((), device=self.device)

    def loss_of(self, ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def load(self, index: int) -> None:
        """The batch and the learning rates of a step."""
        self.batch.copy_(self.tokens[self.starts[index][:, None] + self.places])
        ablations.set_rates(self.optimizer, ablations.schedule(index, self.warmup, len(self.starts)))

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        loss = self.loss_of(self.batch)
        loss.backward()
        self.loss.copy_(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Undoes the steps of the block, which leave compiled code and optimizer states of zeros."""
        weights = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.load(0)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in zip(self.model.parameters(), weights):
                    parameter.copy_(weight)
                for state in self.optimizer.state.values():
                    for value in state.values():
                        value.zero_()

    def prepare(self, is_captured: bool) -> None:
        """Compiles what is to be compiled, and sets `take_step`: `step`, or a CUDA graph of it."""
        self.is_captured = is_captured
        if self.is_on_gpu:
            torch.cuda.reset_peak_memory_stats()
        if is_captured:
            self.take_step = self.captured().replay
        else:
            with self.undone():
                self.step()
            self.take_step = self.step

    def captured(self) -> torch.cuda.CUDAGraph:
        """`step` as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with self.undone():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            for parameter in self.model.parameters():
                parameter.grad = None
            with torch.cuda.graph(graph):
                self.step()
        return graph

    def state(self) -> list[torch.Tensor]:
        """What a checkpoint holds: weights, and what the optimizer has of them after its first step."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [self.optimizer.state[parameter] for parameter in parameters]
        return [p.detach() for p in parameters] + [state[name] for state in states for name in sorted(state)]


class Worker:
    """
    Does runs on one device, in one of the processes of `scheduler.do_runs`. Subclasses define `new_training(run, is_compiled)`.
    """

    def __init__(self, data: Path, settings: dict, may_compile: bool, may_capture: bool, device: torch.device):
        if device.type == "cuda":
            torch.set_num_threads(1)
        tokenizer, self.tokens = read_tokens(data, device)
        self.configurations = ablations.Configurations(settings, tokenizer)
        # Whether a step is compiled, and whether captured. What fails on a GPU is reported and not tried again.
        allowed = may_compile, may_capture and device.type == "cuda"
        self.ways = list(itertools.product(*([True, False] if may else [False] for may in allowed)))

    def prepared(self, run: NamedTuple) -> CapturedTraining:
        while True:
            is_compiled, is_captured = self.ways[0]
            training = self.new_training(run, is_compiled)
            try:
                training.prepare(is_captured)
                return training
            except RuntimeError as error:
                if len(self.ways) == 1 or isinstance(error, torch.OutOfMemoryError):
                    raise
                print(f"{run.key}, compiled: {is_compiled}, captured: {is_captured}", file=sys.stderr)
                traceback.print_exc()
                del training, self.ways[0]
