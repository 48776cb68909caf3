"""Checkpoints in safetensors, read and written one tensor at a time."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .errors import ConversionError
from .folders import read_json


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class TensorInfo(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def shard_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """
    The safetensors files of a checkpoint that Transformers loads, and its index if it loads by one: like Transformers, it
    takes `model.safetensors` where there are shards, too.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    if not (folder / INDEX).exists():
        variants = sorted(path.name for path in folder.glob("*.safetensors"))
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f", only {', '.join(variants)}: other names are not loaded" if variants else ""
        found = f", only {', '.join(pickles)}: pickles are not read" if pickles and not variants else found
        raise ConversionError(f"{folder} has no {SINGLE} and no {INDEX}{found}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{folder / INDEX} must have a `weight_map` from tensors to files")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name:
            raise ConversionError(
                f"{folder / INDEX} puts {tensor} into {name!r}: expected the name of a file beside it"
            )
        if not name.endswith(".safetensors"):
            raise ConversionError(f"{folder / INDEX} puts {tensor} into {name!r}: expected a .safetensors file")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise ConversionError(f"{file} is missing: {INDEX} lists it")
    return files, weight_map


class Checkpoint:
    """
    The tensors of a folder with `model.safetensors`, or with shards and their index.

    Raises:
        ConversionError: naming the file or the tensor that is missing, damaged, in two files, or of a dtype that is
            not a floating-point one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files, weight_map = shard_files(folder)
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            with self._open(file) as shard:
                for name in shard.keys():  # noqa: SIM118  not a dict
                    if name in self.tensors:
                        raise ConversionError(
                            f"{name} is in two files, {self.tensors[name].file.name} and {file.name}"
                        )
                    if weight_map is not None and weight_map.get(name) != file.name:
                        raise ConversionError(f"{file} holds {name}, which {INDEX} does not put there")
                    piece = shard.get_slice(name)
                    if piece.get_dtype() not in DTYPES:
                        raise ConversionError(
                            f"{name} in {file} has dtype {piece.get_dtype()}: expected one of {', '.join(DTYPES)}"
                        )
                    self.tensors[name] = TensorInfo(file, tuple(piece.get_shape()), DTYPES[piece.get_dtype()])
        for name in weight_map or ():
            if name not in self.tensors:
                raise ConversionError(f"{name} is missing from {folder / weight_map[name]}: {INDEX} puts it there")

    @staticmethod
    def _open(file: Path):
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{file} is not a readable safetensors file: {error}") from error

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, file by file. Each has a mapping of its own: what was read of its file leaves memory with it."""
        for name in self.tensors:
            yield name, self.read(name)

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """A tensor, or some of its rows."""
        file = self.tensors[name].file
        with self._open(file) as shard:
            try:
                tensor = shard.get_tensor(name) if rows == slice(None) else shard.get_slice(name)[rows]
            except (SafetensorError, OSError) as error:
                raise ConversionError(f"{name} in {file} cannot be read: {error}") from error
        if not all(piece.isfinite().all() for piece in tensor.flatten().split(2**24)):
            raise ConversionError(f"{name} in {file} has values that are not finite")
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(info.numel * info.dtype.itemsize for info in self.tensors.values())


def count_numbers(checkpoint: "Checkpoint") -> int:
    """Of all tensors of a checkpoint, or of what has `tensors` as it does."""
    return sum(info.numel for info in checkpoint.tensors.values())


class ShardWriter:
    """
    Writes tensors in the order in which they were announced, each straight to its shard: no shard is held in memory.

    Args:
        folder: where `model.safetensors`, or shards and their index, go.
        tensors: name, shape and dtype of every tensor, in the order of writing.
        max_shard_size: bytes of a shard; a larger tensor has a shard for itself.
    """

    def __init__(self, folder: Path, tensors: list[tuple[str, tuple[int, ...], torch.dtype]], max_shard_size: int):
        self.folder = folder
        self.shards: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
        size = self.total_size = 0
        for tensor in tensors:
            nbytes = torch.Size(tensor[1]).numel() * tensor[2].itemsize
            if self.shards[-1] and size + nbytes > max_shard_size:
                self.shards.append([])
                size = 0
            self.shards[-1].append(tensor)
            size += nbytes
            self.total_size += nbytes
        self.queue = [(shard, *tensor) for shard, tensors in enumerate(self.shards) for tensor in tensors]
        self.position = 0
        self.file = None

    def _name(self, shard: int) -> str:
        count = len(self.shards)
        return SINGLE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def _start(self, shard: int) -> None:
        self._finish()
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape, dtype in self.shards[shard]:
            end = offset + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.file = open(self.folder / self._name(shard), "wb")  # noqa: SIM115  closed by `_finish`
        self.file.write(len(text).to_bytes(8, "little") + text)

    def _finish(self) -> None:
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Appends the next tensor; raises `ValueError` for another one than was announced."""
        shard, expected, shape, dtype = self.queue[self.position]
        if name != expected or tuple(tensor.shape) != shape:
            raise ValueError(f"expected {expected} {list(shape)}, got {name} {list(tensor.shape)}")
        if self.position == 0 or self.queue[self.position - 1][0] != shard:
            self._start(shard)
        for piece in tensor.detach().reshape(-1).split(2**26):
            self.file.write(piece.to(dtype).contiguous().view(torch.uint8).numpy())
        self.position += 1

    def close(self) -> None:
        """Completes the last shard and writes the index; without it the folder holds no checkpoint."""
        if self.position != len(self.queue):
            raise ValueError(f"{self.queue[self.position][1]} was announced and not written")
        self._finish()
        if len(self.shards) > 1:
            weight_map = {
                name: self._name(shard) for shard, tensors in enumerate(self.shards) for name, _, _ in tensors
            }
            index = {"metadata": {"total_size": self.total_size}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception) -> None:
        if self.file is not None:
            self.file.close()
