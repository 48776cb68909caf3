"""
Turns text files into a folder of tokens that `pretrain.py` reads.

    python examples/prepare.py --text docs/ books/*.txt --output-dir runs/tokens

A folder stands for its files with one of the suffixes. Each file is one document. `KIND=PATH` names the kind of text, and the
held-out documents of each kind follow each other, so that losses can be told by kind:

    python examples/prepare.py --text code=src prose=books docs=manual --suffix .py .txt .md --output-dir runs/tokens

A line of a file that ends in .jsonl or .jsonl.xz is a document, {"text": ...}, as `gather.py` writes them, which may have a
"kind". Documents of equal content count once; a share of them, chosen by their content, is held out. Left out are documents of which half
of the lines or more stand in the training documents: of training documents in those before them, of held-out ones in all. A
byte-level BPE tokenizer is trained, unless one is given. The same files give the same folder.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import lzma
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from command_line import (
    TOKENIZER,
    InputError,
    Kind,
    MatchingPaths,
    input_errors,
    kind_and_path,
    new_folder,
    number,
    one_line,
    read_text,
)


# What --overwrite replaces.
DATA = Kind("tokens of this command", (("data.json",), ("train.bin",)), (*TOKENIZER, "held_out.bin"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text",
        nargs="+",
        type=kind_and_path,
        action=MatchingPaths,
        required=True,
        metavar="[KIND=]PATH",
        help="files and folders",
    )
    parser.add_argument(
        "--suffix", nargs="+", default=[".txt", ".md"], metavar="S", help="of the files of folders (%(default)s)"
    )
    parser.add_argument(
        "--held-out",
        nargs="+",
        type=kind_and_path,
        action=MatchingPaths,
        metavar="[KIND=]PATH",
        help="held-out text, in place of a share",
    )
    parser.add_argument(
        "--held-out-fraction",
        type=number(float, 0, 0.5),
        default=0.005,
        metavar="F",
        help="of the documents, at least one (%(default)s)",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="use this tokenizer instead of training one")
    parser.add_argument("--vocab-size", type=number(int, 258), default=16384, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--tokenizer-megabytes",
        type=number(float, 1e-3),
        default=20,
        metavar="X",
        help="of text to train the tokenizer on (%(default)s)",
    )
    parser.add_argument(
        "--num-processes", type=number(int, 1), default=os.cpu_count(), metavar="N", help="(all cores)"
    )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from language_modeling import encode, load_tokenizer, text_size, train_tokenizer


BATCH = 2**20  # characters of a process's portion
JSON_LINES = re.compile(r"\.jsonl(\.xz)?$")
MIN_LINE = 24  # characters: shorter lines are alike in documents that have nothing else in common


class Document(NamedTuple):
    kind: str
    text: str


def find_files(paths: list[tuple[str, Path]], suffixes: list[str]) -> Iterator[tuple[str, Path, bool]]:
    """The kinds and files, and whether they were found in folders."""
    for kind, path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.name.endswith(tuple(suffixes)) and file.is_file())
            yield from ((kind, file, True) for file in inside)
        else:
            yield kind, path, False


def read_documents(paths: list[tuple[str, Path]], suffixes: list[str]) -> tuple[dict[bytes, Document], int]:
    """Documents by the hash of their content, in the order of the hashes, and how many files were left out."""
    documents, left_out = {}, 0
    files = list(find_files(paths, suffixes))
    for kind, path, is_found in tqdm(files, desc="reading", unit="file", disable=None):
        try:
            read = list(read_lines(kind, path)) if JSON_LINES.search(path.name) else [Document(kind, read_text(path))]
        except InputError:
            if not is_found or JSON_LINES.search(path.name):
                raise
            read = []  # a folder may hold anything
        read = [document for document in read if document.text.strip()]
        left_out += not read
        for document in read:
            documents.setdefault(hashlib.sha256(document.text.encode()).digest(), document)
    return dict(sorted(documents.items())), left_out


def read_lines(kind: str, path: Path) -> Iterator[Document]:
    """The documents of a file of JSON lines, {"text": ..., "kind": ...}; a kind that was given goes before theirs."""
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise InputError(f'{path}, line {number}: expected {{"text": ...}}')
                if not isinstance(row.get("kind", kind), str):
                    raise InputError(f'{path}, line {number}: expected a string as "kind"')
                row["text"].encode()  # JSON can escape what is no character
                yield Document(row.get("kind", kind) if kind == "text" else kind, row["text"])
    except (json.JSONDecodeError, UnicodeError, lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path} is no file of JSON lines: {one_line(error)}") from error


def line_hashes(texts: list[str]) -> list[np.ndarray]:
    """The hashes of each document's lines, each once."""
    hashes = []
    for text in texts:
        lines = {stripped for line in text.splitlines() if len(stripped := line.strip()) >= MIN_LINE}
        digests = b"".join(hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines)
        hashes.append(np.frombuffer(digests, dtype="uint64"))
    return hashes


def near_copies(hashes: Iterable[np.ndarray], seen: set[int], adds: bool) -> list[bool]:
    """Whether half of each document's lines or more are in `seen`, to which it `adds` its own."""
    near = []
    for lines in hashes:
        numbers = lines.tolist()
        near.append(bool(numbers) and 2 * sum(number in seen for number in numbers) >= len(numbers))
        if adds:
            seen.update(numbers)
    return near


cached_tokenizer = functools.cache(load_tokenizer)


def encode_batch(tokenizer_dir: Path, texts: list[str]) -> np.ndarray:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel already
    return encode(cached_tokenizer(tokenizer_dir), texts).numpy()


def batches(texts: list[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def prepare(args: argparse.Namespace) -> dict:
    """Writes the folder; returns what its `data.json` says."""
    texts = {f"--text {path}": path for _, path in (*args.text, *(args.held_out or ())) if path.is_file()}
    with new_folder(args.output_dir, args.overwrite, texts, DATA) as folder:
        facts = write(args, folder)
    print(json.dumps(facts, indent=2))
    return facts


def write(args: argparse.Namespace, folder: Path) -> dict:
    documents, left_out = read_documents(args.text, args.suffix)
    if not documents:
        raise InputError(
            f"there is no text in {', '.join(str(path) for _, path in args.text)}: expected files of UTF-8, or folders of such files that "
            f"end in {', '.join(args.suffix)}"
        )
    if args.held_out:
        held_out, _ = read_documents(args.held_out, args.suffix)
    else:
        limit = args.held_out_fraction * 2**32
        held_out = {key: document for key, document in documents.items() if int.from_bytes(key[:4]) < limit}
        if not held_out and args.held_out_fraction and len(documents) > 1:  # a share of few documents is one of them
            held_out = dict([next(iter(documents.items()))])
    training = [document for key, document in documents.items() if key not in held_out]
    if not training:
        raise InputError("there is no training text: all of it is held out")

    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None  # a mistake is told before the work
    with contextlib.ExitStack() as stack:
        parallel = map
        if args.num_processes > 1:
            # Not forked: this process has threads, of the tokenizers.
            context = multiprocessing.get_context("spawn")
            parallel = stack.enter_context(ProcessPoolExecutor(args.num_processes, context)).map

        def hashes(documents: list[Document]) -> Iterator[np.ndarray]:
            return itertools.chain.from_iterable(parallel(line_hashes, batches(texts_of(documents))))

        seen = set()
        near = near_copies(hashes(training), seen, adds=True)
        dropped = sum(near)
        training = [document for document, is_near in zip(training, near) if not is_near]
        near = near_copies(hashes(list(held_out.values())), seen, adds=False)
        kept = [document for document, is_near in zip(held_out.values(), near) if not is_near]
        if not kept:
            reason = f"the {sum(near)} held out repeat the training text" if any(near) else "the share took none"
            raise InputError(
                f"there is no held-out text: of {len(documents)} documents, {reason}; expected "
                f"{'a larger --held-out-fraction' if len(documents) > 1 else 'more documents'}, or --held-out PATH"
            )

        if tokenizer is None:
            tokenizer = train_on_a_share(args, training)
        for chosen in (training, kept):
            chosen.sort(key=lambda document: document.kind)
        tokenizer.save_pretrained(folder)
        dtype = np.dtype("uint16" if len(tokenizer) <= 2**16 else "uint32")
        counts, digest = {}, hashlib.sha256()
        for name, chosen in (("train", training), ("held_out", kept)):
            # Batches of one kind, whose tokens count as its own.
            parts = [
                (kind, batch)
                for kind, group in itertools.groupby(chosen, key=lambda document: document.kind)
                for batch in batches(texts_of(group))
            ]
            encoded = parallel(encode_batch, [folder] * len(parts), [batch for _, batch in parts])
            with (folder / f"{name}.bin").open("wb") as file:
                for (kind, _), tokens in tqdm(
                    zip(parts, encoded), total=len(parts), desc=f"{name} tokens", unit="batch", disable=None
                ):
                    counts[name, kind] = counts.get((name, kind), 0) + len(tokens)
                    data = tokens.astype(dtype).tobytes()
                    digest.update(data)
                    file.write(data)

    def sizes(kind: str | None = None) -> dict:
        """Of one kind of text, or of all."""
        facts = {}
        for name, chosen in (("train", training), ("held_out", kept)):
            texts = texts_of(document for document in chosen if kind in (None, document.kind))
            facts[f"{name}_documents"] = len(texts)
            facts[f"{name}_tokens"] = sum(n for (of, k), n in counts.items() if of == name and kind in (None, k))
            facts[f"{name}_characters"], facts[f"{name}_bytes"] = text_size(texts)
        return facts

    facts = {
        "dtype": dtype.name,
        "vocab_size": len(tokenizer),
        **sizes(),
        "train_documents_dropped": dropped,
        "held_out_documents_dropped": sum(near),
        "files_left_out": left_out,
        "kinds": {kind: sizes(kind) for kind in sorted({document.kind for document in [*training, *kept]})},
        "sha256": digest.hexdigest(),
    }
    (folder / "data.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def texts_of(documents: Iterable[Document]) -> list[str]:
    return [document.text for document in documents]


def train_on_a_share(args: argparse.Namespace, training: list[Document]) -> PreTrainedTokenizerFast:
    size, sample = 0, []
    for document in training:
        if size < 1e6 * args.tokenizer_megabytes:
            sample.append(document.text)
            size += len(document.text.encode())
    return train_tokenizer(sample, args.vocab_size)


def main(argv: list[str] | None = None) -> dict:
    with input_errors("prepare.py"):
        return prepare(parse_args(argv))


if __name__ == "__main__":
    main()
