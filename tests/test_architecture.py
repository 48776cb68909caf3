"""The tree imports what docs/architecture.md says, and nothing else."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
# Folders at the top of a checkout that are not of the tree.
OTHERS = ("build", "dist", "runs")

pytestmark = pytest.mark.once


def read_rules(page: str) -> dict[str, list[str]]:
    """
    The page's block of `imports`: by file or folder, in dotted names, the files and folders that it may import. A name that
    begins with a dot is one of the same folder.
    """
    (block,) = re.findall(r"^```imports\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    rules = {}
    for line in block.splitlines():
        name, arrow, allowed = line.partition("->")
        name = name.strip()
        assert arrow and name not in rules, f"{line!r}: expected `name -> name, name`, one line for each name"
        folder = name.rpartition(".")[0]
        rules[name] = [
            folder + word if word.startswith(".") else word for word in re.split(r",\s*", allowed.strip()) if word
        ]
    return rules


def find_modules(root: Path) -> dict[str, Path]:
    """The Python files of the tree by dotted name. Links, as a model folder has them to its code, are left out."""
    # Other folders are not looked into: environments, which change as others are made beside the tests.
    tops = [path for path in root.iterdir() if not path.name.startswith(".") and path.name not in OTHERS]
    files = [top for top in tops if top.suffix == ".py"] + [path for top in tops for path in top.rglob("*.py")]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(files) if not path.is_symlink()
    }


def find_imports(name: str, modules: dict[str, Path]) -> set[str]:
    """The files of the tree that one of them imports, anywhere in it."""
    folder = name.rpartition(".")[0]
    # A script finds those beside it by their names alone.
    is_script = f"{folder}.__init__" not in modules
    found = set()
    for node in ast.walk(ast.parse(modules[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = folder.split(".")[: folder.count(".") + 2 - node.level] if node.level else []
            names = [".".join([*start, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        for imported in names:
            found |= set(resolve(imported, modules) or (resolve(f"{folder}.{imported}", modules) if is_script else []))
    return found - {name}


def resolve(imported: str, modules: dict[str, Path]) -> list[str]:
    """The file that a dotted name is of, or is in; none if that is not of the tree."""
    while imported:
        for module in (imported, f"{imported}.__init__"):
            if module in modules:
                return [module]
        imported = imported.rpartition(".")[0]
    return []


def is_in(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


def find_faults(root: Path, page: str) -> list[str]:
    """What the tree and the page say differently, one line each, and circles of imports."""
    rules, modules = read_rules(page), find_modules(root)
    faults = [
        f"the page names {name}, which is not there"
        for name in sorted({*rules, *(name for names in rules.values() for name in names)})
        if not any(is_in(module, name) for module in modules)
    ]
    arrows, used = {}, set()
    for module in modules:
        if is_in(module, "tests"):  # which may import everything
            continue
        arrows[module] = find_imports(module, modules)
        entry = max((name for name in rules if is_in(module, name)), key=len, default=None)
        if entry is None:
            faults.append(f"the page does not name {module}")
            continue
        for imported in sorted(arrows[module]):
            places = [place for place in (entry, *rules[entry]) if is_in(imported, place)]
            used |= {(entry, place) for place in places}
            if not places:  # files that one line stands for may import each other
                faults.append(f"{module} imports {imported}")
    faults += [
        f"the page lets {name} import {place}, which it does not"
        for name, places in rules.items()
        for place in places
        if (name, place) not in used
    ]
    # What imports nothing that is left, or is imported by nothing that is left, is in no circle.
    while ends := [
        module
        for module in arrows
        if not arrows[module] & arrows.keys() or not any(module in imported for imported in arrows.values())
    ]:
        for module in ends:
            del arrows[module]
    if arrows:
        faults.append(f"a circle is in the imports of {', '.join(sorted(arrows))}")
    return faults


def test_imports_are_those_of_the_page():
    assert find_faults(ROOT, PAGE.read_text(encoding="utf-8")) == []


def test_faults_are_found(tmp_path):
    files = {
        "model/__init__.py": "from .cache import Cache",
        "model/cache.py": "import torch",
        "model/attention.py": "from . import cache\nfrom .kernels import decode",
        "model/kernels.py": "def decode():\n    from .attention import attend",
        "tools/files/read.py": "from ...model import cache",
        "tools/files/write.py": "from .read import x",
        "tools/convert.py": "try:\n    from ..model.cache import Cache\nexcept ImportError:\n    from tools.files import write",
        "scripts/train.py": "import common\nimport model.attention",
        "scripts/common.py": "import tests.helper",
        "new/file.py": "",
        "tests/helper.py": "import scripts.train",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "tools" / "__init__.py").touch()
    (tmp_path / "scripts" / "linked.py").symlink_to(tmp_path / "model" / "attention.py")
    page = "\n".join(
        [
            "# A page",
            "```imports",
            "model.__init__ -> .cache",
            "model.cache ->",
            "model.attention -> .cache, .kernels",
            "model.kernels ->",
            "model.gone -> .cache",
            "tools -> tools.files",
            "tools.files -> model",
            "scripts -> model.cache",
            "```",
        ]
    )
    assert find_faults(tmp_path, page) == [
        "the page names model.gone, which is not there",
        "model.kernels imports model.attention",
        "the page does not name new.file",
        "scripts.common imports tests.helper",
        "scripts.train imports model.attention",
        "tools.convert imports model.cache",
        "the page lets model.gone import model.cache, which it does not",
        "the page lets scripts import model.cache, which it does not",
        "a circle is in the imports of model.attention, model.kernels",
    ]
