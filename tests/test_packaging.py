"""What an installation puts into site-packages: every package of the checkout, under two names."""

import importlib
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import Distribution


ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = {folder: package for package, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items()}
NAMES = {Path(folder).name for folder in MAPPED}

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    with pytest.MonkeyPatch.context() as context:
        context.chdir(ROOT)
        distribution = Distribution({"script_name": "setup.py"})
        distribution.parse_config_files(["pyproject.toml"])
        distribution.include_package_data = False  # which would write what it finds into the checkout
        distribution.get_command_obj("build_py").build_lib = str(folder)
        distribution.run_command("build_py")
    return folder


def test_no_module_is_forgotten(site_packages):
    """The listed packages are those of the tree; beside them go the published configurations and the card's template."""
    expected = set()
    for folder, package in {"modeling_t6": "modeling_t6", "vllm_t6": "vllm_t6", **MAPPED}.items():
        files = [*ROOT.glob(f"{folder}/**/*.py"), *ROOT.glob(f"{folder}/*/config.json"), *ROOT.glob(f"{folder}/*.md")]
        target = package.replace(".", "/")
        expected |= {f"{target}/{path.relative_to(ROOT / folder)}" for path in files}
    assert len(expected) > 60
    assert {str(path.relative_to(site_packages)) for path in site_packages.rglob("*") if path.is_file()} == expected
    assert {path.name for path in site_packages.iterdir()} == {"modeling_t6", "t6_transformers", "vllm_t6"}


def test_commands_run_without_the_checkout(site_packages, monkeypatch):
    """The console commands are found, and nothing that they import is a module of the checkout's top."""
    for name in list(sys.modules):
        if name.split(".")[0] in NAMES:
            monkeypatch.delitem(sys.modules, name)
    elsewhere = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "examples")]
    monkeypatch.setattr(sys, "path", [str(site_packages), *elsewhere])
    try:
        for command, target in PYPROJECT["project"]["scripts"].items():
            assert callable(importlib.metadata.EntryPoint(command, target, "console_scripts").load()), command
        for path in site_packages.glob("t6_transformers/**/*.py"):
            importlib.import_module(".".join(path.relative_to(site_packages).with_suffix("").parts))
        assert not NAMES & {name.split(".")[0] for name in sys.modules}
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "t6_transformers"]:
            del sys.modules[name]


def test_the_shipped_model_has_all_files_of_its_code():
    links = {path.name: path.resolve() for path in (ROOT / "examples" / "t6-tiny-shakespeare").glob("*.py")}
    assert links == {path.name: path.resolve() for path in (ROOT / "modeling_t6").glob("*_t6.py")}
