"""Where a result may go, what is in its place, and what runs that ended early have left."""

import contextlib
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest

from conversion import convert
from conversion.__main__ import main
from conversion.files import folders
from conversion.files.errors import ConversionError
from conversion.files.folders import new_folder, replace_folder, temporary_folder
from conversion.files.locks import release, take_lock

from ..common import last_error, save_source


pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("targets") / "home" / "source")


def model(folder: Path, **files: str) -> Path:
    """A folder that passes for a model."""
    folder.mkdir(parents=True)
    for name, text in {"config.json": "{}", "model.safetensors": "old", **files}.items():
        (folder / name).write_text(text)
    return folder


def write(target: Path, *arguments, **options) -> None:
    with new_folder(target, *arguments, **options) as folder:
        (folder / "config.json").write_text("new")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def place(name: str, source: Path, folder: Path) -> Path:
    """The target of a case, and what it needs."""
    if name == "link":
        (folder / "link").symlink_to(source)
    if name == "link to above":
        (folder / "link to above").symlink_to(source.parent)
    if name == "below a link":
        (folder / "below").symlink_to(source)
    return {
        "itself": source, "above": source.parent, "below": source / "t6", "far below": source / "a" / "b",
        "link": folder / "link", "link to above": folder / "link to above", "below a link": folder / "below" / "t6",
        "dots": source / ".." / "source",
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["itself", "above", "below", "far below", "link", "link to above", "below a link", "dots"]
)
def test_the_source_stays(name, source, tmp_path, capsys):
    before = content(source.parent)
    target = place(name, source, tmp_path)
    for more in ([], ["--overwrite"]):
        assert main(["hf", str(source), str(target), *more]) == 1
        word = {"above": "holds", "link to above": "holds"}.get(name, "lies in" if "below" in name else "is")
        assert f"{target} {word} SRC" in last_error(capsys)
    assert content(source.parent) == before and not [p for p in source.parent.iterdir() if p.name.startswith(".")]


def test_what_a_link_in_the_source_leads_to_stays(source, tmp_path, capsys):
    """As the Hub's cache has its files."""
    (tmp_path / "repo" / "snapshots" / "abc").mkdir(parents=True)
    shutil.copytree(source, tmp_path / "repo" / "blobs")
    for path in (tmp_path / "repo" / "blobs").iterdir():
        (tmp_path / "repo" / "snapshots" / "abc" / path.name).symlink_to(path)
    before = content(tmp_path)
    target = tmp_path / "repo" / "blobs"
    assert main(["hf", str(tmp_path / "repo" / "snapshots" / "abc"), str(target), "--overwrite"]) == 1
    assert f"{target} holds SRC" in last_error(capsys) and content(tmp_path) == before


@pytest.mark.parametrize("option", ["calibration", "held-out", "heal"])
def test_texts_stay(option, source, tmp_path, capsys):
    model(tmp_path / "t6", **{"README.md": "text"})
    (tmp_path / "other.txt").write_text("text")
    texts = {"calibration": tmp_path / "other.txt", option: tmp_path / "t6" / "README.md"}
    words = [word for name, path in texts.items() for word in (f"--{name}", str(path))]
    words += ["--heal-steps", "1"] if option == "heal" else []
    assert main(["hf", str(source), str(tmp_path / "t6"), "--overwrite", "--k-rank", "1", *words]) == 1
    assert f"holds --{option}" in last_error(capsys)
    assert (tmp_path / "t6" / "README.md").read_text() == "text"


def test_the_working_directory_stays(source, tmp_path, capsys, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for target in (".", "..", str(tmp_path / "here")):
        assert main(["hf", str(source), target, "--overwrite"]) == 1
        assert "the working directory" in last_error(capsys)
    write(Path("t6"))  # below it is where results go
    assert Path("t6", "config.json").read_text() == "new"


REPLACED = {
    "README.md": "",
    "tokenizer.json": "",
    "chat_template.jinja": "",
    "conversion.json": "",
    "modeling_t6.py": "",
    "configuration_other.py": "",
}
KEPT = {
    "notes alone": ({"notes.txt": ""}, "it has no config.json"),
    "no weights": ({"config.json": "{}", "notes.txt": ""}, "it has no *.safetensors"),
    "no configuration": ({"model.safetensors": ""}, "it has no config.json"),
    "notes beside a model": ({"config.json": "{}", "model.safetensors": "", "notes.txt": ""}, "it holds notes.txt"),
    "code beside a model": ({"config.json": "{}", "model.safetensors": "", "train.py": ""}, "it holds train.py"),
    "data alone": ({"config.json": "{}", "train.bin": ""}, "it has no *.safetensors"),
    "notes on a tokenizer": ({"config.json": "{}", "model.safetensors": "", "tokenizer.txt": ""}, "it holds tokenizer.txt"),
    "a project": ({"config.json": "{}", "model.safetensors": "", ".git/HEAD": ""}, "it holds .git"),
    "a model of models": ({"config.json": "{}", "model.safetensors": "", "other/config.json": ""}, "it holds other"),
}  # fmt: skip


@pytest.mark.parametrize("files, reason", KEPT.values(), ids=KEPT)
def test_only_a_model_is_replaced(files, reason, tmp_path):
    for name, text in files.items():
        (tmp_path / "t6" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t6" / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(ConversionError, match="not empty: --overwrite replaces it"):
        write(tmp_path / "t6")
    with pytest.raises(ConversionError, match=f"t6 is not replaced, .*{reason.replace('*', '[*]')}"):
        write(tmp_path / "t6", overwrite=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("swaps", [True, False], ids=["at once", "by two renames"])
def test_a_model_is_replaced_whole(swaps, tmp_path, monkeypatch):
    if swaps:  # with no moment at which the name is nobody's
        monkeypatch.setattr(Path, "rename", None)
    else:
        monkeypatch.setattr(folders, "exchange", lambda *paths: False)
    model(tmp_path / "t6", **REPLACED)
    write(tmp_path / "t6", overwrite=True)
    assert content(tmp_path) == {"t6/config.json": b"new"}


def test_a_folder_filled_meanwhile_is_kept(tmp_path):
    """Without --overwrite nothing is replaced, with it nothing but what was there at the start."""

    def filled() -> None:
        (tmp_path / "t6" / "notes.txt").write_text("hours of work")

    def other_run() -> None:
        shutil.rmtree(tmp_path / "t6")
        model(tmp_path / "t6", **{"model.safetensors": "the other's"})

    def from_nothing() -> None:
        model(tmp_path / "t6", **{"model.safetensors": "the other's"})

    cases = [
        (None, from_nothing, False, "not empty"),
        (None, from_nothing, True, "no longer what it was"),
        ("empty", filled, False, "not empty"),
        ("empty", filled, True, "it has no config.json"),
        ("model", filled, True, "it holds notes.txt"),
        ("model", other_run, True, "no longer what it was"),
    ]
    for start, act, overwrite, message in cases:
        shutil.rmtree(tmp_path / "t6", ignore_errors=True)
        if start is not None:
            model(tmp_path / "t6") if start == "model" else (tmp_path / "t6").mkdir()
        with pytest.raises(ConversionError, match=message), new_folder(tmp_path / "t6", overwrite):
            act()
            before = content(tmp_path / "t6")
        assert content(tmp_path / "t6") == before
        assert [path.name for path in tmp_path.iterdir()] == ["t6"]


def test_an_output_through_a_link_goes_where_it_leads(tmp_path):
    (tmp_path / "t6").symlink_to(model(tmp_path / "disk" / "real"))
    write(tmp_path / "t6", overwrite=True)
    assert (tmp_path / "t6").is_symlink()
    assert content(tmp_path / "disk") == {"real/config.json": b"new"}


def test_what_cannot_be_read_is_not_said_to_be_unwritable(tmp_path):
    for path, message in (
        (tmp_path / "source" / "config.json", f"^{tmp_path}/source/config.json: No such file or directory"),
        (None, f"^cannot write {tmp_path}/t6: .*No such file"),
    ):
        with pytest.raises(ConversionError, match=message), new_folder(tmp_path / "t6") as folder:
            (path or folder / "no" / "such" / "folder").read_text()
    assert not list(tmp_path.iterdir())


def test_permissions_are_those_of_the_umask(tmp_path):
    for umask in (0o022, 0o027, 0o077, 0o002):
        old = os.umask(umask)
        try:
            with new_folder(tmp_path / f"{umask:o}" / "t6") as folder:
                (folder / "below").mkdir()
                (folder / "below" / "code.py").write_text("")
                (folder / "below" / "code.py").chmod(0o500)  # copied from where it was read-only
        finally:
            os.umask(old)
        for path in (tmp_path / f"{umask:o}").rglob("*"):
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_what_a_killed_run_left_is_removed_and_a_live_run_is_not_touched(tmp_path, capsys):
    dead, alive = (tmp_path / f".t6.{name}.partial" for name in ("deadbeef", "a11ve000"))
    other = tmp_path / ".t6-large.deadbeef.partial"
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "model.safetensors").write_text("gigabytes")
    lock = take_lock(alive)
    write(tmp_path / "t6")
    assert f"{dead} is removed" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, other.name, "t6"])
    release(lock)
    with contextlib.suppress(ConversionError):  # a run that is refused removes them, too
        write(tmp_path / "t6")
    assert f"{alive} is removed" in capsys.readouterr().out and not alive.exists()


def test_without_locks_what_is_left_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(folders, "take_lock", lambda folder: None)
    (tmp_path / ".t6.deadbeef.partial").mkdir()
    write(tmp_path / "t6")
    assert ".t6.deadbeef.partial is left from another run" in capsys.readouterr().out
    assert (tmp_path / ".t6.deadbeef.partial").is_dir() and (tmp_path / "t6").is_dir()


def test_a_kill_between_two_renames_is_undone(tmp_path, capsys, monkeypatch):
    """On file systems where two folders cannot change places at once."""
    monkeypatch.setattr(folders, "exchange", lambda *paths: False)
    model(tmp_path / "t6")
    new, rename = model(tmp_path / "new"), Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path == new:
            os._exit(9)
        return rename(path, target)

    if (child := os.fork()) == 0:
        Path.rename = killed
        replace_folder(new, tmp_path / "t6")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and not (tmp_path / "t6").exists()
    with pytest.raises(ConversionError, match="not empty"):
        write(tmp_path / "t6")
    assert f"{tmp_path / 't6'} is put back" in capsys.readouterr().out
    assert (tmp_path / "t6" / "model.safetensors").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "t6"]


STOPS = {signal.SIGTERM: (143, "terminated"), signal.SIGINT: (130, "interrupted"), signal.SIGHUP: (129, "terminated")}


@pytest.mark.usefixtures("signals_of_a_terminal")
@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_a_stopped_run_cleans_up(number, source, tmp_path, capsys, monkeypatch):
    """In one line, without a traceback, also where it was to make the folders above its target."""
    model(tmp_path / "t6")
    write_model = convert.write_model

    def stopped(*arguments) -> None:
        write_model(*arguments)
        assert list(tmp_path.rglob("*.partial/model.safetensors"))
        signal.raise_signal(number)

    monkeypatch.setattr(convert, "write_model", stopped)
    handlers = [signal.getsignal(known) for known in STOPS]
    code, word = STOPS[number]
    for target in (tmp_path / "t6", tmp_path / "new" / "folder" / "t6"):
        assert main(["hf", str(source), str(target), "--overwrite"]) == code
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"{word}")
        assert [path.name for path in tmp_path.iterdir()] == ["t6"]
    assert (tmp_path / "t6" / "model.safetensors").read_text() == "old"
    assert [signal.getsignal(known) for known in STOPS] == handlers


def test_temporary_folder_of_a_run_that_ends(tmp_path, monkeypatch):
    """It is listed, and gone when it is looked at."""
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([tmp_path / "t6-upload-abcdefgh.tmp"]))
    with temporary_folder("t6-upload-", tmp_path) as folder:
        assert folder.is_dir()


def test_temporary_folders(tmp_path, capsys, monkeypatch):
    """Copies of weights that a killed upload left go with the next one; those of a live one stay."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary_folder("t6-upload-") as alive:
        assert stat.S_IMODE(alive.stat().st_mode) == 0o700
        dead, kept = tmp_path / "t6-upload-deadbeef.tmp", tmp_path / "t6-upload-20261129"
        dead.mkdir()
        kept.mkdir()  # a model of the user's
        with temporary_folder("t6-upload-") as other:
            assert sorted(tmp_path.iterdir()) == sorted([alive, other, kept])
            assert f"{dead} is removed" in capsys.readouterr().out
        kept.rmdir()
        assert list(tmp_path.iterdir()) == [alive]
    assert not list(tmp_path.iterdir())
