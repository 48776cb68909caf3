"""Llama-shaped models against what they become: logits, greedy tokens with every cache, bytes of cache."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conversion.__main__ import main
from conversion.sources import llama
from conversion.sources.families import FAMILIES as SUPPORTED
from conversion.sources.families import REFUSED
from modeling_t6 import T6ForCausalLM
from modeling_t6.cache_t6 import CACHE_NAME, cache_nbytes

from ...modeling_t6.common import DEVICE
from ...versions import once_but
from ..common import FAMILIES, LAYOUTS, last_error, save_source, source_model


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "no-cache": {"use_cache": False},
}
if DEVICE == "cuda":  # a stream copies the layers
    CACHES["offloaded-static"] = {"cache_implementation": "offloaded_static"}
NEW = 12  # after 40: beyond windows of 24, and the 48 positions at which dynamic RoPE changes
TWO_LAYERS = {
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 1]},
}


def loaded(folder, dtype=torch.float32):
    return T6ForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("layout", once_but(LAYOUTS, "gqa"))
@pytest.mark.parametrize("family", FAMILIES)
def test_exact(family, layout, tmp_path):
    source = source_model(family, layout, num_hidden_layers=2, **TWO_LAYERS.get(family, {}))
    source.save_pretrained(tmp_path / "source")
    assert main(["hf", str(tmp_path / "source"), str(tmp_path / "t6"), "--no-verify"]) == 0
    source, model = source.to(DEVICE), loaded(tmp_path / "t6").to(DEVICE)
    ids = torch.randint(2, 99, (2, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        for attention_mask in (None, mask):
            expected = source(ids, attention_mask=attention_mask, use_cache=False).logits
            logits = model(ids, attention_mask=attention_mask, use_cache=False).logits
            real = slice(None) if attention_mask is None else mask.bool()
            assert (logits - expected)[real].abs().max() <= 1e-5 * expected.abs().max()
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "disable_compile": True}
    expected = source.generate(ids, attention_mask=mask, **kwargs)
    for name, options in CACHES.items():
        output = model.generate(ids, attention_mask=mask, **kwargs, **options)
        same = expected
        if (family, name) == ("llama-dynamic", "no-cache"):
            # It rotates anew, by other frequencies, what is not cached: another function, in the source as well.
            same = source.generate(ids, attention_mask=mask, **kwargs, **options)
        assert torch.equal(output.sequences, same.sequences), name
        if name == "dynamic":
            assert cache_nbytes(getattr(output, CACHE_NAME)) <= cache_nbytes(getattr(expected, CACHE_NAME))


@pytest.mark.parametrize("family", once_but(["llama", "qwen3", "granite"], "granite"))
def test_half_precision_and_shards(family, tmp_path, capsys):
    """What is folded into weights would be rounded: such models are written in float32, others as they are."""
    save_source(tmp_path / "source", family, dtype=torch.bfloat16, max_shard_size="100KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    args = ["hf", str(tmp_path / "source"), str(tmp_path / "t6"), "--max-shard-size", "50KB"]
    assert main(args) == 0
    assert "verified: logits differ by" in capsys.readouterr().out
    shards = list((tmp_path / "t6").glob("model-*.safetensors"))
    assert len(shards) > 4 and all(shard.stat().st_size < 60_000 for shard in shards)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "t6", dtype="auto")
    assert model.dtype == (torch.float32 if family == "granite" else torch.bfloat16)
    assert main([*args, "--overwrite", "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "t6", dtype="auto").dtype == torch.bfloat16


def test_companions_come_along(tmp_path):
    folder = save_source(tmp_path / "source")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"t{i}": i for i in range(99)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t2", chat_template="{{ messages }}")
    fast.save_pretrained(folder)
    (folder / "stray.bin").write_bytes(b"x")
    assert main(["hf", str(folder), str(tmp_path / "t6")]) == 0
    names = {path.name for path in (tmp_path / "t6").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "modeling_t6.py"} <= names
    assert "stray.bin" not in names
    assert loaded(tmp_path / "t6").generation_config.bos_token_id == 1
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "t6").chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    "model_type, overrides, reason",
    [
        ("olmo2", {}, "normalises the outputs"),
        ("gemma2", {}, "caps attention scores"),
        ("cohere", {}, "side by side"),
        ("stablelm", {}, "LayerNorms with biases"),
        ("mixtral", {"num_local_experts": 2}, "mixture of experts"),
        ("gpt2", {}, "not known to be Llama-shaped"),
        ("olmo", {"clip_qkv": 5.0}, "clip_qkv=5.0"),
        ("smollm3", {}, "have no RoPE"),
        ("t6", {}, "T6 model already"),
    ],
)
def test_what_cannot_be_exact_is_refused(model_type, overrides, reason, tmp_path, capsys):
    from transformers import AutoConfig

    AutoConfig.for_model(model_type, **overrides).save_pretrained(tmp_path / "source")
    assert main(["hf", str(tmp_path / "source"), str(tmp_path / "t6")]) == 1
    error = last_error(capsys)
    assert model_type in error and reason in error
    assert not (tmp_path / "t6").exists()


def test_family_names():
    for name in SUPPORTED.keys() | REFUSED.keys() - {"t6"}:
        assert name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, name


def test_a_mismatch_is_refused(tmp_path, monkeypatch, capsys):
    """Verification compares with the source, not with itself."""
    folder = save_source(tmp_path / "source")
    monkeypatch.setattr(
        llama, "group_matrix", lambda h, g: g * torch.eye(g).repeat(1, h // g)
    )  # heads dealt, not blocked
    assert main(["hf", str(folder), str(tmp_path / "t6")]) == 1
    assert "verification failed: logits differ" in capsys.readouterr().err
    assert not (tmp_path / "t6").exists() and not list(tmp_path.glob(".t6*"))
