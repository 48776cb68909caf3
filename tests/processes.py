"""
Processes that know nothing of this package. What each imports first, torch and Triton, takes most of the time in which Transformers is
imported: one process imports it, and forks for the others.
"""

import atexit
import functools
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


# Transformers is left to those that are forked: it reads its settings as it is imported.
SERVER = """
import json, os, sys
import contextlib, torch, torch._dynamo, torch.distributed.tensor
with contextlib.suppress(ImportError):
    import triton.language

for line in sys.stdin:
    request = json.loads(line)
    if not os.fork():
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()

os.chdir(request["cwd"])
os.environ.clear()
os.environ.update(request["env"])
for descriptor, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), descriptor)
sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
sys.argv = ["-c", *request["arguments"]]
exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
"""

# What torchrun does, without starting Python anew: the first process that fails ends the other.
IN_TWO = """
import os
import torch.multiprocessing

def start(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    main()

torch.multiprocessing.start_processes(start, nprocs=2, start_method="fork")
"""


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # ends it: there is no more to read
    return server


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(code: str, *arguments: str, env: dict[str, str], cwd: Path, merged: bool = False) -> Outcome:
    """
    What `python -c code arguments` does, in an environment of its own.

    Args:
        merged: what is written to stderr goes to stdout.
    """
    server = _server()
    with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
        files = {"stdout": stdout.name, "stderr": (stdout if merged else stderr).name}
        request = {"code": code, "arguments": arguments, "env": env, "cwd": str(cwd)} | files
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return Outcome(int(server.stdout.readline()), stdout.read(), stderr.read())


def run_in_two(code: str, *arguments: str, env: dict[str, str], cwd: Path) -> Outcome:
    """As `run`; what `code` defines as `main` is called in two processes of one group."""
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return run(code + IN_TWO, *arguments, env=env | group, cwd=cwd)
