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
"""The attention mechanisms that are compared: MHA, MQA, GQA, MLA, TPA-KVonly and TPA."""

from typing import NamedTuple


class Architecture(NamedTuple):
    folder: str  # of configuration/
    fields: dict[str, int | None]  # of its configuration, replaced


def architectures(settings: dict) -> dict[str, Architecture]:
    """Every architecture by its name in the results, but the number of its heads."""
    hidden, layers, dim = settings["hidden_size"], settings["num_layers"], settings["head_dim"]
    common = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "max_position_embeddings": settings["block_length"],
    }
    # The paper's small model has hidden / 3 and 2 hidden / 3.
    unit = 64 if hidden >= 192 else 8
    latent = max(1, round(hidden / 3 / unit)) * unit
    mla = {
        "kv_lora_rank": latent,
        "q_lora_rank": 2 * latent,
        "qk_rope_head_dim": dim // 2,
        "qk_nope_head_dim": dim,
        "v_head_dim": dim,
        "first_k_dense_replace": layers,
    }
    return {
        "MHA": Architecture("llama-mha-small", {**common, "head_dim": dim}),
        "MQA": Architecture("llama-mqa-small", {**common, "head_dim": dim, "num_key_value_heads": 1}),
        "GQA": Architecture("llama-gqa-small", {**common, "head_dim": dim, "num_key_value_heads": 2}),
        "MLA": Architecture("deepseek-mla-small", {**common, **mla}),
        "TPA-KVonly": Architecture("t6-small-kvonly", {**common, "head_dim": dim}),
        "TPA": Architecture("t6-small", {**common, "head_dim": dim}),
    }
