"""
What vLLM's documentation asks of a model in remote code ("Writing custom models"), which vLLM's Transformers backend then
runs: tested with an attention function that takes, keeps and returns what vLLM's does.
"""

import pytest
import torch
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_t6 import T6Model

from .common import random_ids, random_model
from .test_variants import config_of, every_variant


class KeysAndValues:
    """Stands for one of vLLM's attention layers: it has the keys and values of one sequence, and its own window."""

    def __init__(self, config, layer_type: str):
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.window = config.sliding_window if layer_type == "sliding_attention" else None
        self.keys = self.values = None

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """Takes and returns [tokens, h * d], as vLLM does."""
        query = query.view(-1, self.num_heads, self.head_dim)
        key, value = (x.view(-1, self.num_kv_heads, self.head_dim) for x in (key, value))
        self.keys = key if self.keys is None else torch.cat([self.keys, key])
        self.values = value if self.values is None else torch.cat([self.values, value])
        groups = self.num_heads // self.num_kv_heads
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (self.keys, self.values))
        rows = torch.arange(len(self.keys))
        own_rows = rows[len(self.keys) - len(query) :, None]
        visible = rows <= own_rows
        if self.window is not None:
            visible &= rows > own_rows - self.window
        scores = torch.einsum("qhd,khd->hqk", query, keys) * scaling
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)


def vllm_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    assert attention_mask is None
    query, key, value = (x.transpose(1, 2)[0].flatten(1) for x in (query, key, value))  # from [1, h, tokens, d]
    return attention_instances[module.layer_idx](query, key, value, scaling), None


@pytest.fixture(autouse=True)
def registered_backend(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", vllm_attention)


@every_variant
@pytest.mark.parametrize("window", [None, 4], ids=["full", "sliding"])
def test_backend_with_keys_and_values_of_its_own(variant, window):
    config = config_of(variant)
    if window is not None:
        config = config_of(variant, sliding_window=window, layer_types=["sliding_attention", "full_attention"])
    plain = random_model(config, cls=T6Model, dtype=torch.float64)
    ids = random_ids(config, 1, 12)
    with torch.no_grad():
        expected = plain(ids, use_cache=False)[0]

    config = type(config)(**config.to_dict())
    config._attn_implementation = "vllm"
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.float64)
    assert type(model) is type(model.get_decoder()) is T6Model
    model.load_state_dict(plain.state_dict(), assign=True)
    model.rotary_emb = plain.rotary_emb  # vLLM makes buffers where they belong
    instances = {layer_idx: KeysAndValues(config, config.layer_types[layer_idx]) for layer_idx in range(2)}
    outputs = []
    with torch.no_grad():
        for start, end in ((0, 7), (7, 9), (9, 10), (10, 12)):
            output = model.eval()(
                input_ids=ids[:, start:end],
                inputs_embeds=None,
                use_cache=False,
                position_ids=torch.arange(start, end)[None],
                attention_instances=instances,
                return_dict=False,
            )
            outputs.append(output[0])
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-6, rtol=1e-6)  # RoPE's angles are float32


def test_what_vllm_reads_of_the_classes():
    config = config_of("TPA")
    assert T6Model.is_backend_compatible()
    assert set(config.base_model_pp_plan) == {"embed_tokens", "layers", "norm"}
    assert config.num_key_value_heads == config.num_attention_heads
    model = random_model(config, cls=T6Model)
    assert set(config.base_model_pp_plan) <= {name for name, _ in model.named_children()}
    assert all(layer.self_attn.is_causal for layer in model.layers)
