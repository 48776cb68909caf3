"""The model card: its metadata by huggingface_hub's own classes, its numbers by other ways."""

import json
import math
import random

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from transformers import DynamicCache, LlamaConfig

import hub_upload
from hub.card import cache_bytes
from hub.code import code_commit, code_digest, code_files
from modeling_t6 import T6Cache, T6Config, T6ForCausalLM
from modeling_t6.cache_t6 import CACHE_NAME, cache_nbytes

from .common import SHIPPED, make_model
from .hub_server import card_errors


pytestmark = pytest.mark.usefixtures("nothing_is_loaded")


@pytest.fixture
def make_card(capsys):
    def make(folder, *options) -> ModelCard:
        assert hub_upload.main([str(folder), "someone/t6", "--dry-run", *map(str, options)]) == 0
        text = capsys.readouterr().out
        text = text[text.index("\n---\n") + 1 :]
        assert card_errors(text) == []
        return ModelCard(text)

    return make


def test_new_card(folder, make_card, tmp_path):
    card = make_card(folder)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["t6", "tensor-product-attention"],
    }
    text = card.text
    assert text.strip().startswith("# t6\n")
    # Loading at a commit comes first, and each call that loads is pinned.
    assert text.index("revision = ") < text.index("from_pretrained(") < text.index("## Architecture")
    calls = [line for line in text.splitlines() if "from_pretrained(" in line]
    assert len(calls) == 2 and all("revision=revision" in line and "trust_remote_code=True" in line for line in calls)
    assert code_digest(code_files()) in text
    parameters = sum(parameter.numel() for parameter in T6ForCausalLM.from_pretrained(folder).parameters())
    for row in (
        f"parameters | {parameters:,}",
        "heads, head size | 3, 8",
        "ranks of Q, K, V | 2, 1, 2",
        "weights | float32",
    ):
        assert f"| {row} |" in text
    assert code_commit() is None or code_commit() in text
    (tmp_path / "card.md").write_text(str(card))
    assert metadata_load(tmp_path / "card.md")["library_name"] == "transformers"


@pytest.mark.once
def test_text_of_the_author_stays(make_card, tmp_path):
    card = make_card(SHIPPED)
    old = (SHIPPED / "README.md").read_text().split("---\n", 2)[2]
    for paragraph in old.split("\n\n"):
        assert paragraph.strip() in card.text
    assert card.text.index("# t6-tiny-shakespeare") < card.text.index("## Load it") < card.text.index("## Use")


@pytest.mark.once
def test_a_card_of_ours_is_renewed_not_repeated(folder, make_card):
    first = make_card(folder)
    text = str(first).replace("# t6\n", "# My model\n\nIt is mine.\n") + "\n## More\n\nSaid.\n"
    (folder / "README.md").write_text(text.replace("float32", "float99"))
    second = make_card(folder)
    assert second.text.count("## Load it") == 1 and "float99" not in second.text
    assert "# My model\n\nIt is mine." in second.text and second.text.strip().endswith("## More\n\nSaid.")
    (folder / "README.md").write_text(str(second))
    assert str(make_card(folder)) == str(second)


@pytest.mark.once
def test_metadata_of_the_author_stays(folder, make_card):
    (folder / "README.md").write_text(
        "---\nlicense: mit\nlanguage: [en]\ntags: [mine, t6]\ndatasets: [a/b]\nthumbnail: x.png\nbase_model: m/n\n---\ntext\n"
    )
    data = make_card(folder).data.to_dict()
    assert data == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "license": "mit", "language": ["en"],
        "tags": ["mine", "t6", "tensor-product-attention"], "datasets": ["a/b"], "thumbnail": "x.png", "base_model": "m/n",
    }  # fmt: skip
    data = make_card(folder, "--datasets", "c/d", "e/f", "--license", "gemma", "--base-model", "o/p").data.to_dict()
    assert (data["datasets"], data["license"], data["base_model"]) == (["c/d", "e/f"], "gemma", "o/p")


def write_report(folder, base_model, **more) -> None:
    report = {
        "command": "python -m conversion hf llama t6", "source": base_model or "llama", "source_model_type": "llama",
        "base_model": base_model, "versions": {"torch": "1.2.3", "transformers": "4.5.6"},
    }  # fmt: skip
    (folder / "conversion.json").write_text(json.dumps(report | more))


@pytest.mark.once
def test_card_of_a_converted_model(folder, make_card):
    rows = [
        {"model": "source", "cache_bytes_per_token": 4096.0, "perplexity": 12.34567},
        {"model": "T6", "cache_bytes_per_token": 512.0, "perplexity": 13.5},
    ]
    found = [
        {"model": "source", "found": 0.75, "log_probability": -0.25},
        {"model": "result", "found": 0.5, "log_probability": -1.0},
    ]
    for row, losses in zip(found, ((3.0, 2.125), (3.5, 2.25))):
        row["loss_by_position"] = [{"first": 1, "loss": losses[0]}, {"first": 2048, "loss": losses[1]}]
    warning = {"retrieval_warning": "this model finds less"}
    write_report(folder, "meta-llama/Llama-3.2-1B", perplexity=rows, retrieval=found, **warning)
    card = make_card(folder)
    data = card.data.to_dict()
    assert data["base_model"] == "meta-llama/Llama-3.2-1B"
    # Whose license this is, is known; which it is, is not.
    assert (data["license"], data["license_name"]) == ("other", "that-of-the-base-model")
    assert data["license_link"].endswith("/meta-llama/Llama-3.2-1B")
    for text in ("| made from | meta-llama/Llama-3.2-1B |", "`python -m conversion hf llama t6`", "torch 1.2.3, transformers 4.5.6",
                 "| source | 4,096 | 12.3457 |", "| T6 | 512 | 13.5000 |", "| result | 50.0% | -1.000 |",
                 "at least | 1 | 2,048 |", "| result | 3.500 | 2.250 |",
                 "**Warning:** this model finds less."):  # fmt: skip
        assert text in card.text


@pytest.mark.once
def test_license_of_a_converted_model_must_be_known(folder, make_card, capsys):
    write_report(folder, None)
    assert hub_upload.main([str(folder), "someone/t6", "--dry-run"]) == 1
    assert "the license of converted weights is that of their source: pass --license" in capsys.readouterr().err
    assert make_card(folder, "--license", "llama3").data.license == "llama3"
    (folder / "LICENSE").write_text("as the source has it")
    data = make_card(folder).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "see-license-file", "LICENSE")


@pytest.mark.once
def test_results_of_lm_eval(folder, make_card, tmp_path, capsys):
    results = {
        "results": {
            "arc_easy": {"alias": " - arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 0.25},
            "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.125, "exact_match_stderr,strict-match": "N/A"},
        },
        "n-shot": {"arc_easy": 0, "gsm8k": 5},
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    card = make_card(folder, "--eval-results", path)
    found = {
        (r.dataset_type, r.metric_name): (r.metric_value, r.dataset_args, r.task_type) for r in card.data.eval_results
    }
    assert found == {
        ("arc_easy", "acc"): (0.5, {"num_few_shot": 0}, "text-generation"),
        ("arc_easy", "acc_norm"): (0.25, {"num_few_shot": 0}, "text-generation"),
        ("gsm8k", "exact_match (strict-match)"): (0.125, {"num_few_shot": 5}, "text-generation"),
    }
    assert card.data.model_name == "t6" and "| gsm8k 5-shot | exact_match (strict-match) | 0.1250 |" in card.text
    # Scores given again replace the old ones, others stay.
    (folder / "README.md").write_text(str(card))
    paths = [path, tmp_path / "2-shot.json"]
    for shots, value, name in zip((0, 2), (0.75, 0.875), paths):
        name.write_text(json.dumps({"results": {"arc_easy": {"acc,none": value}}, "n-shot": {"arc_easy": shots}}))
    found = {
        (r.dataset_type, r.dataset_args["num_few_shot"], r.metric_name): r.metric_value
        for r in make_card(folder, "--eval-results", *paths).data.eval_results
    }
    assert found["arc_easy", 0, "acc"] == 0.75 and found["arc_easy", 2, "acc"] == 0.875 and len(found) == 4
    for content in (
        "{}",
        '{"results": {"a": {"alias": "a"}}}',
        "[",
        '{"results": {"a": [1]}}',
        '{"results": {"a": {"b,c": NaN}}}',
    ):
        path.write_text(content)
        assert hub_upload.main([str(folder), "someone/t6", "--dry-run", "--eval-results", str(path)]) == 1
        assert str(path) in capsys.readouterr().err.splitlines()[-1]


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_cache_bytes_are_those_of_caches(seed):
    """Of caches that hold tokens: this model's, and Transformers' for ordinary attention of the same shape."""
    draw = random.Random(seed)
    layers, heads, head_dim = draw.randint(1, 3), draw.randint(3, 20), 2 * draw.randint(2, 12)
    config = T6Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=layers, num_attention_heads=heads, head_dim=head_dim,
        q_rank=draw.choice([None, 2]), k_rank=[draw.randint(1, 3) for _ in range(layers)], v_rank=draw.randint(1, 3),
        noncontextual_a=draw.random() < 0.3,
        num_key_value_heads=draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        cache_dtype=[None, "float8_e4m3fn", "int4", None][seed],
    )  # fmt: skip
    dtype, tokens = draw.choice([torch.float32, torch.bfloat16]), 5
    sizes = cache_bytes(config, dtype)
    cache = T6Cache(config=config)
    T6ForCausalLM(config).to(dtype)(torch.randint(20, (1, tokens)), **{CACHE_NAME: cache})
    assert sizes.pop("T6, this model") * tokens == cache_nbytes(cache)
    assert f"MHA, {heads} heads" in sizes
    assert all(heads % int(name.split(", ")[1].split()[0]) == 0 for name in sizes)  # else there is no such model
    for name, size in sizes.items():
        kv_heads = int(name.split(", ")[1].split()[0])
        cache = DynamicCache(config=LlamaConfig(num_hidden_layers=layers))
        for layer in range(layers):
            cache.update(*(torch.zeros(1, kv_heads, tokens, head_dim, dtype=dtype) for _ in "kv"), layer)
        assert size * tokens == cache_nbytes(cache)
    assert math.isclose(size, 2 * layers * kv_heads * head_dim * dtype.itemsize)


@pytest.mark.parametrize(
    "heads, kv_heads", [(32, [32, 8, 2, 1]), (9, [9, 3, 1]), (34, [34, 2, 1]), (47, [47, 1]), (1, [1])]
)
def test_cache_is_compared_with_possible_shapes(heads, kv_heads):
    sizes = cache_bytes(T6Config(num_attention_heads=heads, num_hidden_layers=3), torch.bfloat16)
    assert list(sizes.values())[1:] == [2 * 3 * 64 * 2 * count for count in kv_heads]


def test_card_of_an_exact_conversion(tmp_path, make_card, monkeypatch):
    """Of 9 heads in 3 groups, which saves nothing; the queries are no products."""
    make_model(tmp_path, num_attention_heads=9, q_rank=None, k_rank=3, v_rank=3, noncontextual_a=True)
    write_report(tmp_path, "someone/llama")
    monkeypatch.setattr("hub.card.project_url", lambda: "https://example.com/t6")
    text = make_card(tmp_path).text
    assert "The cache is no smaller than that of the source, someone/llama." in text
    size = DynamicCache(config=LlamaConfig(num_hidden_layers=2))
    for layer in range(2):
        size.update(*(torch.zeros(1, 3, 1, 8) for _ in "kv"), layer)
    for row in ("T6, this model", "the source, someone/llama", "GQA, 3 KV heads"):
        assert f"| {row} | {cache_nbytes(size):,} | 1.00x |" in text
    assert "GQA, 8" not in text and "GQA, 2" not in text
    assert (
        "Its keys and values are products of learned constants over the heads (A) and factors of each token (B)"
        in text
    )
    assert "Its queries come from one ordinary projection." in text and "queries, keys and values" not in text
    assert "[T6 for Transformers](https://example.com/t6)" in text


def test_card_of_grouped_heads(tmp_path, make_card):
    make_model(tmp_path, num_attention_heads=6, num_key_value_heads=2, qk_norm="heads")
    text = make_card(tmp_path).text
    assert "| heads, head size | 6 (2 of keys and values), 8 |" in text and "| QK norm | of heads |" in text


def test_card_of_rows_in_4_bits(tmp_path, make_card):
    make_model(tmp_path, cache_dtype="int4")
    assert "| bytes per token, float32, this model's rows in int4 |" in make_card(tmp_path).text


def test_card_beside_a_measured_source(folder, make_card):
    own = cache_bytes(T6Config.from_pretrained(folder), torch.float32)["T6, this model"]
    write_report(folder, "m/n", perplexity=[{"model": "source", "cache_bytes_per_token": 4 * own, "perplexity": 9.0}])
    text = make_card(folder).text
    assert "The cache is 4.00 times smaller than that of the source, m/n." in text
    assert f"| the source, m/n | {4 * own:,} | 4.00x |" in text
    assert "Its queries, keys and values are products of small factors" in text
