"""What the plugin does not serve is refused when a model is loaded, by one error that names it."""

from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs

from vllm_t6 import cache_dtype, variants
from vllm_t6.cache_dtype import FollowCacheDtype
from vllm_t6.variants import refuse_unserved_variants, warn_of_cache_dtype

from ..modeling_t6.common import random_model, tiny_config
from .common import engine


VARIANTS = {
    "noncontextual_b": ({"noncontextual_b": True}, "`noncontextual_b`=True"),
    "shared_b": ({"shared_b": True, "v_rank": 2}, "`shared_b`=True"),
    "third_order": ({"c_factor_dim": 2}, "`c_factor_dim`=2"),
    "dynamic_rope": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "`rope_type`='dynamic'",
    ),
    "gelu_new": ({"hidden_act": "gelu_new"}, "`hidden_act`='gelu_new'"),
    "relu": ({"hidden_act": "relu"}, "`hidden_act`='relu'"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "named"), VARIANTS.values(), ids=VARIANTS)
def test_variant(fields, named, tmp_path):
    random_model(tiny_config(**fields)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"vLLM cannot serve a T6 model with {named}"), engine(tmp_path):
        pass


SETTINGS = {
    "fp8_e5m2": ({"kv_cache_dtype": "fp8_e5m2"}, "`kv_cache_dtype` of a T6 model must be one of .* got 'fp8_e5m2'"),
    "int8": (
        {"kv_cache_dtype": "int8_per_token_head"}, "`kv_cache_dtype` of a T6 model must .* got 'int8_per_token_head'",
    ),
    "skipped_layers": (
        {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]}, "`kv_cache_dtype_skip_layers`",
    ),
    # By vLLM itself.
    "decode_context_parallel": (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "[Dd]ecode.context.parallel",
    ),
    "heads": ({"tensor_parallel_size": 4}, "attention heads .6. must be divisible by tensor parallel size .4."),
    "context": ({"max_model_len": 512}, "max_position_embeddings=256"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "named"), SETTINGS.values(), ids=SETTINGS)
def test_setting(settings, named, tmp_path):
    random_model(tiny_config(num_attention_heads=6)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named), engine(tmp_path, **settings):
        pass


def test_softmax_over_heads_of_several_processes(tmp_path):
    """The error is that of a worker, whose words vLLM prints alone: here it is told what they are."""
    random_model(tiny_config(num_attention_heads=6, head_factor_act="softmax")).save_pretrained(tmp_path)
    config = EngineArgs(str(tmp_path), skip_tokenizer_init=True, tensor_parallel_size=2).create_engine_config()
    with pytest.raises(ValueError, match="`head_factor_act`='softmax' by tensor parallelism"):
        refuse_unserved_variants(config.model_config.hf_config, config)


MISSING = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.k_b_proj.weight",
    "model.layers.1.self_attn.q_a_proj.bias",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
]


@pytest.mark.parametrize("name", MISSING)
def test_missing_tensor(name, tmp_path):
    random_model(tiny_config(attention_bias=True)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state[name]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks '{name}'"), engine(tmp_path):
        pass


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_a", "model.layers.2.mlp.up_proj.weight"])
def test_tensor_too_many(name, tmp_path):
    random_model(tiny_config()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state[name] = state["model.norm.weight"].clone()
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"'{name}'"), engine(tmp_path):
        pass


def test_rows_of_another_dtype_than_the_folder_says(tmp_path, monkeypatch):
    """Pages of 16 bits hold what a `cache_dtype` would round: no error, but more bytes than were measured."""
    messages = []
    monkeypatch.setattr(variants.logger, "warning", lambda text, *words: messages.append(text % words))
    config = tiny_config(cache_dtype="int4")
    random_model(config).save_pretrained(tmp_path)
    with engine(tmp_path):
        pass
    assert "`cache_dtype` is 'int4'" in messages[0] and "kv_cache_dtype='fp8' holds them in 8 bits" in messages[0]
    for stored, asked, count in (
        ("int4", "fp8", 1),
        ("float8_e4m3fn", "auto", 1),
        ("float8_e4m3fn", "fp8", 0),
        (None, "auto", 0),
    ):
        messages.clear()
        settings = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=asked))
        warn_of_cache_dtype(tiny_config(cache_dtype=stored), settings)
        assert len(messages) == count


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), "auto"), ((8, 9), "fp8")], ids=["Ampere", "Ada"])
def test_rows_of_float8_need_ada(capability, expected, monkeypatch):
    """A GPU whose kernels read none keeps the rows that they read, whatever the folder says; who starts vLLM may say otherwise."""
    platform = SimpleNamespace(
        is_cuda=lambda: True, has_device_capability=lambda least: capability >= divmod(least, 10)
    )
    monkeypatch.setattr(cache_dtype, "current_platform", platform)
    for asked, dtype in (("auto", expected), ("fp8", "fp8")):
        settings = SimpleNamespace(
            cache_config=SimpleNamespace(cache_dtype=asked),
            model_config=SimpleNamespace(hf_text_config=tiny_config(cache_dtype="float8_e4m3fn")),
        )
        FollowCacheDtype.verify_and_update_config(settings)
        assert settings.cache_config.cache_dtype == dtype
