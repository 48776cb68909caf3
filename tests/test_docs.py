"""What the pages point at is there: links, files and names of the code."""

import re
from pathlib import Path

import pytest

from tests.test_architecture import ROOT, find_modules


PAGES = sorted(path for folder in (".", "docs", "configuration") for path in (ROOT / folder).glob("*.md"))
FOLDERS = ("benchmarks", "configuration", "conversion", "docs", "examples", "hub", "modeling_t6", "serving", "tests")
# Pages whose names in code type are all names of this code.
OF_THE_CODE = (
    "architecture",
    "converting",
    "flash_tpa",
    "flash_tpa_kernels",
    "studying",
    "training",
    "training_speed",
)

pytestmark = pytest.mark.once


def anchors(page: Path) -> set[str]:
    """Those that a heading gets: its words in lower case, joined by hyphens."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.name if page.parent == ROOT else page.parent.name + page.name
)
def test_links_and_files(page):
    text, missing = page.read_text(encoding="utf-8"), []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    for name in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w/.-]*\w", text):
        if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}.*")):
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", *(f"docs/{name}.md" for name in OF_THE_CODE)])
def test_names_are_in_the_code(page):
    names = set(re.findall(r"`([A-Za-z_][\w.]*)(?:\(\))?`", (ROOT / page).read_text(encoding="utf-8")))
    names = {part for name in names if not (ROOT / name).exists() for part in name.split(".")}
    words = set()
    for path in find_modules(ROOT).values():
        words |= set(re.findall(r"\w+", path.read_text(encoding="utf-8"))) | {path.stem}
    assert sorted(names - words) == []
