"""
Every way to run a T6 on several processes, beside one process. `test_distributed.py` starts it on two; by hand:

    PYTHONPATH=examples TRITON_INTERPRET=1 torchrun --nproc-per-node 4 -m tests.modeling_t6.distributed_cases FOLDER [CASE ...]

on 2 or 4 processes, without a GPU. FOLDER, a new one, takes the checkpoints, and PASSED-n, the cases that process n has passed. The
arithmetic is float64's: 16 digits, of which a few hundred additions in another order leave 13.
"""

import contextlib
import io
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from transformers import DynamicCache
from transformers.distributed import DistributedConfig

from conversion.__main__ import main as convert
from modeling_t6 import T6ForCausalLM, T6ForSequenceClassification
from modeling_t6.cache_t6 import CACHE_NAME, cache_nbytes
from modeling_t6.flash_tpa_t6 import decode_with_flash_tpa
from tests.conversion.common import save_source

from . import interpreter
from .common import cached, random_ids, random_model, tiny_config
from .test_variants import CACHED, VARIANTS


NEW = 3
HEADS, HEAD_DIM = 12, 16  # 6 or 3 heads in a process: rows of A need padding
MIXED = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    "sliding_window": 5,
    "k_rank": [1, 2, 3, 1],
}
TENSOR_PARALLEL = VARIANTS | {
    "norms": {"qk_norm": True, "head_norm": True, "output_gate": True},
    "norms of non-contextual A": {"noncontextual_a": True, "q_rank": None, "qk_norm": True, "head_norm": True},
    "norms of non-contextual B": {"noncontextual_b": True, "qk_norm": True},
    "norms of shared B": {"shared_b": True, "v_rank": 2, "qk_norm": True, "sliding_window": 5},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
}
PIPELINE = {
    "TPA": {},
    "non-contextual A": {"noncontextual_a": True, "tie_word_embeddings": False},
    "mixed layers": MIXED,
    "mixed layers of non-contextual B": MIXED | {"noncontextual_b": True},
}

assert_close = partial(torch.testing.assert_close, atol=1e-10, rtol=0)


def config_of(**overrides):
    return tiny_config(**{"num_attention_heads": HEADS, "vocab_size": 96} | overrides)


def distributed(model, folder: Path, **sizes: int):
    """The model, saved by one process and loaded by all as Transformers' `DistributedConfig` says."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return type(model).from_pretrained(folder, dtype=model.dtype, distributed_config=DistributedConfig(**sizes))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    """In float64: the model's own is float32's."""
    return torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def generate(model, ids: torch.Tensor, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True} | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **options)


def check_inference(one, many, ids: torch.Tensor, kinds=("T6Cache", "static"), **options) -> list[tuple]:
    """
    Logits, and greedy tokens over some kinds of cache, of a batch with and without left padding.

    Returns:
        The caches of one process, each with what this process holds.
    """
    with torch.no_grad():
        expected = one(ids).logits
        assert expected.std() > 0.1
        assert_close(many(ids).logits, expected)
    many = getattr(many, "module", many)  # DDP wraps `forward` alone
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    caches = []
    for kind in kinds:
        outputs = []
        for model, more in ((one, {}), (many, options)):
            more = more | {"cache_implementation": "static"} if kind == "static" else more
            more = more | {CACHE_NAME: DynamicCache()} if kind == "DynamicCache" else more
            outputs.append(generate(model, ids, attention_mask=mask, **more))
        tokens = [output.sequences.tolist() for output in outputs]
        assert tokens[1] == tokens[0], (kind, tokens)
        caches.append(tuple(map(cached, outputs)))
    return caches


def check_weights(one, folder: Path) -> None:
    """What several processes saved is what one process has."""
    saved = type(one).from_pretrained(folder, dtype=one.dtype).state_dict()
    assert saved.keys() == one.state_dict().keys()
    for name, weight in one.state_dict().items():
        assert_close(saved[name], weight)
    files = [transformers.modeling_utils.load_state_dict(path) for path in folder.glob("*.safetensors")]
    tied = set(one.all_tied_weights_keys)
    assert {name for file in files for name in file} == saved.keys() - tied


def tensor_parallel(folder: Path, variant: str) -> None:
    config = config_of(num_hidden_layers=2 if variant in ("TPA", "norms") else 1, **TENSOR_PARALLEL[variant])
    one = random_model(config, dtype=torch.float64)
    many = distributed(one, folder / "one", tp_size=dist.get_world_size())
    ids = random_ids(config, 2, 9)
    k, v = config.ranks(0)
    numbers = CACHED.get(variant.removeprefix("norms of "), lambda h, d, k, v: (k + v) * (h + d))
    numbers = numbers(config.num_key_value_heads // dist.get_world_size(), HEAD_DIM, k, v)
    for _, cache in check_inference(one, many, ids):
        for layer in cache.layers:
            row = layer.keys.shape[-1] + layer.values.shape[-1]
            assert numbers <= row <= numbers + 7 * (k + v) and row % 8 == 0, (row, numbers)

    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (one, many)]
    for batch in (ids, ids.flip(1)):  # gradients add up
        losses = [loss_of(model, batch) for model in (one, many)]
        assert_close(losses[1], losses[0])
        for loss in losses:
            loss.backward()
    for (name, parameter), other in zip(one.named_parameters(), many.parameters(), strict=True):
        assert parameter.grad.abs().max() > 1e-6, name
        assert_close(whole(other.grad), parameter.grad, msg=lambda text, name=name: f"gradient of {name}: {text}")
    for optimizer in optimizers:
        optimizer.step()
    many.save_pretrained(folder / "many")
    check_weights(one, folder / "many")
    for name in ("q_a_proj", "k_a", "o_proj"):
        for module in many.model.layers:
            weight = getattr(getattr(module.self_attn, name, None), "weight", getattr(module.self_attn, name, None))
            assert weight is None or weight.to_local().numel() == weight.numel() // dist.get_world_size()


def tensor_parallel_with_checkpointing(folder: Path) -> None:
    one = random_model(config_of(qk_norm=True, noncontextual_b=True), dtype=torch.float64).train()
    many = distributed(one, folder / "one", tp_size=dist.get_world_size()).train()
    many.gradient_checkpointing_enable()
    ids = random_ids(one.config, 2, 9)
    for model in (one, many):
        loss_of(model, ids).backward()
    for parameter, other in zip(one.parameters(), many.parameters(), strict=True):
        assert_close(whole(other.grad), parameter.grad)


def tensor_parallel_classifier(folder: Path) -> None:
    one = random_model(config_of(num_labels=3), cls=T6ForSequenceClassification, dtype=torch.float64)
    many = distributed(one, folder / "one", tp_size=dist.get_world_size())
    ids = random_ids(one.config, 2, 9)
    assert_close(many(ids).logits, one(ids).logits)


def tensor_parallel_of_a_llama(folder: Path) -> None:
    """A converted Llama beside the Llama: of both, Transformers computes the norms in float32, with 7 digits."""
    source, converted = folder / "llama", folder / "converted"
    if dist.get_rank() == 0:
        save_source(source, vocab_size=96)
        assert convert(["hf", str(source), str(converted), "--no-verify"]) == 0
    dist.barrier()
    one = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    many = T6ForCausalLM.from_pretrained(
        converted, dtype=torch.float32, distributed_config=DistributedConfig(tp_plan="auto")
    )
    ids = random_ids(many.config, 2, 9)
    torch.testing.assert_close(many(ids).logits, one(ids).logits, atol=1e-4, rtol=0)
    assert generate(many, ids).sequences.equal(generate(one, ids).sequences)


def tensor_parallel_with_flash_tpa(folder: Path, **fields) -> None:
    """The Triton kernels, interpreted, over the heads of a process."""
    interpreter.make_haste(pytest.MonkeyPatch())
    one = random_model(config_of(num_hidden_layers=1, **fields))
    many = distributed(one, folder / "one", tp_size=dist.get_world_size())
    many.set_attn_implementation("flash_tpa")
    with torch.no_grad():
        assert decode_with_flash_tpa(many.config, torch.zeros(1, 1, 1), DynamicCache())
    ids = random_ids(one.config, 1, 9)
    assert generate(many, ids, max_new_tokens=3).sequences.equal(generate(one, ids, max_new_tokens=3).sequences)


def tensor_parallel_refusal(folder: Path) -> None:
    """Of heads that the processes cannot share out evenly."""
    kinds = {
        "contextual": ("num_attention_heads", 47, {}),
        "constant": ("num_attention_heads", 47, {"noncontextual_a": True}),
        "grouped": ("num_key_value_heads", 3, {}),
    }
    for name, (field, heads, options) in kinds.items():
        one = random_model(config_of(**{field: heads}, **options))
        try:
            distributed(one, folder / name, tp_size=dist.get_world_size())
        except ValueError as error:
            message = f"`{field}`={heads} must be a multiple of the number of processes, got {dist.get_world_size()}."
            assert str(error).endswith(message), error
        else:
            raise AssertionError(f"{heads} heads were taken")


def pipeline(folder: Path, variant: str) -> None:
    config = config_of(num_hidden_layers=4, **PIPELINE[variant])
    one = random_model(config, dtype=torch.float64)
    many = distributed(one, folder / "one", pp_size=dist.get_world_size())
    ids = random_ids(config, 2, 9)
    for expected, here in check_inference(one, many, ids, ("T6Cache", "static", "DynamicCache")):
        expected, here = cache_nbytes(expected), cache_nbytes(here)
        total = torch.tensor(here)
        dist.all_reduce(total)
        assert here < expected and total == expected, (here, total, expected)
    with torch.no_grad():
        assert_close(loss_of(many, ids), loss_of(one, ids))
    # From a returned cache, of which this process fills the rows of its layers.
    outputs = [generate(model, ids) for model in (one, many)]
    outputs = [
        generate(model, output.sequences, **{CACHE_NAME: cached(output)})
        for model, output in zip((one, many), outputs)
    ]
    assert outputs[1].sequences.equal(outputs[0].sequences)


def check_data_parallel(one, many, backward: Callable = torch.Tensor.backward, **options) -> None:
    """Each process has sequences of its own; the loss is the mean of theirs, and so are the gradients."""
    ids = random_ids(one.config, 2 * dist.get_world_size(), 9)
    mine = ids[2 * dist.get_rank() :][:2]
    check_inference(one, many, mine, **options)
    # Prompts and answers of different lengths: whoever is ready first waits for the rest.
    lengths = {"max_new_tokens": 4 + 3 * dist.get_rank()}
    mine_cut = mine[:, dist.get_rank() :]
    output = generate(getattr(many, "module", many), mine_cut, **lengths, **options)
    assert output.sequences.equal(generate(one, mine_cut, **lengths).sequences)

    for batch in (ids, ids.flip(1)):
        expected = loss_of(one, batch)
        expected.backward()
        loss = loss_of(many, batch[2 * dist.get_rank() :][:2])
        backward(loss)
        total = loss.detach().clone()
        dist.all_reduce(total)
        assert_close(total / dist.get_world_size(), expected.detach())
    for (name, parameter), other in zip(one.named_parameters(), many.parameters(), strict=True):
        assert_close(whole(other.grad), parameter.grad, msg=lambda text, name=name: f"gradient of {name}: {text}")


def fsdp(folder: Path) -> None:
    """FSDP2 by Transformers."""
    one = random_model(config_of(noncontextual_a=True, qk_norm=True), dtype=torch.float64)
    many = distributed(one, folder / "one", fsdp_size=dist.get_world_size())
    assert all(isinstance(parameter, DTensor) for parameter in many.parameters())
    check_data_parallel(one, many, synced_gpus=True)
    many.save_pretrained(folder / "many")
    dist.barrier()
    check_weights(one, folder / "many")


def accelerated(folder: Path, kind: str) -> None:
    """FSDP2 and DDP by accelerate. Without a GPU it would leave FSDP aside and start DDP, if it were not told."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, options = Accelerator(cpu=True), {}
    if kind == "FSDP2":
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        options = {"synced_gpus": True}
    one, many = (random_model(config_of(), dtype=torch.float64) for _ in range(2))
    many, _ = accelerator.prepare(many, torch.optim.SGD(many.parameters()))
    assert {isinstance(parameter, DTensor) for parameter in many.parameters()} == {kind == "FSDP2"}
    assert isinstance(many, torch.nn.parallel.DistributedDataParallel) == (kind == "DDP")
    check_data_parallel(one, many, accelerator.backward, **options)


def example(folder: Path, kind: str) -> None:
    """`examples/generate.py` writes what it writes in one process."""
    import generate as script

    texts = []
    for options in ([], ["--parallel", kind]):
        sys.argv = ["generate.py", "--dtype", "float32", "--max-new-tokens", "5", *options]
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            script.main()
        texts.append(stdout.getvalue())
    if dist.get_rank() == 0:
        assert texts[1].split("\n\n")[0] == texts[0].split("\n\n")[0]
        assert f"in this process, one of {dist.get_world_size()}" in texts[1]
    else:
        assert texts[1] == ""


CASES = {
    **{f"tensor parallel: {variant}": partial(tensor_parallel, variant=variant) for variant in TENSOR_PARALLEL},
    "tensor parallel: gradient checkpointing": tensor_parallel_with_checkpointing,
    "tensor parallel: classifier": tensor_parallel_classifier,
    "tensor parallel: converted Llama": tensor_parallel_of_a_llama,
    "tensor parallel: FlashTPA": partial(tensor_parallel_with_flash_tpa, head_factor_act="softmax"),
    "tensor parallel: FlashTPA, grouped heads": partial(
        tensor_parallel_with_flash_tpa, num_key_value_heads=4, qk_norm="heads", head_factor_act="sigmoid"
    ),
    "tensor parallel: 47 heads": tensor_parallel_refusal,
    **{f"pipeline: {variant}": partial(pipeline, variant=variant) for variant in PIPELINE},
    "FSDP2": fsdp,
    "FSDP2 by accelerate": partial(accelerated, kind="FSDP2"),
    "DDP by accelerate": partial(accelerated, kind="DDP"),
    "example: tensor": partial(example, kind="tensor"),
    "example: pipeline": partial(example, kind="pipeline"),
}


def main() -> None:
    folder, *names = sys.argv[1:]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # If one process fails, the others need not wait long for it.
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    Path(folder).mkdir(parents=True, exist_ok=True)
    passed = Path(folder, f"PASSED-{dist.get_rank()}")
    for index, name in enumerate(names or CASES):
        CASES[name](Path(folder, str(index)))
        with passed.open("a") as file:
            file.write(f"{name}\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
