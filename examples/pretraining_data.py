"""What `pretrain.py` trains on: windows of a stream, or of a folder of `prepare.py`, that go on where a checkpoint was made."""

import argparse
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from command_line import InputError, one_line, read_text
from language_modeling import RandomWindows, encode, load_tokenizer, text_size
from training import load_dataset


DOCUMENTS = 256  # of a stream that are tokenized at once


class PreparedWindows(IterableDataset):
    """This process's share of the windows of a run, in batches side by side with those of the other processes."""

    def __init__(self, windows: RandomWindows, batch_size: int, rank: int, world_size: int):
        self.windows, self.batch_size, self.rank, self.world_size = windows, batch_size, rank, world_size
        self.taken = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            batch, place = divmod(self.taken, self.batch_size)
            index = (batch * self.world_size + self.rank) * self.batch_size + place
            if index >= len(self.windows):
                return
            self.taken += 1
            yield self.windows[index]

    def state_dict(self) -> dict:
        return {"windows": self.taken * self.world_size}

    def load_state_dict(self, state: dict) -> None:
        self.taken = state["windows"] // self.world_size


class StreamedWindows(IterableDataset):
    """
    Consecutive windows of a stream of documents, which starts again at its end.

    The next documents are read and tokenized while the model works. The state is that of the stream before the
    documents whose tokens are being used, the tokens left over from those before them, and the windows taken since.

    Args:
        make_stream: makes this process's share of the data set, a `datasets.IterableDataset` with a column "text".
        held_out: hashes of documents to leave out.
    """

    def __init__(
        self,
        make_stream: Callable,
        tokenizer: PreTrainedTokenizerBase,
        block_length: int,
        held_out: set[bytes],
    ):
        self.make_stream, self.tokenizer, self.block_length = make_stream, tokenizer, block_length
        self.held_out = held_out
        self.state = {"stream": None, "tokens": [], "taken": 0}

    def _portions(self, stream_state: dict | None, tokens: list[int]) -> Iterator[tuple[dict, torch.Tensor]]:
        rest = torch.tensor(tokens, dtype=torch.long)
        while True:
            stream, found = self.make_stream(), False
            if stream_state:
                stream.load_state_dict(stream_state)
            documents = iter(stream)
            state = stream_state
            while portion := list(itertools.islice(documents, DOCUMENTS)):
                texts = [row["text"] for row in portion if row["text"]]
                texts = [text for text in texts if document_hash(text) not in self.held_out]
                before = {"stream": state, "tokens": rest.tolist()}
                state = stream.state_dict()
                if not texts:
                    continue
                found = True
                rest = torch.cat([rest, encode(self.tokenizer, texts)])
                used = len(rest) // self.block_length * self.block_length
                yield before, rest[:used].view(-1, self.block_length)
                rest = rest[used:]
            if not found and stream_state is None:
                raise InputError("the data set has no training documents for each process")
            stream_state = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        portions, taken = self._portions(self.state["stream"], self.state["tokens"]), self.state["taken"]
        with ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(next, portions)
            while True:
                before, windows = upcoming.result()
                upcoming = pool.submit(next, portions)
                for index in range(taken, len(windows)):
                    self.state = {**before, "taken": index + 1}
                    yield windows[index].clone()
                taken = 0

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def document_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def open_prepared(folder: Path) -> tuple[PreTrainedTokenizerBase, dict]:
    """The tokenizer of a folder of `prepare.py`, and what its `data.json` says."""
    if not folder.is_dir():
        raise InputError(
            f"--data: there is no folder {folder}; prepare.py writes one: --text TEXTS --output-dir {folder}"
        )
    tokenizer = load_tokenizer(folder)
    try:
        facts = json.loads(read_text(folder / "data.json"))
        facts["sha256"]  # noqa: B018
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is no folder of prepare.py: {one_line(error)}") from error
    return tokenizer, facts


def kinds_of(facts: dict) -> dict[str, dict]:
    """What `data.json` says of each kind of text, in the order in which the held-out tokens lie; of older folders there is one."""
    return facts.get("kinds", {"text": facts})


def held_out_of_kinds(folder: Path, facts: dict, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    The held-out tokens of a folder by kind.

    Raises:
        InputError: they are not as many as `data.json` says.
    """
    counts = {kind: of["held_out_tokens"] for kind, of in kinds_of(facts).items()}
    if len(tokens) != sum(counts.values()):
        raise InputError(f"{folder}: the size of held_out.bin is not that which data.json states")
    return dict(zip(counts, tokens.split(list(counts.values()))))


class Data:
    """
    What a run trains and is evaluated on.

    Attributes:
        description: what must be the same when the run goes on.
        held_out: token ids, `characters` and `bytes` of the held-out text.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        if args.data:
            self.tokenizer, facts = open_prepared(args.data)
            try:
                # Copy on write: PyTorch has no tensors that cannot be written.
                train, held_out = (
                    np.memmap(args.data / f"{name}.bin", dtype=facts["dtype"], mode="c")
                    for name in ("train", "held_out")
                )
                self.description = {"sha256": facts["sha256"], "data_seed": args.data_seed}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"{args.data} is no folder of prepare.py: {one_line(error)}") from error
            if [len(train), len(held_out)] != [facts["train_tokens"], facts["held_out_tokens"]]:
                raise InputError(f"{args.data}: the sizes of its files are not those that data.json states")
            self.tokens, self.held_out = train, torch.as_tensor(held_out, dtype=torch.long)
            self.characters, self.bytes = facts["held_out_characters"], facts["held_out_bytes"]
        else:
            self.tokenizer = load_tokenizer(args.tokenizer)
            texts = [row["text"] for row in itertools.islice(self._stream(), args.held_out_documents) if row["text"]]
            if not texts:
                raise InputError(f"the data set {args.dataset} has no documents")
            self.hashes = {document_hash(text) for text in texts}
            self.held_out = encode(self.tokenizer, texts)
            self.characters, self.bytes = text_size(texts)
            self.description = {
                "dataset": [args.dataset, args.dataset_config, args.split],
                "held_out_documents": args.held_out_documents,
                "tokenizer": args.tokenizer,
            }

    def _stream(self, rank: int = 0, world_size: int = 1):
        args = self.args
        stream = load_dataset(args, "folders of prepare.py go to --data", streaming=True)
        stream = stream.select_columns([args.text_column])
        if args.text_column != "text":
            stream = stream.rename_column(args.text_column, "text")
        if world_size == 1:
            return stream
        from datasets.distributed import split_dataset_by_node

        return split_dataset_by_node(stream, rank, world_size)

    def training(self, block_length: int, num_windows: int, rank: int, world_size: int) -> IterableDataset:
        args = self.args
        if not args.data:
            return StreamedWindows(lambda: self._stream(rank, world_size), self.tokenizer, block_length, self.hashes)
        if len(self.tokens) < block_length:
            raise InputError(f"{args.data} has {len(self.tokens)} tokens, less than one block of {block_length}")
        windows = RandomWindows(self.tokens, block_length, num_windows, args.data_seed)
        return PreparedWindows(windows, args.batch_size, rank, world_size)


def data_state_file(checkpoint: Path, args: TrainingArguments) -> Path:
    return checkpoint / f"data-{args.process_index}-of-{args.world_size}.json"


def load_data_state(data: IterableDataset, checkpoint: Path, args: TrainingArguments) -> None:
    path = data_state_file(checkpoint, args)
    if not path.exists() and isinstance(data, PreparedWindows):  # its state is the same in all processes
        path = next(checkpoint.glob("data-0-of-*.json"), path)
    if not path.exists():
        found = ", ".join(sorted(path.name for path in checkpoint.glob("data-*-of-*.json"))) or "none"
        raise InputError(
            f"--resume: {checkpoint} has no {path.name} (found: {found}); a stream goes on with as many processes"
        )
    data.load_state_dict(json.loads(read_text(path)))
