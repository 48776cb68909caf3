"""A small T6 whose every part matters: odd sizes, ranks that differ, and no weight at zero."""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import torch

from modeling_t6 import T6Config, T6ForCausalLM, factor_product_t6
from modeling_t6.cache_t6 import CACHE_NAME


# `T6_TEST_DEVICE=cuda pytest tests/modeling_t6/test_generation.py tests/modeling_t6/test_reference.py` tests a GPU.
DEVICE = os.environ.get("T6_TEST_DEVICE", "cpu")
# The mode of `generate()` by its id, none where Transformers cannot make its cache: that wants a stream, which torch for CUDA has not
# without a GPU, unlike torch for CPUs.
OFFLOADED_MODE = {"offloaded": {"cache_implementation": "offloaded"}}
if torch.version.cuda is not None and not torch.cuda.is_available():
    OFFLOADED_MODE = {}


def tiny_config(**overrides) -> T6Config:
    fields = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "head_dim": 16,
        "q_rank": 3,
        "k_rank": 2,
        "v_rank": 1,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    return T6Config(**fields | overrides)


@contextlib.contextmanager
def projected_one_by_one() -> Iterator[None]:
    """A context in which each factor projection is a product of its own, as where adapters or hooks are added to it."""
    with mock.patch.object(factor_product_t6, "_are_plain", lambda projections: False):
        yield


def random_model(config: T6Config, cls=T6ForCausalLM, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A model in eval mode. At initialisation `o_proj` and `down_proj` are zero: attention would not show."""
    torch.manual_seed(seed)
    model = cls(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(DEVICE)


def random_ids(config: T6Config, *shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, config.vocab_size, shape, generator=generator).to(DEVICE)


def train_step(model, ids: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    """The loss of the tokens before the step."""
    loss = model(ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def quick(implementation: str):
    """
    A context in which `flex_attention` runs as PyTorch's plain operations. Transformers compiles it with inductor, whose
    C++ takes half a minute of a CPU.
    """
    interpreted = implementation == "flex_attention" and DEVICE == "cpu"
    return torch.compiler.set_stance("force_eager" if interpreted else "default")


def cached(output):
    """The cache in a model's output, whose name depends on the version of Transformers."""
    return getattr(output, CACHE_NAME)
