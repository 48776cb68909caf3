"""Large checkpoints: the memory that a conversion takes, and what a kill leaves."""

import importlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from transformers import LlamaConfig

from conversion.__main__ import main
from conversion.files.checkpoints import Checkpoint

from ... import processes


ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def conversion_memory() -> Iterator[ModuleType]:
    """The benchmark, a script beside others that it imports from."""
    with pytest.MonkeyPatch.context() as context:
        context.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("conversion_memory")


@pytest.mark.once
def test_memory_does_not_grow_with_the_checkpoint(conversion_memory, tmp_path):
    peaks, convert = [], conversion_memory.CHILD
    for layers in (1, 8):
        config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, vocab_size=8000)
        shards = conversion_memory.write_sparse_checkpoint(tmp_path / f"source-{layers}", config, 80_000_000)
        arguments = ["hf", str(tmp_path / f"source-{layers}"), str(tmp_path / f"t6-{layers}"), "--no-verify"]
        converted = processes.run(convert, *arguments, env=dict(os.environ), cwd=ROOT)
        assert converted.code == 0, converted.stderr
        peaks.append(int(converted.stdout.split()[-1]))
    sizes = [path.stat().st_size for path in shards]
    # A tensor's shard is never in memory whole: all that is beyond the program itself is less than one shard.
    assert sum(sizes) > 3 * max(sizes) and peaks[1] - peaks[0] < 0.5 * max(sizes)


# Converts, and is killed as soon as there is a second shard. Arguments: the target's folder, then those of the conversion.
KILLED = """if True:
    import os, signal, sys, threading, time
    from pathlib import Path
    from conversion.__main__ import main

    def kill():
        while not list(Path(sys.argv[1]).glob(".t6.*.partial/model-00002-*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    sys.exit(main(sys.argv[2:]))"""


@pytest.mark.once
def test_a_kill_leaves_nothing_or_all(conversion_memory, tmp_path, capsys):
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, vocab_size=8000)
    conversion_memory.write_sparse_checkpoint(tmp_path / "source", config, 100_000_000)
    arguments = ["hf", str(tmp_path / "source"), str(tmp_path / "t6"), "--no-verify", "--max-shard-size", "100MB"]
    killed = processes.run(KILLED, str(tmp_path), *arguments, env=dict(os.environ), cwd=ROOT)
    assert killed.code == -signal.SIGKILL, f"the conversion ended before it could be killed: {killed.stderr}"
    assert not (tmp_path / "t6").exists()
    (left,) = tmp_path.glob(".t6.*.partial")
    assert main(arguments) == 0
    assert f"{left} is removed" in capsys.readouterr().out and not left.exists()
    source, result = (Checkpoint(tmp_path / name) for name in ("source", "t6"))
    assert len(result.files) > 2 and result.nbytes >= source.nbytes
