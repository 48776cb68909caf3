"""
Checkpoints of the paper's research code as T6 models.

What differs from T6 in Transformers: its RoPE turns the other way (y1 = x1 cos + x2 sin, y2 = x2 cos - x1 sin), which
negating the second half of what is rotated undoes; its norms have no weights, and float32's machine epsilon; its
checkpoints are pickles, read with `weights_only=True` alone.
"""

import math
import pickle
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch.nn import functional as F

from modeling_t6 import T6Config

from ..files.checkpoints import DTYPE_NAMES, INDEX, SINGLE, Checkpoint, TensorInfo
from ..files.errors import ConversionError, reason
from ..files.folders import read_json
from .fields import SIZES, is_integer, is_number, shown
from .plan import Plan, Transform


PREFIXES = ("_orig_mod.", "module.")
# With the largest that is taken for a size.
FIELDS = {
    "n_layer": SIZES["num_hidden_layers"], "n_head": SIZES["num_attention_heads"], "head_dim": SIZES["head_dim"],
    "n_embd": SIZES["hidden_size"], "rank": 10**5, "vocab_size": SIZES["vocab_size"],
    "block_size": SIZES["max_position_embeddings"],
}  # fmt: skip
HEAD_NORM_EPS = 1e-5
EPS = torch.finfo(torch.float32).eps


class PickledCheckpoint:
    """The tensors of a pickled state dict, memory-mapped but for files older than torch 1.6; has what `Checkpoint` has."""

    def __init__(self, file: Path, state: dict):
        self.state: dict[str, torch.Tensor] = {}
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise ConversionError(f"{file} holds {name!r}, a {type(tensor).__name__}: expected tensors by name")
            while name.startswith(PREFIXES):
                name = name.split(".", 1)[1]
            if name in self.state:
                raise ConversionError(f"{file} holds {name} twice, with and without a prefix")
            if tensor.dtype not in DTYPE_NAMES:
                raise ConversionError(
                    f"{name} in {file} has dtype {tensor.dtype}: expected one of {', '.join(map(str, DTYPE_NAMES))}"
                )
            if tensor.layout is not torch.strided or tensor.device.type != "cpu":
                raise ConversionError(
                    f"{name} in {file} is {tensor.layout} on {tensor.device}: expected numbers in a row"
                )
            self.state[name] = tensor
        self.file = file
        self.tensors = {name: TensorInfo(file, tuple(t.shape), t.dtype) for name, t in self.state.items()}
        self.nbytes = sum(tensor.nbytes for tensor in self.state.values())

    def __iter__(self):
        for name, tensor in self.state.items():
            if not tensor.isfinite().all():
                raise ConversionError(f"{name} in {self.file} has values that are not finite")
            yield name, tensor


def load_pickle(file: Path) -> dict:
    try:
        content = torch.load(file, map_location="cpu", mmap=is_zipfile(file), weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{file} holds more than tensors and plain values and is not loaded: {reason(error)}"
        ) from error
    except Exception as error:  # damaged bytes make torch and zipfile raise what they like
        raise ConversionError(f"{file} cannot be read as a checkpoint of torch: {reason(error)}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} must hold a dict, got a {type(content).__name__}")
    return content


def load(source: Path) -> tuple[dict, Checkpoint | PickledCheckpoint]:
    """The model's arguments and tensors, from a `save_pretrained` folder, or a folder with, or path of, a `ckpt.pt`."""
    if source.is_dir() and (source / "config.json").exists():
        arguments = read_json(source / "config.json")
        if "hidden_size" in arguments and "n_embd" not in arguments:
            raise ConversionError(
                f"{source} is a model of Transformers, of type {arguments.get('model_type')!r}: `python -m conversion hf` "
                "reads those"
            )
        if (source / SINGLE).exists() or (source / INDEX).exists():
            return arguments, Checkpoint(source)
        file = source / "pytorch_model.bin"
        if not file.exists():
            raise ConversionError(f"{source} has neither {SINGLE} nor pytorch_model.bin")
        return arguments, PickledCheckpoint(file, load_pickle(file))
    file = source / "ckpt.pt" if source.is_dir() else source
    if not file.exists():
        raise ConversionError(
            f"{source} has neither config.json nor ckpt.pt, as folders of the research code have"
            if source.is_dir()
            else f"{source}: there is no such file or folder"
        )
    content = load_pickle(file)
    for key in ("model", "model_args"):
        if not isinstance(content.get(key), dict):
            raise ConversionError(f"{file} must hold a dict `{key}`, as the research code's checkpoints do")
    return content["model_args"], PickledCheckpoint(file, content["model"])


def rotary_dim(arguments: dict) -> int:
    """Features of a head that are rotated: the first int(d * rope_partial_factor), rounded down to even."""
    factor = arguments.get("rope_partial_factor")
    return arguments["head_dim"] if factor is None else int(arguments["head_dim"] * factor) // 2 * 2


def turned(head_dim: int, rotary: int) -> Transform:
    """Negates, in each row of a weight's output viewed as [n, d], the second half of what is rotated."""

    def transform(weight: torch.Tensor) -> torch.Tensor:
        rows = weight.clone().view(-1, head_dim, weight.shape[-1])
        rows[:, rotary // 2 : rotary].neg_()
        return rows.view_as(weight)

    return transform


def make_plan(arguments: dict, checkpoint: Checkpoint | PickledCheckpoint) -> Plan:
    """
    Raises:
        ConversionError: naming a field of the configuration, or a tensor, that is missing or cannot be.
    """
    for field, most in FIELDS.items():
        if not is_integer(arguments.get(field)) or not 1 <= arguments[field] <= most:
            raise ConversionError(
                f"`{field}` must be an integer from 1 to {most:,}, got {shown(arguments.get(field))}"
            )
    factor = arguments.get("rope_partial_factor")
    if factor is not None and (not is_number(factor) or not 0 < factor <= 1):
        raise ConversionError(f"`rope_partial_factor` must be in (0, 1], got {factor!r}")
    d, rotary = arguments["head_dim"], rotary_dim(arguments)
    if rotary < 2 or rotary % 2:
        raise ConversionError(f"RoPE must rotate an even number of features, got {rotary} of `head_dim`={d}")
    first = "transformer.h.0."
    kv_only = f"{first}attn.c_qkv.c_q.weight" in checkpoint.tensors
    q_rank = arguments.get("q_rank")
    if not kv_only and (not is_integer(q_rank) or not 1 <= q_rank <= FIELDS["rank"]):
        raise ConversionError(f"`q_rank` must be an integer from 1 to {FIELDS['rank']:,}, got {shown(q_rank)}")
    mlp = checkpoint.tensors.get(f"{first}mlp.c_fc1.weight")
    if mlp is None:
        raise ConversionError(f"missing from the checkpoint: {first}mlp.c_fc1.weight")
    head_norm = f"{first}attn.subln.weight" in checkpoint.tensors
    if bool(arguments.get("using_groupnorm", head_norm)) != head_norm:
        raise ConversionError(
            f"`using_groupnorm` is {arguments['using_groupnorm']}, but the checkpoint "
            f"{'has' if head_norm else 'lacks'} {first}attn.subln.weight"
        )

    config = T6Config(
        vocab_size=arguments["vocab_size"],
        hidden_size=arguments["n_embd"],
        intermediate_size=mlp.shape[0],
        num_hidden_layers=arguments["n_layer"],
        num_attention_heads=arguments["n_head"],
        head_dim=d,
        q_rank=None if kv_only else q_rank,
        k_rank=arguments["rank"],
        v_rank=arguments["rank"],
        head_norm=head_norm,
        max_position_embeddings=arguments["block_size"],
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary / d},
        tie_word_embeddings=True,
    )
    plan = Plan(config, ignored=("lm_head.weight", "inv_freq", "attn.bias"))
    plan.move("transformer.wte.weight", "model.embed_tokens.weight")
    ones = torch.ones(config.hidden_size)
    plan.constants["model.norm.weight"] = ones
    turn = turned(d, rotary)
    for layer in range(config.num_hidden_layers):
        source, target = f"transformer.h.{layer}", f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            plan.constants[f"{target}.{name}.weight"] = ones
        if kv_only:
            plan.move(f"{source}.attn.c_qkv.c_q.weight", f"{target}.self_attn.q_proj.weight", turn)
        for x in "kv" if kv_only else "qkv":
            # A's rows are head first, rank second in both; B's are rank first.
            plan.move(f"{source}.attn.c_qkv.W_A_{x}.weight", f"{target}.self_attn.{x}_a_proj.weight")
            b = f"{source}.attn.c_qkv.W_B_{x}.weight", f"{target}.self_attn.{x}_b_proj.weight"
            plan.move(*b) if x == "v" else plan.move(*b, turn)
        if head_norm:
            plan.move(f"{source}.attn.subln.weight", f"{target}.self_attn.head_norm.weight")
        plan.move(f"{source}.attn.c_proj.weight", f"{target}.self_attn.o_proj.weight")
        for old, new in (("c_fc1", "gate_proj"), ("c_fc2", "up_proj"), ("c_proj", "down_proj")):
            plan.move(f"{source}.mlp.{old}.weight", f"{target}.mlp.{new}.weight")
    return plan


def research_logits(arguments: dict, state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """
    What the research code computes, cos and sin in float32: logits [batch, seq, vocab] of `ids` [batch, seq].
    Serves to check conversions.
    """
    h, d, rotary = arguments["n_head"], arguments["head_dim"], rotary_dim(arguments)
    batch, seq = ids.shape
    angles = torch.outer(torch.arange(seq).float(), 10000.0 ** (-torch.arange(0, rotary, 2).float() / rotary))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def turn(x: torch.Tensor) -> torch.Tensor:
        x1, x2, rest = x.split([rotary // 2, rotary // 2, d - rotary], dim=-1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=EPS)

    x = state["transformer.wte.weight"][ids]
    for layer in range(arguments["n_layer"]):
        w = {
            name.removeprefix(f"transformer.h.{layer}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"transformer.h.{layer}.")
        }
        y = norm(x)

        def heads(name: str, rotate: bool, y=y, w=w) -> torch.Tensor:
            if name == "q" and "attn.c_qkv.c_q.weight" in w:
                return turn((y @ w["attn.c_qkv.c_q.weight"].T).view(batch, seq, h, d))
            a = (y @ w[f"attn.c_qkv.W_A_{name}.weight"].T).view(batch, seq, h, -1)
            b = (y @ w[f"attn.c_qkv.W_B_{name}.weight"].T).view(batch, seq, -1, d)
            return a @ (turn(b) if rotate else b) / b.shape[2]

        q, k, v = (heads(name, name != "v").transpose(1, 2) for name in "qkv")
        scores = (q @ k.transpose(2, 3) / math.sqrt(d)).masked_fill(torch.ones(seq, seq).triu(1).bool(), -math.inf)
        y = scores.softmax(-1) @ v
        if "attn.subln.weight" in w:
            y = F.rms_norm(y, (d,), w["attn.subln.weight"], HEAD_NORM_EPS)
        x = x + y.transpose(1, 2).reshape(batch, seq, h * d) @ w["attn.c_proj.weight"].T
        y = norm(x)
        x = x + (F.silu(y @ w["mlp.c_fc1.weight"].T) * (y @ w["mlp.c_fc2.weight"].T)) @ w["mlp.c_proj.weight"].T
    return norm(x) @ state["transformer.wte.weight"].T
