"""
What the benchmarks of vLLM share, none of which imports it: folders of models, a server in a process of its own, requests to it,
and what it says of itself. Asks for nothing that vLLM does not document: its server, the OpenAI endpoints and /metrics.
"""

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from options import ROOT


if TYPE_CHECKING:
    import aiohttp


def model_folders(names: list[str], directory: Path, context: int) -> dict[str, Path]:
    """
    Folders in `directory` by the last part of their names, with nothing but a config.json each, which is enough for random
    weights.

    Args:
        names: of folders with a config.json, or of those in configuration/.
        context: tokens that a model has positions for, at the least.
    """
    folders = {}
    for name in names:
        places = (Path(name), ROOT / "configuration" / name)
        source = next((place for place in places if (place / "config.json").is_file()), None)
        if source is None:
            sys.exit(f"--models: {name} is neither a folder with a config.json nor one of {ROOT / 'configuration'}")
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config["max_position_embeddings"] = max(config["max_position_embeddings"], context)
        folder = directory / source.resolve().name
        if folder.name in folders:
            sys.exit(f"--models: two are called {folder.name}")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        folders[folder.name] = folder
    return folders


def gpu_query(field: str) -> str | None:
    """What nvidia-smi says of the first GPU, or None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None


def machine() -> str:
    return gpu_query("name") or f"CPU {platform.machine()}, {os.cpu_count()} cores"


def command_line(engine: dict) -> list[str]:
    """The arguments of `LLM(...)` as those of `vllm serve`."""
    words = []
    for key, value in engine.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return words


class Server:
    """vLLM's OpenAI server on a port of its own, until the end of the `with`; `wait` for it to have started."""

    def __init__(self, folder: Path, engine: dict, log: Path, start_seconds: float = 600):
        """
        Args:
            engine: arguments as of `LLM(...)`.
            log: file that takes what the server prints.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log, self.start_seconds = f"http://127.0.0.1:{port}", log, start_seconds
        try:
            importlib.metadata.version("vllm")
            entry = ["vllm.entrypoints.cli.main", "serve", str(folder)]
        except importlib.metadata.PackageNotFoundError:
            # A build for CPUs, which goes by another name, and there `vllm serve` does not find its own version.
            entry = ["vllm.entrypoints.openai.api_server", "--model", str(folder)]
        # As a module, since a vLLM that was unpacked onto PYTHONPATH has no command.
        self.command = [sys.executable, "-m", *entry, "--host", "127.0.0.1"]
        self.command += ["--port", str(port), "--served-model-name", "model", *command_line(engine)]

    def __enter__(self) -> "Server":
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        return self

    def wait(self) -> None:
        """Until it answers, or raises RuntimeError with what it printed."""
        start = time.perf_counter()
        while True:
            if self.process.poll() is not None or time.perf_counter() - start > self.start_seconds:
                lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
                # The engine's own reason stands far above the server's last words.
                said = "\n".join(
                    [line for line in lines if "Error: " in line and "WARNING" not in line] or lines[-20:]
                )
                raise RuntimeError(f"The server did not start: {' '.join(self.command)}\n{said}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            time.sleep(0.5)

    def __exit__(self, *exception) -> None:
        # The group, since the engine is a process beside the server; ended twice, in case the first is not heard.
        for number, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read().decode()

    def version(self) -> str:
        return json.loads(self.get("/version"))["version"]

    def metrics(self) -> dict[str, float]:
        """What /metrics counts, by name, and `num_gpu_blocks` and `block_size` of the cache."""
        text = self.get("/metrics")
        values: dict[str, float] = {}
        for line in text.splitlines():
            match = re.fullmatch(r"([a-zA-Z_:]+)(?:\{.*\})? ([-+.0-9eE]+)", line)
            if match:
                values[match[1]] = values.get(match[1], 0.0) + float(match[2])
        for name in ("num_gpu_blocks", "block_size"):
            values[name] = float(re.search(rf'vllm:cache_config_info{{.*\b{name}="(\d+)"', text)[1])
        return values


@dataclasses.dataclass
class Answer:
    """The tokens of a streamed answer, when it was asked for, and when each piece of it came (`time.perf_counter`)."""

    asked: float
    tokens: list[int] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def first_token_seconds(self) -> float:
        return self.times[0] - self.asked

    @property
    def inter_token_seconds(self) -> Iterator[float]:
        """Between pieces, as `vllm bench serve` counts them: a piece may hold more than a token."""
        return (after - before for before, after in zip(self.times, self.times[1:]))


def session() -> "aiohttp.ClientSession":
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=aiohttp.ClientTimeout(total=600)
    )


async def complete(
    client: "aiohttp.ClientSession",
    url: str,
    prompt: list[int],
    new_tokens: int,
    leave_after: int | None = None,
) -> Answer:
    """
    The greedy answer, of exactly `new_tokens` tokens.

    Args:
        leave_after: tokens after which the connection is closed; with 0, as soon as the server has begun to answer.
    """
    body = {
        "model": "model", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "return_token_ids": True,
    }  # fmt: skip
    answer = Answer(time.perf_counter())
    async with client.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"The server answered with status {response.status}: {await response.text()}")
        if leave_after == 0:
            response.close()
            return answer
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            now, piece = time.perf_counter(), json.loads(line[len(b"data: ") :])
            if "choices" not in piece:
                raise RuntimeError(f"The server ended an answer with {piece}")
            if tokens := piece["choices"][0]["token_ids"]:
                answer.times.append(now)
                answer.tokens += tokens
            if leave_after is not None and len(answer.tokens) >= leave_after:
                response.close()
                return answer
    if len(answer.tokens) != new_tokens:
        raise RuntimeError(f"The server answered with {len(answer.tokens)} tokens, not the {new_tokens} asked for.")
    return answer


async def at_times(starts: list[float], calls: list) -> list:
    """The results of coroutines, each started so many seconds from now."""

    async def later(start: float, call):
        await asyncio.sleep(start)
        return await call

    return await asyncio.gather(*(later(start, call) for start, call in zip(starts, calls)))
