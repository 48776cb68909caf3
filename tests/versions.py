"""Which members of a parametrised test run with the oldest Transformers, too."""

from collections.abc import Hashable, Iterable, Mapping

import pytest


def once_but(cases: Mapping[Hashable, object] | Iterable[Hashable], *everywhere: Hashable) -> list:
    """
    The parameters of a test, marked `once` but for those that stand for their kind on every version.

    Args:
        cases: values by their ids, or values that are ids themselves.
        everywhere: ids of the ones that are not marked.
    """
    cases = cases if isinstance(cases, Mapping) else {case: case for case in cases}
    assert set(everywhere) <= set(cases), set(everywhere) - set(cases)
    return [
        pytest.param(value, id=str(name), marks=() if name in everywhere else pytest.mark.once)
        for name, value in cases.items()
    ]
