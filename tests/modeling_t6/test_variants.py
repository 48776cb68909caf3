"""Every variant of the paper in every way it is used: the cells of the table in `docs/variants.md`."""

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, CompileConfig, DynamicCache, StaticCache

from modeling_t6 import T6Cache, T6ForCausalLM, factor_space_t6, flash_tpa_t6
from modeling_t6.cache_t6 import cache_nbytes, factor_layouts
from modeling_t6.flash_tpa_t6 import decode_with_flash_tpa

from ..versions import once_but
from .common import DEVICE, cached, random_ids, random_model, tiny_config, train_step
from .reference import t6_logits
from .test_attention import LargestResult
from .test_generation import MODES, NEW, PADDED, generate, greedy, quantization_error
from .test_reference import left_padded, logits_with_and_without, positions, reference


HALF_ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
VARIANTS = {
    "TPA": {},
    "TPA-KVonly": {"q_rank": None},
    "non-contextual A": {"noncontextual_a": True},
    "non-contextual B": {"noncontextual_b": True},
    "shared B": {"shared_b": True, "v_rank": 2},
    "sigmoid head factors": {"head_factor_act": "sigmoid"},
    "softmax head factors": {"head_factor_act": "softmax"},
    "third order": {"c_factor_dim": 4},
    "head norm": {"head_norm": True},
    "output gate": {"output_gate": True},
    "partial RoPE": {"rope_parameters": HALF_ROPE},
    "QK norm of heads": {"qk_norm": "heads"},
    "grouped heads": {"num_attention_heads": 6, "num_key_value_heads": 2},
}
# Numbers per token and layer, from the paper: h heads of size d, ranks k and v, third factors of size c.
CACHED = {
    "non-contextual A": lambda h, d, k, v: (k + v) * d,
    "non-contextual B": lambda h, d, k, v: (k + v) * h,
    "shared B": lambda h, d, k, v: 2 * k * h + k * d,
    "third order": lambda h, d, k, v: (k + v) * (h + d // 4 + 4),
}
KERNEL = set(VARIANTS) - {"non-contextual B", "shared B", "third order"}
DOCS = Path(__file__).parents[2] / "docs" / "variants.md"

# With the oldest Transformers, one for each kind of row that its caches hold: A and B, B alone, and B that is rotated on
# reading. The formulas of the others are the same functions on every version.
every_variant = pytest.mark.parametrize("variant", once_but(VARIANTS, "TPA", "non-contextual A", "shared B"))
rotated_on_read = pytest.mark.parametrize("variant", ["non-contextual B", "shared B"])


def config_of(variant: str, **overrides):
    """With another number of heads, grouped heads have as many of keys and values, for twice as many of queries."""
    fields = VARIANTS[variant] | overrides
    if "num_key_value_heads" in fields and "num_attention_heads" in overrides:
        heads = overrides["num_attention_heads"]
        fields |= {"num_attention_heads": 2 * heads, "num_key_value_heads": heads}
    return tiny_config(**fields)


PROMPTS = 3, 11, 24  # in a batch padded on the left


@pytest.fixture(scope="module")
def alone(models):
    """The tokens of a variant for each row of a batch by itself, greedily or by beams."""
    made = {}

    def get(variant: str, num_beams: int):
        if (variant, num_beams) not in made:
            model, _ = models(variant)
            rows, *_ = left_padded(model.config, PROMPTS)
            new = [generate(model, row[None], num_beams=num_beams)[:, len(row) :] for row in rows]
            made[variant, num_beams] = torch.cat(new)
        return made[variant, num_beams]

    return get


@pytest.fixture(scope="module")
def models():
    """One model of each variant, in float32, and the tokens that it chooses without a cache."""
    made = {}

    def get(variant: str):
        if variant not in made:
            model = random_model(config_of(variant))
            made[variant] = model, {rows: greedy(model, random_ids(model.config, rows, 13)) for rows in (1, 2)}
        return made[variant]

    return get


@every_variant
def test_float64_reference(variant):
    """Logits of the prompt, and of decoding token by token in factor space, and the gradient of every weight."""
    model = random_model(config_of(variant), dtype=torch.float64)
    ids = random_ids(model.config, 7)
    weights = dict(model.named_parameters())
    config = model.config
    expected = t6_logits(
        weights, ids.tolist(), num_layers=2, h=config.num_attention_heads, d=16,
        h_kv=config.num_key_value_heads, rotary_dim=config.rotary_dim,
        theta=config.rope_parameters["rope_theta"], head_factor_act=config.head_factor_act,
        norms_key_heads=config.qk_norm == "heads",
    )  # fmt: skip
    assert expected.std() > 0.1
    logits = model(ids[None], use_cache=False).logits[0]
    # float64 has 16 digits; a few hundred additions of numbers near 1 leave 13.
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)
    cache = T6Cache(config=config)
    with torch.no_grad():
        steps = [model(ids[None, t : t + 1], cache=cache).logits[0] for t in range(len(ids))]
    torch.testing.assert_close(torch.cat(steps), expected, atol=1e-10, rtol=0)

    probe = torch.randn(expected.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((x * probe).sum(), list(weights.values())) for x in (logits, expected)]
    for name, ours, theirs in zip(weights, *gradients):
        assert ours.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-8, msg=name)


@every_variant
@pytest.mark.parametrize("heads", [8, 5, 47])
def test_cache_bytes(variant, heads):
    model = random_model(config_of(variant, num_attention_heads=heads), dtype=torch.bfloat16)
    config = model.config
    k, v = config.ranks(0)
    numbers = CACHED.get(variant, lambda h, d, k, v: (k + v) * (h + d))(heads, 16, k, v)
    with torch.no_grad():
        cache = cached(model(random_ids(config, 3, 6)))
    held = cache.nbytes / (2 * 3 * 6 * 2)  # layers, batch, tokens, bytes of bfloat16
    rows_without_a = variant == "non-contextual A"
    assert numbers <= held <= numbers + (0 if heads == 8 or rows_without_a else 7 * (k + v))
    assert all(layout.width % 8 == 0 for layout in factor_layouts(config, 0))
    for layer in cache.layers:  # nothing else is kept
        kept = [x for x in vars(layer).values() if isinstance(x, torch.Tensor)]
        assert {id(x) for x in kept} == {id(layer.keys), id(layer.values)}
    assert cache_nbytes(cache) == cache.nbytes


CACHES = {
    "T6Cache": lambda config: T6Cache(config=config),
    "DynamicCache": lambda config: DynamicCache(config=config),
    "StaticCache": lambda config: StaticCache(config=config, max_cache_len=24),
}


@every_variant
@pytest.mark.parametrize("window", [None, 4], ids=["full", "sliding"])
@pytest.mark.parametrize("prompt", [1, 11])
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
def test_caches(variant, make_cache, window, prompt):
    """A left-padded batch: a prompt, then token by token, across layers of which one may slide."""
    layer_types = {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"]} if window else {}
    config = config_of(variant, **layer_types)
    model = random_model(config)
    _, ids, mask = left_padded(config, (14, 9))
    logits, full = logits_with_and_without(make_cache(config), model, ids, mask, [0, *range(prompt, 15)])
    # Logits are of order 1 and float32 has 7 digits.
    torch.testing.assert_close(logits, full, atol=2e-5, rtol=1e-5)


@every_variant
def test_cropped_cache(variant, models):
    model, _ = models(variant)
    ids = random_ids(model.config, 2, 12)
    cache = T6Cache(config=model.config)
    with torch.no_grad():
        model(
            random_ids(model.config, 2, 9, seed=5).index_copy(1, torch.arange(6, device=DEVICE), ids[:, :6]),
            cache=cache,
        )
        cache.crop(-3)
        logits = model(ids[:, 6:], cache=cache).logits
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, 6:], atol=2e-5, rtol=1e-5)


@every_variant
@pytest.mark.parametrize("nbits", [4, 8])
def test_quantized_cache(variant, nbits):
    model = random_model(config_of(variant, num_hidden_layers=1))
    # Half a step is 1/30 of a group's range with 4 bits and 1/510 with 8, in each factor.
    assert 0 < quantization_error(model, nbits) < {4: 1.5, 8: 0.1}[nbits]


@every_variant
def test_fp8_cache(variant, models):
    model, _ = models(variant)
    ids = random_ids(model.config, 2, 13)
    cache = T6Cache(config=model.config, dtype=torch.float8_e4m3fn)
    with torch.no_grad():
        logits = model(ids[:, :-1], cache=cache).logits, model(ids[:, -1:], cache=cache).logits
        exact = model(ids, use_cache=False).logits
    assert cache.layers[0].keys.dtype == torch.float8_e4m3fn
    # 3 bits after the point: each factor is off by up to 1/16, 3.6% in the mean square, in every product of two layers.
    assert 0 < (torch.cat(logits, dim=1) - exact).square().mean().sqrt() / exact.std() < 0.25


@every_variant
@pytest.mark.parametrize("kwargs", MODES.values(), ids=MODES)
def test_generation(variant, kwargs, models):
    model, expected = models(variant)
    rows = 1 if "prompt_lookup_num_tokens" in kwargs else 2
    assert torch.equal(generate(model, random_ids(model.config, rows, 13), **kwargs), expected[rows])


@every_variant
@pytest.mark.parametrize("implementation", [None, "static"])
def test_eager_generation(variant, implementation, models):
    """`eager` returns probabilities, of the factor space too."""
    model = random_model(config_of(variant, attn_implementation="eager"))
    output = generate(
        model, random_ids(model.config, 2, 13), cache_implementation=implementation, return_dict_in_generate=True,
        output_attentions=True,
    )  # fmt: skip
    assert torch.equal(output.sequences, models(variant)[1][2])
    for step in output.attentions:
        for layer in step:
            torch.testing.assert_close(layer.sum(-1), torch.ones_like(layer[..., 0]))


@every_variant
def test_compiled_generation(variant):
    model = random_model(config_of(variant, num_hidden_layers=1))
    ids = random_ids(model.config, 2, 13)
    expected = greedy(model, ids)
    compile_config = CompileConfig(backend="eager", fullgraph=True, dynamic=False, mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    output = generate(
        model, ids, cache_implementation="static", compile_config=compile_config, disable_compile=False
    )  # fmt: skip
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(output, expected)


@every_variant
@pytest.mark.parametrize("implementation", [None, "static"])
def test_beam_search(variant, implementation, models):
    model, _ = models(variant)
    ids = random_ids(model.config, 2, 7)
    kwargs = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(model, ids, use_cache=False, **kwargs)
    assert torch.equal(generate(model, ids, cache_implementation=implementation, **kwargs), expected)


@every_variant
def test_sampling(variant, models):
    model, _ = models(variant)
    outputs = []
    for kwargs in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(5)
        ids = random_ids(model.config, 2, 7)
        outputs.append(generate(model, ids, do_sample=True, top_k=20, num_return_sequences=2, **kwargs))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@every_variant
def test_assisted_generation(variant, models):
    """A perfect assistant has all its tokens taken, another few: crops of none and of many."""
    model, expected = models(variant)
    other = random_model(config_of(variant, num_hidden_layers=1), seed=3)
    for assistant in (model, other):
        assert torch.equal(
            generate(model, random_ids(model.config, 1, 13), assistant_model=assistant), expected[1]
        )  # fmt: skip


@every_variant
@pytest.mark.parametrize("kwargs", PADDED.values(), ids=PADDED)
def test_left_padded_batch_equals_its_rows(variant, kwargs, models, alone):
    model, _ = models(variant)
    _, ids, mask = left_padded(model.config, PROMPTS)
    batch = generate(model, ids, attention_mask=mask, **kwargs)[:, max(PROMPTS) :]
    assert torch.equal(batch, alone(variant, kwargs.get("num_beams", 1)))


@every_variant
def test_continues_from_a_returned_cache(variant, models):
    model, expected = models(variant)
    first = generate(model, random_ids(model.config, 2, 13), max_new_tokens=4, return_dict_in_generate=True)
    second = generate(model, first.sequences, max_new_tokens=NEW - 4, cache=cached(first))
    assert torch.equal(second, expected[2])


@pytest.mark.skipif(flash_tpa_t6.triton is None, reason="Triton is for Linux")
@every_variant
def test_kernel(variant, models, monkeypatch):
    """The kernels decode the variants that they cover; the others decode in PyTorch's factor space all the same."""
    ways = {"flash_tpa": flash_tpa_t6, "factor_space_attention": factor_space_t6}
    counts = dict.fromkeys(ways, 0)

    def count(name):
        function = getattr(ways[name], name)

        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(ways[name], name, counted)

    if DEVICE == "cpu":
        from . import interpreter

        interpreter.make_haste(monkeypatch)
    for name in counts:
        count(name)
    ids = random_ids(tiny_config(), 1, 17)  # a prompt too long for the kernels
    expected = greedy(models(variant)[0], ids, new=2)
    model = random_model(config_of(variant, attn_implementation="flash_tpa"))
    assert torch.equal(generate(model, ids, max_new_tokens=2), expected)
    # One token is decoded, in two layers.
    used = "flash_tpa" if variant in KERNEL else "factor_space_attention"
    assert counts == {"flash_tpa": 0, "factor_space_attention": 0} | {used: 2}
    with torch.no_grad():
        hidden_states = torch.empty(1, 1, 48, device=DEVICE)
        assert decode_with_flash_tpa(model.config, hidden_states, T6Cache()) == (variant in KERNEL)


@every_variant
@pytest.mark.parametrize("query_length", [1, 3])
def test_decoding_forms_no_keys_or_values(variant, query_length):
    """K or V of 300 cached tokens would have 300 h d numbers; the cached factors and the scores have fewer."""
    config = config_of(variant, num_attention_heads=24, v_rank=2)
    model = random_model(config)
    ids = random_ids(config, 2, 300)
    cache = T6Cache(config=config)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.update(*(torch.zeros_like(x[:, :, :1]) for x in (cache.layers[0].keys, cache.layers[0].values)), 0)
        cache.crop(-1)  # the storage has grown: what follows is not the growth
        with LargestResult() as largest:
            model(ids[:, :query_length], cache=cache)
    heads = 2 * 300 * config.num_attention_heads * 16  # of grouped heads, twice as many as K has
    assert largest.numel < heads / 2


@every_variant
def test_training(variant):
    """From the paper's initialisation to a sequence known by heart, which is then generated over a cache."""
    torch.manual_seed(0)
    model = T6ForCausalLM(config_of(variant, num_hidden_layers=1)).to(DEVICE)
    ids = torch.randperm(model.config.vocab_size - 2)[:16][None].to(DEVICE) + 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    while not losses or losses[-1] > 0.02 and len(losses) < 200:
        losses.append(train_step(model, ids, optimizer))
    assert losses[0] > 4 and losses[-1] <= 0.02
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    model.eval()
    for implementation in (None, "static"):
        output = generate(model, ids[:, :3], max_new_tokens=13, cache_implementation=implementation)
        assert torch.equal(output, ids)


@every_variant
def test_gradient_checkpointing_and_bfloat16(variant):
    model = random_model(config_of(variant)).train()
    ids = random_ids(model.config, 2, 9)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)
    model = model.bfloat16()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())


@every_variant
def test_gradients_through_the_cache(variant):
    model = random_model(config_of(variant), dtype=torch.float64)
    ids, gradients = random_ids(model.config, 2, 8), []
    for split in (8, 5):
        model.zero_grad()
        output = model(ids[:, :split], use_cache=True)
        logits = [output.logits]
        if split < 8:
            logits.append(model(ids[:, split:], cache=cached(output)).logits)
        torch.cat(logits, dim=1).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for whole, parts in zip(*gradients):
        torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-9)


@every_variant
def test_save_and_load(variant, models, tmp_path):
    model, expected = models(variant)
    model.save_pretrained(tmp_path)
    loaded = T6ForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    changed = {"dtype": None, "_name_or_path": None}
    assert loaded.config.to_dict() | changed == model.config.to_dict() | changed
    assert torch.equal(generate(loaded, random_ids(model.config, 2, 13)), expected[2])


def random_fields(seed: int) -> dict:
    """Variants combined at random, with ranks by layer, windows, biases and norms."""
    rng = random.Random(seed)
    a = rng.choice(["contextual", "contextual", "constant"])
    b = "contextual" if a == "constant" else rng.choice(["contextual", "constant"])
    has_c = b == "contextual" and rng.random() < 0.5
    k_rank = [rng.randint(1, 3), rng.randint(1, 3)]
    shared_b = a == "contextual" and rng.random() < 0.5
    fields = {
        "q_rank": rng.choice([None, 1, 4]),
        "k_rank": k_rank,
        "v_rank": k_rank if shared_b else [rng.randint(1, 3), rng.randint(1, 3)],
        "noncontextual_a": a == "constant",
        "noncontextual_b": b == "constant",
        "shared_b": shared_b,
        "c_factor_dim": rng.choice([1, 2, 4]) if has_c else None,
        "head_factor_act": None if a == "constant" else rng.choice([None, "sigmoid", "softmax"]),
        "qk_norm": not has_c and rng.random() < 0.3 and (True if a == "constant" else rng.choice([True, "heads"])),
        "head_norm": rng.random() < 0.3,
        "output_gate": rng.random() < 0.3,
        "attention_bias": rng.random() < 0.3,
        "num_attention_heads": rng.randint(1, 9),
    }
    if rng.random() < 0.5:
        fields["rope_parameters"] = HALF_ROPE
    if rng.random() < 0.5:
        fields |= {"sliding_window": 3, "layer_types": rng.sample(["full_attention", "sliding_attention"], 2)}
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = rng.choice([None, *(n for n in range(1, heads) if heads % n == 0)])
    return fields


@pytest.mark.parametrize("seed", once_but(range(40), *range(8)))
@torch.no_grad()
def test_random_combinations(seed):
    model = random_model(tiny_config(**random_fields(seed)), dtype=torch.float64)
    ids = random_ids(model.config, 8)
    expected = reference(model, ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(ids[None], use_cache=False).logits[0], expected, atol=1e-10, rtol=0)
    for make_cache in CACHES.values():
        cache = make_cache(model.config)
        steps = [model(ids[None, start:end], cache=cache).logits[0] for start, end in ((0, 3), (3, 4), (4, 6), (6, 8))]
        torch.testing.assert_close(torch.cat(steps), expected, atol=1e-10, rtol=0)


# Positions, which a cache of B before RoPE does not hold.


@rotated_on_read
@torch.no_grad()
def test_positions_that_a_cache_cannot_tell(variant, models):
    model, _ = models(variant)
    ids = random_ids(model.config, 2, 6)
    hole = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]], device=DEVICE)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]], device=DEVICE)
    for kwargs in ({"attention_mask": hole, "position_ids": positions(hole)}, {"position_ids": packed}):
        with pytest.raises(ValueError, match="`position_ids` must go up by one"):
            model(ids, cache=T6Cache(config=model.config), **kwargs)
        assert model(ids, use_cache=False, **kwargs).logits.isfinite().all()
    for implementation in (None, "static"):
        with pytest.raises(ValueError, match="`position_ids` must go up by one"):
            generate(model, ids, attention_mask=hole, cache_implementation=implementation)
    cache = T6Cache(config=model.config)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match=r"here \[6\]"):
        model(ids[:, :1], cache=cache, position_ids=torch.tensor([[9]], device=DEVICE))


@rotated_on_read
@torch.no_grad()
def test_without_a_cache_positions_are_free(variant):
    """Two sequences packed into one, against each alone."""
    model = random_model(config_of(variant), dtype=torch.float64)
    ids = random_ids(model.config, 9)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]], device=DEVICE)
    mask = torch.zeros(9, 9, dtype=torch.bool, device=DEVICE)
    mask[:5, :5], mask[5:, 5:] = True, True
    packed = model(ids[None], attention_mask=mask.tril()[None, None], position_ids=position_ids, use_cache=False)
    expected = torch.cat([reference(model, ids[:5]), reference(model, ids[5:])])
    torch.testing.assert_close(packed.logits[0], expected, atol=1e-10, rtol=0)


@rotated_on_read
@pytest.mark.parametrize("implementation", [None, "static"])
def test_dynamic_rope(variant, implementation):
    """Frequencies that change with the length are those of the tokens there are, not of a static cache's rows."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    # One layer: what a deeper one cached of earlier tokens would be of the earlier frequencies, as in any model.
    config = config_of(variant, num_hidden_layers=1, max_position_embeddings=16, rope_parameters=rope)
    model = random_model(config)
    ids = random_ids(config, 1, 13)
    expected = greedy(random_model(config), ids)
    assert torch.equal(generate(model, ids, cache_implementation=implementation), expected)


EXCLUDED = {
    "head_factor_act": {"head_factor_act": "tanh"},
    "head_factor_act` and `noncontextual_a": {"head_factor_act": "sigmoid", "noncontextual_a": True},
    "noncontextual_b` and `noncontextual_a": {"noncontextual_a": True, "noncontextual_b": True},
    "shared_b` needs `k_rank` and `v_rank": {"shared_b": True, "k_rank": [2, 1], "v_rank": 2},
    "shared_b` and `noncontextual_a": {"shared_b": True, "noncontextual_a": True, "v_rank": 2},
    "c_factor_dim` must be a divisor": {"c_factor_dim": 3},
    "`head_dim` / `c_factor_dim`": {"c_factor_dim": 16},
    "c_factor_dim` and `noncontextual_b": {"c_factor_dim": 4, "noncontextual_b": True},
    "c_factor_dim` and `qk_norm": {"c_factor_dim": 4, "qk_norm": True},
    "qk_norm` must be False, True": {"qk_norm": "rows"},
    "qk_norm`='heads' and `noncontextual_a": {"qk_norm": "heads", "noncontextual_a": True},
}


@pytest.mark.parametrize("message", EXCLUDED)
def test_fields_that_exclude_each_other(message):
    with pytest.raises(Exception, match=re.escape(message)):
        tiny_config(**EXCLUDED[message])


def test_constant_b_views():
    model = random_model(config_of("non-contextual B"))
    with torch.no_grad():
        layer = cached(model(random_ids(model.config, 1, 4))).layers[0]
    assert layer.a_k.shape == (1, 4, 2, 5)
    with pytest.raises(ValueError, match="B factors of this model are constants"):
        print(layer.b_k)


def test_shared_b_views():
    model = random_model(config_of("shared B"))
    with torch.no_grad():
        layer = cached(model(random_ids(model.config, 1, 4))).layers[0]
    assert layer.b_v.shape == (1, 4, 2, 16) and layer.b_v.data_ptr() == layer.b_k.data_ptr()


def test_initialisation():
    """Xavier uniform, of b and c each as [hidden, R, size]; constant B factors as [R, d], the scale of projected ones."""
    attention = T6ForCausalLM(tiny_config(hidden_size=256, k_rank=6, c_factor_dim=2)).model.layers[0].self_attn
    for proj, size in ((attention.k_b_proj, 8), (attention.k_c_proj, 2)):
        bound = (6 / ((256 + 6) * size)) ** 0.5
        assert 0.97 * bound < proj.weight.abs().max() <= bound
    constant = T6ForCausalLM(tiny_config(noncontextual_b=True, k_rank=6)).model.layers[0].self_attn.k_b
    bound = (6 / (6 + 16)) ** 0.5
    assert constant.shape == (6, 16) and 0.8 * bound < constant.abs().max() <= bound


def docs_table(first_column: str) -> list[dict[str, str]]:
    """The rows of the table of `docs/variants.md` that has a column of this name."""
    lines = DOCS.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| variant |") and first_column in line)
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(rows[0], row)) for row in rows[2:]]


def test_docs_say_what_is_tested():
    from . import distributed_cases, test_serving  # which import this module

    tests, *rows = docs_table("float64 reference")
    named = {column: re.findall(r"`(test_\w+)`", cell) for column, cell in tests.items() if column != "variant"}
    for name in named.pop("pages"):
        assert every_variant.mark in getattr(test_serving, name).pytestmark, name
    assert set(VARIANTS) <= set(distributed_cases.TENSOR_PARALLEL) and named.pop("two processes") == []
    for names in named.values():
        for name in names:
            marks = globals()[name].pytestmark
            assert every_variant.mark in marks, f"{name} does not go through every variant"
    everywhere = {name for name, value in globals().items() if every_variant.mark in getattr(value, "pytestmark", [])}
    assert everywhere == {name for names in named.values() for name in names}
    assert [row["variant"] for row in rows] == list(VARIANTS)
    assert {row["variant"] for row in rows if row["decoding"] == "FlashTPA"} == KERNEL


@pytest.mark.parametrize("row", docs_table("published config"), ids=lambda row: row["variant"])
def test_docs_table_of_configs(row):
    """The published config has the field that is named, and caches the numbers that the formula says."""
    config = AutoConfig.from_pretrained(DOCS.parents[1] / "configuration" / row["published config"].strip("`"))
    if field := re.fullmatch(r"`(\w+)=(.+)`", row["field"]):
        assert str(getattr(config, field[1])) == field[2].strip('"')
    d_c = config.c_factor_dim or 1
    symbols = {"R": config.k_rank, "R_K": config.k_rank, "R_V": config.v_rank, "h": config.num_attention_heads}
    symbols |= {"d": config.head_dim, "d_b": config.head_dim // d_c, "d_c": d_c}
    formula = re.sub(r"(?<=[\w)]) ?(?=\()|(?<=[\w)]) (?=\w)", "*", row["numbers cached per token and layer"])
    layouts = factor_layouts(config, 0)
    assert sum(layout.rank * (layout.num_heads + layout.head_dim) for layout in layouts) == eval(formula, {}, symbols)
