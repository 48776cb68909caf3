"""A folder of tokens as `examples/prepare.py` makes it, of a few small documents."""

import random
from pathlib import Path

import prepare


def write_tokens(folder: Path, documents: int, words: int) -> Path:
    """Writes `documents` of so many random `words` each into a folder, and their tokens into another in it, which is returned."""
    generator = random.Random(0)
    for index in range(documents):
        text = " ".join(generator.choices(["the", "king", "and", "queen", "of", "wood"], k=words))
        (folder / f"{index}.txt").write_text(f"{index} {text}\n")
    options = ["--vocab-size", "280", "--held-out-fraction", "0.2", "--num-processes", "1"]
    prepare.main(["--text", str(folder), *options, "--output-dir", str(folder / "tokens")])
    return folder / "tokens"
