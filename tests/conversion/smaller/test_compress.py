"""Low-rank head factors against plain restatements, and what a compressed model computes."""

import copy
import itertools

import pytest
import torch

from conversion.files.errors import ConversionError
from conversion.smaller.compress import Compression, compress
from conversion.smaller.fits import mean_pool, selections
from conversion.smaller.key_fits import KeyFit, KeyProblem
from conversion.smaller.least_squares import NOISE
from conversion.smaller.measure import cache_bytes_per_token
from conversion.smaller.moments import Moments, collect_moments, from_complex, to_complex
from conversion.smaller.normed_heads import with_normed_heads
from conversion.smaller.options import METHODS
from conversion.smaller.probe import Probe
from conversion.smaller.questions import Questions
from conversion.smaller.ranks import choose_ranks
from conversion.smaller.value_fits import ValueFit, ValueProblem
from conversion.smaller.weights import balance, compressed_attention
from conversion.sources.plan import unchanged
from modeling_t6 import T6Cache, T6ForCausalLM
from modeling_t6.cache_t6 import CACHE_NAME
from modeling_t6.factors_t6 import apply_rotary_pos_emb

from ..common import FAMILIES, LAYOUTS, divergence, exact_model, log_probabilities, random_ids


pytestmark = pytest.mark.once


def correlated(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random features [..., n, d] in which the n heads resemble one another."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(*shape[:-2], 1, shape[-1], generator=generator, dtype=torch.double)
    return common + torch.randn(*shape, generator=generator, dtype=torch.double)


def fit_keys(moments: Moments, selection: torch.Tensor, rank: int) -> KeyFit:
    return KeyProblem([moments], selection[None]).fit(rank)[0]


def fit_values(moments: Moments, selection: torch.Tensor, output: torch.Tensor, rank: int) -> ValueFit:
    return ValueProblem([moments], selection[None], [output]).fit(rank)[0]


def test_complex_numbers_are_what_rope_turns():
    """RoPE on features is a multiplication by exp(i angle) on the complex numbers that stand for them."""
    x = torch.randn(2, 9, 3, 16, dtype=torch.double)
    assert torch.equal(from_complex(to_complex(x, 12), 12), x)
    angles = torch.randn(2, 9, 6, dtype=torch.double)
    rotated = apply_rotary_pos_emb(x, torch.cat(2 * [angles.cos()], -1), torch.cat(2 * [angles.sin()], -1))
    turn = torch.cat([torch.polar(torch.ones_like(angles), angles), torch.ones(2, 9, 2)], dim=-1)
    assert torch.allclose(to_complex(rotated, 12), to_complex(x, 12) * turn[:, :, None], atol=1e-14)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_moments(family):
    """Token by token, from what the layer's projections give: what a query's probabilities and a window's mean leave of keys."""
    model = exact_model(family, "gqa")
    attention, ids = model.model.layers[0].self_attn, random_ids(2, 23)
    found = collect_moments(model, [ids])[0]
    states = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    cos, sin = model.model.rotary_emb(states, torch.arange(23)[None])
    d, groups, heads = attention.head_dim, attention.k_rank, model.config.num_attention_heads
    window = model.config.sliding_window or 23
    keys = torch.zeros(d // 2, groups, groups, dtype=torch.cdouble)
    values = torch.zeros(groups * d, groups * d, dtype=torch.double)
    for x in states:
        query = apply_rotary_pos_emb(attention.q_proj(x).view(1, 23, heads, d), cos, sin)[0]
        key = apply_rotary_pos_emb(attention.k_b_proj(x).view(1, 23, groups, d), cos, sin)[0]
        value, z = attention.v_b_proj(x), to_complex(key, d)  # [t, G, F]
        deviations = z - z.mean(0)
        keys += 0.25 * torch.einsum("tgf,tkf->fgk", deviations, deviations.conj())
        keys += 0.01 * torch.einsum("tgf,tkf->fgk", z, z.conj())
        for n in range(23):
            seen = range(max(0, n - window + 1), n + 1)
            all_weights = []
            for head in range(heads):
                own = attention.k_a[:, head] @ key / groups  # [t, d]
                weights = torch.softmax(own[list(seen)] @ query[n, head] * attention.scaling, 0)
                all_weights.append(weights)
                average = weights @ value[list(seen)]
                values += average[:, None] * average
            weights = torch.stack(all_weights).mean(0)
            mean = torch.einsum("t,tgf->gf", weights.to(z.dtype), z[list(seen)])
            for weight, place in zip(weights, seen):
                keys += weight * torch.einsum("gf,kf->fgk", z[place] - mean, (z[place] - mean).conj())
    torch.testing.assert_close(found.keys, keys, rtol=1e-4, atol=1e-4 * keys.abs().max().item())
    torch.testing.assert_close(found.values, values, rtol=1e-4, atol=1e-4 * values.abs().max().item())


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_keys_of_least_error(rank):
    """
    The loss is the weighted share of the power that is lost, token by token, with what errors of B add; plain mixtures of
    heads lose more.
    """
    groups, heads, d, tokens = 6, 6, 8, 300
    keys = to_complex(correlated(tokens, groups, d), d)  # [t, G, F]
    weights = torch.rand(heads, d // 2, dtype=torch.double) + 0.1
    moments = Moments(torch.einsum("tgf,tkf->fgk", keys, keys.conj()), weights, torch.empty(0))
    fit = fit_keys(moments, torch.eye(groups).double(), rank)
    lost = power = 0.0
    for i, f in itertools.product(range(heads), range(d // 2)):
        b = [sum(fit.m[f, r, g] * keys[:, g, f] for g in range(groups)) for r in range(rank)]
        formed = fit.z[i, f] * sum(fit.a[r, i] * b[r] for r in range(rank))
        errors = sum((NOISE * fit.z[i, f] * fit.a[r, i] * b[r]).abs().square().sum() for r in range(rank))
        lost += weights[i, f] * ((keys[:, i, f] - formed).abs().square().sum() + errors)
        power += weights[i, f] * keys[:, i, f].abs().square().sum()
    assert lost / power == pytest.approx(fit.loss, rel=1e-6)

    # The best rank-R mixture of whole heads, by Eckart and Young, of heads weighted as a whole.
    even = Moments(moments.keys, torch.ones_like(weights), moments.values)
    matrix = torch.view_as_real(keys).transpose(0, 1).flatten(1)  # [G, tokens * d]
    tail = torch.linalg.svdvals(matrix)[rank:].square().sum() / matrix.square().sum()
    assert fit_keys(even, torch.eye(groups).double(), rank).loss <= tail + NOISE**2


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_values_of_least_error(rank):
    groups, d, tokens, hidden = 4, 6, 400, 20
    values = correlated(tokens, groups, d)
    output = torch.randn(hidden, groups, d, dtype=torch.double)
    flat = values.flatten(1)
    moments = Moments(torch.empty(0), torch.empty(0), flat.T @ flat)
    fit = fit_values(moments, torch.eye(groups).double(), output, rank)
    b = (flat @ fit.m.T).view(tokens, rank, d)
    lost = power = 0.0
    for i in range(groups):
        formed = sum(fit.a[r, i] * b[:, r] for r in range(rank)) @ fit.u[i].T
        lost += ((values[:, i] - formed) @ output[:, i].T).square().sum()
        errors = NOISE**2 * torch.einsum("r,tre->e", fit.a[:, i].square(), b.square())
        lost += errors @ (output[:, i] @ fit.u[i]).square().sum(0)
        power += (values[:, i] @ output[:, i].T).square().sum()
    assert lost / power == pytest.approx(fit.loss, rel=1e-6)

    # With an output projection that weighs all features alike: no worse than the best mixture of whole heads.
    plain = torch.zeros(groups * d, groups, d, dtype=torch.double)
    for g in range(groups):
        plain[g * d : (g + 1) * d, g] = torch.eye(d)
    matrix = values.transpose(0, 1).flatten(1)
    tail = torch.linalg.svdvals(matrix)[rank:].square().sum() / matrix.square().sum()
    assert fit_values(moments, torch.eye(groups).double(), plain, rank).loss <= tail + NOISE**2


def test_what_has_low_rank_is_found():
    groups, d, tokens, rank = 6, 8, 500, 2
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=torch.double):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    b, a, z = (
        randn(tokens, rank, d // 2, dtype=torch.cdouble),
        randn(rank, groups),
        randn(groups, d // 2, dtype=torch.cdouble),
    )
    keys = z * torch.einsum("rg,trf->tgf", a.to(b), b)
    moments = Moments(
        torch.einsum("tgf,tkf->fgk", keys, keys.conj()), torch.ones(groups, d // 2).double(), torch.empty(0)
    )
    assert fit_keys(moments, torch.eye(groups).double(), rank).loss < 1e-3

    # Heads that come in pairs: one of each pair suffices, whichever the pairs are.
    base = randn(tokens, 3, d)
    values = torch.einsum("tgd,gde->tge", base[:, [0, 1, 2, 1, 0, 2]], randn(6, d, d)).flatten(1)
    moments = Moments(torch.empty(0), torch.empty(0), values.T @ values)
    assert fit_values(moments, torch.eye(groups).double(), randn(20, groups, d), 3).loss < 1.1 * NOISE**2


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "llama-biases", "phi3", "mistral-sliding"])
def test_weights_do_what_the_fit_says(family, layout):
    """Scores and outputs of a compressed layer are those of its formed keys and values, before and after balancing."""
    model = exact_model(family, layout)
    attention = model.model.layers[0].self_attn
    num_heads, d, rotary = model.config.num_attention_heads, attention.head_dim, model.config.rotary_dim
    moments = collect_moments(model, [random_ids(4, 40)])[0]
    rank = max(1, attention.k_rank // 2)
    s_k, s_v = selections(attention)
    output = attention.o_proj.weight.unflatten(1, (-1, d))
    keys, values = fit_keys(moments, s_k, rank), fit_values(moments, s_v, output, rank)
    new = compressed_attention(attention, keys, values)

    x = torch.randn(11, model.config.hidden_size, dtype=torch.double)
    query = to_complex(attention.q_proj(x).view(11, -1, d), rotary)
    key = to_complex(attention.k_b_proj(x).view(11, -1, d), rotary)
    formed = torch.einsum("hf,rh,frg,tgf->thf", keys.z, keys.a.to(keys.m), keys.m, key)
    scores = torch.einsum("qhf,khf->hqk", query.conj(), formed).real
    value = torch.einsum("hde,rh,tre->thd", values.u, values.a, (attention.v_b_proj(x) @ values.m.T).view(11, -1, d))
    for _ in ("as fitted", "balanced"):
        new_query = new.q_proj(x).view(11, num_heads, d)
        new_key = torch.einsum("rh,trd->thd", new.k_a, new.k_b_proj(x).view(11, rank, d)) / rank
        assert torch.allclose(torch.einsum("qhd,khd->hqk", new_query, new_key), scores, rtol=1e-8, atol=1e-8)
        new_value = torch.einsum("rh,trd->thd", new.v_a, new.v_b_proj(x).view(11, rank, d)) / rank
        expected = value.flatten(1) @ attention.o_proj.weight.T
        assert torch.allclose(new_value.flatten(1) @ new.o_proj.weight.T, expected, rtol=1e-8, atol=1e-8)
        balance(new)
    sides = [new.v_b_proj.weight, new.o_proj.weight]
    sizes = [side.square().sum() / count for side, count in zip(sides, (rank, num_heads))]
    assert sizes[0] == pytest.approx(sizes[1].item(), rel=1e-3)


def round_weights(model: T6ForCausalLM) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


@torch.no_grad()
def test_fit_stands_rounding():
    """Heads that are small differences of large B are not: bfloat16 numbers lose little more than the fit does."""
    model = exact_model("llama", "mha")
    calibration, ids = random_ids(8, 60), random_ids(4, 60)
    expected = log_probabilities(model, ids)
    rounded = copy.deepcopy(model)
    round_weights(rounded)
    # What rounding does to the source is all of the model's weights; the rest is what a fit adds.
    of_the_source = divergence(rounded, ids, expected)
    for ranks in ((3, 2), (2, 1)):
        small = compress(model, calibration, *([rank] for rank in ranks), quiet=True)
        assert torch.linalg.cond(small.model.layers[0].self_attn.v_a) == pytest.approx(1)
        fitted = divergence(small, ids, expected)
        round_weights(small)
        assert divergence(small, ids, expected) - fitted < 0.1 * fitted + 3 * of_the_source


@torch.no_grad()
def test_balanced_keys_stand_noise():
    """A B that is large in a feature pair stays out of the heads that do not read it, which noise of B would drown."""
    attention = exact_model("llama", "mha").model.layers[0].self_attn.double()
    num_heads, d = attention.k_a.shape[1], attention.head_dim
    attention.k_a.copy_(torch.eye(num_heads).roll(1, 1) + torch.eye(num_heads))  # B r is read by heads r and r + 1
    pair = [0, d // 2]
    attention.k_b_proj.weight.unflatten(0, (-1, d))[1, pair] *= 1000
    attention.q_proj.weight.unflatten(0, (-1, d))[1:3, pair] /= 1000
    balance(attention)
    x = torch.randn(50, attention.q_proj.in_features, dtype=torch.double)
    query, b = attention.q_proj(x).view(50, num_heads, d), attention.k_b_proj(x).view(50, num_heads, d)
    noisy = b * (1 + 0.01 * torch.randn_like(b))
    scores, disturbed = (
        torch.einsum("qhd,rh,krd->hqk", query[..., pair], attention.k_a, keys[..., pair]) for keys in (b, noisy)
    )
    assert ((disturbed - scores).norm(dim=(1, 2)) < 0.02 * scores.norm(dim=(1, 2))).all()


@torch.no_grad()
def test_rope_stays_exact():
    """The logits of a compressed model depend on distances alone: RoPE turns its keys as it turned the source's."""
    model = exact_model("llama", "mha")
    small = compress(model, random_ids(4, 40), [2], [2], quiet=True)
    ids = random_ids(2, 30)
    positions = torch.arange(30)[None]
    logits = small(ids, position_ids=positions).logits
    moved = small(ids, position_ids=positions + 100).logits
    # Angles are float32 numbers, which lose digits with the position.
    assert torch.allclose(moved, logits, atol=1e-4 * logits.abs().max().item())
    assert not torch.allclose(
        small(ids, position_ids=2 * positions).logits, logits, atol=1e-2 * logits.abs().max().item()
    )


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_less_is_lost_with_more_ranks_and_nothing_with_all(method):
    model = exact_model("llama", "mha")
    calibration, ids = random_ids(8, 60), random_ids(4, 60)
    expected = log_probabilities(model, ids)
    losses = []
    for rank in (1, 2, 4):
        small = compress(model, calibration, [rank], [rank], method=method, quiet=True)
        assert (small.config.k_rank, small.config.v_rank) == (rank, rank)
        losses.append(divergence(small, ids, expected))
    assert losses[0] > losses[1] > losses[2] and abs(losses[2]) < 1e-6


@torch.no_grad()
def test_fit_loses_less_than_mean_pool():
    model = exact_model("llama", "mha")
    calibration, ids = random_ids(8, 60), random_ids(4, 60)
    expected = log_probabilities(model, ids)
    fit, pooled = (
        divergence(compress(model, calibration, [2], [2], method=method, quiet=True), ids, expected)
        for method in ("fit", "mean-pool")
    )
    assert fit < 0.9 * pooled


def test_mean_pool_is_the_mean_of_neighbours():
    model = exact_model("llama", "mha")
    attention = model.model.layers[0].self_attn
    keys, values = mean_pool(selections(attention)[0], attention.head_dim, 2)
    small = compressed_attention(attention, keys, values)
    for name in ("k_b_proj", "v_b_proj"):
        old = getattr(attention, name).weight.view(2, 2, attention.head_dim, -1)
        assert torch.allclose(getattr(small, name).weight, old.mean(1).flatten(0, 1))
    assert torch.equal(small.k_a, 2 * torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.double))
    assert torch.equal(small.q_proj.weight, attention.q_proj.weight)
    assert torch.equal(small.o_proj.weight, attention.o_proj.weight)


@torch.no_grad()
def test_ranks_by_layer_lose_less_than_equal_ranks():
    model = exact_model("llama", "mha", num_hidden_layers=4)
    # Two of the layers hardly matter: their ranks are the ones to save.
    for layer in (1, 2):
        model.model.layers[layer].self_attn.o_proj.weight.mul_(0.05)
    ids = random_ids(16, 60)
    expected = log_probabilities(model, ids)
    chosen = compress(model, ids, cache_ratio=2, quiet=True)
    equal = compress(model, ids, [2], [2], quiet=True)
    k_ranks, v_ranks = chosen.config.k_rank, chosen.config.v_rank
    assert sum(k_ranks) + sum(v_ranks) <= 16
    assert k_ranks[1] + k_ranks[2] < k_ranks[0] + k_ranks[3]
    assert divergence(chosen, ids, expected) < divergence(equal, ids, expected)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [1.5, 2.6, 4])
def test_rows_in_which_least_is_lost(ratio):
    """Of rows of 16, 8 and 4 bits, each with the ranks that the bytes allow, those are taken whose predictions are nearest."""
    model = exact_model("llama", "mha", dtype=torch.float32, num_hidden_layers=2)
    ids, names = random_ids(24, 60), (None, "float8_e4m3fn", "int4")
    probe = Probe(model, ids)
    source = 2 * 2 * model.config.num_hidden_layers * model.config.k_rank * model.config.head_dim
    losses = {}
    for name in names:
        small = compress(model, ids, cache_ratio=ratio, quiet=True, cache_dtypes=[name])
        cache = T6Cache(config=small.config)
        assert small.config.cache_dtype == name
        assert cache_bytes_per_token(small, cache, 2) <= source / ratio
        losses[name] = probe.divergence(small, name).item()
    chosen = compress(model, ids, cache_ratio=ratio, quiet=True, cache_dtypes=names)
    assert losses[chosen.config.cache_dtype] == min(losses.values())


@torch.no_grad()
def test_equal_ranks_are_not_tried_beyond_the_ratio(monkeypatch):
    """Rows of 4 bits of 3 heads of 16 are padded: two of them take more than one of 2 and one of 4."""
    model, ids = exact_model("llama", "mha", num_hidden_layers=1), random_ids(8, 40)
    monkeypatch.setattr("conversion.smaller.compress.choose_ranks", lambda *arguments: [2, 4])
    small = compress(model, ids, cache_ratio=256 / 72, quiet=True, cache_dtypes=["int4"])
    assert (small.config.k_rank, small.config.v_rank) == (2, 4)
    assert cache_bytes_per_token(small, T6Cache(config=small.config), 2) == 72


@torch.no_grad()
def test_costs_of_less_than_nothing():
    """Where ranks hardly matter, rounding makes some costs negative; of these, too, the least is near enough to itself."""
    model, ids = exact_model("llama", "mha", dtype=torch.float32, num_hidden_layers=2), random_ids(12, 60)
    model.float()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(1e-5)
    costs = Compression(model, "fit", ids.split(8), quiet=True).costs(Probe(model, ids))
    assert min(min(cost.values()) for cost in costs) < 0
    small = compress(model, ids, cache_ratio=2, quiet=True)
    assert cache_bytes_per_token(small, T6Cache(config=small.config), 2) <= 2 * 2 * 2 * 64 / 2


@torch.no_grad()
def test_probe_begins_where_a_model_has_changed():
    model, ids = exact_model("mistral-sliding", "gqa"), random_ids(6, 60)
    probe = Probe(model, ids[:4], Questions(ids[4:], torch.rand(2, 60) < 0.3))
    for layer in reversed(range(3)):
        model.model.layers[layer].self_attn.v_b_proj.weight.mul_(1.3)
        whole = probe.divergence(model)
        assert whole > 0
        torch.testing.assert_close(probe.divergence(model, first=layer), whole)
    assert [type(layer).__name__ for layer in model.model.layers] == ["T6DecoderLayer"] * 3


def test_choose_ranks_against_all_choices():
    """With costs that fall ever more slowly, choosing step by step is best of all choices."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        steps = torch.rand(4, 5, generator=generator).sort(dim=1, descending=True).values
        costs = [{rank: float(row[rank - 1 :].sum()) for rank in range(1, 6)} for row in steps]
        for budget in (4, 7, 12, 20):
            ranks = choose_ranks(costs, budget)
            best = min(
                sum(cost[rank] for cost, rank in zip(costs, choice))
                for choice in itertools.product(range(1, 6), repeat=4)
                if sum(choice) <= budget
            )
            assert sum(ranks) <= budget
            assert sum(cost[rank] for cost, rank in zip(costs, ranks)) == pytest.approx(best)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_normed_heads_are_the_same_function(layout):
    model, ids = exact_model("qwen3", layout), random_ids(3, 40)
    logits = model(ids).logits
    formed = with_normed_heads(model)
    cached = formed(ids, **{CACHE_NAME: T6Cache(config=formed.config), "use_cache": True}).logits
    for found in (formed(ids, use_cache=False).logits, cached):
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-12 * logits.abs().max().item())
    assert torch.equal(model(ids).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_keys_of_formed_heads_are_normed(rank):
    """Scores and outputs of a Qwen3's layer with fewer keys: each key head is a mixture of the source's, and then normed."""
    model = exact_model("qwen3", "mha")
    small = compress(model, random_ids(8, 60), [rank], [2], quiet=True)
    old, new, config = model.model.layers[0].self_attn, small.model.layers[0].self_attn, small.config
    assert (config.k_rank, config.v_rank, config.qk_norm, config.num_key_value_heads) == (rank, 2, "heads", 4)
    x = torch.randn(1, 11, config.hidden_size, dtype=torch.double)
    angles = torch.zeros(1, 11, config.head_dim, dtype=torch.double)
    factors = new.project(x, (angles.cos(), angles.sin()))
    sources = old.k_b_proj(x).unflatten(-1, (-1, config.head_dim))[0]  # [t, G, d]
    b = new.k_b_proj(x).unflatten(-1, (-1, config.head_dim))[0]
    # A feature of each B is a mixture of that feature of the source's heads.
    for feature in range(config.head_dim):
        mixture = torch.linalg.lstsq(sources[..., feature], b[..., feature])
        assert mixture.solution.shape == (4, rank) and (mixture.residuals < 1e-20).all()
    heads = torch.einsum("gr,trd->tgd", new.k_a_proj.bias.view(4, rank), b) / rank
    sizes = (heads.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    expected = old.k_norm.weight * heads / sizes
    formed = torch.einsum("trg,trd->tgd", factors.a_k[0], factors.b_k[0]) / rank
    torch.testing.assert_close(formed, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(new.q_proj.weight, old.q_proj.weight)  # the norms of the queries see what they saw


@torch.no_grad()
@pytest.mark.parametrize("ratio", [1.5, 3, 5])
@pytest.mark.parametrize("layout", ["mha", "gqa"])
def test_smaller_caches_of_normalised_keys(layout, ratio):
    """Keys stay whole, without A in their rows, or lose heads, whichever costs less; in no more bytes than were asked for."""
    model, ids = exact_model("qwen3", layout, dtype=torch.float32, num_hidden_layers=2), random_ids(12, 60)
    names, sizes = (None, "float8_e4m3fn", "int4"), 2 * 2 * 2 * model.config.k_rank * model.config.head_dim
    if layout == "gqa" and ratio == 5:
        with pytest.raises(ConversionError, match="expected 1 to 4 for this model"):
            compress(model, ids, cache_ratio=ratio, quiet=True, cache_dtypes=names)
        return
    small = compress(model, ids, cache_ratio=ratio, quiet=True, cache_dtypes=names)
    config = small.config
    assert config.qk_norm == (True if config.k_rank == model.config.k_rank else "heads")
    assert cache_bytes_per_token(small, T6Cache(config=config), 2) <= sizes / ratio
    answer = small.generate(ids[:2], max_new_tokens=3, do_sample=False)
    cached = {CACHE_NAME: T6Cache(config=config), "use_cache": True}
    assert small(answer[:, :-1], **cached).logits[:, -3:].argmax(-1).equal(answer[:, -3:])


@torch.no_grad()
def test_normed_heads_are_saved_and_loaded(tmp_path):
    """With a rank for each layer, beside heads that share a key, and with biases of all projections but the output's."""
    model = exact_model("qwen3", "gqa")
    ids = random_ids(4, 40)
    small = compress(model, ids, [1, 2, 1], [2, 1, 2], quiet=True).float()
    small.save_pretrained(tmp_path)
    loaded, info = T6ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and (loaded.config.k_rank, loaded.config.qk_norm) == ([1, 2, 1], "heads")
    assert torch.equal(loaded.eval()(ids).logits, small(ids).logits)


@torch.no_grad()
def test_keys_of_any_size_fit_into_rows_of_8_bits():
    """A norm takes out the size of a source's keys: that of B, by which A is divided, is to be none of float8's concern."""
    losses = []
    for size in (1e-3, 1.0, 1e3):
        model, ids = exact_model("qwen3", "mha", rms_norm_eps=1e-12), random_ids(8, 60)
        probe = Probe(model, ids)
        for layer in model.model.layers:
            layer.self_attn.k_b_proj.weight.mul_(size)
        losses.append(probe.divergence(compress(model, ids, [2], [2], quiet=True), "float8_e4m3fn").item())
    assert losses == pytest.approx(3 * [losses[1]], rel=1e-3)


@torch.no_grad()
def test_fewer_keys_lose_less_than_mean_pool():
    model, calibration, ids = exact_model("qwen3", "mha"), random_ids(8, 60), random_ids(4, 60)
    expected = log_probabilities(model, ids)
    for rank in (1, 2, 3):
        fit, pooled = (
            divergence(compress(model, calibration, [rank], [rank], method=method, quiet=True), ids, expected)
            for method in ("fit", "mean-pool")
        )
        assert fit < 0.7 * pooled


def test_balancing_leaves_what_norms_see():
    attention = exact_model("qwen3", "mha").model.layers[0].self_attn
    weights = [attention.q_proj.weight.clone(), attention.k_b_proj.weight.clone()]
    balance(attention)
    assert all(map(torch.equal, (attention.q_proj.weight, attention.k_b_proj.weight), weights))


@torch.no_grad()
def test_heads_that_do_nothing():
    """A head without power takes no part, and makes no number that is none."""
    model = exact_model("llama", "mha")
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_b_proj, attention.v_b_proj):
        projection.weight[16:32] = 0
    small = compress(model, random_ids(4, 40), [2], [3], quiet=True)
    assert small(random_ids(2, 30)).logits.isfinite().all()


def test_every_family_is_compressed():
    """Whatever an exact model can be, its keys and values can be compressed."""
    for family in FAMILIES:
        model = exact_model(family, "gqa")
        ids = random_ids(2, 30)
        small = compress(model, ids, [1], [1], quiet=True)
        assert small(ids).logits.isfinite().all(), family
        # And it generates before it is saved and loaded.
        answer = small.generate(ids, max_new_tokens=3, do_sample=False)
        assert small(answer[:, :-1], use_cache=False).logits[:, -2:].argmax(-1).equal(answer[:, -2:]), family
    assert unchanged(ids) is ids
