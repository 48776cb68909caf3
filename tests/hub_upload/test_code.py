"""The code that a repository carries: what it may not do, and the number by which it is known."""

import ast
import json
import re
import subprocess

import pytest

import hub_upload
from hub import code as hub_code
from hub.code import code_digest, code_files, unsafe_code
from modeling_t6 import T6Config, T6ForCausalLM

from .common import ROOT, SHIPPED, make_model, run


CODE = sorted(path for path in (ROOT / "modeling_t6").glob("*.py") if path.name != "__init__.py")


@pytest.mark.once
@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_code_names_nothing_that_opens_files_connections_or_processes(path):
    source = path.read_text()
    assert unsafe_code(source) == []
    # By another way: the packages that are imported at all, and the words that occur.
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.split(".")[0])
    assert not imported & {
        "sys", "io", "pathlib", "shutil", "subprocess", "socket", "ssl", "http", "urllib", "requests", "httpx",
        "asyncio", "ctypes", "importlib", "pickle", "tempfile", "multiprocessing", "threading", "builtins", "runpy",
    }  # fmt: skip
    assert set(re.findall(r"\bos\.[a-z_]+", source)) <= {"os.environ"}
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    assert not called & {"open", "exec", "eval", "compile", "__import__", "torch.load", "torch.save", "torch.hub.load"}


@pytest.mark.once
@pytest.mark.parametrize(
    "line",
    [
        "import os; os.remove('x')", "import os as o", "from os import environ", "x = os", "from torch import os", "x.load('x')", "import socket", "import subprocess as s", "from urllib import request", "import requests",
        "from pathlib import Path", "import torch.hub", "from torch import hub", "from torch.utils import cpp_extension",
        "from torch.utils.cpp_extension import load_inline", "import torch.distributed as dist", "open('x', 'w')",
        "from torch.distributed.tensor import Shard, init_device_mesh", "from torch.distributed.tensor import *",
        "import torch.distributed.tensor", "from torch.distributed import tensor",
        "x = open", "exec('1')", "eval('1')", "__import__('os')", "torch.save(x, 'x')", "torch.load('x')",
        "torch.ops.load_library('x')", "x.numpy().tofile('x')", "torch.hub.load('a', 'b')",
        "torch.utils.cpp_extension.load('x', [])", "super().push_to_hub('x')", "model.save_pretrained('x')",
        "T6Model.from_pretrained('x')", "from transformers.utils import cached_file",
        "from transformers.utils.hub import cached_file as f", "from huggingface_hub import hf_hub_download",
        "import huggingface_hub", "().__class__.__subclasses__()", "f.__globals__['os']", "torch.os.system('ls')",
        "torch.serialization.os.unlink('x')", "import triton.runtime.cache, ctypes",
        "def f(self):\n    return super().save_pretrained('x')",
    ],
)  # fmt: skip
def test_what_is_refused(line):
    source = (ROOT / "modeling_t6" / "modeling_t6.py").read_text()
    assert unsafe_code(f"{source}\n{line}\n")


def test_what_kernels_and_tensor_parallelism_need_is_allowed():
    lines = "import os", "import triton.language as tl", "x = os.environ.get('TRITON_INTERPRET')", "y = tl.load(x)"
    lines += ("from torch.distributed.tensor import DTensor, Partial, Replicate, Shard",)
    assert unsafe_code("\n".join(lines)) == []


@pytest.mark.once
def test_unsafe_code_is_not_pushed(tmp_path, monkeypatch, capsys):
    make_model(tmp_path / "model")
    package = tmp_path / "root" / "modeling_t6"
    package.mkdir(parents=True)
    for path in CODE:
        (package / path.name).write_bytes(path.read_bytes())
    (package / "cache_t6.py").write_text((package / "cache_t6.py").read_text() + "\n\nimport socket\n")
    monkeypatch.setattr(hub_code, "ROOT", tmp_path / "root")
    assert hub_upload.main([str(tmp_path / "model"), "someone/t6", "--dry-run"]) == 1
    assert "modeling_t6/cache_t6.py is not safe to push: line" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.once
def test_running_code_opens_nothing(tmp_path):
    """Python's own audit events, of which those count that have a line of the code on their stack."""
    code = """if True:
        import json, sys
        sys.dont_write_bytecode = True
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache
        found = []
        kinds = (
            "socket.", "subprocess.", "shutil.", "urllib.", "ctypes.dlopen", "pickle.find_class", "os.system", "os.exec",
            "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link",
        )

        def audit(event, arguments):
            writes = event == "open" and any(letter in str(arguments[1]) for letter in "wax+")
            if not writes and not event.startswith(kinds):
                return
            frame, files = sys._getframe(1), set()
            while frame is not None:
                files.add(frame.f_code.co_filename)
                frame = frame.f_back
            # What an import of torch or Transformers does is not the code's doing.
            if any("transformers_modules" in file for file in files) and not any("importlib" in file for file in files):
                found.append(event)

        sys.addaudithook(audit)
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        ids = torch.randint(1024, (2, 9))
        model(ids, labels=ids).loss.backward()
        for implementation in (None, "static", "offloaded"):
            model.generate(ids, max_new_tokens=3, cache_implementation=implementation, disable_compile=True)
        model(ids, past_key_values=DynamicCache())
        assert type(model).__module__.startswith("transformers_modules.")
        json.dump(found, open("found.json", "w"))
        exec(compile("open('a', 'w').close()", "transformers_modules/x.py", "exec"))
        assert found == ["open"]  # it would have been found"""
    outcome = run(
        code,
        str(SHIPPED),
        env={
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
        },
        cwd=tmp_path,
    )
    assert outcome.code == 0, outcome.output
    assert json.loads((tmp_path / "found.json").read_text()) == []


def test_code_files_are_those_that_transformers_saves(tmp_path):
    """And the shipped model has them all."""
    T6ForCausalLM(
        T6Config(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8)
    ).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.glob("*.py")}
    assert set(code_files()) == names == {path.name for path in SHIPPED.glob("*.py")}


def test_digest_is_that_of_the_command_in_the_card():
    answer = subprocess.run(
        "LC_ALL=C sha256sum *.py | sha256sum", shell=True, cwd=SHIPPED, capture_output=True, text=True
    )
    assert answer.stdout.split()[0] == code_digest(code_files())


def test_digest_tells_names_and_contents_apart(tmp_path):
    contents = {"a.py": "1", "b.py": "2", "B.py": "3"}
    digests = []
    for change in ({}, {"a.py": "2", "b.py": "1"}, {"c.py": ""}, {"a.py": "1\n"}):
        for name, content in (contents | change).items():
            (tmp_path / name).write_text(content)
        files = {name: tmp_path / name for name in contents | change}
        assert code_digest(files) == code_digest(dict(reversed(files.items())))
        digests.append(code_digest(files))
    assert len(set(digests)) == len(digests)
