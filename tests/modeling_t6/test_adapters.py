"""LoRA by PEFT on the projections to factors: trained, saved, loaded, merged, and by Transformers' own adapter methods."""

import copy

import peft
import pytest
import torch
import transformers.integrations.peft
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from modeling_t6 import T6ForCausalLM

from ..versions import once_but
from .common import DEVICE, projected_one_by_one, random_ids, random_model, tiny_config, train_step
from .test_generation import generate, greedy


FACTORS = ["q_a_proj", "q_b_proj", "k_a_proj", "k_b_proj", "v_a_proj", "v_b_proj", "o_proj"]
KV_FACTORS = [name for name in FACTORS if not name.startswith("q_")]
TARGETS = {
    "TPA": ({}, {"target_modules": FACTORS}),
    "TPA-all-linear": ({}, {"target_modules": "all-linear"}),
    "KVonly": ({"q_rank": None}, {"target_modules": ["q_proj", *KV_FACTORS]}),
    "non-contextual A": (
        {"noncontextual_a": True, "v_rank": 3},
        {
            "target_modules": [name for name in FACTORS if "_a_" not in name],
            "target_parameters": ["q_a", "k_a", "v_a"],
        },
    ),
    "non-contextual B": ({"noncontextual_b": True}, {"target_parameters": ["q_b", "k_b", "v_b"]}),
    "third order": ({"c_factor_dim": 4}, {"target_modules": "all-linear"}),
    "output gate": ({"output_gate": True}, {"target_modules": "all-linear"}),
}
every_target = pytest.mark.parametrize("overrides, targets", once_but(TARGETS.items(), "TPA", "non-contextual A"))


def lora(targets: dict) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, **targets)


def with_adapter(overrides: dict, targets: dict) -> PeftModel:
    """A model with an adapter that is trained to another's logits for a while."""
    torch.manual_seed(0)
    peft_model = get_peft_model(random_model(tiny_config(**overrides)), lora(targets)).to(DEVICE).train()
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = random_ids(peft_model.config, 2, 12)
    losses = [train_step(peft_model, ids, optimizer) for _ in range(15)]
    assert losses[-1] < 0.9 * losses[0]
    return peft_model.eval()


def merged(peft_model: PeftModel) -> T6ForCausalLM:
    peft_model.merge_and_unload()
    # PEFT unloads an adapter of constant factors with the first call, and those of the projections inside it with the next.
    return peft_model.merge_and_unload()


@every_target
def test_round_trip(overrides, targets, tmp_path):
    peft_model = with_adapter(overrides, targets)
    ids = random_ids(peft_model.config, 2, 9)
    original = random_model(tiny_config(**overrides))
    # Every projection and constant that was asked for has an adapter in every layer, each has learned, and nothing else.
    names = targets.get("target_parameters", []) + (
        [name.rsplit(".", 1)[-1] for name, module in original.model.layers[0].named_modules() if type(module) is nn.Linear]
        if targets.get("target_modules") == "all-linear"
        else targets.get("target_modules", [])
    )  # fmt: skip
    learned = {n: p for n, p in peft_model.named_parameters() if "lora_B" in n}
    assert len(learned) == 2 * len(names) and all(p.abs().max() > 0 for p in learned.values())
    assert {n for n, p in peft_model.named_parameters() if p.requires_grad} == {
        n for n, _ in peft_model.named_parameters() if "lora_" in n
    }

    with torch.no_grad():
        logits = peft_model(ids).logits
        with peft_model.disable_adapter():
            # PEFT's constants lie elsewhere in memory, by which matrix products of some CPUs round otherwise.
            assert torch.allclose(peft_model(ids).logits, original(ids).logits, rtol=0, atol=1e-5)
        assert (logits - original(ids).logits).std() > 0.1 * logits.std()
    tokens = generate(peft_model, ids)
    assert torch.equal(tokens, greedy(peft_model, ids))
    assert torch.equal(generate(peft_model, ids, cache_implementation="static"), tokens)

    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(random_model(tiny_config(**overrides)), tmp_path / "adapter").eval()
    by_transformers = random_model(tiny_config(**overrides))
    by_transformers.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
        assert torch.equal(by_transformers(ids).logits, logits)

    model = merged(peft_model)
    assert type(model) is T6ForCausalLM and not any("lora" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        # W x + B A x against (W + B A) x, in float32 and logits of order 1 to 10.
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(generate(model, ids), tokens)
    model.save_pretrained(tmp_path / "merged")
    loaded = T6ForCausalLM.from_pretrained(tmp_path / "merged").to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=0)  # as above
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    for module, initial in zip(model.modules(), original.modules(), strict=True):
        assert getattr(module, "initializer_bound", None) == getattr(initial, "initializer_bound", None)


def test_transformers_adapter_methods(tmp_path, monkeypatch):
    """`add_adapter`, training, `save_pretrained` of the adapter alone, and `from_pretrained` of its folder."""
    # Transformers 5.24 asks for PEFT 0.22 here, which came out after it.
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", peft.__version__)
    random_model(tiny_config()).save_pretrained(tmp_path / "base")
    model = T6ForCausalLM.from_pretrained(tmp_path / "base").to(DEVICE)
    ids = random_ids(model.config, 2, 9)
    with torch.no_grad(), projected_one_by_one():  # the operations of the wrapped layers
        base = model(ids).logits
    torch.manual_seed(0)
    model.add_adapter(lora({"target_modules": FACTORS, "init_lora_weights": False}))
    model.train()
    model(ids, labels=ids).loss.backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert gradients == {name for name, _ in model.named_parameters() if "lora_" in name}
    model.eval()
    with torch.no_grad():
        logits = model(ids).logits
        model.disable_adapters()
        assert torch.equal(model(ids).logits, base)
        model.enable_adapters()
    assert not torch.equal(logits, base)
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    loaded = T6ForCausalLM.from_pretrained(tmp_path / "adapter").to(DEVICE)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, logits)


def test_gradient_checkpointing():
    peft_model = with_adapter({}, {"target_modules": FACTORS}).train()
    ids, gradients = random_ids(peft_model.config, 2, 9), []
    for checkpointing in (False, True):
        if checkpointing:
            peft_model.gradient_checkpointing_enable()
            peft_model.enable_input_require_grads()
        peft_model.zero_grad()
        peft_model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in peft_model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)


def test_without_targets():
    """PEFT has no default for a model type that it does not know."""
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(random_model(tiny_config()), LoraConfig(task_type="CAUSAL_LM"))


def test_remote_code(load_remote_class, tmp_path):
    """A model of the code in its own folder takes the same adapter."""
    peft_model = with_adapter({}, {"target_modules": FACTORS})
    ids = random_ids(peft_model.config, 2, 9)
    peft_model.save_pretrained(tmp_path / "adapter")
    random_model(tiny_config()).save_pretrained(tmp_path / "model")
    remote = load_remote_class(tmp_path / "model")
    assert remote.__module__.startswith("transformers_modules.")
    model = PeftModel.from_pretrained(
        remote.from_pretrained(tmp_path / "model").to(DEVICE), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, peft_model(ids).logits)
    tokens = generate(copy.deepcopy(model), ids)
    assert torch.equal(generate(merged(model), ids), tokens)


def test_prefix_tuning_and_what_to_use_in_its_place():
    """A prefix is keys and values of heads; a prompt is embeddings, and PEFT has that, too."""
    config = tiny_config(num_attention_heads=6)  # a divisor of `hidden_size`, without which PEFT makes no prefix
    ids = random_ids(config, 2, 9)
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    with pytest.raises(RuntimeError, match="holds factors, not heads: use prompt tuning or LoRA"):
        get_peft_model(random_model(config), PrefixTuningConfig(**settings))(input_ids=ids)
    model = get_peft_model(random_model(config), PromptTuningConfig(**settings))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert model.prompt_encoder.default.embedding.weight.grad.abs().max() > 0
