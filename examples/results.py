# Copyright 2026 The T6 for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Results of commands that make many runs: files, to which each call adds the runs that it lacks, and what their reports have in common.
"""

import json
import statistics
from pathlib import Path

from command_line import InputError, read_text


def read_results(path: Path, command: str, fields: tuple[str, ...] = ("settings",)) -> dict:
    """
    Raises:
        InputError: it cannot be read, or has no runs or not all `fields`.
    """
    try:
        results = json.loads(read_text(path))
        complete = {*fields, "runs"} <= results.keys()
    except (json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"{path} is no file of {command}") from error
    if not complete:
        raise InputError(f"{path} is no file of {command}: expected the fields {', '.join([*fields, 'runs'])}")
    return results


def open_results(path: Path, command: str, header: dict) -> dict:
    """
    The results so far, or new ones without runs.

    Args:
        header: what all runs have in common, some of it in a dictionary "settings".

    Raises:
        InputError: the results have another header; it names the first field that differs.
    """
    if not path.exists():
        return {**header, "runs": {}}
    results = read_results(path, command, tuple(header))
    old, new = ({**fields, **fields["settings"]} for fields in (results, header))
    for name in sorted(new, key="settings".__eq__):  # which differ in a field of theirs, if at all
        if old.get(name) != new[name]:
            raise InputError(
                f"{path} has {name}={old.get(name)}, this command {new[name]}: expected another --results"
            )
    return results


def spread(values: list[float]) -> str:
    """The mean, and half of the range where there are several."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.4f}" + (f" ± {half:.4f}" if len(values) > 1 else "")


def markdown_table(columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    """Lines of a table whose rows begin with their names."""
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' --: |' * len(columns)}"]
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def three_panels() -> tuple:
    """
    A figure of matplotlib, and its axes, side by side.

    Raises:
        InputError: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the report needs the package matplotlib") from error
    figure = Figure(figsize=(16, 5), layout="constrained")
    return figure, figure.subplots(1, 3)
