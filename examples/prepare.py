"""
Turns text files into a folder of tokens that `pretrain.py` reads.

    python examples/prepare.py --text docs/ books/*.txt --output-dir runs/tokens

A folder stands for its files with one of the suffixes. Each file is one document. Documents of equal content count
once; a share of them, chosen by their content, is held out, except those of which the training documents hold half of
the lines or more. A byte-level BPE tokenizer is trained, unless one is given. The same files give the same folder.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from command_line import TOKENIZER, InputError, Kind, input_errors, new_folder, number, read_text


# What --overwrite replaces.
DATA = Kind("tokens of this command", (("data.json",), ("train.bin",)), (*TOKENIZER, "held_out.bin"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="PATH", help="files and folders")
    parser.add_argument(
        "--suffix", nargs="+", default=[".txt", ".md"], metavar="S", help="of the files of folders (%(default)s)"
    )
    parser.add_argument("--held-out", nargs="+", type=Path, metavar="PATH", help="held-out text, in place of a share")
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

from language_modeling import encode, load_tokenizer, text_size, train_tokenizer


BATCH = 2**20  # characters of a process's portion
MIN_LINE = 24  # characters: shorter lines are alike in documents that have nothing else in common


def find_files(paths: list[Path], suffixes: list[str]) -> tuple[list[Path], set[Path]]:
    """The files, and those of them that were found in folders."""
    files, found = [], set()
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
            found.update(inside)
            files += inside
        else:
            files.append(path)
    return files, found


def read_documents(paths: list[Path], suffixes: list[str]) -> tuple[dict[bytes, str], int]:
    """Texts by the hash of their content, in the order of the hashes, and how many files were left out."""
    files, found = find_files(paths, suffixes)
    documents, left_out = {}, 0
    for path in tqdm(files, desc="reading", unit="file", disable=None):
        try:
            text = read_text(path)
        except InputError:
            if path not in found:
                raise
            text = ""  # a folder may hold anything
        if text.strip():
            documents[hashlib.sha256(text.encode()).digest()] = text
        else:
            left_out += 1
    return dict(sorted(documents.items())), left_out


def line_hashes(text: str) -> set[int]:
    lines = {line.strip() for line in text.splitlines()}
    return {
        int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest())
        for line in lines
        if len(line) >= MIN_LINE
    }


def common_lines(texts: list[str], hashes: set[int]) -> set[int]:
    return {line for text in texts for line in line_hashes(text)} & hashes


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
    texts = {f"--text {path}": path for path in (*args.text, *(args.held_out or ())) if path.is_file()}
    with new_folder(args.output_dir, args.overwrite, texts, DATA) as folder:
        facts = write(args, folder)
    print(json.dumps(facts, indent=2))
    return facts


def write(args: argparse.Namespace, folder: Path) -> dict:
    documents, left_out = read_documents(args.text, args.suffix)
    if not documents:
        raise InputError(
            f"there is no text in {', '.join(map(str, args.text))}: expected files of UTF-8, or folders of such files that "
            f"end in {', '.join(args.suffix)}"
        )
    if args.held_out:
        held_out, _ = read_documents(args.held_out, args.suffix)
    else:
        limit = args.held_out_fraction * 2**32
        held_out = {key: text for key, text in documents.items() if int.from_bytes(key[:4]) < limit}
        if not held_out and args.held_out_fraction and len(documents) > 1:  # a share of few documents is one of them
            held_out = dict([next(iter(documents.items()))])
    training = [text for key, text in documents.items() if key not in held_out]
    if not training:
        raise InputError("there is no training text: all of it is held out")

    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        size, sample = 0, []
        for text in training:
            if size < 1e6 * args.tokenizer_megabytes:
                sample.append(text)
                size += len(text.encode())
        tokenizer = train_tokenizer(sample, args.vocab_size)
    tokenizer.save_pretrained(folder)

    with contextlib.ExitStack() as stack:
        parallel = map
        if args.num_processes > 1:
            # Not forked: this process has threads, of the tokenizers.
            context = multiprocessing.get_context("spawn")
            parallel = stack.enter_context(ProcessPoolExecutor(args.num_processes, context)).map
        lines = {key: line_hashes(text) for key, text in held_out.items()}
        every_line, parts = set().union(*lines.values()), list(batches(training))
        common = set().union(*parallel(common_lines, parts, [every_line] * len(parts)))
        near = {key for key, hashes in lines.items() if hashes and 2 * len(hashes & common) >= len(hashes)}
        kept = [text for key, text in held_out.items() if key not in near]
        if not kept:
            reason = f"the {len(near)} held out repeat the training text" if near else "the share took none"
            raise InputError(
                f"there is no held-out text: of {len(documents)} documents, {reason}; expected "
                f"{'a larger --held-out-fraction' if len(documents) > 1 else 'more documents'}, or --held-out PATH"
            )

        dtype = np.dtype("uint16" if len(tokenizer) <= 2**16 else "uint32")
        counts, digest = {}, hashlib.sha256()
        for name, texts in (("train", training), ("held_out", kept)):
            parts = list(batches(texts))
            encoded = parallel(encode_batch, [folder] * len(parts), parts)
            with (folder / f"{name}.bin").open("wb") as file:
                counts[name] = 0
                for tokens in tqdm(encoded, total=len(parts), desc=f"{name} tokens", unit="batch", disable=None):
                    counts[name] += len(tokens)
                    data = tokens.astype(dtype).tobytes()
                    digest.update(data)
                    file.write(data)
    characters, num_bytes = text_size(kept)
    facts = {
        "dtype": dtype.name,
        "vocab_size": len(tokenizer),
        "train_documents": len(training),
        "train_tokens": counts["train"],
        "train_bytes": text_size(training)[1],
        "held_out_documents": len(kept),
        "held_out_tokens": counts["held_out"],
        "held_out_characters": characters,
        "held_out_bytes": num_bytes,
        "held_out_documents_dropped": len(near),
        "files_left_out": left_out,
        "sha256": digest.hexdigest(),
    }
    (folder / "data.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def main(argv: list[str] | None = None) -> dict:
    with input_errors("prepare.py"):
        return prepare(parse_args(argv))


if __name__ == "__main__":
    main()
