"""T6's heads, losses, initialisation, RoPE types and configuration, as a Transformers model has them."""

import pytest
import torch
from torch import nn

from modeling_t6 import (
    T6Cache,
    T6Config,
    T6ForCausalLM,
    T6ForQuestionAnswering,
    T6ForSequenceClassification,
    T6ForTokenClassification,
    T6Model,
)
from modeling_t6.factors_t6 import T6RMSNorm

from .common import cached, quick, random_ids, random_model, tiny_config, train_step


HEADS = {
    T6ForSequenceClassification: ({"labels": torch.tensor([0, 2])}, (2, 3)),
    T6ForTokenClassification: ({"labels": torch.zeros(2, 8, dtype=torch.long)}, (2, 8, 3)),
    T6ForQuestionAnswering: ({"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])}, (2, 8)),
    T6ForCausalLM: ({"labels": torch.ones(2, 8, dtype=torch.long)}, (2, 8, 97)),
}


@pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
def test_heads(cls, tmp_path):
    kwargs, shape = HEADS[cls]
    model = random_model(tiny_config(num_labels=3), cls=cls)
    ids = random_ids(model.config, 2, 8)
    output = model(ids, **kwargs)
    logits = output.start_logits if cls is T6ForQuestionAnswering else output.logits
    assert logits.shape == shape and output.loss.isfinite()
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert (
        not info["unexpected_keys"] and not info["mismatched_keys"] and not info["missing_keys"] - {"lm_head.weight"}
    )
    with torch.no_grad():
        for value, expected in zip(loaded(ids).to_tuple()[:1], output.to_tuple()[1:2]):
            torch.testing.assert_close(value, expected)


def test_loss_and_logits_to_keep():
    model = random_model(tiny_config())
    ids = random_ids(model.config, 2, 8)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    with torch.no_grad():
        output = model(ids, labels=labels)
        expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(output.loss, expected)
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])
        keep = torch.tensor([1, 4])
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, output.logits[:, keep])


@torch.no_grad()
def test_shapes_without_numbers():
    """Memory and operations of a model are estimated so: a prompt and a decoded token on "meta"."""
    with torch.device("meta"):
        model = T6ForCausalLM(tiny_config())
        cache = T6Cache(config=model.config)
        for length in (9, 1):
            logits = model(torch.zeros(2, length, dtype=torch.long), cache=cache).logits
            assert logits.shape == (2, length, 97)
    assert cache.get_seq_length() == 10


def test_hidden_states_and_attentions():
    model = random_model(tiny_config(attn_implementation="eager"))
    with torch.no_grad():
        output = model(random_ids(model.config, 2, 8), output_hidden_states=True, output_attentions=True)
    assert [tuple(x.shape) for x in output.hidden_states] == [(2, 8, 48)] * 3
    assert [tuple(x.shape) for x in output.attentions] == [(2, 5, 8, 8)] * 2
    for probabilities in output.attentions:
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 5, 8))
        assert not probabilities.triu(1).any()
    torch.testing.assert_close(output.logits, model.lm_head(output.hidden_states[-1]))


@pytest.mark.once
def test_attention_implementations_agree():
    ids = random_ids(tiny_config(), 2, 20)
    with torch.no_grad(), quick("flex_attention"):
        logits = [
            random_model(tiny_config(attn_implementation=name))(ids, use_cache=False).logits
            for name in ("eager", "sdpa", "flex_attention")
        ]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = random_model(tiny_config()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = random_ids(model.config, 2, 8)
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for gradient, expected in zip(*gradients):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_both_names_of_the_cache(name):
    """Transformers 5.24 renamed `past_key_values`; generate() and forward() take either name on every version."""
    model = random_model(tiny_config())
    ids = random_ids(model.config, 2, 9)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = T6Cache(config=model.config)
        model(ids[:, :5], **{name: cache})
        torch.testing.assert_close(model(ids[:, 5:], **{name: cache}).logits, full[:, 5:], atol=1e-5, rtol=1e-5)
        hidden_states = model.model(ids[:, :1], **{name: cache}).last_hidden_state
    assert hidden_states.shape == (2, 1, 48) and cache.get_seq_length() == 10
    cache.crop(-1)
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(torch.cat([ids, ids[:, :1]], dim=1), **{name: cache}, **kwargs)
    assert torch.equal(tokens, model.generate(torch.cat([ids, ids[:, :1]], dim=1), **kwargs))
    assert cache.get_seq_length() == 15


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_gradient_checkpointing_does_not_fill_a_cache(name):
    """A layer that is run again for the backward pass would append its factors twice."""
    model = random_model(tiny_config()).train()
    model.gradient_checkpointing_enable()
    ids, cache = random_ids(model.config, 2, 8), T6Cache(config=model.config)
    loss = model(ids, labels=ids, **{name: cache}).loss
    loss.backward()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(loss, random_model(tiny_config())(ids, labels=ids).loss)


def test_resize_embeddings():
    model = random_model(tiny_config())
    before = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(110)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.vocab_size == 110
    assert torch.equal(model.lm_head.weight[:97], before)
    assert model(torch.tensor([[109]])).logits.shape == (1, 1, 110)


def test_compile():
    model = random_model(tiny_config(num_hidden_layers=1))
    ids = random_ids(model.config, 2, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_initialisation():
    """Xavier uniform of each factor projection, viewed as [hidden, n1, n2]: bound sqrt(6 / ((hidden + n1) n2))."""
    config = tiny_config(hidden_size=256, num_attention_heads=24, initializer_range=0.05, q_rank=6, v_rank=3)
    model = T6ForCausalLM(config)
    attention = model.model.layers[1].self_attn
    for name, rank in (("q", 6), ("k", 2), ("v", 3)):
        for factor, n1, n2 in (("a", 24, rank), ("b", rank, 16)):
            weight = getattr(attention, f"{name}_{factor}_proj").weight
            bound = (6 / ((256 + n1) * n2)) ** 0.5
            assert 0.98 * bound < weight.abs().max() <= bound
            assert abs(weight.std() - bound / 3**0.5) < 0.02 * bound
    assert not attention.o_proj.weight.any() and not model.model.layers[1].mlp.down_proj.weight.any()
    for weight in (model.model.embed_tokens.weight[1:], model.model.layers[0].mlp.up_proj.weight):
        assert abs(weight.std() - 0.05) < 0.002


ROPE_TYPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "factor": 2.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_rope_types(rope_type):
    """The frequencies are those of Transformers' Llama with the same parameters."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPE_TYPES[rope_type]}
    model = random_model(tiny_config(rope_parameters=dict(parameters)))
    llama = LlamaConfig(
        hidden_size=80,
        num_attention_heads=5,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters=dict(parameters),
    )
    positions = torch.arange(300)[None]
    x = torch.zeros(1, 300, 16)
    for ours, theirs in zip(model.model.rotary_emb(x, positions), LlamaRotaryEmbedding(llama)(x, positions)):
        torch.testing.assert_close(ours, theirs)
    ids = random_ids(model.config, 1, 12)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = cached(model(ids[:, :8], use_cache=True))
        torch.testing.assert_close(model(ids[:, 8:], cache=cache).logits, full[:, 8:], atol=1e-5, rtol=1e-5)


WRONG_FIELDS = {
    "k_rank": 0,
    "v_rank": -1,
    "q_rank": 0,
    "hidden_size": -4,
    "num_attention_heads": 0,
    "head_dim": 15,
    "num_hidden_layers": 0,
    "vocab_size": -1,
    "max_position_embeddings": 0,
    "attention_dropout": 1.5,
    "hidden_act": "sillu",
    "rms_norm_eps": 0.0,
    "initializer_range": -0.1,
    "rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4},
}


@pytest.mark.parametrize("field", WRONG_FIELDS)
def test_wrong_fields_are_named(field):
    with pytest.raises(Exception, match=field):
        T6Config(**{field: WRONG_FIELDS[field]})


@pytest.mark.parametrize(
    "field,value", [("k_rank", "two"), ("q_rank", 1.5), ("hidden_size", "768"), ("attention_bias", "yes")]
)
def test_wrong_types_are_named(field, value):
    with pytest.raises(Exception, match=field):
        T6Config(**{field: value})


def test_odd_rotary_size():
    with pytest.raises(Exception, match="partial_rotary_factor"):
        tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.2})


def test_config_round_trip(tmp_path):
    config = tiny_config(q_rank=None, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0})
    config.save_pretrained(tmp_path)
    assert T6Config.from_pretrained(tmp_path).to_dict() == config.to_dict() | {
        "auto_map": {"AutoConfig": "configuration_t6.T6Config"}
    }
    assert T6Config(hidden_size=256).intermediate_size == 682


def test_lora():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(random_model(tiny_config()), LoraConfig(target_modules=["q_a_proj", "k_b_proj"], r=2))
    ids = random_ids(model.config, 2, 8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = [train_step(model, ids, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_base_model_in_float64_stays_there():
    model = random_model(tiny_config(), cls=T6Model, dtype=torch.float64)
    assert model(random_ids(model.config, 1, 3)).last_hidden_state.dtype == torch.float64


def test_norm_of_a_gpu(monkeypatch):
    """One operator where weights and hidden states are of one dtype, with the values and gradients of the equation."""
    calls, plain = [], nn.functional.rms_norm
    monkeypatch.setattr(nn.functional, "rms_norm", lambda *args: calls.append(args[0].dtype) or plain(*args))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    norm, x = T6RMSNorm(33, eps=1e-3).double(), torch.randn(2, 3, 33, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(norm.weight)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    gradients = [torch.autograd.grad(y.pow(3).sum(), (x, norm.weight)) for y in (norm(x), expected)]
    torch.testing.assert_close(*gradients)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.testing.assert_close(norm.to(dtype)(x.to(dtype)), expected.to(dtype), atol=1e-2, rtol=1e-2)
    norm.float()(x.bfloat16())
    torch.func.vmap(norm)(x.float())
    assert calls == [torch.float64, torch.float32, torch.float16, torch.bfloat16]
