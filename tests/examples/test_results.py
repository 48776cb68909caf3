"""Files of results."""

import json

import pytest

from command_line import InputError
from results import open_results, read_results


HEADER = {"settings": {"steps": 7, "size": 3}, "data": "abc"}


def test_results(tmp_path):
    path = tmp_path / "r.json"
    assert open_results(path, "x.py", HEADER) == {**HEADER, "runs": {}} and not path.exists()
    path.write_text(json.dumps({**HEADER, "torch": "2", "runs": {"a": 1}}))
    assert open_results(path, "x.py", HEADER)["runs"] == {"a": 1}
    for other, message in (
        ({**HEADER, "settings": {"steps": 8, "size": 3}}, "r.json has steps=7, this command 8"),
        ({**HEADER, "data": "abd"}, "r.json has data=abc, this command abd"),
        ({**HEADER, "rate": 1}, "r.json is no file of x.py: expected the fields settings, data, rate, runs"),
    ):
        with pytest.raises(InputError, match=message):
            open_results(path, "x.py", other)
    for text in ("[]", "{", '{"runs": {}}'):
        path.write_text(text)
        with pytest.raises(InputError, match="r.json is no file of x.py"):
            read_results(path, "x.py")
