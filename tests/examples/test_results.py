"""Files of results, and that processes do not outlive the one that started them."""

import json
import subprocess
import sys

import pytest

from command_line import InputError
from results import open_results, read_results


HEADER = {"settings": {"steps": 7, "size": 3}, "data": "abc"}

ORPHAN = """
import multiprocessing, os
context = multiprocessing.get_context("spawn")
ready = context.Event()
code = "import results, time; results.end_with_parent(); ready.set(); time.sleep(600)"
context.Process(target=exec, args=(code, {"ready": ready})).start()
ready.wait()
os.kill(os.getpid(), 9)
"""


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


@pytest.mark.once
def test_processes_end_with_their_parent():
    """Who waits for what they print would wait for them, too."""
    path = f"import sys; sys.path[:] = {sys.path}\n"
    result = subprocess.run([sys.executable, "-c", path + ORPHAN], stdout=subprocess.PIPE, timeout=60)
    assert result.returncode == -9
