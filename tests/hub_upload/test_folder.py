"""What is checked in a folder before anything is sent, and what it is completed with."""

import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, utils

import hub_upload
from hub.folder import REPLACED, TEXTS
from hub.shared import matches
from modeling_t6.modeling_t6 import AUTO_MAP

from ..versions import once_but
from .common import ROOT, make_model


pytestmark = pytest.mark.usefixtures("nothing_is_loaded")


def change_json(path, **changes) -> None:
    content = json.loads(path.read_text())
    content = {key: value for key, value in (content | changes).items() if value is not None}
    path.write_text(json.dumps(content))


def change_tensors(folder, function) -> None:
    tensors = load_file(folder / "model.safetensors")
    function(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_value(tensors, name, value) -> None:
    tensors[name].view(-1)[-1] = value


def change_rope(folder, **changes) -> None:
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    change_json(folder / "config.json", rope_parameters=rope | changes)


def write_template(folder, name, text) -> None:
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)


K_B = "model.layers.1.self_attn.k_b_proj.weight"
BROKEN = {
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "is no folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "other model": (lambda f: change_json(f / "config.json", model_type="llama"), "`model_type` must be 't6', got 'llama'"),
    "bad field": (lambda f: change_json(f / "config.json", k_rank=0), "`k_rank` must be a positive integer"),
    "foreign code": (
        lambda f: change_json(f / "config.json", auto_map=AUTO_MAP | {"AutoModel": "evil.Model"}),
        "AutoModel is 'evil.Model', this package has 'modeling_t6.T6Model'",
    ),
    "auto_map no object": (lambda f: change_json(f / "config.json", auto_map=["x"]), "`auto_map` must be an object"),
    "foreign class": (
        lambda f: change_json(f / "config.json", architectures=["LlamaForCausalLM"]),
        "`architectures` must be one of T6ForCausalLM, .*got \\['LlamaForCausalLM'\\]",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "weights no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "not a readable safetensors"),
    "weights cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        "not a readable safetensors",
    ),
    "tensor missing": (lambda f: change_tensors(f, lambda t: t.pop(K_B)), f"{K_B} are missing from the weights"),
    "tensor unknown": (
        lambda f: change_tensors(f, lambda t: t.update(extra=torch.ones(1))),
        "extra are unknown to config.json, but in the weights",
    ),
    "shape": (
        lambda f: change_tensors(f, lambda t: t.update({K_B: t[K_B][:, :-1].contiguous()})),
        f"{K_B} in model.safetensors has shape \\[8, 15\\], by config.json it is \\[8, 16\\]",
    ),
    "shapes by config": (lambda f: change_json(f / "config.json", v_rank=1), "has shape .* by config.json it is"),
    "dtype": (
        lambda f: change_tensors(f, lambda t: t.update({K_B: t[K_B].half()})),
        f"{K_B} in model.safetensors has dtype torch.float16, by config.json it is torch.float32",
    ),
    "dtype by config": (lambda f: change_json(f / "config.json", dtype="bfloat16"), "by config.json it is torch.bfloat16"),
    "not a number": (
        lambda f: change_tensors(f, lambda t: set_value(t, K_B, torch.nan)),
        f"{K_B} in .* has values that are not finite",
    ),
    "infinity": (lambda f: change_tensors(f, lambda t: set_value(t, K_B, -torch.inf)), "has values that are not finite"),
    "pickle": (lambda f: torch.save({}, f / "pytorch_model.bin"), "pytorch_model.bin: pickles run code"),
    "pickle of a trainer": (lambda f: torch.save({}, f / "training_args.bin"), "training_args.bin: pickles run code"),
    "pickle below": (
        lambda f: ((f / "old").mkdir(), (f / "old" / "optimizer.pt").write_bytes(b"")),
        "old/optimizer.pt: pickles run code",
    ),
    "zip in disguise": (lambda f: torch.save({}, f / "tokenizer.model"), "tokenizer.model: pickles run code"),
    "pickle in disguise": (
        lambda f: (f / "vocab.txt").write_bytes(pickle.dumps(["a"], protocol=4)),
        "vocab.txt: pickles run code",
    ),
    "link out of the folder": (
        lambda f: ((f.parent / "key").write_text("secret"), (f / "LICENSE").symlink_to("../key")),
        "links to files outside of it, which are not pushed: LICENSE -> .*/key",
    ),
    "pipe": (lambda f: os.mkfifo(f / "NOTICE"), "no part of a T6 model: NOTICE"),
    "strays": (
        lambda f: ((f / "notes.txt").write_text("x"), (f / "evil.py").write_text("")),
        "no part of a T6 model: evil.py, notes.txt",
    ),
    "weights below": (
        lambda f: ((f / "checkpoint-1").mkdir(), save_file({"a": torch.ones(1)}, f / "checkpoint-1" / "model.safetensors")),
        "no part of a T6 model: checkpoint-1/model.safetensors",
    ),
    "weights beside": (
        lambda f: save_file({"a": torch.ones(1)}, f / "adapter_model.safetensors"),
        "weights that would not be loaded: adapter_model.safetensors",
    ),
    "index beside": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}'),
        "would not be loaded: model.safetensors.index.json|does not put there",
    ),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        "has no tokenizer: save it there, or pass --no-tokenizer",
    ),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer does not load"),
    "tokenizer with code": (
        lambda f: change_json(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.X", None]}),
        "tokenizer_config.json: `auto_map` names code of its own",
    ),
    "generation config": (
        lambda f: change_json(f / "generation_config.json", max_new_tokens=-3),
        "generation_config.json: .*max_new_tokens",
    ),
    "card": (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "README.md: the metadata cannot be read"),
    "base model": (lambda f: (f / "README.md").write_text("---\nbase_model: 3\n---\n"), "`base_model` must be a name"),
    "report of a conversion": (
        lambda f: (f / "conversion.json").write_text('{"perplexity": [{"model": "x"}]}'),
        "conversion.json is not what `python -m conversion` writes",
    ),
    "report of retrieval": (
        lambda f: (f / "conversion.json").write_text('{"retrieval": [{"model": "x", "exact": "much"}]}'),
        "conversion.json is not what `python -m conversion` writes",
    ),
    "report of losses": (
        lambda f: (f / "conversion.json").write_text(
            '{"retrieval": [{"model": "x", "found": 1, "log_probability": 0, "loss_by_position": [{"first": 1}]}]}'
        ),
        "conversion.json is not what `python -m conversion` writes",
    ),
    "byte order mark": (
        lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf" + (f / "config.json").read_bytes()),
        "config.json begins with a byte order mark",
    ),
    "number of thousands of digits": (
        lambda f: (f / "config.json").write_text('{"a": ' + "1" * 5000 + "}"), "config.json cannot be read as JSON"
    ),
    "endless layers": (
        lambda f: change_json(f / "config.json", num_hidden_layers=10**9),
        "`num_hidden_layers` is 1000000000, the weights hold 2 layers",
    ),
    "endless labels": (lambda f: change_json(f / "config.json", num_labels=10**9), "`num_labels` is 1000000000"),
    "endless heads": (lambda f: change_json(f / "config.json", num_attention_heads=10**12), "by config.json it is \\[10+, 16"),
    "no head size": (lambda f: change_json(f / "config.json", head_dim=0), "config.json: .*`head_dim` must be"),
    "rope_theta text": (lambda f: change_rope(f, rope_theta="10000"), "config.json"),
    "rope_theta null": (lambda f: change_rope(f, rope_theta=None), "config.json"),
    "rope_theta list": (lambda f: change_rope(f, rope_theta=[1e4]), "config.json"),
    "RoPE factor text": (lambda f: change_rope(f, rope_type="linear", factor="2"), "config.json"),
    "no dtype": (lambda f: change_json(f / "config.json", dtype="float99"), "`dtype` must be one such as .*, got 'float99'"),
    "architectures text": (
        lambda f: change_json(f / "config.json", architectures="T6ForCausalLM"), "`architectures` must be one of"
    ),
    "other weights named": (
        lambda f: change_json(f / "config.json", transformers_weights="other.safetensors"),
        "`transformers_weights` must not be there, got other.safetensors",
    ),
    "code of a pipeline": (
        lambda f: change_json(f / "config.json", custom_pipelines={"x": {"impl": "x.X"}}), "`custom_pipelines` must not be"
    ),
    "quantised": (
        lambda f: change_json(f / "config.json", quantization_config={"quant_method": "x"}),
        "`quantization_config` must not be there",
    ),
    "generation config a list": (
        lambda f: (f / "generation_config.json").write_text("[]"), "generation_config.json must hold a JSON object, got a list"
    ),
    "generation config with text": (
        lambda f: change_json(f / "generation_config.json", max_new_tokens="x"), "generation_config.json: "
    ),
    "tokenizer cut off": (
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text()[:-9]),
        "tokenizer.json cannot be read as JSON",
    ),
    "chat template no text": (
        lambda f: change_json(f / "tokenizer_config.json", chat_template=5), "chat template default must be text, got 5"
    ),
    "chat template no template": (
        lambda f: write_template(f, "x", "{% if"), "the chat template x is no template, line 1"
    ),
    "chat template no UTF-8": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"), "does not load from chat_template.jinja, tokenizer.json"
    ),
    "card no UTF-8": (lambda f: (f / "README.md").write_bytes(b"\xff\xfe"), "README.md: the metadata cannot be read"),
    "attributes no UTF-8": (lambda f: (f / ".gitattributes").write_bytes(b"\xff\xfe"), ".gitattributes is not text in UTF-8"),
    "link to other weights": (
        lambda f: ((f / "model.safetensors").rename(f.parent / "secret"), (f / "model.safetensors").symlink_to("../secret")),
        "links to files outside of it, which are not pushed: model.safetensors -> .*/secret",
    ),
    "link to a folder outside": (
        lambda f: ((f.parent / "x").mkdir(), (f / "additional_chat_templates").symlink_to("../x")),
        "links to files outside of it, which are not pushed: additional_chat_templates -> .*/x",
    ),
    "link to a folder inside": (
        lambda f: ((f / ".cache").mkdir(), (f / "additional_chat_templates").symlink_to(".cache")),
        "no part of a T6 model: additional_chat_templates",
    ),
    "link to itself": (lambda f: (f / "LICENSE").symlink_to("LICENSE"), "cannot read .*LICENSE"),
    "shard missing": (
        lambda f: (
            (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'),
        ),
        "model-00002-of-00002.safetensors is missing",
    ),
}  # fmt: skip


# With the oldest Transformers, what its own classes read.
@pytest.mark.parametrize(
    "case", once_but(BROKEN, "bad field", "shape", "tensor missing", "broken tokenizer", "generation config")
)
def test_one_line_errors(folder, capsys, case):
    change, message = BROKEN[case]
    change(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.exists() else {}
    assert hub_upload.main([str(folder), "someone/t6", "--dry-run"]) == 1
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("error: ") and "---\n" not in captured.out
    assert re.search(message, error), error
    assert before == (
        {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.exists() else {}
    )


@pytest.mark.once  # as all that pushes: Transformers has no part in it but of what `--dry-run` checks, too
def test_cheap_checks_come_before_the_weights_are_read(folder, capsys, monkeypatch, hub, uploader):
    monkeypatch.setattr("hub.upload.check_numbers", lambda checkpoint: pytest.fail("the weights are read"))
    (folder / "conversion.json").write_text('{"source": "llama"}')
    assert hub_upload.main([str(folder), "someone/t6", "--dry-run"]) == 1
    assert "pass --license" in capsys.readouterr().err
    assert hub_upload.main([str(folder), "someone/t6", "--dry-run", "--license", "mit", "--eval-results", "none"]) == 1
    assert "none is missing" in capsys.readouterr().err
    for options in (["--token", "hf_nobody"], ["--create-pr"], ["--code-only"]):
        outcome = uploader(
            folder, "someone/none", "--license", "mit", *options, token=None if "--token" in options else "hf_someone"
        )
        assert outcome.code == 1 and "checking weights" not in outcome.output, outcome.output
    assert not hub.repositories


MIXED = {
    "norms": (lambda name: "norm" in name, torch.float32, torch.bfloat16),
    "all but the norms": (lambda name: "norm" not in name, torch.bfloat16, torch.float32),
    "the first layer": (lambda name: ".0." in name, torch.float64, torch.float16),
    "the last layer": (lambda name: ".1." in name, torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("case", MIXED)
def test_mixed_dtypes(folder, capsys, case):
    """As Transformers loads them: in that of config.json, which some tensors have."""
    chosen, dtype, rest = MIXED[case]
    change_tensors(folder, lambda t: t.update({n: x.to(dtype if chosen(n) else rest) for n, x in t.items()}))
    change_json(folder / "config.json", dtype=str(rest).removeprefix("torch."))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {rest}
    assert hub_upload.main([str(folder), "someone/t6", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert f"Transformers loads all in {rest}, config.json's `dtype`" in output
    assert f"| weights | {str(rest).removeprefix('torch.')} as they are loaded; stored in " in output


def test_a_rounded_tensor_among_mixed_ones(folder, capsys):
    """As wide as the others, but with other digits."""
    change_tensors(folder, lambda t: t.update({n: x.half() if n == K_B else x.bfloat16() for n, x in t.items()}))
    change_json(folder / "config.json", dtype="bfloat16")
    assert hub_upload.main([str(folder), "someone/t6", "--dry-run"]) == 1
    assert (
        f"{K_B} in model.safetensors has dtype torch.float16, by config.json it is torch.bfloat16"
        in capsys.readouterr().err
    )


@pytest.mark.once
def test_a_snapshot_in_the_cache(folder):
    """Its files are links: into the cache's own `blobs`, and nowhere else."""
    snapshot = folder.parent / "snapshots" / "0123"
    snapshot.parent.mkdir()
    (folder.parent / "blobs").mkdir()
    folder.rename(snapshot)
    for path in list(snapshot.iterdir()):
        path.rename(folder.parent / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert hub_upload.main([str(snapshot), "someone/t6", "--dry-run"]) == 0
    snapshot.parent.rename(folder.parent / "others")
    assert hub_upload.main([str(folder.parent / "others" / "0123"), "someone/t6", "--dry-run"]) == 1


def test_tokens_beyond_the_vocabulary(tmp_path, capsys):
    make_model(tmp_path, vocab_size=1000)
    assert hub_upload.main([str(tmp_path), "someone/t6", "--dry-run"]) == 1
    assert "the tokenizer has token 1023, by config.json `vocab_size` is 1000" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["t6", "a/b/c", "some one/t6", "someone/", "someone/a--b", "x" * 200 + "/y"])
def test_names_of_repositories(folder, capsys, name):
    assert hub_upload.main([str(folder), name, "--dry-run"]) == 1
    assert "is no name of a repository" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--create-pr", "--revision", "x"], ["--create-pr", "--private"], ["--commit-message", " "],
                ["--revision", "0123456789" * 4], ["--revision", "refs/heads/x"], ["--token", ""], ["--max-shard-size", "0"], ["--max-shard-size", "big"]]
)  # fmt: skip
def test_bad_options(folder, capsys, options):
    with pytest.raises(SystemExit) as caught:
        hub_upload.main([str(folder), "someone/t6", *options])
    assert caught.value.code == 2 and options[0] in capsys.readouterr().err


@pytest.mark.once
def test_tokens(hub, uploader, folder):
    assert "there is no token: pass --token" in uploader(folder, "someone/t6", token=None).output
    outcome = uploader(folder, "someone/t6", token="hf_some one")
    assert outcome.code == 1 and "the token has blanks" in outcome.output and "hf_some one" not in outcome.output
    outcome = uploader(folder, "someone/t6", token="hf_nobody")
    assert outcome.code == 1 and "does not accept the token" in outcome.output and "hf_nobody" not in outcome.output
    assert not hub.repositories


@pytest.mark.once
def test_dry_run_contacts_nobody_and_shows_all(hub, uploader, folder):
    outcome = uploader(folder, "someone/t6", "--dry-run")
    assert outcome.code == 0 and hub.log == []
    for path in folder.iterdir():
        assert f"  {path.name}\n" in outcome.output
    assert "LICENSE\n" in outcome.output and f"{(folder / 'model.safetensors').stat().st_size:,}" in outcome.output
    assert "library_name: transformers" in outcome.output and "SHA-256 of the code files: " in outcome.output


@pytest.mark.once
def test_what_a_folder_lacks_is_added(hub, uploader, folder):
    """The folder itself stays as it is."""
    for path in (*folder.glob("*.py"), folder / "generation_config.json"):
        path.unlink()
    change_json(folder / "config.json", auto_map=None, dtype=None, architectures=None)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "left.bin").write_bytes(b"by a download")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert uploader(folder, "someone/t6").code == 0
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files = hub.repositories["someone/t6"].files()
    code = {path.name for path in (ROOT / "modeling_t6").glob("*.py")} - {"__init__.py"}
    expected = {".gitattributes", "README.md", "LICENSE", "config.json", "generation_config.json", "model.safetensors"}
    assert set(files) == expected | code | {"tokenizer.json", "tokenizer_config.json"}
    config = json.loads(files["config.json"])
    assert (config["auto_map"], config["dtype"], config["architectures"]) == (AUTO_MAP, "float32", ["T6ForCausalLM"])
    assert json.loads(files["generation_config.json"])["eos_token_id"] == 0
    assert b"*.safetensors filter=lfs" in files[".gitattributes"]


@pytest.mark.once
def test_old_code_in_the_folder_is_replaced(hub, uploader, folder):
    (folder / "cache_t6.py").write_text("raise SystemExit")
    change_json(folder / "config.json", auto_map={"AutoConfig": f"someone/t6--{AUTO_MAP['AutoConfig']}"})
    outcome = uploader(folder, "someone/t6")
    assert outcome.code == 0 and f"cache_t6.py: the one in {folder} is replaced by this package's" in outcome.output
    files = hub.repositories["someone/t6"].files()
    assert files["cache_t6.py"] == (ROOT / "modeling_t6" / "cache_t6.py").read_bytes()
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP


# What a repository may hold of other models: any of them changes what one of Transformers' readers, or another's, gets.
LEFTOVERS = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "custom_generate/generate.py",
    "custom_generate/requirements.txt", "additional_chat_templates/old.jinja", "chat_template.jinja", "chat_template.json",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.model",
    "tokenizer.model.v3", "tekken.json", "config.4.0.0.json", "tokenizer.5.0.0.json", "helper.py", "pytorch_model.bin",
    "model.safetensors.index.json", "model.fp16.safetensors", "model.safetensors.index.fp16.json", "tf_model.h5",
    "modules.json", "quantize_config.json", "spiece.model", "special_tokens_map.json",
)  # fmt: skip
KEPT = ("a.png", "notes/merges.txt", "LICENSE-OLD", "samples.json", "scripts/run.py")


@pytest.mark.once
def test_what_other_models_left_is_removed(hub, uploader, folder):
    assert uploader(folder, "someone/t6").code == 0
    repository = hub.repositories["someone/t6"]
    before = repository.files()
    repository.change(**dict.fromkeys((*LEFTOVERS, *KEPT), b"of before"))
    outcome = uploader(folder, "someone/t6")
    assert outcome.code == 0, outcome.output
    assert repository.files() == before | dict.fromkeys(KEPT, b"of before")
    removed, staying = (
        next(line for line in outcome.output.splitlines() if line.startswith(start))
        for start in ("removing", "staying")
    )
    assert all(name in removed for name in LEFTOVERS) and all(name in staying for name in KEPT)
    # With --code-only code goes, and what stays and changes the model is named before anything is pushed.
    repository.change(**dict.fromkeys(("custom_generate/generate.py", "chat_template.jinja"), b"of before"))
    assert uploader(folder, "someone/t6", "--code-only").code == 0
    assert set(repository.files()) == {
        *before,
        *KEPT,
        "chat_template.jinja",
    }  # a template is the tokenizer's, which stays
    repository.change(**{"adapter_config.json": b"of before"})
    commits = len(repository.commits)
    outcome = uploader(folder, "someone/t6", "--code-only")
    assert outcome.code == 1 and "someone/t6 holds adapter_config.json, which readers get" in outcome.output
    assert len(repository.commits) == commits


def test_all_files_that_transformers_has_a_name_for_are_replaced():
    names = {v for k, v in vars(utils).items() if k.endswith(("_NAME", "_FILE")) and isinstance(v, str) and "." in v}
    assert {"config.json", "adapter_config.json", "processor_config.json", "chat_template.jinja"} <= names
    assert [name for name in names if not matches(name, REPLACED)] == []
    assert not any(matches(name, REPLACED) for name in (*TEXTS, *KEPT))


@pytest.mark.once
def test_lines_of_gitattributes_stay(hub, uploader, folder):
    assert uploader(folder, "someone/t6").code == 0
    repository = hub.repositories["someone/t6"]
    repository.change(**{".gitattributes": b"*.mp4 filter=lfs diff=lfs merge=lfs -text\n"})
    (folder / ".gitattributes").write_text("*.txt text\n")
    assert uploader(folder, "someone/t6").code == 0
    lines = repository.files()[".gitattributes"].decode().splitlines()
    assert lines[:2] == ["*.mp4 filter=lfs diff=lfs merge=lfs -text", "*.txt text"]
    assert any(line.startswith("*.safetensors filter=lfs") for line in lines)


@pytest.mark.once
def test_other_heads(hub, uploader, tmp_path):
    """A classifier without a tokenizer: task and Auto class follow."""
    from modeling_t6 import T6Config, T6ForSequenceClassification

    config = T6Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
        num_labels=3,
        pad_token_id=0,
    )
    T6ForSequenceClassification(config).to(torch.bfloat16).save_pretrained(tmp_path)
    outcome = uploader(tmp_path, "someone/classifier", "--no-tokenizer")
    assert outcome.code == 0, outcome.output
    assert 'AutoModelForSequenceClassification.from_pretrained("someone/classifier"' in outcome.output
    card = hub.repositories["someone/classifier"].files()["README.md"].decode()
    assert "pipeline_tag: text-classification\n" in card and "AutoTokenizer" not in card


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        hub_upload.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for option in ("--private", "--revision", "--create-pr", "--commit-message", "--dry-run", "--code-only",
                   "--max-shard-size", "--token"):  # fmt: skip
        assert option in text


def test_arguments_are_read_without_torch():
    """So help, and errors in the arguments, come at once."""
    code = "import sys, hub_upload; hub_upload.main(sys.argv[1:])"
    for words in (["--help"], ["a", "b/c", "--max-shard-size", "big"]):
        command = [sys.executable, "-X", "importtime", "-c", code, *words]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        imported = {
            line.rpartition("|")[2].strip() for line in answer.stderr.splitlines() if line.startswith("import time:")
        }
        assert answer.returncode == (0 if words == ["--help"] else 2) and "hub.command" in imported, answer.stderr
        assert not imported & {"torch", "transformers", "huggingface_hub"}
