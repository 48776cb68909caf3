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
"""The paper's table of sizes, and the heads of each kind of model."""

from typing import NamedTuple


class Heads(NamedTuple):
    """Attention heads of each kind of model, chosen in the paper so that all kinds have as many parameters."""

    t6: int
    t6_kvonly: int
    mha: int
    mqa: int
    gqa: int
    mla: int


class Size(NamedTuple):
    """One row of the paper's table of sizes."""

    num_hidden_layers: int
    hidden_size: int
    heads: Heads
    kv_lora_rank: int
    q_lora_rank: int
    paper_total: float


SIZES = {
    "small": Size(12, 768, Heads(34, 22, 12, 23, 22, 12), 256, 512, 124e6),
    "medium": Size(24, 1024, Heads(47, 29, 16, 31, 30, 23), 512, 1024, 353e6),
    "large": Size(36, 1280, Heads(61, 37, 20, 39, 38, 34), 512, 1024, 773e6),
    "xl": Size(48, 1600, Heads(78, 47, 25, 49, 48, 49), 512, 1024, 1.5e9),
}
