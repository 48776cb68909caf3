"""
Weights that accelerate keeps in CPU memory or on the disk: `device_map="auto"` where they do not fit, and maps by layer.

With a GPU, layers are on it too. The computing device is then the GPU, else the CPU.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ..versions import once_but
from .common import OFFLOADED_MODE, cached, projected_one_by_one, random_ids, random_model, tiny_config
from .test_generation import generate, greedy


HAS_GPU = torch.cuda.is_available()
COMPUTES_ON = "cuda:0" if HAS_GPU else "cpu"
LAYERS, NEW = 4, 6
CONFIGS = {
    "TPA": {},
    "untied": {"tie_word_embeddings": False},
    "non-contextual A": {"noncontextual_a": True},
    "shared B, sliding": {"shared_b": True, "v_rank": 2, "sliding_window": 5},
}


def layer_bytes(model) -> int:
    return sum(parameter.nbytes for parameter in model.model.layers[0].parameters())


def too_small(model) -> dict:
    """Memory for the embedding and some layers: the rest goes to the disk. accelerate keeps room for one layer free."""
    embedding = model.model.embed_tokens.weight.nbytes
    if HAS_GPU:
        return {0: embedding + 5 * layer_bytes(model) // 2, "cpu": 3 * layer_bytes(model) // 2}
    return {"cpu": embedding + 3 * layer_bytes(model)}


def by_layer(_model) -> dict:
    places = [0, "cpu", "disk", 0] if HAS_GPU else ["cpu", "disk", "cpu", "disk"]
    others = dict.fromkeys(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], 0 if HAS_GPU else "cpu"
    )
    return others | {f"model.layers.{i}": place for i, place in enumerate(places)}


MAPS = {
    "auto": lambda model: {"device_map": "auto", "max_memory": too_small(model)},
    "by layer": lambda model: {"device_map": by_layer(model)},
    "all on disk": lambda model: {"device_map": {"": "disk"}},
}


@pytest.fixture(scope="module", params=once_but(CONFIGS.items(), "TPA", "shared B, sliding"))
def saved(request, tmp_path_factory):
    """A folder, the model that is in it, and its tokens."""
    folder = tmp_path_factory.mktemp("saved")
    model = random_model(tiny_config(num_hidden_layers=LAYERS, **request.param))
    model.save_pretrained(folder)
    model = model.to(COMPUTES_ON).eval()
    ids = random_ids(model.config, 2, 11).to(COMPUTES_ON)
    with torch.no_grad():
        return folder, model, ids, model(ids, use_cache=False).logits, greedy(model, ids, new=NEW)


@pytest.mark.parametrize("make_map", MAPS.values(), ids=MAPS)
def test_offloaded_weights(saved, make_map, tmp_path):
    folder, plain, ids, logits, tokens = saved
    model = AutoModelForCausalLM.from_pretrained(folder, offload_folder=tmp_path, **make_map(plain)).eval()
    places = {str(place) for place in model.hf_device_map.values()}
    assert "disk" in places
    if make_map is not MAPS["all on disk"]:
        assert places == ({"0", "cpu", "disk"} if HAS_GPU else {"cpu", "disk"})
    # No key names a part of a layer: its residual connections stay on one device.
    assert all(key.count(".") <= 2 for key in model.hf_device_map)
    if model.config.tie_word_embeddings and "" not in model.hf_device_map:
        assert model.hf_device_map["lm_head"] == model.hf_device_map["model.embed_tokens"]
        assert model.lm_head.weight is model.model.embed_tokens.weight
    on_meta = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    assert any(".layers." in name for name in on_meta)

    with torch.no_grad():
        # Offloaded projections are computed one by one: sums in another order, of numbers of order 1 and 7 digits.
        offloaded = model(ids, use_cache=False).logits.to(COMPUTES_ON)
        torch.testing.assert_close(offloaded, logits, atol=2e-5, rtol=1e-5)
        with projected_one_by_one():  # the same weights, operations and device: the same bits
            offloaded, logits = (x(ids, use_cache=False).logits.to(COMPUTES_ON) for x in (model, plain))
        assert torch.equal(offloaded, logits)
    output = generate(model, ids, max_new_tokens=NEW, return_dict_in_generate=True)
    assert torch.equal(output.sequences.to(COMPUTES_ON), tokens)
    assert type(cached(output)).__name__ == "T6Cache"
    for kwargs in (
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 4},
        *OFFLOADED_MODE.values(),
    ):
        assert torch.equal(generate(model, ids, max_new_tokens=NEW, **kwargs).to(COMPUTES_ON), tokens), kwargs
    beams = {"num_beams": 3, "max_new_tokens": 3}
    assert torch.equal(generate(model, ids, **beams).to(COMPUTES_ON), generate(plain, ids, **beams))
