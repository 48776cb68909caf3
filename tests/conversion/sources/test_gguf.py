"""GGUF files against Transformers' own loading of them: weights, logits, tokenizer; and files that are not whole."""

import importlib.util
import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.__main__ import main
from conversion.files.checkpoints import Checkpoint
from conversion.sources.gguf import GgufFile
from modeling_t6 import T6ForCausalLM

from ...versions import once_but
from ..common import last_error, source_model


TYPES = gguf.GGMLQuantizationType
# 256 columns are one block of the largest kind, so that every matrix can be of every type.
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 128},  # which Transformers takes for granted
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<e>{% endfor %}"


def quantised(weights: np.ndarray, kind: TYPES) -> np.ndarray:
    """As the package quantises, or, for types that it can only read, blocks of random bits with scales that are finite."""
    try:
        return gguf.quantize(weights, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        random = np.random.default_rng(0)
        blocks = random.integers(0, 256, (*weights.shape[:-1], weights.shape[-1] // block, size), np.uint8)
        scales = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)}
        start, end = scales.get(kind.name, (0, 2))
        halves = random.uniform(0.0005, 0.002, (*blocks.shape[:-1], (end - start) // 2)).astype(np.float16)
        blocks[..., start:end] = halves.view(np.uint8)
        return blocks.reshape(*weights.shape[:-1], -1)


def rotated_pairs(weights: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a Llama's queries or keys as llama.cpp has them, whose RoPE pairs neighbours."""
    return weights.reshape(heads, 2, -1, weights.shape[-1]).swapaxes(1, 2).reshape(weights.shape)


def write_gguf(path: Path, family: str = "llama", kind: TYPES = TYPES.F32, drop=(), tokenizer=True, **changes) -> Path:
    """
    A model with random weights as llama.cpp's converter writes it, matrices of type `kind`.

    Args:
        drop: names of fields and tensors that are left out.
        changes: further fields with their values, or tensors.
    """
    torch.manual_seed(0)
    name = family.split("-")[0]
    model = source_model(name, "gqa", **SIZES | FAMILIES.get(family, {}))
    config = model.config
    writer = gguf.GGUFWriter(path, changes.pop("architecture", name))
    fields = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0, "vocab_size": config.vocab_size,
    }  # fmt: skip
    tensors = {key: changes.pop(key) for key in list(changes) if isinstance(changes[key], np.ndarray)}
    for key, value in (fields | changes).items():
        if key not in drop:
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
            add(f"{name}.{key}", value)
    if tokenizer:
        add_tokenizer(writer)
    map_name = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weights = tensor.numpy()
        for part, heads in (
            ("q_proj.weight", config.num_attention_heads),
            ("k_proj.weight", config.num_key_value_heads),
        ):
            if name == "llama" and key.endswith(part):
                weights = rotated_pairs(weights, heads)
        target = map_name.get_name(key, try_suffixes=(".weight", ".bias"))
        tensors.setdefault(target, weights)
    for key, weights in tensors.items():
        if key not in drop:
            if weights.ndim > 1 and kind != TYPES.F32 and weights.dtype == np.float32:
                writer.add_tensor(key, quantised(weights, kind), raw_dtype=kind)
            else:
                writer.add_tensor(key, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Byte-level BPE with a few letters, two merges, an end of text, and a chat template."""
    tokens = ["<e>", "<|user|>", *map(chr, range(33, 127)), "\u0120", "he", "he\u0120"][:99]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["h e", "he \u0120"])
    writer.add_bos_token_id(0)  # without which Transformers 5.17 has no tokenizer of this kind
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template(CHAT)


def own_loading(path: Path):
    """What Transformers makes of the file."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", once_but(FAMILIES, "llama-tied", "qwen3", "phi3"))
def test_families(family, tmp_path, capsys):
    """Logits, a greedy continuation and the tokenizer are those that Transformers gets from the file itself."""
    path = write_gguf(tmp_path / "m.gguf", family, TYPES.Q8_0)
    assert main(["hf", str(path), str(tmp_path / "t6")]) == 0
    assert "verified: logits differ by" in capsys.readouterr().out
    source, model = own_loading(path), T6ForCausalLM.from_pretrained(tmp_path / "t6").eval()
    assert model.dtype == torch.float32
    ids = torch.randint(2, 99, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = source(ids).logits
        assert (model(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    tokens = [m.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None) for m in (source, model)]
    assert torch.equal(*tokens)
    assert model.generation_config.eos_token_id == source.generation_config.eos_token_id == 0
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t6")
    for text in ("he he 123 x", "<e>he", "The <|user|> hehe"):
        assert tokenizer(text).input_ids == expected(text).input_ids
    message = [{"role": "user", "content": "he"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<|user|>he<e>"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "t6"]


KINDS = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL".split()


# The package gguf reads blocks, with every Transformers the same.
@pytest.mark.parametrize("kind", once_but(KINDS, "F32", "BF16", "Q4_K"))
def test_quantisation_types(kind, tmp_path):
    """Every number is the one that Transformers loads, and is stored in no more bits than it needs."""
    path = write_gguf(tmp_path / "m.gguf", "llama", TYPES[kind], tokenizer=False)
    assert main(["hf", str(path), str(tmp_path / "t6"), "--no-verify"]) == 0
    expected, found = own_loading(path).state_dict(), Checkpoint(tmp_path / "t6")
    half = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    for layer in range(2):
        for name, target in (
            ("q_proj", "q_proj"),
            ("k_proj", "k_b_proj"),
            ("v_proj", "v_b_proj"),
            ("o_proj", "o_proj"),
        ):
            tensor = found.read(f"model.layers.{layer}.self_attn.{target}.weight")
            assert torch.equal(tensor.float(), expected[f"model.layers.{layer}.self_attn.{name}.weight"]), name
            assert tensor.dtype == half
        for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{layer}.{name}.weight"
            assert torch.equal(found.read(name).float(), expected[name]), name
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(found.read(name).float(), expected[name]), name


@pytest.mark.once
def test_pieces(tmp_path, monkeypatch):
    """Rows that are dequantised some at a time are those of a whole tensor."""
    file = GgufFile(write_gguf(tmp_path / "m.gguf", "llama", TYPES.Q6_K, tokenizer=False))
    tensor = next(t for t in file.reader.tensors if t.name == "token_embd.weight")
    whole = file.dequantised(tensor)
    monkeypatch.setattr("conversion.sources.gguf.PIECE", 7 * 256)
    assert np.array_equal(file.dequantised(tensor), whole) and np.array_equal(
        whole, gguf.dequantize(tensor.data, tensor.tensor_type)
    )


@pytest.mark.once
def test_a_file_without_the_ending_and_a_smaller_cache(tmp_path):
    """Stores name files by digests; compression takes a GGUF file as it takes a folder."""
    path = write_gguf(tmp_path / "sha256-ab", "llama", TYPES.Q8_0)
    (tmp_path / "text").write_text("he said 1234 and\n" * 400)
    args = [
        "--k-rank",
        "1",
        "--v-rank",
        "1",
        "--calibration",
        str(tmp_path / "text"),
        "--window",
        "32",
        "--reconstruct-steps",
        "0",
    ]
    assert main(["hf", str(path), str(tmp_path / "t6"), *args]) == 0
    report = json.loads((tmp_path / "t6" / "conversion.json").read_text())
    assert report["source"] == "sha256-ab" and report["source_model_type"] == "llama"
    assert report["source_cache_numbers_per_token"] == 2 * 32 * (2 + 2)
    assert T6ForCausalLM.from_pretrained(tmp_path / "t6").config.k_rank == 1


def shortened(count: int):
    return lambda path: os.truncate(path, path.stat().st_size - count)


def begun(content: bytes):
    return lambda path: path.write_bytes(content + path.read_bytes()[len(content) :])


ROW = np.ones(256, np.float32)
FAULTS = {
    "truncated": ({}, shortened(1000), "is damaged, or not whole"),
    "header-alone": ({}, lambda path: os.truncate(path, 200), "is damaged, or not whole"),
    "empty": ({}, lambda path: os.truncate(path, 0), "is empty: expected a GGUF file"),
    "magic": ({}, begun(b"GGML"), "expected it to begin with b'GGUF', got b'GGML'"),
    "version": ({}, begun(b"GGUF" + struct.pack("<I", 9)), "version 9"),
    "big-endian": ({}, begun(b"GGUF" + struct.pack(">I", 3)), "is damaged, or not whole"),
    "many-tensors": ({}, begun(b"GGUF" + struct.pack("<IQ", 3, 2**60)), "is damaged, or not whole"),
    "architecture": ({"architecture": "granite"}, None, "`general.architecture` is 'granite', which Transformers does not"),
    "refused": ({"architecture": "qwen3moe"}, None, "m.gguf"),
    "no-heads": ({"drop": ["attention.head_count"]}, None, "no field `llama.attention.head_count`: expected an integer"),
    "no-groups": ({"drop": ["attention.head_count_kv"]}, None, "no field `llama.attention.head_count_kv`"),
    "no-norm": ({"drop": ["attention.layer_norm_rms_epsilon"]}, None, "`llama.attention.layer_norm_rms_epsilon`"),
    "text-for-number": ({"block_count": "2"}, None, "`llama.block_count` must be an integer from 1 to 10,000, got '2'"),
    "many-layers": ({"block_count": 999}, None, "`llama.block_count` is 999, more than there are tensors"),
    "odd-groups": ({"attention.head_count_kv": 3}, None, "`llama.attention.head_count` is 8, no multiple of `llama.attention"),
    "rope-scaling": ({"rope.scaling.type": "yarn"}, None, "`llama.rope.scaling.type` is 'yarn', which Transformers"),
    "partial-rope": ({"rope.dimension_count": 16, "attention.key_length": 32}, None, "`llama.attention.key_length` is 32"),
    "no-tensor": ({"drop": ["blk.1.ffn_up.weight"]}, None, "tensors are missing: blk.1.ffn_up.weight"),
    "rope-factors": ({"rope_freqs.weight": ROW[:16]}, None, "rope_freqs.weight has no place in a llama"),
    "a-bias": ({"blk.0.attn_q.bias": ROW}, None, "blk.0.attn_q.bias has no place in a llama of Transformers"),
    "shape": ({"blk.1.attn_norm.weight": ROW[:64]}, None, "blk.1.attn_norm.weight has shape [64], by the file's fields"),
    "vocabulary": ({"vocab_size": 98}, None, "token_embd.weight has shape [99, 256], by the file's fields it must have [98"),
    "integers": ({"blk.1.attn_norm.weight": ROW.astype(np.int32)}, None, "blk.1.attn_norm.weight is of type I32"),
    "not-finite": ({"blk.1.attn_norm.weight": ROW * np.nan}, None, "values that are not finite"),
}  # fmt: skip


# With the oldest, too, what depends on the kinds that Transformers reads.
@pytest.mark.parametrize(
    "changes, damage, message", once_but(FAULTS.items(), "architecture", "refused", "rope-scaling", "truncated")
)
def test_refused(changes, damage, message, tmp_path, capsys):
    path = write_gguf(tmp_path / "m.gguf", "llama", **{"tokenizer": False} | changes)
    if damage is not None:
        damage(path)
    assert main(["hf", str(path), str(tmp_path / "t6")]) == 1
    error = last_error(capsys)
    assert message in error and "m.gguf" in error
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.once
def test_a_damaged_tokenizer_and_no_package(tmp_path, capsys, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"he \xc4\xa0", b"zzzzz"[:4] + b" "))
    assert main(["hf", str(path), str(tmp_path / "t6")]) == 1
    assert "m.gguf: Transformers cannot make a tokenizer of it" in last_error(capsys)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["hf", str(path), str(tmp_path / "t6")]) == 1
    assert 'm.gguf is GGUF, which the package gguf reads: `pip install "gguf' in last_error(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
