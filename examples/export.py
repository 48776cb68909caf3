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
Exports one decoding step of a T6 model, with its static cache of factors, by `torch.export`.

    python examples/export.py examples/t6-tiny-shakespeare step.pt2 --max-cache-len 256

What loads the file needs torch alone:

    step = torch.export.load("step.pt2").module()
    logits = step(input_ids=torch.tensor([[token]]), cache_position=torch.tensor([position]))

`input_ids` is [batch, 1], `cache_position` [1], the logits [batch, 1, vocab]. A prompt goes in token by token; position 0
starts another text. The cache is a buffer of the loaded module.
"""

import argparse
from pathlib import Path

from command_line import DTYPES, InputError, input_errors, loading, temporary_folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("output", type=Path, help="file to write, *.pt2")
    parser.add_argument("--max-cache-len", type=int, help="tokens that the cache holds; default: the model's context")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of weights and cache; auto: as the checkpoint"
    )
    args = parser.parse_args(argv)
    if args.output.suffix != ".pt2":
        parser.error(f"OUTPUT must end in .pt2, got {args.output}")
    if args.output.is_dir():
        parser.error(f"OUTPUT is a folder: {args.output}")
    if not args.output.parent.is_dir():
        parser.error(f"the folder of OUTPUT does not exist: {args.output.parent}")
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.max_cache_len is not None and args.max_cache_len < 1:
        parser.error(f"--max-cache-len must be at least 1, got {args.max_cache_len}")
    return args


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import os

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from modeling_t6.cache_t6 import CACHE_NAME, allocate_static_cache


class ExportableT6(nn.Module):
    """
    A T6 causal language model and its static cache as one module without other state, of the inputs and buffer names of
    Transformers' `TorchExportableModuleWithStaticCache`, which allocates its cache for heads instead of factors.

    Args:
        model: The model; its parameters stop requiring gradients.
        max_cache_len: Tokens that the cache holds, prompt included.
        batch_size: Sequences that are decoded together, of one length.
    """

    def __init__(self, model: PreTrainedModel, max_cache_len: int, batch_size: int = 1):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.cache = StaticCache(config=model.config, max_cache_len=max_cache_len)
        # Sliding layers branch on how full they are, which no graph can: here they keep all rows, and the mask slides.
        self.cache.layers = [StaticLayer(max_cache_len) for _ in self.cache.layers]
        allocate_static_cache(
            self.cache, model.config, batch_size, model.dtype, model.device, range(len(self.cache.layers))
        )
        for i, layer in enumerate(self.cache.layers):
            self.register_buffer(f"key_cache_{i}", layer.keys, persistent=False)
            self.register_buffer(f"value_cache_{i}", layer.values, persistent=False)
            self.register_buffer(f"cumulative_length_{i}", layer.cumulative_length, persistent=False)

    def forward(self, input_ids: torch.LongTensor, cache_position: torch.LongTensor) -> torch.Tensor:
        """Logits [batch, 1, vocab] of `input_ids` [batch, 1], the tokens at `cache_position` [1]."""
        for i, layer in enumerate(self.cache.layers):
            # The buffers of this module as the graph knows them, not the tensors that they were registered with.
            layer.keys, layer.values = getattr(self, f"key_cache_{i}"), getattr(self, f"value_cache_{i}")
            layer.cumulative_length = getattr(self, f"cumulative_length_{i}")
            layer.cumulative_length.copy_(cache_position[0])
        return self.model(input_ids, use_cache=True, **{CACHE_NAME: self.cache}).logits


def export_decoding_step(
    model: PreTrainedModel, max_cache_len: int, batch_size: int = 1
) -> torch.export.ExportedProgram:
    """One step of `ExportableT6`, exported."""
    inputs = {
        "input_ids": torch.zeros(batch_size, 1, dtype=torch.long, device=model.device),
        "cache_position": torch.zeros(1, dtype=torch.long, device=model.device),
    }
    with torch.no_grad():
        return torch.export.export(ExportableT6(model, max_cache_len, batch_size), args=(), kwargs=inputs)


def export(args: argparse.Namespace) -> None:
    """Writes the file, whole or not at all."""
    with loading("model", args.model):
        model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True, dtype=args.dtype)
    if model.config.model_type != "t6":
        raise InputError(f"MODEL must be a T6 model, got one of type {model.config.model_type!r}")
    max_cache_len = args.max_cache_len or model.config.max_position_embeddings
    program = export_decoding_step(model, max_cache_len, args.batch_size)
    with temporary_folder(f".{args.output.name}.", args.output.parent) as folder:
        path = folder / args.output.name
        torch.export.save(program, path)
        os.replace(path, args.output)
    print(f"{args.output}: {args.output.stat().st_size:,} bytes, a cache of {max_cache_len:,} tokens")


def main(argv: list[str] | None = None) -> None:
    with input_errors("export.py"):
        export(parse_args(argv))


if __name__ == "__main__":
    main()
