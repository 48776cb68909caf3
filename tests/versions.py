"""Which members of a parametrised test run with the oldest Transformers, too."""

from collections.abc import Hashable, ItemsView, Iterable

import pytest


def once_but(cases: Iterable[Hashable] | ItemsView[Hashable, object], *everywhere: Hashable) -> list:
    """
    The parameters of a test, marked `once` but for those that stand for their kind on every version.

    Args:
        cases: values that are their own ids, or the items of a dictionary of values by their ids; a tuple there is a value
            for each name.
        everywhere: ids of the ones that are not marked.
    """
    cases = dict(cases) if isinstance(cases, ItemsView) else {case: case for case in cases}
    assert set(everywhere) <= set(cases), set(everywhere) - set(cases)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            id=str(name),
            marks=() if name in everywhere else pytest.mark.once,
        )
        for name, value in cases.items()
    ]
