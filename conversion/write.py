"""Writes the T6 model that a plan describes."""

from pathlib import Path

import torch
from tqdm import tqdm
from transformers.dynamic_module_utils import custom_object_save

from modeling_t6 import T6Config, T6ForCausalLM
from modeling_t6.modeling_t6 import AUTO_MAP

from .files.checkpoints import Checkpoint, ShardWriter
from .files.errors import ConversionError
from .sources.plan import Plan


def meta_model(config: T6Config) -> T6ForCausalLM:
    with torch.device("meta"):
        return T6ForCausalLM(config)


def loaded_dtype(plan: Plan, checkpoint: Checkpoint, dtype: torch.dtype | None) -> torch.dtype:
    """
    In which Transformers loads the result: in that of the source's configuration, unless all weights are written in `dtype`,
    or none of them is stored in what the configuration says.
    """
    stored = [info.dtype for info in checkpoint.tensors.values()]
    return dtype or (plan.config.dtype if plan.config.dtype in stored else stored[0])


def write_model(
    plan: Plan,
    checkpoint: Checkpoint,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_size: int,
    quiet: bool = False,
) -> None:
    """
    Writes configuration, code and weights of the T6 model into `folder`, reading one tensor at a time.

    Args:
        dtype: of all weights; `None` keeps that of each tensor of the source.
    """
    plan.check_names(set(checkpoint.tensors))
    model = meta_model(plan.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if plan.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    common = loaded_dtype(plan, checkpoint, dtype)
    announced = [(name, tuple(tensor.shape), common) for name, tensor in plan.constants.items()]
    for source, info in checkpoint.tensors.items():
        announced += [(target, shapes[target], dtype or info.dtype) for target, _ in plan.moves.get(source, ())]
    unset = sorted(set(shapes) - {name for name, _, _ in announced})
    assert not unset, f"no tensor of the source sets {unset}"

    plan.config.auto_map, plan.config.architectures, plan.config.dtype = dict(AUTO_MAP), ["T6ForCausalLM"], common
    plan.config.save_pretrained(folder)
    custom_object_save(model, folder)
    with ShardWriter(folder, announced, max_shard_size) as writer:
        for name, tensor in plan.constants.items():
            writer.write(name, tensor)
        with tqdm(total=checkpoint.nbytes, unit="B", unit_scale=True, desc="converting", disable=quiet) as progress:
            for source, tensor in checkpoint:
                for target, transform in plan.moves.get(source, ()):
                    try:
                        result = transform(tensor if dtype is None else tensor.to(dtype))
                    except (RuntimeError, IndexError, ValueError) as error:
                        raise ConversionError(
                            f"{source} has shape {list(tensor.shape)}, which does not fit the configuration ({error})"
                        ) from error
                    if tuple(result.shape) != shapes[target]:
                        raise ConversionError(
                            f"{source} has shape {list(tensor.shape)}: by the configuration {target} takes "
                            f"{list(shapes[target])} from it, got {list(result.shape)}"
                        )
                    if dtype == torch.float16 and not result.isfinite().all():
                        raise ConversionError(f"{source} has values too large for float16: expected another --dtype")
                    writer.write(target, result)
                progress.update(tensor.nbytes)
        writer.close()
