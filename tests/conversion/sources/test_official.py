"""Checkpoints of the research code against an independent reading of its model."""

import codecs
import json

import pytest
import torch

from conversion.__main__ import main
from modeling_t6 import T6ForCausalLM

from ...versions import once_but
from ..common import last_error
from . import research


MODELS = {
    "5-heads": {"heads": 5, "head_dim": 16, "q_rank": 6, "rank": 2},
    "34-heads": {"heads": 34, "head_dim": 16, "q_rank": 6, "rank": 2},
    "47-heads": {"heads": 47, "head_dim": 8, "q_rank": 6, "rank": 2},
    "ranks-12-1": {"heads": 5, "head_dim": 16, "q_rank": 12, "rank": 1},
    "ranks-3-4": {"heads": 6, "head_dim": 16, "q_rank": 3, "rank": 4},
    "kv-only": {"heads": 5, "head_dim": 16, "q_rank": None, "rank": 2},
    "head-norm": {"heads": 5, "head_dim": 16, "q_rank": 6, "rank": 2, "head_norm": True},
    "kv-only-head-norm": {"heads": 5, "head_dim": 16, "q_rank": None, "rank": 2, "head_norm": True},
    "partial-third": {"heads": 5, "head_dim": 16, "q_rank": 6, "rank": 2, "partial": 1 / 3},
    "partial-0.7-kv-only": {"heads": 5, "head_dim": 12, "q_rank": None, "rank": 2, "partial": 0.7},
}


def write(folder, arguments, state, form):
    folder.mkdir()
    if form == "folder":
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | arguments))
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    prefix = {"ckpt": "", "compiled": "_orig_mod.", "ddp": "module.", "both": "_orig_mod.module."}[form]
    state = {prefix + name: tensor for name, tensor in state.items()}
    torch.save(
        {"model": state, "model_args": arguments, "iter_num": 7, "best_val_loss": torch.tensor(3.0)},
        folder / "ckpt.pt",
    )
    return folder / "ckpt.pt" if form == "ddp" else folder


@pytest.mark.parametrize("options", once_but(MODELS.items(), "5-heads", "kv-only-head-norm"))
def test_logits(options, tmp_path, capsys):
    arguments, state = research.random_checkpoint(**options)
    source = write(tmp_path / "source", arguments, state, "folder")
    assert main(["official", str(source), str(tmp_path / "t6")]) == 0
    assert "verified: logits differ by" in capsys.readouterr().out
    model = T6ForCausalLM.from_pretrained(tmp_path / "t6").eval()
    assert model.dtype == torch.float32
    ids = torch.randint(83, (14,), generator=torch.Generator().manual_seed(1))
    expected = research.logits(arguments, state, ids.tolist())
    assert expected.std() > 0.3
    with torch.no_grad():
        assert (model(ids[None], use_cache=False).logits[0] - expected).abs().max() < 1e-4
        double = T6ForCausalLM.from_pretrained(tmp_path / "t6", dtype=torch.float64).eval()
        assert (double(ids[None], use_cache=False).logits[0] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("form", ["ckpt", "compiled", "ddp", "both"])
def test_forms_of_checkpoints(form, tmp_path):
    arguments, state = research.random_checkpoint(**MODELS["5-heads"])
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    source = write(tmp_path / "source", arguments, state, form)
    assert main(["official", str(source), str(tmp_path / "t6"), "--max-shard-size", "20KB"]) == 0
    model = T6ForCausalLM.from_pretrained(tmp_path / "t6", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.embed_tokens.weight, state["transformer.wte.weight"])


def renamed(state, old, new):
    return {name.replace(old, new): tensor for name, tensor in state.items()}


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


B = "transformer.h.1.attn.c_qkv.W_B_k.weight"
DAMAGE = {
    "missing": (lambda a, s: (a, without(s, B)), B),
    "unexpected": (lambda a, s: (a, s | {"transformer.h.9.x.weight": torch.ones(1)}), "transformer.h.9.x.weight"),
    "shape": (lambda a, s: (a, s | {B: s[B][:-1]}), B),
    "rank": (lambda a, s: (a | {"rank": 3}, s), "W_A_k"),
    "vocabulary": (lambda a, s: (a | {"vocab_size": 84}, s), "transformer.wte.weight"),
    "no-rank": (lambda a, s: ({k: v for k, v in a.items() if k != "rank"}, s), "`rank`"),
    "text-rank": (lambda a, s: (a | {"rank": "2"}, s), "`rank`"),
    "true-for-rank": (lambda a, s: (a | {"rank": True}, s), "`rank` must be an integer from 1"),
    "layers-without-end": (lambda a, s: (a | {"n_layer": 10**9}, s), "`n_layer` must be an integer from 1 to 10,000"),
    "heads-without-end": (lambda a, s: (a | {"n_head": 10**9}, s), "`n_head`"),
    "q-rank-without-end": (lambda a, s: (a | {"q_rank": 10**12}, s), "`q_rank`"),
    "partial-text": (lambda a, s: (a | {"rope_partial_factor": "0.5"}, s), "`rope_partial_factor`"),
    "partial-true": (lambda a, s: (a | {"rope_partial_factor": True}, s), "`rope_partial_factor`"),
    "float8": (lambda a, s: (a, s | {B: s[B].to(torch.float8_e4m3fn)}), "float8_e4m3fn"),
    "sparse": (lambda a, s: (a, s | {B: s[B].to_sparse()}), "torch.sparse_coo"),
    "no-q-rank": (lambda a, s: (a | {"q_rank": 0}, s), "`q_rank`"),
    "partial": (lambda a, s: (a | {"rope_partial_factor": 1.5}, s), "`rope_partial_factor`"),
    "norm": (lambda a, s: (a | {"using_groupnorm": True}, s), "subln"),
    "nan": (lambda a, s: (a, s | {B: s[B] * float("nan")}), B),
    "integers": (lambda a, s: (a, s | {B: s[B].int()}), "int32"),
    "not-tensors": (lambda a, s: (a, s | {B: "text"}), B),
    "twice": (lambda a, s: (a, s | {f"module.{B}": s[B]}), "twice"),
    "mha": (lambda a, s: (a, renamed(s, "W_A_k", "c_k")), "W_A_k"),
}


@pytest.mark.parametrize("damage, named", DAMAGE.values(), ids=DAMAGE)
def test_damaged(damage, named, tmp_path, capsys):
    arguments, state = damage(*research.random_checkpoint(**MODELS["5-heads"]))
    source = write(tmp_path / "source", arguments, state, "folder")
    assert main(["official", str(source), str(tmp_path / "t6")]) == 1
    assert named in last_error(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


class Hostile:
    def __reduce__(self):
        return print, ("run while loading",)


@pytest.mark.once
def test_files_of_an_old_torch(tmp_path):
    """Those before 1.6 are no zip files, and cannot be memory-mapped."""
    arguments, state = research.random_checkpoint(**MODELS["5-heads"])
    content = {"model": state, "model_args": arguments}
    torch.save(content, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)
    assert main(["official", str(tmp_path / "ckpt.pt"), str(tmp_path / "t6"), "--no-verify"]) == 0


@pytest.mark.once
def test_companions_of_a_folder(tmp_path, capsys):
    """What lies beside the weights is looked at as in a folder of Transformers."""
    arguments, state = research.random_checkpoint(**MODELS["5-heads"])
    source = write(tmp_path / "source", arguments, state, "folder")
    (source / "config.json").write_bytes(codecs.BOM_UTF8 + (source / "config.json").read_bytes())
    (source / "generation_config.json").write_bytes(codecs.BOM_UTF8 + b"{}")
    assert main(["official", str(source), str(tmp_path / "t6")]) == 0
    assert (tmp_path / "t6" / "generation_config.json").read_bytes() == b"{}"
    for name, content, message in (
        ("generation_config.json", b"[]", "generation_config.json must hold a JSON object"),
        ("tokenizer.json", b"{}", "has no tokenizer that can be loaded"),
    ):
        (source / name).write_bytes(content)
        assert main(["official", str(source), str(tmp_path / "t6"), "--overwrite"]) == 1
        assert message in last_error(capsys)
        (source / name).unlink()
    assert (tmp_path / "t6" / "generation_config.json").read_bytes() == b"{}"


def test_pickles_run_nothing(tmp_path, capsys):
    arguments, state = research.random_checkpoint(**MODELS["5-heads"])
    source = write(tmp_path / "source", arguments, state | {"x": Hostile()}, "folder")
    assert main(["official", str(source), str(tmp_path / "t6")]) == 1
    output = capsys.readouterr()
    assert "more than tensors" in output.err and "run while loading" not in output.out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"text"], ids=["empty", "zip", "text"])
def test_unreadable(content, tmp_path, capsys):
    file = tmp_path / "ckpt.pt"
    file.write_bytes(content)
    assert main(["official", str(file), str(tmp_path / "t6")]) == 1
    assert "ckpt.pt" in capsys.readouterr().err and not (tmp_path / "t6").exists()
    assert main(["official", str(tmp_path / "nowhere"), str(tmp_path / "t6")]) == 1
    assert "nowhere" in capsys.readouterr().err
