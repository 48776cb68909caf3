"""How the source generates, the T6 model generates."""

import json

import pytest
from transformers import AutoModelForCausalLM

from conversion.__main__ import main

from ...versions import once_but
from ..common import save_source


SETTINGS = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.5, "top_k": 5, "suppress_tokens": [3]}


@pytest.mark.parametrize(
    "settings", once_but({"valid": SETTINGS, "without-sampling": {"temperature": 0.5}}.items(), "without-sampling")
)
@pytest.mark.parametrize("file", once_but(["generation_config.json", "config.json"], "config.json"))
def test_generation_settings(file, settings, tmp_path):
    """From their own file, or from config.json, as old models have them; those that Transformers only warns of, too."""
    source = save_source(tmp_path / "source")
    content = json.loads((source / file).read_text())
    if file == "config.json":
        (source / "generation_config.json").unlink()
    (source / file).write_text(json.dumps(content | settings))
    assert main(["hf", str(source), str(tmp_path / "t6")]) == 0
    expected, found = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).generation_config for name in ("source", "t6")
    )
    for name, value in settings.items():
        assert getattr(found, name) == getattr(expected, name) == value, name
