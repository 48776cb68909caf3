"""What `python -m tests.modeling_t6.*_cases` says of wrong numbers, which a GPU alone would show."""

import math
import sys
from functools import partial

import pytest
import torch

from . import factor_pages_cases
from .random_cases import run_cases


pytestmark = pytest.mark.once


def _run(errors: list[float], seed: int) -> tuple[str, str, float, float]:
    return "a kind", f"case {seed}", errors[seed], 0.1


@pytest.mark.parametrize(
    "errors, failed, worst, processes",
    [
        ([0.05, 0.1, 0.0], [], 0.1, "0"),
        ([0.05, 0.2, 0.0], [1], 0.2, "0"),
        ([0.05, math.nan, 0.0], [1], math.inf, "0"),
        ([math.nan, 0.2, 0.05], [0, 1], math.inf, "1"),
    ],
    ids=str,
)
def test_errors(errors, failed, worst, processes, monkeypatch, capsys):
    """What is not a number is worse than any; in this process and in another."""
    monkeypatch.setattr(sys, "argv", ["cases", "0", "3", processes])
    with pytest.raises(SystemExit) as ended:
        run_cases(partial(_run, errors))
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [f"a kind: case {seed}" for seed in failed]
    assert last == f"3 random cases, {len(failed)} failures; worst errors {{'a kind': {worst}}}"
    assert ended.value.code == bool(failed)


def test_failed_checks(monkeypatch):
    """A case of rows and pages says which of its checks failed, and each of them is run."""

    def check_store(case: dict, device: str) -> None:
        raise AssertionError("query: not near")

    def check_form(case: dict, device: str) -> None:
        formed.append(case["seed"])

    formed = []
    monkeypatch.setattr(factor_pages_cases, "check_store", check_store)
    monkeypatch.setattr(factor_pages_cases, "check_form", check_form)
    threads = torch.get_num_threads()
    try:
        _, case, failures, allowed = factor_pages_cases._run(3)
    finally:
        torch.set_num_threads(threads)
    assert failures == 1 > allowed and formed == [3]
    assert case.endswith("\ncheck_store: query: not near") and "check_form" not in case
