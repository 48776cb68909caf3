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
Writes the published architectures as `config.json` folders beside this file, and prints the table of `README.md`.

    python -m configuration.make_configs
"""

import argparse


def parse_args() -> argparse.Namespace:
    text = "Writes the published architectures as config.json folders, and prints the table of README.md."
    return argparse.ArgumentParser(description=text).parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from modeling_t6.cache_t6 import factor_layouts

from .sizes import SIZES


DIRECTORY = Path(__file__).parent


HEAD_DIM = 64
Q_RANK, KV_RANK = 6, 2
# The paper's variants of TPA, of the small size: heads, and the fields that differ. The paper does not state the heads;
# these bring the parameters nearest to MHA's, or are TPA's where the variant has as many parameters.
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "noncontextual-a": (38, {"noncontextual_a": True}),
    "noncontextual-b": (42, {"noncontextual_b": True}),
    "shared-b": (35, {"shared_b": True}),
    "sigmoid": (34, {"head_factor_act": "sigmoid"}),
    "softmax": (34, {"head_factor_act": "softmax"}),
    "third-order": (39, {"c_factor_dim": 4}),
    "head-norm": (34, {"head_norm": True}),
    "output-gate": (18, {"output_gate": True}),
    # 20 of 64 features: a third, the research code's default, rounded down to an even number.
    "partial-rope": (
        34,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 20 / 64}},
    ),
}
ROPE_HEAD_DIM = 32  # MLA: the rotated part of a head, beside HEAD_DIM unrotated features
END_OF_TEXT = 50256  # of GPT-2's tokenizer, which the paper uses; the vocabulary is padded to a multiple of 64


def make_configs() -> dict[str, dict[str, Any]]:
    """The content of every `config.json`, by the name of its folder."""
    configs = {}
    for name, size in SIZES.items():
        common = {
            "vocab_size": 50304,
            "hidden_size": size.hidden_size,
            "intermediate_size": 8 * size.hidden_size // 3,
            "num_hidden_layers": size.num_hidden_layers,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": END_OF_TEXT,
        }
        for folder, heads, q_rank, variant in (
            (f"t6-{name}", size.heads.t6, Q_RANK, {}),
            (f"t6-{name}-kvonly", size.heads.t6_kvonly, None, {}),
            *(
                (f"t6-{name}-{suffix}", heads, Q_RANK, variant)
                for suffix, (heads, variant) in VARIANTS.items()
                if name == "small"
            ),
        ):
            configs[folder] = {
                "model_type": "t6",
                "architectures": ["T6ForCausalLM"],
                **common,
                "num_attention_heads": heads,
                "head_dim": HEAD_DIM,
                "q_rank": q_rank,
                "k_rank": KV_RANK,
                "v_rank": KV_RANK,
                **variant,
            }
        configs[f"llama-mha-{name}"] = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            **common,
            "num_attention_heads": size.heads.mha,
            "num_key_value_heads": size.heads.mha,
            "head_dim": HEAD_DIM,
        }
        for folder, heads, kv_heads in (
            (f"llama-mqa-{name}", size.heads.mqa, 1),
            (f"llama-gqa-{name}", size.heads.gqa, 2),
        ):
            # LlamaConfig refuses heads whose number does not divide `hidden_size`, whatever `head_dim` says. Mistral
            # without its sliding window is the same model, weight for weight, and takes them.
            configs[folder] = {
                "model_type": "mistral",
                "architectures": ["MistralForCausalLM"],
                **common,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_dim": HEAD_DIM,
                "sliding_window": None,
            }
        configs[f"deepseek-mla-{name}"] = {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            **common,
            "num_attention_heads": size.heads.mla,
            "num_key_value_heads": size.heads.mla,
            "kv_lora_rank": size.kv_lora_rank,
            "q_lora_rank": size.q_lora_rank,
            "qk_rope_head_dim": ROPE_HEAD_DIM,
            "qk_nope_head_dim": HEAD_DIM,
            "v_head_dim": HEAD_DIM,
            "rope_interleave": False,
            # A plain decoder: every layer dense, no multi-token prediction.
            "first_k_dense_replace": size.num_hidden_layers,
            "num_nextn_predict_layers": 0,
        }
    return configs


def write_configs(directory: Path = DIRECTORY) -> None:
    """Writes `directory/<folder>/config.json` for every architecture."""
    for folder, config in make_configs().items():
        (directory / folder).mkdir(parents=True, exist_ok=True)
        (directory / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def count_parameters(config: PreTrainedConfig) -> int:
    """All parameters of the causal language model, the tied embedding once; no memory is allocated for them."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def cache_numbers(config: PreTrainedConfig) -> tuple[int, int]:
    """Numbers to cache per token over all layers: those the architecture needs, and those that are stored."""
    if config.model_type == "t6":
        layouts = [layout for layer in range(config.num_hidden_layers) for layout in factor_layouts(config, layer)]
        needed = sum(layout.rank * (layout.num_heads + layout.head_dim) for layout in layouts)
        return needed, sum(layout.width for layout in layouts)
    if config.model_type == "deepseek_v3":
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        numbers = 2 * config.num_key_value_heads * config.head_dim
    return (config.num_hidden_layers * numbers,) * 2


def make_table() -> str:
    """The table of `README.md`, counted from the folders on disk."""
    columns = (
        "folder",
        "layers",
        "hidden",
        "heads (KV heads)",
        "parameters",
        "against the paper's total",
        "against MHA",
        "numbers cached per token",
        "as stored",
    )
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' --: |' * (len(columns) - 1)}"]
    configs = {folder: AutoConfig.from_pretrained(DIRECTORY / folder) for folder in make_configs()}
    counts = {folder: count_parameters(config) for folder, config in configs.items()}
    for folder, config in configs.items():
        name = next(name for name in SIZES if name in folder.split("-"))
        total, mha, count = SIZES[name].paper_total, counts[f"llama-mha-{name}"], counts[folder]
        paper = f"{total / 1e9:.1f}B" if total >= 1e9 else f"{total / 1e6:.0f}M"
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        needed, stored = cache_numbers(config)
        lines.append(
            f"| `{folder}` | {config.num_hidden_layers} | {config.hidden_size} "
            f"| {heads}{f' ({kv_heads})' if kv_heads != heads else ''} | {count:,} "
            f"| {paper} {count / total - 1:+.1%} | {count / mha - 1:+.1%} | {needed:,} | {stored:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    parse_args()
    write_configs()
    print(make_table())


if __name__ == "__main__":
    main()
