"""A process that talks to the test server, and small models to push."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from modeling_t6 import T6Config, T6ForCausalLM

from .. import processes
from .hub_server import HubServer


ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "examples" / "t6-tiny-shakespeare"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


class Outcome(NamedTuple):
    code: int
    output: str  # all that the process wrote, its loggers included


def environment(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    """Of a process to which the test server is the Hub, and whose caches are in `home`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return inherited | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # Xet's storage speaks another protocol
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }  # fmt: skip


def run(code: str, *arguments: str, env: dict[str, str], cwd: Path) -> Outcome:
    """Runs `code` in a process of its own, which does not see this package."""
    outcome = processes.run(code, *arguments, env=env, cwd=cwd, merged=True)
    return Outcome(outcome.code, outcome.stdout)


LOOP = """
import json, os, sys, tempfile, time, traceback
import hub_upload
from hub import upload

time.sleep = lambda seconds: print(f"waits {seconds:g} s", file=sys.stderr)
loads = {name: getattr(upload, name) for name in ("available_memory", "load_in_clean_process")}
nothing = {"available_memory": lambda: 0, "load_in_clean_process": lambda *arguments, **options: {}}
for line in sys.stdin:
    request = json.loads(line)
    with tempfile.TemporaryFile() as file:
        saved = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            # None: no process is started to load a model. False: as on a machine into whose memory none fits.
            vars(upload).update(nothing if request["load"] is None else loads)
            if request["load"] is False:
                upload.available_memory = nothing["available_memory"]
            code = hub_upload.main(request["arguments"])
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(saved[0], 1), os.dup2(saved[1], 2)
        os.close(saved[0]), os.close(saved[1])
        file.seek(0)
        output = file.read().decode(errors="replace")
    print(json.dumps([code, output]), flush=True)
"""


class Uploader:
    """
    Another process, in which `hub_upload.py` runs again and again: importing takes longer than most pushes. It does not
    wait where it should, but says for how long it would.
    """

    def __init__(self, hub: HubServer, home: Path):
        self.hub = hub
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP],
            cwd=ROOT,
            env=environment(hub, home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def __call__(self, *arguments: object, token: str | None = "hf_someone", load: bool | None = None) -> Outcome:
        """
        `python hub_upload.py ARGUMENTS`; `load` says whether models are loaded before and after, and whether with their
        numbers. With `None` no process is started for it.
        """
        arguments = [str(argument) for argument in arguments] + (["--token", token] if token else [])
        self.process.stdin.write(json.dumps({"arguments": arguments, "load": load}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise RuntimeError(f"the process ended: {self.errors.read().decode()}")
        return Outcome(*json.loads(answer))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.errors.close()


def make_model(folder: Path, shards: int = 1, seed: int = 0, tokenizer: bool = True, **overrides) -> T6ForCausalLM:
    """A small model with random weights, saved in `shards` files, with the tokenizer of the shipped model."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": 1024, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "head_dim": 8, "q_rank": 2, "k_rank": 1, "v_rank": 2, "max_position_embeddings": 64, "eos_token_id": 0,
    } | overrides  # fmt: skip
    model = T6ForCausalLM(T6Config(**config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    size = sum(parameter.nbytes for parameter in model.parameters())
    if shards == 1:
        model.save_pretrained(folder)
    else:  # the embedding is most of the model: it has a shard for itself, the rest share theirs
        rest = size - model.model.embed_tokens.weight.nbytes
        model.save_pretrained(folder, max_shard_size=rest // (shards - 2))
    assert len(list(folder.glob("*.safetensors"))) == shards
    if tokenizer:
        for name in TOKENIZER:
            (folder / name).write_bytes((SHIPPED / name).read_bytes())
    return model
