"""Text of folders and archives: what kind it is, what is left of it, and that prepare.py reads it."""

import gzip
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

import gather
import prepare


def tar_of(files: dict[str, bytes], compression: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def deb_of(files: dict[str, bytes]) -> bytes:
    members = {"debian-binary": b"2.0\n", "control.tar.xz": tar_of({}, "xz"), "data.tar.xz": tar_of(files, "xz")}
    data = b"!<arch>\n"
    for name, content in members.items():
        data += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        data += b"\n" * (len(content) % 2)
    return data


def lines(word: str) -> str:
    return "".join(f"{word} of line {index}, which is long enough to count as a line\n" for index in range(12))


@pytest.fixture
def sources(tmp_path) -> list[str]:
    page = f"<html><head><title>x</title></head><body><script>var x = 1;</script><p>{lines('page')}<br>&amp;</body></html>"
    manual = f'.\\" a comment\n.TH GIT 1\n.SH NAME\n\\fBgit\\fR \\- the tracker\n{lines("manual")}'
    entries = "".join(f"entry{index}\n   1: {lines('entry')}".replace("\n", "\n   ") + "\n" for index in range(200))
    kernel = tar_of({"linux/main.c": lines("kernel").encode(), "linux/table.bin": b"\x00" * 500}, "gz")
    (tmp_path / "a.deb").write_bytes(
        deb_of(
            {
                "./usr/src/linux.tar.gz": kernel,
                "./usr/share/doc/page.html": page.encode(),
                "./usr/share/man/man1/git.1.gz": gzip.compress(manual.encode()),
                "./usr/share/damaged.txt": b"\xff\xfe\x00" * 300,
            }
        )
    )
    (tmp_path / "d.deb").write_bytes(deb_of({"./usr/share/dictd/d.dict.dz": gzip.compress(entries.encode())}))
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as wheel:
        wheel.writestr("package/module.py", lines("wheel"))
        wheel.writestr("package/short.py", "x = 1\n")
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    (folder / "inside" / "module.py").write_text(lines("folder"))
    (folder / "copy.py").write_text(lines("wheel"))
    (folder / "picture.png").write_bytes(b"\x89PNG" * 100)
    return [str(tmp_path / "a.deb"), f"prose={tmp_path / 'd.deb'}", str(tmp_path / "b.whl"), str(folder)]


def read(folder: Path) -> dict[str, list[str]]:
    texts = {}
    for path in sorted(folder.iterdir()):
        for line in lzma.open(path, "rt", encoding="utf-8"):
            row = json.loads(line)
            assert path.name.startswith(row["kind"])
            texts.setdefault(row["kind"], []).append(row["text"])
    return texts


def test_kinds(sources, tmp_path):
    report = gather.main([*sources, "--output-dir", str(tmp_path / "out"), "--part-megabytes", "0.05"])
    texts = read(tmp_path / "out")
    assert texts["c"] == [lines("kernel")]
    assert sorted(texts["python"]) == [lines("folder"), lines("wheel")]
    page, manual = sorted(texts["docs"], reverse=True)
    assert page == lines("page") + "\n&\n"
    assert "a comment" not in manual and "git - the tracker" in manual and lines("manual") in manual
    assert len(texts["prose"]) > 2 and all(text.startswith("entry") for text in texts["prose"])
    assert sum(text.count(" 1: ") for text in texts["prose"]) == 200
    assert len(list((tmp_path / "out").glob("prose-*"))) > 1
    assert report["python"] == {"documents": 2, "bytes": len(lines("folder") + lines("wheel"))}

    less = gather.main([*sources, "--output-dir", str(tmp_path / "less"), "--megabytes", "0.0001"])
    assert all(of["documents"] == 1 for of in less.values())


def test_patterns_behind_a_kind(sources, tmp_path):
    """The shell leaves them as they are."""
    patterns = [source.replace("d.deb", "d*.deb") for source in sources]
    gather.main([*patterns, "--output-dir", str(tmp_path / "out")])
    gather.main([*sources, "--output-dir", str(tmp_path / "same")])
    assert patterns != sources and read(tmp_path / "out") == read(tmp_path / "same")
    options = ["--vocab-size", "300", "--num-processes", "1", "--held-out-fraction", "0.3"]
    pattern = f"all={tmp_path / 'out' / '*.xz'}"
    facts = prepare.main(["--text", pattern, *options, "--output-dir", str(tmp_path / "tokens")])
    assert set(facts["kinds"]) == {"all"}
    with pytest.raises(SystemExit, match=r"there is no .*x\*.deb"):
        gather.main([f"prose={tmp_path / 'x*.deb'}", "--output-dir", str(tmp_path / "none")])


def test_books_of_sword(tmp_path):
    """Blocks of markup, compressed one by one, with zeros between."""
    blocks = [f"<div><verse>{lines(name)}</verse><note n='1'/></div>" for name in ("genesis", "exodus")]
    data = b"\0\0\0".join(zlib.compress(block.encode()) for block in blocks)
    (tmp_path / "book.deb").write_bytes(deb_of({"./usr/share/sword/modules/ot.bzz": data}))
    gather.main([f"prose={tmp_path / 'book.deb'}", "--output-dir", str(tmp_path / "out")])
    assert {"prose": sorted(map(lines, ("exodus", "genesis")))} == read(tmp_path / "out")


def test_prepare_reads_it(sources, tmp_path):
    """Kinds are those of the lines, unless one is given; a document of two kinds is of the first."""
    gather.main([*sources, "--output-dir", str(tmp_path / "out")])
    options = ["--suffix", ".xz", "--vocab-size", "300", "--num-processes", "1", "--held-out-fraction", "0.3"]
    facts = prepare.main(["--text", str(tmp_path / "out"), *options, "--output-dir", str(tmp_path / "tokens")])
    assert set(facts["kinds"]) == {"c", "docs", "prose", "python"}
    for name in ("train_tokens", "held_out_bytes", "train_documents", "held_out_characters"):
        assert facts[name] == sum(of[name] for of in facts["kinds"].values())
    given = prepare.main(["--text", f"all={tmp_path / 'out'}", *options, "--output-dir", str(tmp_path / "given")])
    assert set(given["kinds"]) == {"all"}


def test_damaged(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"no archive")
    with pytest.raises(SystemExit, match="x.whl is damaged, or of a kind that is not known"):
        gather.main([str(tmp_path / "x.whl"), "--output-dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="there is no .*missing"):
        gather.main([str(tmp_path / "missing"), "--output-dir", str(tmp_path / "out")])
    for line, message in (
        ('{"title": "the queen"}', "x.jsonl, line 2: expected"),
        ('{"text": "the queen", "kind": 3}', 'x.jsonl, line 2: expected a string as "kind"'),
        ('{"text": "the queen \\ud800"}', "x.jsonl is no file of JSON lines: .*surrogates"),
    ):
        (tmp_path / "x.jsonl").write_text(f'{{"text": "the king"}}\n{line}\n')
        with pytest.raises(SystemExit, match=message):
            prepare.main(["--text", str(tmp_path / "x.jsonl"), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def zip_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.py", data)
    return buffer.getvalue()


TEXT = lines("text").encode()
DAMAGED = {
    "text.txt.gz": (gzip.compress(TEXT)[:10] + b"\xff" * 30, "invalid block type"),
    "cut.deb": (deb_of({"./a.py": TEXT})[:-20], "its member data.tar.xz is cut off"),
    "no.deb": (TEXT, "it does not begin as an archive of ar"),
    "zst.deb": (deb_of({"./a.py": TEXT}).replace(b"data.tar.xz ", b"data.tar.zst"), "another way than gz, xz or bz2"),
    "damaged.zip": (zip_of(TEXT)[:45] + b"\x00" * 15 + zip_of(TEXT)[60:], "while decompressing"),
    "password.zip": (zip_of(TEXT).replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"), "encrypted"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_archives_are_named(name, tmp_path):
    """Also where others are whole: what is left out must be known."""
    data, message = DAMAGED[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "whole.py").write_bytes(TEXT)
    with pytest.raises(SystemExit, match=f"{name} is damaged, or of a kind that is not known: .*{message}"):
        gather.main([str(tmp_path / "whole.py"), str(tmp_path / name), "--output-dir", str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "whole.py"])


def test_pages_that_leave_tags_out():
    page = f"<html><head><title>x</title><body><p>{lines('page')}"
    assert gather.without_markup("a.html", page) == lines("page")
    assert gather.without_markup("a.html", page + "<![unknown[ y ]]><p>z") == lines("page")


def test_nothing_of_an_older_run_is_left(sources, tmp_path):
    words = [*sources, "--output-dir", str(tmp_path / "out")]
    gather.main([*words, "--part-megabytes", "0.05"])
    with pytest.raises(SystemExit, match="out is not empty: --overwrite replaces it"):
        gather.main(words)
    gather.main([*words, "--overwrite"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{kind}-0.jsonl.xz" for kind in ("c", "docs", "prose", "python")
    ]
