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
Gathers the text that packages and folders hold, for `prepare.py`.

    apt-get download linux-source-6.1 python3.11-doc git-doc dict-gcide
    python examples/gather.py *.deb prose=dict-gcide_*.deb --output-dir texts --megabytes 300
    python examples/prepare.py --text texts --suffix .xz --output-dir runs/tokens

Takes folders and archives (.deb, .whl, .zip, .tar and compressed ones), archives in them too. What a file is says its name:
python, c, or docs (HTML and manual pages without their markup); KIND=PATH says it for all of a path. Each kind is written as
`KIND-N.jsonl.xz`, a document a line as {"text": ..., "kind": ...}, in parts of `--part-megabytes` of text. Of what is more than
`--megabytes` a share is taken, evenly. Files of equal content count once.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

from command_line import InputError, Kind, MatchingPaths, input_errors, kind_and_path, new_folder, number


KINDS = {
    "python": (".py", ".pyi"),
    "c": (".c", ".h", ".S", ".cc", ".cpp", ".cu", ".cuh", ".hpp"),
    "docs": (".md", ".rst", ".txt", ".html", ".htm", ".adoc", ".dict", ".pod"),
}
SWORD = (".bzz", ".czz")  # books and commentaries of the SWORD project
SKIPPED_TAGS = ("script", "style", "nav", "head")
LARGEST = 2**20  # bytes of a file: larger ones are tables that a program wrote
PIECE = 50_000  # characters: a dictionary is cut into documents, between its entries
SMALLEST = 200
TEXTS = Kind("texts of this command", (("*.jsonl.xz",),), ())  # what --overwrite replaces
MOST_DAMAGED = 1e-3  # of a text's characters, that are no UTF-8


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources",
        nargs="+",
        type=kind_and_path,
        action=MatchingPaths,
        metavar="[KIND=]PATH",
        help="folders and archives",
    )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")
    parser.add_argument(
        "--megabytes",
        type=number(float, 1e-6),
        default=1e6,
        metavar="X",
        help="of text of a kind, and the rest of its last document, at most (all)",
    )
    parser.add_argument(
        "--part-megabytes", type=number(float, 1e-6), default=200, metavar="X", help="of text in a file (%(default)s)"
    )
    parser.add_argument("--preset", type=number(int, 0, 9), default=6, metavar="N", help="of xz (%(default)s)")
    return parser.parse_args(argv)


class PlainText(HTMLParser):
    """The text of a page, without menus and programs; blocks begin on lines of their own."""

    def __init__(self):
        super().__init__()
        self.pieces, self.depth = [], 0

    def handle_starttag(self, tag, attrs):
        self.depth = 0 if tag == "body" else self.depth + (tag in SKIPPED_TAGS)  # </head> may be left out
        if tag in ("p", "div", "li", "tr", "br", "pre", "h1", "h2", "h3", "h4", "dt", "dd"):
            self.pieces.append("\n")

    def handle_endtag(self, tag):
        self.depth -= tag in SKIPPED_TAGS and self.depth > 0

    def handle_data(self, data):
        if not self.depth:
            self.pieces.append(data)


def without_markup(name: str, text: str) -> str:
    """HTML and troff as the text that a reader sees, about."""
    if name.endswith((".html", ".htm")):
        parser = PlainText()
        with contextlib.suppress(AssertionError):  # of marked sections that HTML has not: it ends there
            parser.feed(text)
        text = "".join(parser.pieces)
    elif re.search(r"\.[1-8]$", name):
        text = re.sub(r'^[.\'](\\"|ig|de|nr|if|ie|el|ds|TH).*$', "", text, flags=re.MULTILINE)  # comments and programs
        text = re.sub(
            r"\\f([A-Z]|\(\w\w|\[\w*\])|\\&|\\\|", "", re.sub(r"^\.[A-Za-z]+ ?", "", text, flags=re.MULTILINE)
        )
        text = text.replace("\\-", "-").replace("\\e", "\\")
    return re.sub(r"\n\s*\n\s*\n+", "\n\n", text).strip() + "\n"


def kind_of(name: str) -> str | None:
    suffix = PurePosixPath(name).suffix
    if re.search(r"/man\d/[^/]+\.[1-8]$", name):
        return "docs"
    return next((kind for kind, suffixes in KINDS.items() if suffix in suffixes), None)


# Archives


def ar_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of an `ar` archive, which a .deb is."""
    if data[:8] != b"!<arch>\n":
        raise ValueError("it does not begin as an archive of ar")
    place = 8
    while place < len(data):
        header = data[place : place + 60]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if not 0 <= size <= len(data) - place - 60:
            raise ValueError(f"its member {name} is cut off")
        yield name, data[place + 60 : place + 60 + size]
        place += 60 + size + size % 2


def open_tar(data: bytes) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(data))


def members(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Every file of an archive and of those in it, by its name; a file that is no archive is itself."""
    if name.endswith((".gz", ".dz")) and not name.endswith(".tar.gz"):
        yield from members(re.sub(r"\.[gd]z$", "", name), gzip.decompress(data))
    elif name.endswith(".deb"):
        for member, content in ar_members(data):
            if member.startswith("data.tar"):
                yield from members(member, content)
    elif re.search(r"\.(tar(\.(gz|xz|bz2))?|tgz)$", name):
        with open_tar(data) as archive:
            for member in archive:
                is_wanted = kind_of(member.name.removesuffix(".gz")) or is_archive(member.name)
                if member.isfile() and is_wanted:
                    yield from members(member.name, archive.extractfile(member).read())
    elif re.search(r"\.tar\.(zst|lz4?|Z)$", name):
        raise ValueError(f"{name} is compressed in another way than gz, xz or bz2")
    elif name.endswith(SWORD):
        while data:  # chapters or books, compressed one by one, with zeros behind
            block = zlib.decompressobj()
            text, data = block.decompress(data), block.unused_data.lstrip(b"\0")
            yield f"{name}.html", text
    elif name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                if kind_of(member) or is_archive(member):
                    yield from members(member, archive.read(member))
    else:
        yield name, data


def is_archive(name: str) -> bool:
    return bool(re.search(r"\.(deb|whl|zip|tar(\.\w+)?|tgz|dict\.dz)$", name)) or name.endswith(SWORD)


def pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        entry = re.compile(r"\n(?=\S)").search(text, start + PIECE)  # what belongs to an entry is indented
        end = entry.end() if entry else len(text)
        yield text[start:end]
        start = end


def documents(sources: list[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
    """Kinds and texts; the kind that a source is given goes before that of its names."""
    for _, path in sources:
        if not path.exists():
            raise InputError(f"there is no {path}")
    for given, path in sources:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            name = file.as_posix()
            if path.is_dir() and not (kind_of(name.removesuffix(".gz")) or is_archive(name)):
                continue
            try:
                for member, data in members(name, file.read_bytes()):
                    kind = kind_of(member) if given == "text" else given
                    if kind is None or len(data) < SMALLEST or len(data) > LARGEST and not member.endswith(".dict"):
                        continue
                    text = data.decode("utf-8-sig", errors="replace")
                    if text.count("\ufffd") > MOST_DAMAGED * len(text):
                        continue
                    text = without_markup(member, text)
                    for piece in pieces(text) if member.endswith(".dict") else [text]:
                        if len(piece) >= SMALLEST:
                            yield kind, piece
            except (
                tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError, ValueError,
                RuntimeError,  # of an archive with a password
            ) as error:  # fmt: skip
                raise InputError(f"{file} is damaged, or of a kind that is not known: {error}") from error


def gather(args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Writes the folder; returns documents and bytes by kind."""
    files = {f"the source {path}": path for _, path in args.sources if path.is_file()}
    with new_folder(args.output_dir, args.overwrite, files, TEXTS) as folder:
        return write(args, folder)


def write(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, int]]:
    texts = {}
    for kind, text in documents(args.sources):
        texts.setdefault(kind, {}).setdefault(hashlib.sha256(text.encode()).digest(), text)
    if not texts:
        raise InputError("there is no text in what is given")
    report = {}
    for kind, of in texts.items():
        part, size, total, count, file = 0, 0, 0, 0, None
        # By the hash of the content: what is left out is as any.
        for _, text in sorted(of.items()):
            if total > 1e6 * args.megabytes:
                break
            if file is None or size > 1e6 * args.part_megabytes:
                if file is not None:
                    file.close()
                path = folder / f"{kind}-{part}.jsonl.xz"
                file, part, size = lzma.open(path, "wt", preset=args.preset, encoding="utf-8"), part + 1, 0
            file.write(json.dumps({"text": text, "kind": kind}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            total += len(text.encode())
            count += 1
        file.close()
        report[kind] = {"documents": count, "bytes": total}
        print(f"{kind}: {count:,} documents, {total / 1e6:.1f} MB, in {part} files")
    return report


def main(argv: list[str] | None = None) -> dict[str, dict[str, int]]:
    args = parse_args(argv)
    with input_errors("gather.py"):
        return gather(args)


if __name__ == "__main__":
    main()
