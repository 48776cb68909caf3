"""The benchmark of long contexts: which text it heals on, and what its processes are told."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from conversion.files.errors import ConversionError
from tests.conversion.evaluate.test_tasks import characters


pytestmark = pytest.mark.once


@pytest.fixture
def long_context(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import long_context

    return long_context


@pytest.mark.parametrize("at_first, later, most", [(0.1, 0.3, 10_000), (0.3, 0.1, 10_000), (0.1, 0.1, 150)])
def test_steps_fit_into_the_time(at_first, later, most, long_context, monkeypatch):
    """Also where steps become slower, or faster, than they were at first; and the rate has come to its end by then."""
    compression, clock = sys.modules[long_context.Deadline.__module__], [1000.0]
    monkeypatch.setattr(compression, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False)))
    monkeypatch.setattr(compression, "time", SimpleNamespace(time=lambda: clock[0]))
    state = SimpleNamespace(global_step=0, max_steps=most, is_world_process_zero=False)
    scheduler = SimpleNamespace(lr_lambdas=[lambda step: 1.0] * 2)
    deadline = long_context.Deadline(1100.0, final=0.0)
    while state.global_step < state.max_steps:
        state.global_step += 1
        clock[0] += at_first if state.global_step < 300 else later
        deadline.on_step_end(SimpleNamespace(world_size=1, max_steps=most), state, None, scheduler)
    assert state.global_step == most if most == 150 else abs(clock[0] - 1100) < compression.LOOKED_AT * later
    assert [rate(state.global_step) for rate in scheduler.lr_lambdas] == [0.0, 0.0]


def test_one_model_in_a_folder(long_context, tmp_path, monkeypatch):
    """Results of another would stand beside its own."""
    common = ["--text", "t", "--held-out", "h", "--work", str(tmp_path)]

    def check(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["long_context.py", *words, *common])
        long_context.check_work(long_context.parse_args())

    check("first.gguf")
    check("first.gguf", "--heal-minutes", "9")
    for words, named in (
        (["other.gguf"], "MODEL first.gguf, not other.gguf"),
        (["first.gguf", "--samples", "96"], "--samples 24, not 96"),
    ):
        with pytest.raises(SystemExit, match=f"{named}: expected another --work"):
            check(*words)


def test_short_texts_are_read_as_one(long_context, tmp_path):
    texts = {"text": "t" * 70, "a": "a" * 20, "b": "b" * 20}
    files = {name: tmp_path / name for name in texts}
    for name, content in texts.items():
        files[name].write_text(content)
    text, others = files["text"], [files["a"], files["b"]]
    first, second = long_context.healing_windows(characters(), text, others, 32, 16)
    assert first.shape == second.shape == (6, 32)  # three quarters of 16, and as many of each
    assert (first == ord("t")).all()
    assert "".join(map(chr, second[0].tolist())) == "a" * 20 + "\n" + "b" * 11
    (alone,) = long_context.healing_windows(characters(), text, [], 32, 16)
    assert alone.shape == (12, 32)
    for given, length, message in (
        (others, 48, f"--heal-text {others[0]} {others[1]} has 41"),
        ([], 99, f"--text {text} has 70"),
    ):
        with pytest.raises(ConversionError, match=f"{message} tokens: expected at least one window of {length}"):
            long_context.healing_windows(characters(), text, given, length, 16)


def test_processes_get_all_options_but_steps(long_context, tmp_path, monkeypatch):
    """Also a model whose name is that of a step."""
    begun = []

    def begin(command, **options):
        begun.append(command[2:])
        return Mock(**{"poll.return_value": 0, "returncode": 0})

    monkeypatch.setattr(subprocess, "Popen", begin)
    words = ["source", "--text", "a b", "--held-out", "heads", "--work", str(tmp_path)]
    monkeypatch.setattr(
        sys, "argv", ["long_context.py", *words, "--steps", "new-2", "healed-2", "--steps", "--steps", "heads"]
    )
    long_context.side_by_side(long_context.parse_args())
    assert begun == [[*words, "--steps", "new-2", "healed-2"], [*words, "--steps", "heads"]]
