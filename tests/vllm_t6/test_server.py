"""`vllm serve` as anyone starts it, on the folder that this repository ships: no code of the folder is trusted or needed."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from modeling_t6 import T6ForCausalLM

from ..processes import free_port


FOLDER = Path(__file__).parents[2] / "examples" / "t6-tiny-shakespeare"


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(FOLDER)]
    command += ["--served-model-name", "t6", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--kv-cache-memory-bytes", "64M", "--enforce-eager"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        assert server.poll() is None, log.read_text()[-5000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def stream(url: str, **fields) -> list[str]:
    """The pieces of text of a streamed completion."""
    body = json.dumps({"model": "t6", "stream": True, "temperature": 0} | fields).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        lines = [line.decode().removeprefix("data: ").strip() for line in response if line.strip()]
    assert lines.pop() == "[DONE]"
    return [json.loads(line)["choices"][0]["text"] for line in lines]


def metric(url: str, name: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
    return sum(float(value) for value in re.findall(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))


def test_streamed_completion(url):
    prompt = "ROMEO:\nWhat light through yonder window"
    tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), T6ForCausalLM.from_pretrained(FOLDER).float().eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    pieces = stream(url, prompt=prompt, max_tokens=40)
    assert len(pieces) >= 30
    assert "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)


def test_pages_are_given_back(url):
    """Those of a request that runs count as used, and those of one whose client has gone are free."""
    body = json.dumps({"model": "t6", "stream": True, "prompt": "ROMEO:", "max_tokens": 480, "ignore_eos": True})
    request = urllib.request.Request(f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"})
    before = metric(url, "generation_tokens_total")
    with urllib.request.urlopen(request, timeout=300) as response:
        response.readline()
        used = [metric(url, "kv_cache_usage_perc") for _ in range(10)]
    assert max(used) > 0
    for _ in range(100):
        if metric(url, "num_requests_running") + metric(url, "kv_cache_usage_perc") == 0:
            break
        time.sleep(0.2)
    assert metric(url, "num_requests_running") == metric(url, "kv_cache_usage_perc") == 0
    assert 0 < metric(url, "generation_tokens_total") - before < 480
