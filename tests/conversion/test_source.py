"""What is said of a SRC that is something else: what is missing, and what to do."""

import json
from pathlib import Path

import pytest

from conversion.__main__ import main

from .common import last_error, save_source
from .sources import research


pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of everything that somebody may give for a model."""
    folder = tmp_path_factory.mktemp("sources")
    save_source(folder / "llama")
    for name, files in {
        "empty": [], "ckpt": ["ckpt.pt"], "gguf": ["llama.Q4.gguf"], "adapter": ["adapter_config.json"],
        "research": ["pytorch_model.bin"],
    }.items():  # fmt: skip
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).write_bytes(b"GGUF" if name == "gguf" else b"other")
    arguments, _ = research.random_checkpoint(heads=5, head_dim=16, q_rank=6, rank=2)
    (folder / "research" / "config.json").write_text(json.dumps({"model_type": "gpt2"} | arguments))
    return folder


SOURCES = {
    "no configuration": ("hf", "empty", "has no config.json: expected a folder as `save_pretrained` writes it"),
    "research checkpoint": ("hf", "ckpt", "`python -m conversion official` reads those"),
    "research folder": ("hf", "research", "is a model of the research code: `python -m conversion official`"),
    "research file": ("hf", "ckpt/ckpt.pt", "`python -m conversion official` reads a ckpt.pt"),
    "gguf file": ("hf", "gguf/llama.Q4.gguf", "llama.Q4.gguf is damaged, or not whole: "),
    "gguf folder": ("hf", "gguf", "has no config.json but GGUF: `python -m conversion hf "),
    "adapter": ("hf", "adapter", "is an adapter alone: merge it into its model"),
    "weights file": ("hf", "llama/model.safetensors", "is a file: expected the folder that it is in"),
    "nowhere": ("hf", "nowhere", "nowhere: there is no such folder"),
    "weights nowhere": ("hf", "nowhere/model.gguf", "there is no such folder"),
    "official, Transformers' folder": ("official", "llama", "of type 'llama': `python -m conversion hf` reads those"),
    "official, empty": ("official", "empty", "has neither config.json nor ckpt.pt"),
    "official, nowhere": ("official", "nowhere", "nowhere: there is no such file or folder"),
    "official, gguf": ("official", "gguf/llama.Q4.gguf", "is GGUF: `python -m conversion hf "),
}


@pytest.mark.parametrize("command, source, message", SOURCES.values(), ids=SOURCES)
def test_what_is_wrong_and_what_to_do(command, source, message, folder, tmp_path, capsys):
    assert main([command, str(folder / source), str(tmp_path / "t6")]) == 1
    error = last_error(capsys)
    assert message in error and source in error
    assert not any(word in error.lower() for word in ("repo id", "as json", "errno"))
    assert not list(tmp_path.iterdir())


def test_paths_and_names(tmp_path, capsys, monkeypatch):
    """What cannot be a name on the Hub is not looked for there; what can is said to be neither."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("gone")
    for source, message in {
        "./model": "there is no such folder", "../model": "there is no such folder", "~/model": "no such folder",
        "models/llama/7b": "no such folder", "runs\\model": "no such folder", "model/": "no such folder",
        "link": "is a link to", "a model": "no folder here, and no name on the Hub (someone/model)",
        "someone/model": "is no folder here, and could not be had from the Hub",
    }.items():  # fmt: skip
        assert main(["hf", source, str(tmp_path / "t6")]) == 1
        error = last_error(capsys)
        assert source in error and message in error and "Repo id" not in error
