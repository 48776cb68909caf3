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
"""Checked when vLLM has made the cache: the kernels write and read its pages, the last one included, as PyTorch does"""

import itertools
import math

import torch

from modeling_t6.factor_pages_t6 import rows_at
from modeling_t6.factors_t6 import form_heads
from modeling_t6.flash_tpa_pages_t6 import schedule_pieces

from .attention import FactorImpl
from .metadata import FactorMetadata
from .prefill import plan_pieces


# Of the largest number: a few roundings to the dtype of the model, in which queries, probabilities and outputs are.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2**-8, torch.bfloat16: 2**-5}


@torch.no_grad()
def check_pages(impl: FactorImpl, kv_cache: torch.Tensor) -> None:
    """
    Two requests of random numbers go through a layer's pages, as prompts and, their last tokens, decoding. What the pages
    held is put back.

    Raises:
        RuntimeError: if rows, or the outputs, are not those that PyTorch computes.
    """
    device, (num_blocks, block_size) = kv_cache.device, (kv_cache.shape[0], kv_cache.shape[2])
    # One request has the last page and then the first; another one has a page between.
    blocks = torch.tensor([[num_blocks - 1, 0], [num_blocks // 2] * 2], dtype=torch.int32, device=device)
    lengths = [min(block_size + 5, impl.room - 3), 3] if num_blocks > 2 else [min(block_size, impl.room)]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    requests = torch.arange(len(lengths), device=device).repeat_interleave(starts.diff())
    slots = blocks[requests, positions // block_size] * block_size + positions % block_size
    metadata = FactorMetadata(
        slots=slots.long(),
        block_table=blocks[: len(lengths)],
        lengths=starts.diff(),
        query_starts=torch.arange(len(lengths) + 1, dtype=torch.int32, device=device),
        num_decodes=len(lengths),
        max_decode_queries=1,
        decode_pieces=impl.empty_pieces(len(lengths), 1, device),
        prompt_pieces=plan_pieces(
            lengths, lengths, 0, 0, impl.room, impl.sliding_window, blocks, block_size, slots.long(), starts
        ),
    )
    if metadata.decode_pieces is not None:
        schedule_pieces(metadata.lengths, metadata.query_starts, metadata.decode_pieces)

    generator = torch.Generator(device).manual_seed(0)
    columns = sum(impl.projection_sizes.values())
    sizes = (
        len(slots),
        columns + -columns % 8,
    )  # as the model's product has them: the kernels are compiled for their alignment
    projections = torch.randn(sizes, generator=generator, device=device, dtype=torch.float32).to(impl.dtype)
    angles = 6.3 * torch.rand(len(slots), impl.config.rotary_dim // 2, generator=generator, device=device)
    tokens = projections, angles.cos().to(impl.dtype), angles.sin().to(impl.dtype), metadata.slots

    used = blocks.unique().long()
    held = kv_cache[used]
    pages = impl.pages(kv_cache)
    shape = 2, len(slots), impl.num_heads, impl.head_size
    expected_query, query = torch.full(shape, math.nan, dtype=impl.dtype, device=device)
    impl.store(*tokens, *pages, expected_query, kernels=False)
    expected_rows = [rows_at(part, slots).float() for part in pages]
    kv_cache[used] = held  # rows that are not written are to be missed
    impl.store(*tokens, *pages, query)
    rows = [rows_at(part, slots).float() for part in pages]
    prompts, decoded = torch.empty_like(query), torch.empty_like(query[: len(lengths)])
    impl.attend_to_prompts(query, *pages, metadata, prompts)
    formed, at_once = impl.states_of_new_prompts(query, metadata), torch.empty_like(query)
    for states in formed[:2]:
        states.fill_(math.nan)
    impl.store(*tokens, *pages, query, formed)
    impl.attend_to_prompts(query, *pages, metadata, at_once, are_formed=bool(formed))
    impl.decode(query[starts[1:].long() - 1], *pages, metadata, decoded)
    kv_cache[used] = held

    tolerance = TOLERANCES[impl.dtype]
    _compare("queries", query, expected_query, tolerance)
    for name, part, expected_part in zip(("key rows", "value rows"), rows, expected_rows):
        _compare(name, part, expected_part, max(tolerance, 2**-3 if kv_cache.itemsize == 1 else 0))
    outputs, spreads = zip(*(_attention(impl, *x) for x in zip(*(part.split(lengths) for part in (query, *rows)))))
    expected, tolerance = torch.cat(outputs), tolerance * max(1, *spreads)
    _compare("attention of prompts", prompts, expected, tolerance)
    _compare("attention of new prompts", at_once, expected, tolerance)
    _compare("attention of decoded tokens", decoded, expected[starts[1:].long() - 1], tolerance)


def _attention(
    impl: FactorImpl, query: torch.Tensor, key_rows: torch.Tensor, value_rows: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Causal attention of one request in float64 [tokens, h, d], and how large scores are, whose roundings grow with them."""
    states = []
    for layout, rows, constant_a in zip(
        (impl.key_layout, impl.value_layout), (key_rows, value_rows), impl.constants[1:]
    ):
        a, b = layout.unpack(rows[None, None].double())
        states.append(form_heads(a if constant_a is None else constant_a.double(), b)[0].transpose(0, 1))
    key, value = (x.repeat_interleave(impl.config.num_key_value_groups, dim=0) for x in states)
    positions = torch.arange(len(query), device=query.device)
    visible = positions <= positions[:, None]
    if impl.sliding_window is not None:
        visible &= positions > positions[:, None] - impl.sliding_window
    scores = query.double().transpose(0, 1) @ key.transpose(1, 2) * impl.scale
    output = (scores.masked_fill(~visible, -math.inf).softmax(-1) @ value).transpose(0, 1)
    return output, scores.abs().mean().item()


def _compare(name: str, states: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error, largest = (states.double() - expected.double()).abs().max().item(), expected.abs().max().item()
    if not error <= tolerance * largest:  # NaN is not
        raise RuntimeError(
            f"T6's kernels do not compute what PyTorch does on this machine, with this cache: {name} are off by {error:.3g}, "
            f"more than {tolerance:.2g} of the largest number, {largest:.3g}. Please report it, with the model's config.json."
        )
