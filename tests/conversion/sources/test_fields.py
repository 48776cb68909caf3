"""What a family does not read has no effect, whatever a configuration carries; what it reads is obeyed, or refused by name."""

import pytest
import torch

from conversion.files.errors import ConversionError
from conversion.sources.families import FAMILIES, make_plan
from conversion.verify import windows

from ..common import ROPE, as_t6, random_ids, random_source


STRAY = {
    "sliding_window": 5, "layer_types": ["sliding_attention"] * 3, "use_sliding_window": False, "max_window_layers": 0,
    "partial_rotary_factor": 0.5, "attention_bias": True, "mlp_bias": True, "hidden_activation": "relu",
    "attention_out_bias": True, "residual_multiplier": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 2.0,
    "attention_multiplier": 2.0, "clip_qkv": 0.01, "no_rope_layers": [0, 0, 0], "use_bidirectional_attention": True,
    "attention_chunk_size": 5, "rms_norm_eps": 1.0, "tokenizer_class": "GPT2Tokenizer", "rope_interleaved": True,
}  # fmt: skip
# Of these, what each family reads.
READ = {
    "llama": {"attention_bias", "mlp_bias", "rms_norm_eps"},
    "mistral": {"sliding_window", "rms_norm_eps"},
    "ministral": {"layer_types", "rms_norm_eps"},
    "qwen2": {"layer_types", "rms_norm_eps"},
    "qwen3": {"layer_types", "attention_bias", "rms_norm_eps"},
    "seed_oss": {"attention_bias", "mlp_bias", "attention_out_bias", "rms_norm_eps"},
    "smollm3": {"layer_types", "attention_bias", "mlp_bias", "no_rope_layers", "rms_norm_eps"},
    "granite": {
        "attention_bias", "mlp_bias", "residual_multiplier", "logits_scaling", "embedding_multiplier",
        "attention_multiplier", "rms_norm_eps",
    },
    "gemma": {"attention_bias", "use_bidirectional_attention", "rms_norm_eps"},
    "olmo": {"attention_bias", "clip_qkv"},
    "phi3": {"sliding_window", "partial_rotary_factor", "rms_norm_eps"},
}  # fmt: skip
PLAIN = {
    "mistral": {"sliding_window": None},
    "ministral": {"sliding_window": 7, "layer_types": ["full_attention"] * 3},  # always makes a mask for a window
    "seed_oss": {"attention_bias": False},
    "smollm3": {"no_rope_layers": [1, 1, 1]},
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_a_family_does_not_read(family):
    fields = {name: value for name, value in STRAY.items() if name not in READ[family]}
    plain = {"model_type": family} | PLAIN.get(family, {})
    bare, source = random_source(**plain), random_source(**plain | fields)
    ids = random_ids(2, 20)
    expected = source(ids, use_cache=False).logits
    assert torch.equal(expected, bare(ids, use_cache=False).logits), "a field that the family reads"
    model = as_t6(source)
    assert (model(ids, use_cache=False).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_a_family_reads(family):
    plain = {"model_type": family} | PLAIN.get(family, {})
    ids = random_ids(2, 20)
    before = random_source(**plain)(ids, use_cache=False).logits
    mixed = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 5}
    for name in READ[family] - {"no_rope_layers", "clip_qkv", "use_bidirectional_attention"}:
        fields = {name: STRAY[name]}
        if name == "layer_types":
            fields = mixed | {"use_sliding_window": True}
        source = random_source(**plain | fields)
        expected = source(ids, use_cache=False).logits
        assert not torch.equal(expected, before), name
        logits = as_t6(source)(ids, use_cache=False).logits
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize("field", ["sliding_window", "attention_chunk_size"])
def test_fields_that_caches_alone_obey_are_told(field):
    config = random_source(model_type="llama", **{field: 5}).config
    assert [note.split(":")[0] for note in make_plan(config).notes] == [
        f"config.json has {field}=5, which llama does not read"
    ]
    assert windows(config) == {5}  # past which both models are compared


LONG = {
    "rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"model_type": "llama", "rope_parameters": LONG | ROPE}, "longrope"),
        (
            {
                "model_type": "llama",
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5} | ROPE,
            },
            "partial_rotary_factor=0.5",
        ),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            {
                "model_type": "smollm3",
                "no_rope_layers": [1, 1, 1],
                "layer_types": ["sliding_attention"] * 3,
                "sliding_window": 5,
            },
            "use_sliding_window is False",
        ),
    ],
    ids=["longrope", "partial-rope", "bidirectional", "smollm3-windows"],
)
def test_what_is_refused(fields, named):
    with pytest.raises(ConversionError, match=named):
        make_plan(random_source(**fields).config)
