"""Links in a source: a folder from elsewhere must not have files of this machine copied, or read without end."""

import os
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from conversion.__main__ import main
from conversion.files.links import leads_out

from ..common import last_error, save_source


pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("links") / "source")


@pytest.fixture
def private(tmp_path) -> Path:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("private")
    (tmp_path / "private" / "key.jinja").write_text("private")
    return tmp_path / "private" / "key"


NAMES = (
    "LICENSE",
    "tokenizer_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "model.safetensors",
    "config.json",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_a_file_outside_is_not_read(name, relative, source, private, tmp_path, capsys):
    folder = shutil.copytree(source, tmp_path / "source")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../private/key" if relative else private)
    assert main(["hf", str(folder), str(tmp_path / "t6")]) == 1
    message = last_error(capsys)
    assert f"{folder / name} is a link to {private}" in message or name == "config.json" and "config.json" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["private", "source"]


def test_folders_pipes_and_nowhere(source, private, tmp_path, capsys):
    def with_folder(folder: Path) -> None:
        (folder / "chat_templates").symlink_to(private.parent)
        (folder / "chat_template").mkdir()
        (folder / "chat_template" / "a.jinja").symlink_to(private)

    cases = {
        "pipe": (lambda folder: os.mkfifo(folder / "tokenizer.json"), "tokenizer.json is no regular file"),
        "nowhere": (lambda folder: (folder / "NOTICE").symlink_to("nothing"), "nothing, which is not there"),
        "folder": (with_folder, f"a.jinja is a link to {private}"),
    }
    for name, (change, message) in cases.items():
        folder = shutil.copytree(source, tmp_path / name)
        change(folder)
        assert main(["hf", str(folder), str(tmp_path / "t6")]) == 1
        assert message in last_error(capsys)
    assert not (tmp_path / "t6").exists()


def test_official_checkpoints(private, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    for name in ("ckpt.pt", "LICENSE"):
        (tmp_path / "source" / name).symlink_to(private)
        assert main(["official", str(tmp_path / "source"), str(tmp_path / "t6")]) == 1
        assert f"{name} is a link to {private}" in last_error(capsys)
        (tmp_path / "source" / name).unlink()


def test_links_inside_and_to_the_blobs_of_the_cache(source, private, tmp_path):
    """The layout of the Hub's cache, read through a link to its folder, with a link within the folder beside."""
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(source, blobs)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(blobs / "tokenizer.json"))
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (snapshot / "text").write_text("terms")
    (snapshot / "LICENSE").symlink_to("text")
    (snapshot / "unread").symlink_to(private)  # no name that a conversion reads
    (tmp_path / "link").symlink_to(snapshot)
    assert main(["hf", str(tmp_path / "link"), str(tmp_path / "t6"), "--no-verify"]) == 0
    assert not [path for path in (tmp_path / "t6").rglob("*") if path.is_symlink() or path.name == "unread"]
    assert (tmp_path / "t6" / "LICENSE").read_text() == "terms" and (tmp_path / "t6" / "tokenizer.json").exists()
    assert leads_out(snapshot / "unread", snapshot) and not leads_out(snapshot / "config.json", snapshot)
