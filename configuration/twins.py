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
"""The model of ordinary attention that a T6 is compared with."""

from transformers import MistralConfig, PreTrainedConfig


def mha_twin(config: PreTrainedConfig) -> MistralConfig:
    """A Llama-like model of the same shape with as many key/value heads as heads (Llama's own wants h to divide sizes)."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "max_position_embeddings",
    )
    shape = {name: getattr(config, name) for name in names}
    heads = config.num_attention_heads
    return MistralConfig(**shape, num_key_value_heads=heads, sliding_window=None, bos_token_id=None, eos_token_id=None)
