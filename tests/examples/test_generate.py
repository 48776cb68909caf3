"""The shipped checkpoint and the example that generates with it, run as a user runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import generate


ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "t6-tiny-shakespeare"


def run_example(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    # The repository is not on the path: the model must come from the code in the checkpoint's own folder.
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(cwd / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "examples" / "generate.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.once  # `test_distributed.py` runs the script with the oldest, too
def test_generates_and_measures(tmp_path):
    result = run_example("--max-new-tokens", "12", "--temperature", "0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ROMEO:\n")
    rows = re.findall(r"^(T6|MHA) .*?([\d.]+) +([\d,]+)$", result.stdout, flags=re.MULTILINE)
    cache_bytes = {name: int(number.replace(",", "")) for name, _, number in rows}
    config = json.loads((CHECKPOINT / "config.json").read_text())
    layers, heads, head_dim = (config[key] for key in ("num_hidden_layers", "num_attention_heads", "head_dim"))
    ranks = config["k_rank"] + config["v_rank"]
    assert cache_bytes == {"T6": 2 * layers * ranks * (heads + head_dim), "MHA": 2 * layers * 2 * heads * head_dim}
    assert all(float(speed) > 0 for _, speed, _ in rows)


@pytest.mark.parametrize("arguments", [("--prompt", ""), ("--max-new-tokens", "0")], ids=["empty-prompt", "no-tokens"])
def test_refuses(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    with pytest.raises(SystemExit) as refusal:
        generate.main()
    assert refusal.value.code == 2 and f"error: {arguments[0]}" in capsys.readouterr().err


def test_checkpoint_is_small_and_carries_the_code():
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 10_000_000
    code = {path.name: path.read_text() for path in (ROOT / "modeling_t6").glob("*_t6.py")}
    assert {path.name: path.read_text() for path in CHECKPOINT.glob("*.py")} == code


def test_checkpoint_has_learned_english():
    """Its loss on a text that it has not seen (Julius Caesar is not in its data) is far below that of a uniform guess."""
    import torch
    from transformers import AutoTokenizer

    from modeling_t6 import T6ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, trust_remote_code=True)
    model = T6ForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    text = "BRUTUS:\nThere is a tide in the affairs of men,\nWhich, taken at the flood, leads on to fortune;\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    # A uniform guess costs ln(1024) = 6.9 nats a token; the held-out loss is 3.2, and one sentence varies around it.
    assert loss < 4.5
