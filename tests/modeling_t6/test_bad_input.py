"""Bad input gives one clear error, or what Transformers documents: never a wrong answer."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoConfig, DynamicCache

from modeling_t6 import T6Cache, T6Config, T6ForCausalLM

from .common import DEVICE, cached, quick, random_ids, random_model, tiny_config


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config())


def test_empty_prompt(model):
    empty = torch.zeros(1, 0, dtype=torch.long)
    for function in (model, model.generate):
        with pytest.raises(ValueError, match="empty|input_ids|inputs_embeds"):
            function(empty)


def test_ids_and_embeddings(model):
    ids = random_ids(model.config, 1, 4)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_unknown_token(model):
    with pytest.raises(IndexError):
        model(torch.tensor([[97]]))


def test_longer_than_max_position_embeddings():
    """Positions go on beyond it, as in Llama: the answer is that of a model that was made for more."""
    short, long = (random_model(tiny_config(max_position_embeddings=size)) for size in (16, 64))
    ids = random_ids(short.config, 1, 40)
    with torch.no_grad():
        assert torch.equal(short(ids).logits, long(ids).logits)
    assert torch.equal(short.generate(ids, max_new_tokens=5), long.generate(ids, max_new_tokens=5))


MASKS = {
    "batch": (torch.ones(3, 6), r"\[2, 6\], got \[3, 6\]"),
    "too-short": (torch.ones(2, 5), r"\[2, 6\], got \[2, 5\]"),
    "3d": (torch.ones(2, 6, 6), r"must be \[batch, key_length\]"),
    "additive-2d": (torch.full((2, 6), -1e9), "1 for tokens and 0 for padding"),
    "4d-integer": (torch.ones(2, 1, 6, 6, dtype=torch.long), "boolean"),
    "4d-queries": (torch.ones(2, 1, 5, 6, dtype=torch.bool), r"\[2, 1, 6, key_length\]"),
}


@pytest.mark.parametrize("mask,message", MASKS.values(), ids=MASKS)
def test_wrong_masks(model, mask, message):
    with pytest.raises(ValueError, match=message):
        model(random_ids(model.config, 2, 6), attention_mask=mask)


def test_mask_must_cover_the_cache(model):
    ids = random_ids(model.config, 2, 6)
    cache = T6Cache(config=model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    with pytest.raises(ValueError, match="6 cached and 1 new tokens"):
        model(ids[:, :1], cache=cache, attention_mask=torch.ones(2, 1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16], ids=str)
def test_masks_of_any_dtype(model, dtype):
    ids = random_ids(model.config, 2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, attention_mask=mask.to(dtype)).logits, model(ids, attention_mask=mask).logits
        )


@pytest.mark.parametrize("row", [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], ids=str)
@pytest.mark.parametrize("fields", [{}, {"attn_implementation": "eager", "sliding_window": 4}], ids=["sdpa", "eager"])
def test_one_mask_for_a_batch(fields, row):
    """As one for each sequence; Llama takes it where it needs no mask for it."""
    model = random_model(tiny_config(**fields))
    ids, mask = random_ids(model.config, 3, 6), torch.tensor([row])
    for kwargs in ({}, {"use_cache": False}):
        logits = [model(ids, attention_mask=each, **kwargs).logits for each in (mask, mask.expand(3, -1))]
        assert torch.equal(*logits)
    for kwargs in ({}, {"cache_implementation": "static", "disable_compile": True}):
        generated = [
            model.generate(ids, attention_mask=each, max_new_tokens=4, do_sample=False, **kwargs)
            for each in (mask, mask.expand(3, -1))
        ]
        assert torch.equal(*generated)


@torch.no_grad()
def test_block_mask():
    """A mask of flex_attention's own class goes to it as it is."""
    model = random_model(tiny_config(attn_implementation="flex_attention", noncontextual_b=True))
    ids = random_ids(model.config, 2, 9)
    mask = create_block_mask(lambda b, h, q, k: k <= q, None, None, 9, 9, device=DEVICE)
    for use_cache in (False, True):
        with quick("flex_attention"):
            logits = [model(ids, attention_mask=each, use_cache=use_cache).logits for each in (mask, None)]
        torch.testing.assert_close(*logits)


def test_cache_of_another_model(model):
    other = random_model(tiny_config(num_attention_heads=7, k_rank=3))
    ids = random_ids(model.config, 1, 6)
    with torch.no_grad():
        cache = cached(other(ids))
        with pytest.raises(RuntimeError, match="size"):
            model(ids[:, :1], cache=cache)


HEADS = [[torch.zeros(1, 5, 4, 16)] * 2] * 2  # keys and values of the model's heads, in two layers
CACHES_OF_HEADS = {
    "tuple": lambda config: tuple(map(tuple, HEADS)),
    "list": lambda config: HEADS,
    "DynamicCache": lambda config: DynamicCache(HEADS),
    "DynamicCache-config": lambda config: DynamicCache(HEADS, config=config),
    "one layer": lambda config: DynamicCache([[torch.zeros(1, 1, 4, 48), torch.zeros(1, 1, 4, 24)], HEADS[1]]),
    "T6Cache": lambda config: T6Cache(HEADS),
    "T6Cache-config": lambda config: T6Cache(HEADS, config=config),
}


@pytest.mark.parametrize("make_cache", CACHES_OF_HEADS.values(), ids=CACHES_OF_HEADS)
@pytest.mark.parametrize("query_length", [1, 12])  # in factor space, and with K and V
def test_caches_of_heads(model, make_cache, query_length):
    for context in (torch.no_grad(), torch.enable_grad()):
        with (
            context,
            pytest.raises((RuntimeError, ValueError), match=r"factors.* use|factors.* this model has filled"),
        ):
            model(random_ids(model.config, 1, query_length), cache=make_cache(model.config))


@torch.no_grad()
def test_cache_of_another_batch(model):
    ids = random_ids(model.config, 2, 6)
    cache = cached(model(ids))
    with pytest.raises(RuntimeError, match="a batch of 2 sequences"):
        model(ids[:1], cache=cache)
    assert torch.equal(
        cached(model(ids[:, :1], cache=cache)).layers[1].keys[:, :, :6], cached(model(ids)).layers[1].keys
    )


def test_labels_of_another_shape(model):
    with pytest.raises((ValueError, RuntimeError)):
        model(random_ids(model.config, 2, 6), labels=torch.zeros(2, 9, dtype=torch.long))


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.999], ids=str)
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(Exception, match="(?i)safetensors|header|incomplete|metadata|deserializ"):
        T6ForCausalLM.from_pretrained(folder)


def test_missing_tensor_is_reported(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_b_proj.weight"
    tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    _, info = T6ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert name in info["missing_keys"]


def test_tensor_of_another_shape(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_b_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatch|size"):
        T6ForCausalLM.from_pretrained(folder)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        if value is ...:
            config.pop(name)
        else:
            config[name] = value
    path.write_text(json.dumps(config))


def test_unknown_field_is_kept(folder):
    edit_config(folder, invented="field")
    assert T6Config.from_pretrained(folder).invented == "field"


@pytest.mark.parametrize("field", ["num_attention_heads", "k_rank", "hidden_size"])
def test_missing_field_does_not_load_other_shapes(folder, field):
    """A missing field takes its default; weights of other shapes are then refused."""
    edit_config(folder, **{field: ...} if field != "k_rank" else {"k_rank": ..., "v_rank": ...})
    with pytest.raises(RuntimeError, match="mismatch|size"):
        T6ForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("field,value", [("k_rank", "two"), ("k_rank", -2), ("head_dim", None)])
def test_wrong_field(folder, field, value):
    edit_config(folder, **{field: value})
    with pytest.raises(Exception, match=field):
        T6ForCausalLM.from_pretrained(folder)


ROPE = {"rope_theta": 1e4, "rope_type": "default"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
DAMAGED = [
    *(
        ("rope_parameters", ROPE | {"rope_theta": theta}, "rope_theta")
        for theta in ("10000", None, [1e4], True, 0, -1.0)
    ),
    ("rope_theta", "10000", "rope_theta"),
    ("rope_parameters", ROPE | {"partial_rotary_factor": "0.5"}, "partial_rotary_factor"),
    ("rope_parameters", ROPE | {"partial_rotary_factor": None}, "partial_rotary_factor"),
    ("rope_parameters", ROPE | {"rope_type": "linear", "factor": "2"}, "factor"),
    ("rope_parameters", ROPE | {"rope_type": "linear"}, "factor"),
    ("rope_parameters", ROPE | {"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"}, "beta_fast"),
    ("rope_parameters", ROPE | LLAMA3 | {"low_freq_factor": "1"}, "low_freq_factor"),
    (
        "rope_parameters",
        ROPE | LLAMA3 | {"original_max_position_embeddings": [64]},
        "original_max_position_embeddings",
    ),
    ("rope_parameters", ROPE | LONGROPE | {"short_factor": "abc"}, "short_factor.* list of 8"),
    ("rope_parameters", ROPE | LONGROPE | {"long_factor": [1.0] * 7}, "long_factor.* list of 8"),
    ("rope_parameters", ROPE | {"rope_type": ["default"]}, "rope_type"),
    ("rope_parameters", {"full_attention": ROPE}, "rope_parameters"),
    ("rope_parameters", "default", "rope_parameters"),
    ("rope_parameters", [1e4], "rope_parameters"),
    *(("num_key_value_heads", heads, "num_key_value_heads.* divide `num_attention_heads`=5") for heads in (2, 10)),
    *(("num_key_value_heads", heads, "num_key_value_heads") for heads in (0, -1, True, "5", [5])),
    *(("head_dim", size, "head_dim") for size in (0, -16, True, "16", 16.0, [16])),
    *((field, True, field) for field in ("hidden_size", "vocab_size", "k_rank", "q_rank", "sliding_window")),
    ("k_rank", [True, 2], "k_rank"),
    ("layer_types", "full_attention", "layer_types"),
    ("num_hidden_layers", 10**9, "num_hidden_layers.* at most"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps"),
    ("initializer_range", float("inf"), "initializer_range"),
    ("pad_token_id", 97, "pad_token_id.* below `vocab_size`=97"),
    # What follows from other fields, as a config.json from elsewhere may have it.
    ("rotary_dim", 8, "rotary_dim.* must be 16"),
    ("num_local_heads", 1, "num_local_heads.* must be 5"),
    ("num_local_key_value_heads", 1, "num_local_key_value_heads.* must be 5"),
    ("rotates_on_read", True, "rotates_on_read.* must be False"),
    ("ranks", [2, 1], "ranks.* left out"),
]


@pytest.mark.parametrize("field,value,message", DAMAGED)
def test_damaged_config(tmp_path, field, value, message):
    """One sentence that names the field, before anything is built of it; with a window, layers have a list of types."""
    fields = tiny_config().to_dict() | {field: value}
    if field == "rope_theta":
        fields.pop("rope_parameters")
    for window in (None, 4) if field == "num_hidden_layers" else (fields["sliding_window"],):
        (tmp_path / "config.json").write_text(json.dumps(fields | {"sliding_window": window} if window else fields))
        with pytest.raises(Exception, match=f"(?i){message}"):
            AutoConfig.from_pretrained(tmp_path)


def test_derived_fields_as_they_are(tmp_path):
    """Given in a config.json, at load or by assignment, they change nothing, and are not saved."""
    config = tiny_config()
    derived = {
        "num_local_heads": 5,
        "num_local_key_value_heads": 5,
        "rotary_dim": 16,
        "b_dim": 16,
        "rotates_on_read": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | derived))
    loaded = AutoConfig.from_pretrained(tmp_path, num_local_heads=5)
    loaded.num_local_heads = 5
    assert loaded.to_diff_dict() == config.to_diff_dict()
    with pytest.raises(ValueError, match="num_local_heads.* must be 5"):
        AutoConfig.from_pretrained(tmp_path, num_local_heads=1)
    with pytest.raises(ValueError, match="num_local_heads.* must be 5"):
        tiny_config(num_local_heads=1)


def test_heads_of_keys_and_values_follow_those_of_queries(tmp_path):
    """As long as there are no groups; a config.json says how many there are only where there are."""
    config = tiny_config()
    config.save_pretrained(tmp_path)
    assert "num_key_value_heads" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoConfig.from_pretrained(tmp_path, num_attention_heads=6)
    assert loaded.num_key_value_heads == 6 and loaded.num_key_value_groups == 1
    loaded = AutoConfig.from_pretrained(tmp_path, num_attention_heads=6, num_key_value_heads=2)
    loaded.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.num_key_value_heads == 2 and loaded.num_key_value_groups == 3
    loaded.num_attention_heads = 5
    with pytest.raises(ValueError, match="`num_key_value_heads` must divide `num_attention_heads`=5, got 2"):
        T6ForCausalLM(loaded)


def test_methods_are_no_fields():
    """Not by a value of a config.json; a package may patch them with functions, as in every configuration."""
    config = tiny_config()
    with pytest.raises(ValueError, match="`ranks` must be left out"):
        config.ranks = [2, 1]
    config.ranks = lambda layer_idx: (layer_idx, 1)
    assert config.ranks(0) == (0, 1)


def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text('{"model_type": "t6"')
    with pytest.raises(OSError, match="config.json"):
        T6ForCausalLM.from_pretrained(folder)
