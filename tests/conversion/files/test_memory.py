"""How much memory is free, on systems that say less than Linux."""

import math
import os

import pytest

from conversion.files.memory import available_memory


pytestmark = pytest.mark.once


def test_what_is_free_is_no_more_than_there_is():
    assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("known, expected", [({"SC_PHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}, 7 * 4096), ({}, math.inf)])
def test_where_the_system_does_not_say_models_are_not_taken_for_too_large(known, expected, monkeypatch):
    """macOS knows how much there is, not how much of it is free."""

    def sysconf(name: str) -> int:
        if name not in known:
            raise ValueError("unrecognized configuration name")
        return known[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert available_memory() == expected
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    assert available_memory() == math.inf
