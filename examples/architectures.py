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
"""The attention mechanisms that are compared: MHA, MQA, GQA, MLA, TPA-KVonly and TPA, with as many parameters or as many heads."""

from collections.abc import Callable
from typing import NamedTuple

from configuration.make_configs import count_parameters


MAIN = ("MHA", "MQA", "GQA", "MLA", "TPA-KVonly", "TPA")


class Architecture(NamedTuple):
    folder: str  # of configuration/
    overrides: dict[str, int | None]


def architectures(settings: dict, make_config: Callable[[Architecture], object]) -> dict[str, Architecture]:
    """Every architecture by its name in the results."""
    hidden, layers, dim = settings["hidden_size"], settings["num_layers"], settings["head_dim"]
    common = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "max_position_embeddings": settings["block_length"],
    }
    # The paper's small model has hidden / 3 and 2 hidden / 3.
    unit = 64 if hidden >= 192 else 8
    latent = max(1, round(hidden / 3 / unit)) * unit

    def llama(kind: str, heads: int, kv_heads: int) -> Architecture:
        fields = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
        return Architecture(f"llama-{kind}-small", {**common, **fields})

    def mla(heads: int) -> Architecture:
        fields = {
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "kv_lora_rank": latent,
            "q_lora_rank": 2 * latent,
            "qk_rope_head_dim": dim // 2,
            "qk_nope_head_dim": dim,
            "v_head_dim": dim,
            "first_k_dense_replace": layers,
        }
        return Architecture("deepseek-mla-small", {**common, **fields})

    def t6(heads: int, rank: int = 2, kvonly: bool = False) -> Architecture:
        fields = {"num_attention_heads": heads, "head_dim": dim, "k_rank": rank, "v_rank": rank}
        return Architecture("t6-small-kvonly" if kvonly else "t6-small", {**common, **fields})

    h = hidden // dim
    mha = llama("mha", h, h)
    target = count_parameters(make_config(mha))

    def matched(make: Callable[[int], Architecture], step: int = 1) -> Architecture:
        """The number of heads, a multiple of `step`, that comes closest to MHA's parameters, which are linear in it."""
        few, more = (count_parameters(make_config(make(heads))) for heads in (step, 2 * step))
        return make(max(1, round(1 + (target - few) / (more - few))) * step)

    return {
        "MHA": mha,
        "MQA": matched(lambda heads: llama("mqa", heads, 1)),
        "GQA": matched(lambda heads: llama("gqa", heads, 2), step=2),
        "MLA": matched(mla),
        "TPA-KVonly": matched(lambda heads: t6(heads, kvonly=True)),
        "TPA": matched(t6),
        "MQA, heads of MHA": llama("mqa", h, 1),
        "GQA, heads of MHA": llama("gqa", h, 2),
        "MLA, heads of MHA": mla(h),
        "TPA-KVonly, heads of MHA": t6(h, kvonly=True),
        "TPA, heads of MHA": t6(h),
        "TPA, rank 1": matched(lambda heads: t6(heads, 1)),
        "TPA, rank 4": matched(lambda heads: t6(heads, 4)),
    }
