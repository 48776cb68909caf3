"""The model against the paper's equations, and decoding against the full forward pass, with every cache."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from modeling_t6 import T6Cache, T6Config, T6ForCausalLM
from modeling_t6.cache_t6 import factor_layouts

from ..versions import once_but
from .common import DEVICE, quick, random_ids, random_model, tiny_config
from .reference import t6_logits


VARIANTS = {
    "tpa": {},
    "kvonly": {"q_rank": None},
    "h34-ranks622": {"num_attention_heads": 34, "q_rank": 6, "k_rank": 2, "v_rank": 2},
    "h47-kvonly": {"num_attention_heads": 47, "q_rank": None, "v_rank": 2},
    "rank1": {"q_rank": 1, "k_rank": 1, "v_rank": 1},
    "v_rank-above-k_rank": {"k_rank": 1, "v_rank": 4},
    "partial-rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "bias-but-o": {"attention_bias": True, "attention_out_bias": False, "q_rank": None},
    "rank-by-layer": {"k_rank": [1, 3], "v_rank": [2, 1]},
    "noncontextual-a": {"noncontextual_a": True},
    "noncontextual-a-kvonly": {"noncontextual_a": True, "q_rank": None, "k_rank": 3, "v_rank": [1, 5]},
    "qk-norm": {"qk_norm": True},
    "qk-norm-noncontextual-a": {"qk_norm": True, "noncontextual_a": True, "q_rank": None},
    "qk-norm-heads": {"qk_norm": "heads"},
    "qk-norm-heads-rank1-kvonly": {"qk_norm": "heads", "k_rank": 1, "q_rank": None},
    "qk-norm-heads-softmax-partial": {
        "qk_norm": "heads",
        "head_factor_act": "softmax",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
    "qk-norm-heads-noncontextual-b": {"qk_norm": "heads", "noncontextual_b": True, "k_rank": [3, 1]},
    "qk-norm-heads-shared-b": {"qk_norm": "heads", "shared_b": True, "v_rank": 2},
    "grouped-heads": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "grouped-heads-one-group-kvonly": {"num_key_value_heads": 1, "q_rank": None, "v_rank": 3},
    "grouped-heads-noncontextual-a": {"num_attention_heads": 15, "num_key_value_heads": 5, "noncontextual_a": True},
    "grouped-heads-noncontextual-b-softmax": {
        "num_attention_heads": 6, "num_key_value_heads": 3, "noncontextual_b": True, "head_factor_act": "softmax",
    },
    "grouped-heads-shared-b-qk-norm-heads": {
        "num_attention_heads": 6, "num_key_value_heads": 3, "shared_b": True, "v_rank": 2, "qk_norm": "heads",
    },
    "grouped-heads-third-order": {"num_attention_heads": 6, "num_key_value_heads": 3, "c_factor_dim": 2},
    "grouped-heads-sliding": {"num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": 3},
    "head-norm": {"head_norm": True},
    "sliding": {"sliding_window": 3},
    "sliding-and-full": {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]},
    "untied": {"tie_word_embeddings": False},
    "sigmoid": {"head_factor_act": "sigmoid"},
    "softmax-kvonly": {"head_factor_act": "softmax", "q_rank": None},
    "noncontextual-b": {"noncontextual_b": True, "v_rank": 3},
    "noncontextual-b-qk-norm-softmax": {"noncontextual_b": True, "qk_norm": True, "head_factor_act": "softmax"},
    "noncontextual-b-kvonly-partial": {
        "noncontextual_b": True,
        "q_rank": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
    "noncontextual-b-sliding": {
        "noncontextual_b": True,
        "sliding_window": 3,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "shared-b": {"shared_b": True, "v_rank": 2},
    "shared-b-qk-norm-by-layer": {"shared_b": True, "qk_norm": True, "k_rank": [1, 3], "v_rank": [1, 3]},
    "shared-b-bias-kvonly": {"shared_b": True, "v_rank": 2, "attention_bias": True, "q_rank": None},
    "shared-noncontextual-b": {"shared_b": True, "noncontextual_b": True, "v_rank": 2},
    "third-order": {"c_factor_dim": 4},
    "third-order-kvonly-bias": {"c_factor_dim": 2, "q_rank": None, "attention_bias": True, "v_rank": 3},
    "third-order-partial": {
        "c_factor_dim": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
    "third-order-noncontextual-a": {"c_factor_dim": 4, "noncontextual_a": True},
    "third-order-shared-b-sigmoid": {"c_factor_dim": 4, "shared_b": True, "v_rank": 2, "head_factor_act": "sigmoid"},
}  # fmt: skip
# With the oldest Transformers, those whose positions, masks and caches differ.
variants = pytest.mark.parametrize(
    "overrides",
    once_but(
        VARIANTS.items(),
        "tpa",
        "partial-rotary",
        "noncontextual-a-kvonly",
        "sliding-and-full",
        "noncontextual-b-sliding",
        "third-order",
        "grouped-heads",
    ),
)


def reference(model: T6ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    config = model.config
    logits = t6_logits(
        {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        ids.tolist(),
        num_layers=config.num_hidden_layers,
        h=config.num_attention_heads,
        d=config.head_dim,
        h_kv=config.num_key_value_heads,
        rotary_dim=int(
            config.head_dim // (config.c_factor_dim or 1) * config.rope_parameters.get("partial_rotary_factor", 1.0)
        ),
        theta=config.rope_parameters["rope_theta"],
        eps=config.rms_norm_eps,
        head_factor_act=config.head_factor_act,
        norms_key_heads=config.qk_norm == "heads",
        windows=[config.sliding_window if t == "sliding_attention" else None for t in config.layer_types or []]
        or None,
    )
    return logits.to(model.device)


def left_padded(config, lengths: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows of the given lengths, alone and as one left-padded batch with its mask."""
    rows = [random_ids(config, length, seed=length) for length in lengths]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long, device=DEVICE)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
    return rows, ids, mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@variants
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_full_forward(overrides, implementation):
    model = random_model(tiny_config(attn_implementation=implementation, **overrides), dtype=torch.float64)
    rows, ids, mask = left_padded(model.config, (9, 4))
    expected = [reference(model, row) for row in rows]
    assert expected[0].std() > 0.1  # logits large enough for the tolerance to mean something
    with torch.no_grad():
        alone = [model(row[None], use_cache=False).logits[0] for row in rows]
        batch = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    for i, row in enumerate(rows):
        # float64 has 16 digits; a few hundred additions of numbers near 1 leave 13.
        torch.testing.assert_close(alone[i], expected[i], atol=1e-10, rtol=0)
        torch.testing.assert_close(batch[i, -len(row) :], expected[i], atol=1e-10, rtol=0)


@variants
@pytest.mark.parametrize("step", [1, 3])
def test_decoding_in_factor_space(overrides, step):
    model = random_model(tiny_config(**overrides), dtype=torch.float64)
    ids = random_ids(model.config, 10)
    cache, logits = T6Cache(config=model.config), []
    with torch.no_grad():
        for start in range(0, len(ids), step):
            logits.append(model(ids[None, start : start + step], cache=cache).logits[0])
    torch.testing.assert_close(torch.cat(logits), reference(model, ids), atol=1e-10, rtol=0)


CACHES = {
    "t6": lambda config: T6Cache(config=config),
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=24),
}
if DEVICE == "cuda":  # on a CPU there is nowhere to offload to
    CACHES["offloaded"] = lambda config: T6Cache(config=config, offloading=True)
    CACHES["offloaded-static"] = lambda config: StaticCache(config=config, max_cache_len=24, offloading=True)


@torch.no_grad()
def logits_with_and_without(cache, model, ids, mask, bounds) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the tokens that are not padding: over `cache`, by the steps between `bounds`, and in one step without it."""
    position_ids, logits, real = positions(mask), [], mask.bool()
    full = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    for start, end in zip(bounds, bounds[1:]):
        span = slice(start, end)
        output = model(ids[:, span], attention_mask=mask[:, :end], position_ids=position_ids[:, span], cache=cache)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)[real], full[real]


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("q_rank", once_but({"tpa": 3, "kvonly": None}.items(), "tpa"))
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_token_by_token_equals_full_forward(make_cache, implementation, q_rank, padded):
    config = tiny_config(q_rank=q_rank, attn_implementation=implementation)
    model = random_model(config)
    _, ids, mask = left_padded(config, (14, 9) if padded else (14, 14))
    with quick(implementation):
        logits, full = logits_with_and_without(make_cache(config), model, ids, mask, range(ids.shape[1] + 1))
    # Logits are of order 1 and float32 has 7 digits.
    torch.testing.assert_close(logits, full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize(
    "overrides",
    [{"sliding_window": 4}, {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
     {"noncontextual_a": True, "k_rank": [2, 3]}],
    ids=["sliding", "sliding-and-full", "noncontextual-a"],
)  # fmt: skip
@pytest.mark.parametrize("prompt", once_but([1, 5, 11], 5))
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_variants_with_every_cache(make_cache, overrides, prompt, implementation):
    config = tiny_config(attn_implementation=implementation, **overrides)
    model = random_model(config)
    _, ids, mask = left_padded(config, (14, 9))
    logits, full = logits_with_and_without(make_cache(config), model, ids, mask, [0, *range(prompt, 15)])
    torch.testing.assert_close(logits, full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_groups", [6, 2, 1], ids=["mha", "gqa", "mqa"])
def test_llama_is_a_t6(num_groups):
    """Section 4 of the paper: with constant A factors, G at the heads of each group, T6 is Llama."""
    h, d = 6, 8
    llama_config = LlamaConfig(
        vocab_size=97, hidden_size=h * d, intermediate_size=60, num_hidden_layers=2, num_attention_heads=h,
        num_key_value_heads=num_groups, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    llama = random_model(llama_config, cls=LlamaForCausalLM, dtype=torch.float64)
    config = T6Config(
        vocab_size=97, hidden_size=h * d, intermediate_size=60, num_hidden_layers=2, num_attention_heads=h, head_dim=d,
        q_rank=None, k_rank=num_groups, v_rank=num_groups, max_position_embeddings=64, tie_word_embeddings=False,
        noncontextual_a=True,
    )  # fmt: skip
    model = T6ForCausalLM(config).double().to(DEVICE).eval()
    state = llama.state_dict()
    groups = torch.arange(h, device=DEVICE) // (h // num_groups)
    mask = (groups == torch.arange(num_groups, device=DEVICE)[:, None]).double()
    for layer in range(2):
        for x in "kv":
            prefix = f"model.layers.{layer}.self_attn.{x}"
            state[f"{prefix}_b_proj.weight"] = state.pop(f"{prefix}_proj.weight")
            state[f"{prefix}_a"] = num_groups * mask
    model.load_state_dict(state)
    # LlamaRMSNorm computes in float32 whatever its input: give both the wider one.
    for module in llama.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: (
                m.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon)
            )
    ids = random_ids(config, 2, 11)
    with torch.no_grad():
        expected = llama(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-10, rtol=0)
        cache = T6Cache(config=config)
        assert sum(layout.width for layout in factor_layouts(config, 0)) == 2 * num_groups * d
        steps = [model(ids[:, t : t + 1], cache=cache).logits for t in range(11)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-10, rtol=0)
