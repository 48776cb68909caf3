"""Every way in which `generate()` works, against greedy decoding that recomputes the whole sequence for each token."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

from modeling_t6 import T6Cache, T6Config, T6ForCausalLM, generation_t6
from modeling_t6.cache_t6 import CACHE_NAME

from ..versions import once_but
from .common import DEVICE, OFFLOADED_MODE, cached, quick, random_ids, random_model, tiny_config


NEW = 10


@pytest.fixture(scope="module", params=once_but({"tpa": 3, "kvonly": None}.items(), "tpa"))
def model(request):
    return random_model(tiny_config(q_rank=request.param))


@torch.no_grad()
def greedy(model, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    for _ in range(new):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def generate(model, ids: torch.Tensor | None = None, **kwargs):
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True} | kwargs
    return model.generate(ids, **kwargs)


MODES = {
    "default": {},
    "no-cache": {"use_cache": False},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
    **OFFLOADED_MODE,
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "chunked-prefill": {"prefill_chunk_size": 5},
    "chunked-prefill-static": {"prefill_chunk_size": 5, "cache_implementation": "static"},
}
if DEVICE == "cuda":  # a stream copies the layers
    MODES["offloaded-static"] = {"cache_implementation": "offloaded_static"}


@pytest.mark.parametrize("kwargs", MODES.values(), ids=MODES)
def test_greedy(model, kwargs):
    ids = random_ids(model.config, 1 if "prompt_lookup_num_tokens" in kwargs else 2, 13)
    assert torch.equal(generate(model, ids, **kwargs), greedy(model, ids))


def long_rope_model(**fields):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 12}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    return random_model(tiny_config(rope_parameters=rope, **fields))


@pytest.mark.parametrize("length", [9, 12, 13])
def test_long_rope_across_the_switch(length):
    """From the 13th token on, all tokens are rotated by other factors, those in a cache too."""
    model = long_rope_model()
    ids = random_ids(model.config, 1, length)
    expected = greedy(model, ids)
    for mode in ("default", "no-cache", "dynamic", "static", *OFFLOADED_MODE):
        assert torch.equal(generate(model, ids, **MODES[mode]), expected), mode


@pytest.mark.parametrize("padding", ["left", "between"])
@pytest.mark.parametrize("implementation", [None, "static"])
def test_long_rope_counts_tokens(padding, implementation):
    """Not padding: the tokens, from the 13th on, are what decides."""
    model = long_rope_model()
    ids = random_ids(model.config, 2, 9)
    mask = torch.ones_like(ids)
    mask[:, :4] = torch.tensor([0, 0, 0, 0] if padding == "left" else [1, 0, 0, 1])
    expected = generate(model, ids, attention_mask=mask, use_cache=False)
    assert torch.equal(generate(model, ids, attention_mask=mask, cache_implementation=implementation), expected)


@pytest.mark.parametrize("fields", [{}, {"noncontextual_b": True}], ids=["TPA", "constant B"])
@pytest.mark.parametrize("chunk", [1, 5])
def test_long_rope_of_a_prompt_in_pieces(fields, chunk):
    """The first pieces are rotated as the last one is."""
    model = long_rope_model(**fields)
    for length in (9, 12, 13, 17):
        ids = random_ids(model.config, 1, length)
        assert torch.equal(generate(model, ids, prefill_chunk_size=chunk), greedy(model, ids)), length


@pytest.mark.parametrize("cache_dtype", [None, "int4"])
def test_long_rope_and_rows_to_return_to(cache_dtype):
    """The cache that is made anew at the switch is cropped as the one before, also where a window drops rows."""
    model = long_rope_model(sliding_window=4)
    ids = random_ids(model.config, 1, 3).repeat(1, 3)
    output = generate(model, ids, prompt_lookup_num_tokens=3, cache_dtype=cache_dtype)
    if cache_dtype is None:
        assert torch.equal(output, greedy(model, ids))
    assert output.shape[1] == 9 + NEW


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 2])
def test_long_rope_of_tokens_that_are_not_given(padding, monkeypatch):
    """The first tokens are in the cache alone: they are kept, and what cannot be computed anew is said."""
    model, messages = long_rope_model(), []
    monkeypatch.setattr(generation_t6.logger, "warning_once", messages.append)
    ids = random_ids(model.config, 1, 24)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    cache = T6Cache(config=model.config)
    model(ids[:, :9], attention_mask=mask[:, :9], **{CACHE_NAME: cache})
    generate(model, ids[:, 9:], attention_mask=mask, max_new_tokens=2, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 25
    assert len(messages) == 1 and "`input_ids`" in messages[0]


@pytest.mark.parametrize("cache_implementation", [None, "static"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations(implementation, cache_implementation):
    model = random_model(tiny_config(attn_implementation=implementation))
    ids = random_ids(model.config, 2, 9)
    with quick(implementation):
        output = generate(model, ids, cache_implementation=cache_implementation)
    assert torch.equal(output, greedy(random_model(tiny_config()), ids))


def test_static_cache_with_compile():
    """
    `generate()` compiles on accelerators only, unless it is told to compile here too. A layer shows it; the variants are
    those of `test_compiled_generation`.
    """
    model = random_model(tiny_config(num_hidden_layers=1))
    ids = random_ids(model.config, 2, 9)
    compile_config = CompileConfig(backend="aot_eager", fullgraph=True, dynamic=False, mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    output = generate(model, ids, cache_implementation="static", compile_config=compile_config, disable_compile=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch.equal(output, greedy(model, ids))


def quantization_error(model, nbits: int) -> float:
    """The largest error of a logit over a quantised cache, in standard deviations of the logits."""
    ids = random_ids(model.config, 2, 20)
    cache_config = {"backend": "hqq", "nbits": nbits, "residual_length": 4}
    output = generate(
        model, ids, cache_implementation="quantized", cache_config=cache_config, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    assert type(cached(output)).__name__ == "QuantizedCache"
    with torch.no_grad():
        exact = model(output.sequences, use_cache=False).logits[:, 19:-1]
    return ((torch.stack(output.logits, dim=1) - exact).abs().max() / exact.std()).item()


@pytest.mark.parametrize("nbits", [4, 8])
def test_quantized(model, nbits):
    # An error of half a step, 1/30 of a group's range with 4 bits and 1/510 with 8, in every factor of every layer.
    assert 0 < quantization_error(model, nbits) < {4: 1.5, 8: 0.1}[nbits]


@pytest.mark.parametrize(
    "make_cache",
    [lambda config: T6Cache(config=config), lambda config: DynamicCache(config=config)],
    ids=["t6", "dynamic"],
)
def test_continues_from_a_returned_cache(model, make_cache):
    ids = random_ids(model.config, 2, 9)
    cache = make_cache(model.config)
    first = generate(model, ids, max_new_tokens=4, cache=cache, return_dict_in_generate=True)
    assert cached(first) is cache
    second = generate(model, first.sequences, max_new_tokens=NEW - 4, cache=cache)
    assert torch.equal(second, greedy(model, ids))


def test_default_cache(model):
    output = generate(model, random_ids(model.config, 1, 5), return_dict_in_generate=True)
    assert type(cached(output)) is T6Cache


def test_inputs_embeds(model):
    ids = random_ids(model.config, 2, 9)
    output = generate(model, inputs_embeds=model.get_input_embeddings()(ids).detach())
    assert torch.equal(output, greedy(model, ids)[:, 9:])


def test_assisted_decoding(model):
    assistant = random_model(tiny_config(num_hidden_layers=1, num_attention_heads=3), seed=3)
    ids = random_ids(model.config, 1, 9)
    assert torch.equal(generate(model, ids, assistant_model=assistant), greedy(model, ids))
    # A perfect assistant has all its tokens taken: more than one query a step, and crops of none.
    assert torch.equal(generate(model, ids, assistant_model=model), greedy(model, ids))


@pytest.mark.parametrize("implementation", [None, "static"])
def test_beam_search(model, implementation):
    ids = random_ids(model.config, 2, 7)
    kwargs = {"num_beams": 4, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    expected = generate(model, ids, use_cache=False, **kwargs)
    output = generate(model, ids, cache_implementation=implementation, **kwargs)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, atol=1e-5, rtol=1e-5)


def test_sampling_several_sequences(model):
    ids = random_ids(model.config, 2, 7)
    outputs = []
    for kwargs in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(5)
        outputs.append(
            generate(model, ids, do_sample=True, temperature=0.8, top_k=20, num_return_sequences=3, **kwargs)
        )
    assert outputs[0].shape[0] == 6 and len(outputs[0].unique(dim=0)) > 2
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


PADDED = {
    "default": {},
    "static": {"cache_implementation": "static"},
    "beam": {"num_beams": 3},
    "no-cache": {"use_cache": False},
    "chunked-prefill": {"prefill_chunk_size": 4},
}


# Not flex_attention on a CPU, where Transformers' own Llama gives NaN for such a batch, its rows without padding too.
@pytest.mark.parametrize("kwargs", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"] + ["flex_attention"] * (DEVICE == "cuda"))
def test_left_padded_batch_equals_its_rows(kwargs, implementation):
    model = random_model(tiny_config(attn_implementation=implementation))
    rows = [random_ids(model.config, 1, length, seed=length) for length in (3, 11, 40)]
    ids = torch.zeros(3, 40, dtype=torch.long, device=DEVICE)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -row.shape[1] :], mask[i, -row.shape[1] :] = row, 1
    batch = generate(model, ids, attention_mask=mask, **kwargs)[:, 40:]
    alone = torch.cat([generate(model, row, **kwargs)[:, row.shape[1] :] for row in rows])
    assert torch.equal(batch, alone)


def test_streaming(model):
    class Collect(BaseStreamer):
        tokens, ended = [], False

        def put(self, value):
            self.tokens = self.tokens + value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, ids = Collect(), random_ids(model.config, 1, 6)
    output = generate(model, ids, streamer=streamer)
    assert streamer.ended and streamer.tokens == output[0].tolist()


def test_stops_at_the_end_token(model):
    ids = random_ids(model.config, 1, 9)
    tokens = greedy(model, ids)[0]
    end = tokens[12].item()
    stop = tokens[9:].tolist().index(end)
    assert generate(model, ids, eos_token_id=end)[0].tolist() == tokens[: 9 + stop + 1].tolist()


def test_outputs(model):
    model.set_attn_implementation("eager")
    output = generate(
        model, random_ids(model.config, 2, 6), max_new_tokens=3, return_dict_in_generate=True, output_attentions=True,
        output_hidden_states=True, output_scores=True,
    )  # fmt: skip
    model.set_attn_implementation("sdpa")
    assert [step[0].shape for step in output.attentions] == [(2, 5, 6, 6), (2, 5, 1, 7), (2, 5, 1, 8)]
    assert all(
        torch.allclose(layer.sum(-1), torch.ones_like(layer[..., 0])) for step in output.attentions for layer in step
    )
    assert [step[-1].shape for step in output.hidden_states] == [(2, 6, 48), (2, 1, 48), (2, 1, 48)]


def test_bfloat16_and_train_mode():
    model = random_model(tiny_config(), dtype=torch.bfloat16)
    ids = random_ids(model.config, 2, 9)
    output = generate(model, ids, return_dict_in_generate=True, output_logits=True)
    assert all(logits.isfinite().all() for logits in output.logits)
    assert torch.equal(generate(model.train(), ids), output.sequences)


SLIDING = {
    "sliding": {"sliding_window": 8},
    "alternating": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "window of 1, shared B": {"sliding_window": 1, "shared_b": True, "v_rank": 2},
}
DRAFTS = {
    "another": lambda model: {"assistant_model": random_model(tiny_config(sliding_window=5), seed=3)},
    "without a window": lambda model: {"assistant_model": random_model(tiny_config(), seed=3)},
    "prompt-lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "early exit": lambda model: {"assistant_early_exit": 1},
    "itself, with a cache": lambda model: {"assistant_model": model, CACHE_NAME: T6Cache(config=model.config)},
}


@pytest.fixture(scope="module", params=SLIDING.values(), ids=SLIDING)
def sliding_model(request):
    return random_model(tiny_config(**request.param))


@pytest.mark.parametrize("length", [5, 14])  # drafts from before the window across it, and behind it
@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS)
def test_sliding_models_draft(sliding_model, draft, length):
    ids = random_ids(sliding_model.config, 1, length)
    assert torch.equal(generate(sliding_model, ids, **draft(sliding_model)), greedy(sliding_model, ids))


@torch.no_grad()
def test_rows_to_return_to(sliding_model):
    """Recorded rows come back with a crop, after one step and after several, before the window and behind it."""
    model = sliding_model
    ids = random_ids(model.config, 2, 24)
    for first, *steps in ((2, 3), (2, 4, 3), (9, 1, 6), (14, 5, 1, 3)):
        cache = T6Cache(config=model.config)
        model(ids[:, :first], cache=cache)
        cache.activate_past_recording()
        end = first
        for new in steps:
            model(random_ids(model.config, 2, new, seed=new), cache=cache)
        cache.crop(-sum(steps))
        assert cache.get_seq_length() == end
        logits = model(ids[:, end:], cache=cache).logits
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, end:], atol=1e-5, rtol=1e-5)


ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FULL = {"layer_types": ["full_attention"] * 2}
WINDOWS = {  # of a saved model, what is set, and what the result is to be like
    "none before": ({}, {"sliding_window": 5}, {"sliding_window": 5}),
    "shorter": ({"sliding_window": 8}, {"sliding_window": 5}, {"sliding_window": 5}),
    "longer": ({"sliding_window": 5}, {"sliding_window": 8}, {"sliding_window": 8}),
    "taken away": ({"sliding_window": 5}, {"sliding_window": None}, {}),
    "of some layers": (ALTERNATING, {"sliding_window": 5}, ALTERNATING | {"sliding_window": 5}),
    "of no layer": (FULL, {"sliding_window": 5}, {}),
    "types of no layer": (ALTERNATING, {"layer_types": None}, {"sliding_window": 8}),
    "other layers": ({"sliding_window": 5}, {"layer_types": ALTERNATING["layer_types"]}, ALTERNATING | {"sliding_window": 5}),
}  # fmt: skip


@pytest.mark.parametrize("saved,change,like", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("how", ["at load", "set"])
def test_window_that_is_given_later(saved, change, like, how, tmp_path):
    """Layers, masks and every cache agree on it, as if the model had been made so."""
    model = random_model(tiny_config(**saved))
    if how == "set":
        for name, value in change.items():
            setattr(model.config, name, value)
    else:
        model.save_pretrained(tmp_path)
        model = T6ForCausalLM.from_pretrained(tmp_path, **change)
        assert T6Config.from_pretrained(tmp_path, **change).layer_types == model.config.layer_types
    expected = random_model(tiny_config(**like))
    ids = random_ids(model.config, 2, 13)
    continued = greedy(expected, ids)
    assert torch.equal(model(ids, use_cache=False).logits, expected(ids, use_cache=False).logits)
    for implementation in (None, "dynamic", "static"):
        assert torch.equal(generate(model, ids, cache_implementation=implementation), continued)
    windows = {getattr(layer, "sliding_window", None) for layer in T6Cache(config=model.config).layers}
    assert windows == {getattr(layer, "sliding_window", None) for layer in T6Cache(config=expected.config).layers}
    T6Config.from_dict(model.config.to_dict())  # still one that can be saved


LAYERS = {
    "fewer": ({"sliding_window": 5}, 1, {"sliding_window": 5}),
    "more": ({"sliding_window": 5, "k_rank": [2, 2]}, 3, {"sliding_window": 5, "k_rank": [2, 2, 2]}),
    "the first": (
        ALTERNATING | {"k_rank": [1, 2], "v_rank": [2, 1]},
        1,
        {"sliding_window": 8, "layer_types": ALTERNATING["layer_types"][:1], "k_rank": [1], "v_rank": [2]},
    ),
}


@pytest.mark.parametrize("saved,count,like", LAYERS.values(), ids=LAYERS)
def test_number_of_layers_that_is_given_later(saved, count, like, tmp_path):
    """What is said for each layer follows: the model generates, and is saved, as if it had been made so."""
    random_model(tiny_config(**saved)).save_pretrained(tmp_path)
    model = random_model(T6Config.from_pretrained(tmp_path, num_hidden_layers=count))
    expected = random_model(tiny_config(num_hidden_layers=count, **like))
    ids = random_ids(model.config, 1, 13)
    assert torch.equal(generate(model, ids), greedy(expected, ids))
    model.save_pretrained(tmp_path / "saved")
    assert T6ForCausalLM.from_pretrained(tmp_path / "saved").config.layer_types == expected.config.layer_types


@pytest.mark.parametrize("field,value", [("k_rank", [1, 2]), ("layer_types", ALTERNATING["layer_types"])])
def test_more_layers_of_several_kinds(field, value):
    """Nothing says of which kind the others are."""
    config = tiny_config(sliding_window=8, **{field: value})
    config.num_hidden_layers = 4
    with pytest.raises(ValueError, match=rf"`{field}`"):
        T6ForCausalLM(config)


def test_windows_that_cannot_be():
    config = tiny_config(**ALTERNATING)
    for window in (None, 0, -1):
        with pytest.raises(ValueError, match="sliding_window.* must be a positive integer"):
            config.sliding_window = window
        assert config.sliding_window == ALTERNATING["sliding_window"]
    config = tiny_config()
    with pytest.raises(Exception, match="sliding_window"):
        config.sliding_window = "8"
    config.layer_types = ["sliding_attention"] * 2  # to which a window may be given next
    with pytest.raises(ValueError, match="needs a `sliding_window`"):
        T6Cache(config=config)


@torch.no_grad()
def test_cache_made_for_another_window():
    """Rows that left a smaller window are gone: refused. A larger one holds all that are seen."""
    ids = random_ids(tiny_config(), 2, 13)
    for make_cache in (lambda config: T6Cache(config=config), lambda config: StaticCache(config, 16)):
        model = random_model(tiny_config(sliding_window=5))
        small, large = (make_cache(tiny_config(sliding_window=window)) for window in (5, 8))
        for cache in (small, large):
            model(ids[:, :12], cache=cache)
        expected = model(ids, use_cache=False).logits[:, 12:]
        torch.testing.assert_close(model(ids[:, 12:], cache=large).logits, expected, atol=1e-5, rtol=1e-5)
        for window in (8, None):
            model.config.sliding_window = window
            with pytest.raises(ValueError, match="holds the last 5 tokens alone"):
                model(ids[:, 12:], cache=small)


@torch.no_grad()
def test_compiled_steps_over_a_growing_cache():
    """As many graphs as Llama makes over a `DynamicCache`: a prompt, the first token, and all the others."""
    graphs = {}
    sizes = {"hidden_size": 48, "intermediate_size": 60, "vocab_size": 97, "num_attention_heads": 4}
    for name, model in {
        "llama": LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).to(DEVICE).eval(),
        "TPA": random_model(tiny_config(num_hidden_layers=1)),
    }.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        step = torch.compile(model, backend="eager", fullgraph=True)
        cache = (DynamicCache if name == "llama" else T6Cache)(config=model.config)
        ids = random_ids(model.config, 1, 3)
        tokens = [ids]
        for _ in range(18):  # past the lengths at which storage would grow
            logits = step(tokens[-1], use_cache=True, **{CACHE_NAME: cache}).logits
            tokens.append(logits[:, -1:].argmax(-1))
        graphs[name] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch.equal(torch.cat(tokens, dim=1), greedy(model, ids, new=18))
    assert graphs["TPA"] <= graphs["llama"]
