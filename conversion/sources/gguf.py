"""
GGUF files: the folder that Transformers' own loading makes of one.

Configuration, names, and the order of rotated rows are Transformers' (`modeling_gguf_pytorch_utils`), numbers are those of
the `gguf` package. Transformers holds all weights in memory; here one tensor is dequantised at a time, some rows at a time.
What Transformers leaves out of a file in silence, and would then compute something else, is refused.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from ..files.checkpoints import ShardWriter
from ..files.errors import ConversionError, is_error, one_line
from ..files.names import listed
from ..files.space import check_space
from ..files.tokenizer import compare_tokenizers, load_tokenizer, save_tokenizer
from .fields import RULES, shown


ARCHITECTURES = ("llama", "phi3", "qwen2", "qwen3")  # those that Transformers reads of the families here
# What a file must say, and the field of `config.json` that Transformers makes of it.
REQUIRED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# What Transformers does not read, with the values that say nothing else than it computes.
NEUTRAL = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "attention.scale": (),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    "expert_count": (0,),
}
EXACT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}  # all others need float32
PIECE = 2**22  # numbers that are dequantised at a time: the package's intermediate results are several times as large


def is_gguf(path: Path) -> bool:
    """Whether a file is one, by its name or, as in stores that name files by digests, by how it begins."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"


class GgufFile:
    """
    A file whose header has been read.

    Args:
        path: of the file.

    Raises:
        ConversionError: naming the file and what of it, or which package, is not as it must be.
    """

    def __init__(self, path: Path):
        if importlib.util.find_spec("gguf") is None:
            raise ConversionError(f'{path} is GGUF, which the package gguf reads: `pip install "gguf>=0.10.0"`')
        from gguf import GGUFReader

        self.path = path
        if path.stat().st_size == 0:
            raise ConversionError(f"{path} is empty: expected a GGUF file")
        with path.open("rb") as file:
            if (magic := file.read(4)) != b"GGUF":
                raise ConversionError(f"{path} is no GGUF file: expected it to begin with b'GGUF', got {magic!r}")
        try:
            self.reader = GGUFReader(path)
        except Exception as error:  # whatever numpy raises for a slice past the end
            raise ConversionError(f"{path} is damaged, or not whole: {one_line(error)}") from error
        if self.reader.byte_order != "I":
            raise ConversionError(f"{path} has the bytes of numbers in another order than this machine")
        self.architecture = self._text("general.architecture")
        if self.architecture in ARCHITECTURES:
            self._check_fields()

    def field(self, name: str):
        """The value of a field, a list if it has several, or None if the file has no such field."""
        from transformers.modeling_gguf_pytorch_utils import read_field

        try:
            value = read_field(self.reader, name)
        except Exception as error:  # text that is not UTF-8
            raise ConversionError(f"{self.path}: `{name}` cannot be read: {one_line(error)}") from error
        return (value[0] if len(value) == 1 else value) if name in self.reader.fields else None

    def _text(self, name: str) -> str:
        value = self.field(name)
        if not isinstance(value, str):
            raise ConversionError(f"{self.path}: `{name}` must be text, got {shown(value)}")
        return value

    def _check_fields(self) -> None:
        for name, config_name in REQUIRED.items():
            name = f"{self.architecture}.{name}"
            expected, accepts = RULES[config_name]
            value = self.field(name)
            if value is None:
                raise ConversionError(f"{self.path} has no field `{name}`: expected {expected}")
            if not accepts(value):
                raise ConversionError(f"{self.path}: `{name}` must be {expected}, got {shown(value)}")
        for name, neutral in NEUTRAL.items():
            name = f"{self.architecture}.{name}"
            value = self.field(name)
            if value is not None and value not in neutral:
                raise ConversionError(
                    f"{self.path}: `{name}` is {shown(value)}, which Transformers does not read: expected "
                    f"{' or '.join(map(repr, neutral)) or 'no such field'}"
                )
        heads, groups = (
            self.field(f"{self.architecture}.attention.{name}") for name in ("head_count", "head_count_kv")
        )
        if heads % groups:
            raise ConversionError(
                f"{self.path}: `{self.architecture}.attention.head_count` is {heads}, no multiple of "
                f"`{self.architecture}.attention.head_count_kv`, {groups}"
            )
        if self.field(f"{self.architecture}.block_count") > len(self.reader.tensors):
            raise ConversionError(
                f"{self.path}: `{self.architecture}.block_count` is {self.field(f'{self.architecture}.block_count')}, "
                f"more than there are tensors, {len(self.reader.tensors)}"
            )

    def _transformers(self, what: str, auto_class, **options):
        try:
            return auto_class.from_pretrained(self.path.parent, gguf_file=self.path.name, **options)
        except BaseException as error:  # of the tokenizers library, errors are bare `Exception`s, or panics
            if not is_error(error):
                raise
            raise ConversionError(f"{self.path}: Transformers cannot make {what} of it: {one_line(error)}") from error

    def write_config(self, folder: Path) -> list[str]:
        """
        Writes the configuration into the new folder `folder`.

        Returns:
            What the user is to be told.
        """
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

        if self.architecture not in {*ARCHITECTURES, *GGUF_SUPPORTED_ARCHITECTURES}:
            raise ConversionError(
                f"{self.path}: `general.architecture` is {shown(self.architecture)}, which Transformers does not read from "
                f"GGUF: expected one of {', '.join(ARCHITECTURES)}"
            )
        folder.mkdir()
        config = self._transformers("a configuration", AutoConfig)
        config.dtype = torch.float32  # in which Transformers dequantises
        config.save_pretrained(folder)
        if self.architecture not in ARCHITECTURES:
            return []  # the configuration says why it is refused
        self.check_heads(config)
        window = self.field(f"{self.architecture}.attention.sliding_window")
        if window and getattr(config, "sliding_window", None) != window:
            return [
                f"{self.path} has {self.architecture}.attention.sliding_window={window}, which Transformers does not read: "
                "every token sees all those before it"
            ]
        return []

    def write_tokenizer(self, folder: Path) -> None:
        """
        Writes the tokenizer, if the file has one, into the new folder `folder`: not beside the configuration, since there
        Transformers takes the class of some families, which builds a pipeline of its own.
        """
        folder.mkdir()
        if self.field("tokenizer.ggml.model") not in (None, "none", "no_vocab"):
            tokenizer = self._transformers("a tokenizer", AutoTokenizer)
            save_tokenizer(tokenizer, folder)
            compare_tokenizers(tokenizer, load_tokenizer(folder))

    def check_heads(self, config: PreTrainedConfig) -> None:
        """Raises a `ConversionError` if heads are of another size, or rotated otherwise, than Transformers takes them for."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            value = self.field(f"{self.architecture}.{name}")
            if value is not None and value != head_dim:
                raise ConversionError(
                    f"{self.path}: `{self.architecture}.{name}` is {shown(value)}, and Transformers takes heads to be of, and "
                    f"rotated over, {head_dim} numbers"
                )

    def write_weights(self, folder: Path, max_shard_size: int) -> None:
        """Writes the weights, in float16 or bfloat16 where they are stored so, else in float32, beside the configuration."""
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        processor = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)(config=config.to_dict())
        try:
            names = get_gguf_hf_weights_map(model, processor)
        except NotImplementedError as error:
            raise ConversionError(f"{self.path}: {one_line(error)}") from error
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        stored = {tensor.name: tensor for tensor in self.reader.tensors}
        announced = []
        for name, tensor in stored.items():
            shape = shapes.get(names.get(name))
            if shape is None:
                raise ConversionError(
                    f"{self.path}: {name} has no place in a {config.model_type} of Transformers, which leaves it out"
                )
            if tuple(reversed(tensor.shape.tolist())) != shape:
                raise ConversionError(
                    f"{self.path}: {name} has shape {list(reversed(tensor.shape.tolist()))}, by the file's fields it must "
                    f"have {list(shape)}"
                )
            announced.append((names[name], shape, EXACT_DTYPES.get(tensor.tensor_type.name, torch.float32)))
        if missing := [gguf for gguf, name in names.items() if name in shapes and gguf not in stored]:
            raise ConversionError(f"{self.path}: tensors are missing: {listed(missing)}")

        check_space(folder, sum(torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in announced))
        with ShardWriter(folder, announced, max_shard_size) as writer:
            progress = tqdm(announced, desc="dequantising", unit="tensor")
            for (name, shape, dtype), tensor in zip(progress, stored.values()):
                weights = self.dequantised(tensor)
                if not np.isfinite(weights).all():
                    raise ConversionError(f"{self.path}: {tensor.name} has values that are not finite")
                weights = processor.process(weights.reshape(shape), tensor.name).weights
                writer.write(name, torch.from_numpy(np.ascontiguousarray(weights)).to(dtype))
            writer.close()

    def dequantised(self, tensor) -> np.ndarray:
        """The numbers of a tensor of the reader, in float32, its rows piece by piece."""
        from gguf import dequantize

        columns = int(tensor.shape[0])
        rows = tensor.n_elements // columns
        result = np.empty((rows, columns), np.float32)
        with self.path.open("rb") as file:  # not by the reader's mapping, which would keep what was read in memory
            file.seek(tensor.data_offset)
            nbytes = tensor.n_bytes // rows
            step = max(1, PIECE // columns)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                data = np.frombuffer(file.read(count * nbytes), np.uint8).view(tensor.data.dtype).reshape(count, -1)
                try:
                    result[start : start + count] = dequantize(data, tensor.tensor_type)
                except NotImplementedError as error:
                    raise ConversionError(
                        f"{self.path}: {tensor.name} is of type {tensor.tensor_type.name}, which the package gguf does not "
                        "dequantise"
                    ) from error
        return result
