"""The benchmark of long contexts: which text it heals on, and what its processes are told."""

import subprocess
import sys
from pathlib import Path
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
