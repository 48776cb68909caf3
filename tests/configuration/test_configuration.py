"""The published architectures: files, sizes, parameter counts, and a forward pass of a shortened copy of each."""

import functools
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from configuration import make_configs
from modeling_t6 import T6Config
from modeling_t6.cache_t6 import CACHE_NAME
from tests.versions import once_but


DIRECTORY = Path(make_configs.__file__).parent

# The paper's tables, written out a second time: layers, hidden size, SwiGLU size floor(8/3 hidden).
SIZES = {
    "small": (12, 768, 2048),
    "medium": (24, 1024, 2730),
    "large": (36, 1280, 3413),
    "xl": (48, 1600, 4266),
}
# Per kind of attention: model type, heads at each size, and the fields that do not depend on the size.
ARCHITECTURES = {
    "t6-{}": ("t6", (34, 47, 61, 78), {"head_dim": 64, "q_rank": 6, "k_rank": 2, "v_rank": 2}),
    "t6-{}-kvonly": ("t6", (22, 29, 37, 47), {"head_dim": 64, "q_rank": None, "k_rank": 2, "v_rank": 2}),
    "llama-mha-{}": ("llama", (12, 16, 20, 25), {"head_dim": 64}),
    "llama-mqa-{}": ("mistral", (23, 31, 39, 49), {"head_dim": 64, "num_key_value_heads": 1, "sliding_window": None}),
    "llama-gqa-{}": ("mistral", (22, 30, 38, 48), {"head_dim": 64, "num_key_value_heads": 2, "sliding_window": None}),
    "deepseek-mla-{}": (
        "deepseek_v3",
        (12, 23, 34, 49),
        {"qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64},
    ),
}
MLA_RANKS = {"small": (256, 512), "medium": (512, 1024), "large": (512, 1024), "xl": (512, 1024)}

# The paper's totals. Its "1.5B" is GPT-2 XL's name cut short, not rounded: with ordinary attention (MHA) that size has
# 1.555e9 parameters, and the other kinds of attention have as many.
PAPER_TOTALS = {"small": 124e6, "medium": 353e6, "large": 773e6, "xl": 1.555e9}
# The paper's heads and ranks of MLA do not give its totals: see `test_mla_parameters`.
UNMATCHED = {"deepseek-mla-medium", "deepseek-mla-large", "deepseek-mla-xl"}

# The variants of the small TPA model: heads, fields, and the numbers that one of h heads caches per token and layer.
VARIANTS = {
    "t6-{}-noncontextual-a": (38, {"noncontextual_a": True}, lambda h: 4 * 64),
    "t6-{}-noncontextual-b": (42, {"noncontextual_b": True}, lambda h: 4 * h),
    "t6-{}-shared-b": (35, {"shared_b": True}, lambda h: 4 * h + 2 * 64),
    "t6-{}-sigmoid": (34, {"head_factor_act": "sigmoid"}, lambda h: 4 * (h + 64)),
    "t6-{}-softmax": (34, {"head_factor_act": "softmax"}, lambda h: 4 * (h + 64)),
    "t6-{}-third-order": (39, {"c_factor_dim": 4}, lambda h: 4 * (h + 16 + 4)),
    "t6-{}-head-norm": (34, {"head_norm": True}, lambda h: 4 * (h + 64)),
    "t6-{}-output-gate": (18, {"output_gate": True}, lambda h: 4 * (h + 64)),
    "t6-{}-partial-rope": (34, {"rotary_dim": 20}, lambda h: 4 * (h + 64)),
}
for pattern, (heads, fields, _) in VARIANTS.items():
    ARCHITECTURES[pattern] = ("t6", (heads,), ARCHITECTURES["t6-{}"][2] | fields)

FOLDERS = {
    pattern.format(size): (pattern, size)
    for size in SIZES
    for pattern in ARCHITECTURES
    if size == "small" or pattern not in VARIANTS
}
every_folder = pytest.mark.parametrize(
    "folder", once_but(FOLDERS, *(folder for folder, (_, size) in FOLDERS.items() if size == "small"))
)


def load(folder: str, **overrides):
    return AutoConfig.from_pretrained(DIRECTORY / folder, **overrides)


@functools.cache
def meta_model(folder: str, **overrides):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load(folder, **overrides))


def test_files_are_what_the_script_writes(tmp_path):
    make_configs.write_configs(tmp_path)
    written = {path.parent.name: path.read_text() for path in tmp_path.glob("*/*")}
    on_disk = {path.parent.name: path.read_text() for path in DIRECTORY.glob("*/config.json")}
    assert set(on_disk) == set(FOLDERS)
    assert on_disk == written


@pytest.mark.parametrize("argument", [None, "--help"], ids=["no argument", "help"])
def test_command_line(argument, monkeypatch, capsys):
    written = []
    monkeypatch.setattr("sys.argv", ["make_configs", *filter(None, [argument])])
    monkeypatch.setattr(make_configs, "write_configs", lambda: written.append(True))
    monkeypatch.setattr(make_configs, "make_table", lambda: "the table")
    if argument is None:
        make_configs.main()
        assert written and capsys.readouterr().out == "the table\n"
    else:
        with pytest.raises(SystemExit) as exit_info:
            make_configs.main()
        assert exit_info.value.code == 0 and not written


def test_readme_holds_the_printed_table():
    assert make_configs.make_table() in (DIRECTORY / "README.md").read_text()


@every_folder
def test_config_is_the_papers(folder):
    pattern, size = FOLDERS[folder]
    model_type, heads, fields = ARCHITECTURES[pattern]
    layers, hidden_size, intermediate_size = SIZES[size]
    expected = {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": heads[list(SIZES).index(size)],
        "vocab_size": 50304,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        **fields,
    }
    expected.setdefault("num_key_value_heads", expected["num_attention_heads"])
    if model_type == "deepseek_v3":
        expected["kv_lora_rank"], expected["q_lora_rank"] = MLA_RANKS[size]
        expected["first_k_dense_replace"] = layers
    config = load(folder)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.rope_parameters["rope_type"] == "default" and config.rope_parameters["rope_theta"] == 10000


@every_folder
def test_config_survives_saving(folder, tmp_path):
    config = load(folder)
    config.save_pretrained(tmp_path)
    saved, original = AutoConfig.from_pretrained(tmp_path).to_dict(), config.to_dict()
    assert saved | {"_name_or_path": None} == original | {"_name_or_path": None}


@every_folder
def test_model_has_tied_embeddings_and_no_biases(folder):
    model = meta_model(folder)
    assert [type(model).__name__] == load(folder).architectures
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder not in UNMATCHED])
def test_parameters_match_the_papers_total(folder):
    size = FOLDERS[folder][1]
    count = meta_model(folder).num_parameters()
    assert count == pytest.approx(PAPER_TOTALS[size], rel=0.02)
    if size == "xl":
        assert int(count / 1e8) == 15, "1.5B, cut short"


@pytest.mark.parametrize("size", SIZES)
def test_mla_parameters(size):
    """
    The paper's heads give its totals with ranks of 256 and 512, which it states for the small model only. With the
    512 and 1024 that it states for the others, they have 16 to 19% more parameters.
    """
    layers, hidden_size, intermediate_size = SIZES[size]
    folder = f"deepseek-mla-{size}"

    def count(kv_rank, q_rank):
        heads, nope, rope, value = load(folder).num_attention_heads, 64, 32, 64
        queries = hidden_size * q_rank + q_rank + q_rank * heads * (nope + rope)
        keys_values = hidden_size * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + value)
        output = heads * value * hidden_size
        block = queries + keys_values + output + 3 * hidden_size * intermediate_size + 2 * hidden_size
        return layers * block + hidden_size + 50304 * hidden_size

    assert meta_model(folder).num_parameters() == count(*MLA_RANKS[size])
    assert meta_model(folder, kv_lora_rank=256, q_lora_rank=512).num_parameters() == count(256, 512)
    assert count(256, 512) == pytest.approx(PAPER_TOTALS[size], rel=0.02)
    if folder in UNMATCHED:
        assert 1.16 < count(*MLA_RANKS[size]) / PAPER_TOTALS[size] < 1.19


@every_folder
def test_forward_pass_and_cache_of_one_layer(folder):
    config = load(folder, num_hidden_layers=1, vocab_size=64, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # T6 starts its output projections at zero, which would leave nothing to test
            torch.nn.init.normal_(parameter, std=0.02)

    input_ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        outputs = model(input_ids, use_cache=True)
    assert outputs.logits.shape == (2, 6, 64)
    assert outputs.logits.isfinite().all()
    assert outputs.logits.std() > 0

    layer = getattr(outputs, CACHE_NAME).layers[0]
    needed, stored = make_configs.cache_numbers(config)
    assert (layer.keys.numel() + layer.values.numel()) / input_ids.numel() == stored
    if config.model_type == "t6":
        numbers = VARIANTS[FOLDERS[folder][0]][2] if FOLDERS[folder][0] in VARIANTS else lambda h: (2 + 2) * (h + 64)
        assert needed == numbers(config.num_attention_heads)
        assert 0 <= stored - needed <= (2 + 2) * 7  # each row of an A factor is padded by 7 numbers at most
    else:
        assert needed == stored


def test_cache_of_ranks_by_layer():
    config = T6Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, k_rank=[2, 1], v_rank=[1, 3],
        initializer_range=0.1,
    )  # fmt: skip
    layers = getattr(AutoModelForCausalLM.from_config(config)(torch.ones(1, 5, dtype=torch.long)), CACHE_NAME).layers
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in layers) / 5
    assert make_configs.cache_numbers(config) == ((2 + 1 + 1 + 3) * (4 + 8), stored)


def test_mistral_without_its_window_is_llama():
    """The MQA and GQA baselines are Llama models in all but name."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 170,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
    }
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    mistral = MistralForCausalLM(MistralConfig(**sizes, sliding_window=None)).eval()
    mistral.load_state_dict(llama.state_dict())
    input_ids = torch.randint(64, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(mistral(input_ids).logits, llama(input_ids).logits)
