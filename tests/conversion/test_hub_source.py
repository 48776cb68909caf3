"""Models converted straight from the Hub, here a server that speaks its protocol."""

import codecs
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_t6 import T6ForCausalLM

from ..hub_upload.common import ROOT, environment
from ..hub_upload.hub_server import HubServer, Repository
from ..processes import run
from .common import save_source


# One process for all: importing takes longer than converting.
CHILD = """
import json, sys
from conversion.__main__ import main
for arguments in json.loads(sys.argv[1]):
    print("=====", file=sys.stderr)
    print(main(["hf", *arguments]), file=sys.stderr)
"""


@pytest.mark.once
def test_converts_from_the_hub(tmp_path):
    save_source(tmp_path / "source", "qwen2", "gqa", max_shard_size="100KB")
    with HubServer() as hub:
        repository = hub.repositories["someone/llama"] = Repository("someone/llama", private=False)
        repository.change(**{path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()})
        good = repository.resolve("main").sha
        repository.change(**{"pytorch_model.bin": b"a pickle", "config.json": b"{}", "original/weights.pth": b"more"})
        refused = hub.repositories["someone/mixtral"] = Repository("someone/mixtral", private=False)
        refused.change(**{"config.json": b'{"model_type": "mixtral"}', "model.safetensors": b"hours of download"})
        # With byte order marks in what is downloaded before the weights, and with them; and with an adapter beside.
        files = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
        marked = {name: codecs.BOM_UTF8 + content for name, content in files.items() if name.endswith(".json")}
        for name, more in (("marked", marked), ("adapter", {"adapter_config.json": b"{}"})):
            hub.repositories[f"someone/{name}"] = Repository(f"someone/{name}", private=False)
            hub.repositories[f"someone/{name}"].change(**(files | more))
        hub.repositories["someone/private"] = Repository("someone/private", private=True)

        calls = [
            (["someone/llama", "t6", "--revision", good], None),
            (["someone/marked", "marked"], None),
            (["someone/adapter", "other"], "adapter_config.json"),
            # At the newest commit its configuration is none; what is private or not there is named.
            (["someone/llama", "other"], "config.json"),
            (["someone/mixtral", "other"], "mixture of experts"),
            (["someone/private", "other"], "someone/private"),
            (["someone/nothing", "other"], "someone/nothing"),
            (["someone/llama", "other", "--revision", "no-such-branch"], "someone/llama"),
        ]
        for arguments, _ in calls:
            arguments[1] = str(tmp_path / arguments[1])
        process = run(
            CHILD, json.dumps([arguments for arguments, _ in calls]), env=environment(hub, tmp_path / "home"), cwd=ROOT
        )
        outputs = process.stderr.split("=====\n")[1:]
        assert len(outputs) == len(calls), process.stderr
        for (_, named), output in zip(calls, outputs):
            *_, message, code = output.strip().splitlines()
            assert code == ("0" if named is None else "1"), output
            assert named is None or message.startswith("error: ") and named in message, output
        assert not (tmp_path / "other").exists()
        source = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
        model = T6ForCausalLM.from_pretrained(tmp_path / "t6").eval()
        ids = torch.randint(2, 99, (2, 20), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = source(ids).logits
            assert (model(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        report = json.loads((tmp_path / "t6" / "conversion.json").read_text())
        assert (report["base_model"], report["source"]) == ("someone/llama", "someone/llama")

        # No weights of what is refused by its configuration were asked for.
        for repository, asked in (("llama", True), ("mixtral", False)):
            assert hub.requests("HEAD", rf"{repository}/resolve/.*config.json")
            assert bool(hub.requests("HEAD", rf"{repository}/resolve/.*safetensors")) == asked
        # Neither pickles nor what lies in other folders was asked for.
        assert not hub.requests("GET", r"resolve/.*(pytorch_model|original)")
