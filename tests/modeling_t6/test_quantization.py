"""Weights quantised by torchao and bitsandbytes, on the CPU too: logits, decoding over factors, saved bytes, loading."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from modeling_t6 import T6Cache

from ..versions import once_but
from .common import DEVICE, cached, random_ids, random_model, tiny_config, train_step
from .test_generation import generate, greedy


# The A factors of keys and values, and B of the values, have 16, 8 and 16 rows.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "q_rank": 4}
CONFIGS = {
    "TPA": SHAPE,
    "odd heads": SHAPE | {"num_attention_heads": 7},
    "non-contextual A": SHAPE | {"noncontextual_a": True},
    "output gate": SHAPE | {"output_gate": True, "tie_word_embeddings": False},
}
every_config = pytest.mark.parametrize("overrides", once_but(CONFIGS.items(), "TPA"))


def unfit_for_4_bits(model) -> list[str]:
    """
    bitsandbytes' kernel for CPUs with AVX512-BF16 takes weights of a multiple of 32 rows and 64 columns. A list that is
    given replaces the default, which leaves the head out.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unfit = [name for name, module in linears.items() if module.out_features % 32 or module.in_features % 64]
    return [*unfit, "lm_head"]


QUANTIZERS = {
    "torchao int8": lambda model: TorchAoConfig(Int8WeightOnlyConfig()),
    "bitsandbytes 8 bits": lambda model: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes NF4": lambda model: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=unfit_for_4_bits(model),
    ),
}
# Bytes beside those of other weights, of a matrix with n rows and m columns.
SIZES = {
    "torchao int8": lambda n, m: n * m + n * (4 + 1),  # a scale in float32 and a zero point in int8 for each row
    "bitsandbytes 8 bits": lambda n, m: n * m + 4 * n + 1,  # a scale for each row, and one byte naming the layout
    "bitsandbytes NF4": lambda n, m: n * m // 2 + 4 * (n * m // 64) + 4 * 16,  # a scale for 64 numbers, and 16 levels
}
# Of the logits, in their standard deviations. Normal weights lie in 2 * 2.5 deviations to either side of a row's zero:
# a step of 1/127 of the largest is off by 0.6% of a weight in the mean square, in each of a dozen products one after the
# other. bitsandbytes rounds activations to 8 bits too, twice the error. 16 levels are off by 9%.
TOLERANCES = {"torchao int8": 0.1, "bitsandbytes 8 bits": 0.2, "bitsandbytes NF4": 0.8}
quantizers = pytest.mark.parametrize("name", QUANTIZERS)


def error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return ((logits - exact).square().mean().sqrt() / exact.std()).item()


def saved_bytes(folder: Path) -> tuple[int, int]:
    """Bytes of tensors in a folder, without and of bitsandbytes' states, which are JSON."""
    weights = states = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if ".quant_state." in key:
                    states += file.get_tensor(key).nbytes
                else:
                    weights += file.get_tensor(key).nbytes
    return weights, states


@quantizers
@every_config
def test_round_trip(name, overrides, tmp_path):
    plain = random_model(tiny_config(**overrides))
    ids = random_ids(plain.config, 2, 13)
    with torch.no_grad():
        exact = plain(ids).logits
    plain.save_pretrained(tmp_path / "plain")
    skipped = unfit_for_4_bits(plain) if "NF4" in name else ["lm_head"]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=QUANTIZERS[name](plain), dtype=torch.float32, device_map=DEVICE
    )
    model.save_pretrained(tmp_path / "quantized")  # bitsandbytes' CPU kernel rounds NF4's scales at the first use

    expected, quantized = 0, 0
    linears = {f"{n}.weight": module for n, module in plain.named_modules() if isinstance(module, nn.Linear)}
    for key, parameter in plain.named_parameters():  # tied ones once
        is_quantized = key in linears and key.removesuffix(".weight") not in skipped
        expected += SIZES[name](*parameter.shape) if is_quantized else parameter.nbytes
        quantized += is_quantized
    weights, states = saved_bytes(tmp_path / "quantized")
    assert weights == expected < 0.75 * saved_bytes(tmp_path / "plain")[0]
    assert quantized > 0 and states < 100 * quantized
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == ("torchao" if "torchao" in name else "bitsandbytes")

    with torch.no_grad():
        cache = T6Cache(config=model.config)
        logits = model(ids, use_cache=False).logits
        steps = torch.cat([model(ids[:, t : t + 1], cache=cache).logits for t in range(13)], dim=1)
    assert 0 < error(logits, exact) < TOLERANCES[name]
    tokens = generate(model, ids, return_dict_in_generate=True)
    assert type(cached(tokens)) is T6Cache
    static = generate(model, ids, cache_implementation="static")
    if "torchao" in name:  # weights alone are rounded, and all is computed in float32
        torch.testing.assert_close(steps, logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(tokens.sequences, greedy(model, ids)) and torch.equal(static, tokens.sequences)
    else:  # activations too, to 8 bits or bfloat16: what differs in the last bit may round otherwise
        assert error(steps, logits) < TOLERANCES[name] / 2
        assert static.shape == tokens.sequences.shape == (2, 23)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32, device_map=DEVICE)
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, logits)


@quantizers
def test_adapters_on_quantized_weights(name, tmp_path):
    """LoRA trains on frozen quantised weights."""
    plain = random_model(tiny_config(**SHAPE))
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QUANTIZERS[name](plain), dtype=torch.float32, device_map=DEVICE
    )
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = random_ids(plain.config, 2, 12)
    losses = [train_step(model, ids, optimizer) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0] and not math.isnan(losses[-1])
