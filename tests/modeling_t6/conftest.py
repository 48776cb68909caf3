import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import dynamic_module_utils


def _pop_remote_modules() -> dict:
    names = [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def load_remote_class(tmp_path, monkeypatch) -> Iterator[Callable[[Path], type]]:
    """Imports the code in a model's folder as Transformers does, and anew, whatever other tests have imported."""
    others = _pop_remote_modules()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield lambda folder: dynamic_module_utils.get_class_from_dynamic_module("modeling_t6.T6ForCausalLM", str(folder))
    _pop_remote_modules()
    sys.modules.update(others)
