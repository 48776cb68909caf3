"""The model card: the author's text and metadata, completed by what is known of the model."""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants

from modeling_t6 import T6Config
from modeling_t6.cache_t6 import factor_layouts

from .check import CheckedFolder
from .code import code_commit, project_url
from .folder import UploadError
from .shared import one_line, read_json


PAPER = "https://arxiv.org/abs/2501.06425"
# The part of the card that is written here; what stands around it is the author's, and stays.
BEGIN, END = "<!-- T6: written by hub_upload.py; text outside these marks is kept -->", "<!-- /T6 -->"
PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
TEMPLATE = Path(__file__).with_name("card.md")
LOAD_TOKENIZER = "\ntokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)"
EXAMPLE = """
inputs = tokenizer("The first thing to know is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))"""
EXAMPLE_CHAT = """

messages = [{"role": "user", "content": "What is worth knowing?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs.to(model.device), max_new_tokens=50)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
EXAMPLE_OF_OTHERS = """
outputs = model(**tokenizer("A text.", return_tensors="pt").to(model.device))"""


def cache_bytes(config: T6Config, dtype: torch.dtype) -> dict[str, int]:
    """
    Bytes of cache per token: of the factors, and of K and V with the same heads in the ways in which they can be shared
    out: all, in groups (of the numbers that divide theirs, the largest up to 8 and the smallest), and one for all.
    """
    layers = range(config.num_hidden_layers)
    layouts = [layout for layer in layers for layout in factor_layouts(config, layer)]
    if config.cache_dtype == "int4":
        rows = {"T6, this model": sum(layout.quantized.width for layout in layouts)}
    else:
        itemsize = dtype.itemsize if config.cache_dtype is None else 1
        rows = {"T6, this model": sum(layout.width for layout in layouts) * itemsize}
    heads = config.num_attention_heads
    groups = [count for count in range(2, min(8, heads - 1) + 1) if heads % count == 0]
    counts = {f"MHA, {heads} heads": heads}
    counts |= {f"GQA, {count} KV heads": count for count in sorted({*groups[:1], *groups[-1:]}, reverse=True)}
    counts |= {"MQA, 1 KV head": 1} if heads > 1 else {}
    return rows | {name: 2 * len(layers) * count * config.head_dim * dtype.itemsize for name, count in counts.items()}


def source_cache_bytes(config: T6Config, dtype: torch.dtype, conversion: dict) -> tuple[str, float] | None:
    """What the model that this one was made from caches per token, as far as it is known, with what it is called."""
    name = f"the source, {conversion.get('source')}"
    for row in conversion.get("perplexity") or []:
        if row["model"] == "source":
            return name, row["cache_bytes_per_token"]
    if not config.noncontextual_a or conversion.get("source_model_type") in (None, "t6"):
        return None
    # Of an exact conversion, each row of B is a key or value head of the source.
    heads = sum(sum(config.ranks(layer)) for layer in range(config.num_hidden_layers))
    return name, heads * config.head_dim * dtype.itemsize


def attention_of(config: T6Config) -> str:
    """In a sentence or two, what is a product of what, and what of it is cached."""
    whose = "keys and values" if config.q_rank is None else "queries, keys and values"
    factors, cached = "small factors", "only the factors of keys and values are cached"
    if config.noncontextual_a:
        factors = "learned constants over the heads (A) and factors of each token (B)"
        cached = "of the keys and values only the B factors are cached"
    elif config.noncontextual_b:
        factors = "factors of each token over the heads (A) and learned constants (B)"
        cached = "of the keys and values only the A factors are cached"
    text = f"Its {whose} are products of {factors}, and {cached}."
    return text + (" Its queries come from one ordinary projection." if config.q_rank is None else "")


def read_results(paths: list[Path], task_type: str) -> list[EvalResult]:
    """The scores in the JSON files that lm-eval writes with `--output_path`."""
    results = []
    for path in paths:
        content = read_json(path)
        tasks, shots = content.get("results"), content.get("n-shot", {})
        if not (
            isinstance(tasks, dict) and tasks and all(isinstance(part, dict) for part in (shots, *tasks.values()))
        ):
            raise UploadError(f"{path} has no `results`: expected a file that lm-eval wrote")
        for task, scores in tasks.items():
            for key, value in scores.items():
                metric, _, choice = key.partition(",")
                if isinstance(value, (int, float)) and choice and not metric.endswith("_stderr"):
                    if not math.isfinite(value):
                        raise UploadError(f"{path}: {key} of {task} is {value}, no score for a card")
                    name = metric if choice == "none" else f"{metric} ({choice})"
                    error = scores.get(f"{metric}_stderr,{choice}")
                    results.append(
                        EvalResult(
                            task_type=task_type,
                            dataset_type=task,
                            dataset_name=str(scores.get("alias", task)).strip(" -") or task,
                            # A part of what tells results apart: without it one number of shots replaces another.
                            dataset_config=f"{shots[task]}-shot" if task in shots else None,
                            dataset_args={"num_few_shot": shots[task]} if task in shots else None,
                            metric_type=metric,
                            metric_name=name,
                            metric_value=value,
                            metric_args={"stderr": error} if isinstance(error, float) else None,
                        )
                    )
        if not results:
            raise UploadError(f"{path} holds no score")
    return results


def read_card(path: Path | None) -> ModelCard:
    try:
        text = path.read_text(encoding="utf-8") if path else ""
        card = ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}")
    except Exception as error:  # YAML's errors, and those of malformed results
        raise UploadError(f"README.md: the metadata cannot be read: {one_line(error)}") from error
    for name in ("base_model", "datasets", "tags"):
        values = card.data.get(name) or []
        values = values if isinstance(values, list) else [values]
        if not all(isinstance(value, str) for value in values):
            raise UploadError(f"README.md: `{name}` must be a name or a list of names, got {values}")
    return card


def read_conversion(path: Path) -> dict:
    """The report of a conversion, or an empty one; raises an `UploadError` if it is none."""
    report = read_json(path) if path.is_file() else {}
    rows, numbers = report.get("perplexity") or [], ("cache_bytes_per_token", "perplexity")
    found, parts = report.get("retrieval") or [], ("found", "log_probability")
    if not (
        all(
            isinstance(report.get(name) or "", str)
            for name in ("command", "source", "base_model", "retrieval_warning")
        )
        and isinstance(report.get("versions") or {}, dict)
        and isinstance(rows, list)
        and all(isinstance(row, dict) and "model" in row for row in rows)
        and all(isinstance(row.get(name), (int, float)) for row in rows for name in numbers)
        and isinstance(found, list)
        and all(isinstance(row, dict) and isinstance(row.get("model"), str) for row in found)
        and all(isinstance(row.get(name), (int, float)) for row in found for name in parts)
        and all(is_loss_by_position(row.get("loss_by_position") or []) for row in found)
    ):
        raise UploadError(f"{path} is not what `python -m conversion` writes")
    return report


def is_loss_by_position(buckets) -> bool:
    names = ("first", "loss")
    return isinstance(buckets, list) and all(
        isinstance(bucket, dict) and all(isinstance(bucket.get(name), (int, float)) for name in names)
        for bucket in buckets
    )


def card_metadata(old: ModelCard, auto_class: str, conversion: dict, args: argparse.Namespace) -> ModelCardData:
    """What the author's card says, completed; options go before it."""
    task = PIPELINE_TAGS[auto_class]
    data = {key: value for key, value in old.data.to_dict().items() if key not in ("model-index", "model_name")}
    base_model = args.base_model or conversion.get("base_model") or data.get("base_model")
    license_fields = license_of(args, data, base_model, bool(conversion))
    for key in ("license", "license_name", "license_link"):
        data.pop(key, None)
    data |= {"library_name": "transformers", "pipeline_tag": task, **license_fields}
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), "t6", "tensor-product-attention"]))
    data |= {"base_model": base_model} if base_model else {}
    data |= {"datasets": args.datasets} if args.datasets else {}
    results = {}
    for result in [*(old.data.eval_results or []), *read_results(args.eval_results or [], task)]:
        name = result.metric_name or result.metric_type
        results[result.task_type, result.dataset_type, result.dataset_config, name] = result
    if results:
        data |= {"model_name": args.repo_id.split("/")[-1], "eval_results": list(results.values())}
    return ModelCardData(**data)


def model_card(old: ModelCard, checked: CheckedFolder, digest: str, conversion: dict, args: argparse.Namespace) -> str:
    """The text of README.md: metadata, and a part of its own in what the author wrote."""
    auto_class, repo_id, config = checked.auto_class, args.repo_id, checked.config
    data = card_metadata(old, auto_class, conversion, args)
    results = [
        (" ".join(filter(None, (r.dataset_name, r.dataset_config))), r.metric_name, f"{r.metric_value:.4f}")
        for r in data.eval_results or []
    ]
    versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers", "huggingface_hub")}
    bases = [data.base_model] if isinstance(data.base_model, str) else data.base_model or []
    provenance = {
        "made from": conversion.get("source") or ", ".join(bases),
        "converted by": conversion.get("command") and f"`{conversion['command']}`",
        "converted with": ", ".join(f"{k} {v}" for k, v in (conversion.get("versions") or {}).items()),
        "code": (commit := code_commit()) and f"commit {commit} of T6 for Transformers",
        "pushed with": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    example = EXAMPLE_OF_OTHERS
    if auto_class == "AutoModelForCausalLM":
        example = EXAMPLE + (EXAMPLE_CHAT if checked.has_chat_template else "")
    part = TEMPLATE.read_text(encoding="utf-8").format(
        begin=BEGIN,
        end=END,
        paper=PAPER,
        project=f"[T6 for Transformers]({url})" if (url := project_url()) else "T6 for Transformers",
        attention=attention_of(config),
        repo_id=repo_id,
        endpoint=constants.ENDPOINT,
        auto_class=auto_class,
        tokenizer="" if args.no_tokenizer else LOAD_TOKENIZER,
        imports=auto_class if args.no_tokenizer else f"{auto_class}, AutoTokenizer",
        example="" if args.no_tokenizer else f"\n{example}",
        architecture=architecture(checked),
        cache=cache_of(checked, conversion),
        digest=digest,
        results=f"\n## Evaluation\n\n{table(('task', 'metric', 'value'), results)}\n" if results else "",
        conversion=conversion_results(conversion),
        provenance=table(("", ""), [(name, value) for name, value in provenance.items() if value]),
    )
    part = part.rstrip("\n")
    text = old.text.strip()
    start = text.find(BEGIN)
    end = text.find(END, start)
    if 0 <= start < end:
        text = text[:start] + part + text[end + len(END) :]
    else:
        # After the author's introduction, before all else.
        section = re.search(r"^## ", text, re.MULTILINE)
        head, tail = (text[: section.start()], text[section.start() :]) if section else (text, "")
        text = f"{head.strip() or '# ' + repo_id.split('/')[-1]}\n\n{part}\n\n{tail}"
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def architecture(checked: CheckedFolder) -> str:
    """The table of sizes and variants."""
    config, tensors = checked.config, checked.checkpoint.tensors.values()
    parameters = sum(info.numel for info in tensors)
    ranks = ["no factors (one projection)" if config.q_rank is None else config.q_rank, config.k_rank, config.v_rank]
    a_factors = "learned constants" if config.noncontextual_a else "of the token"
    b_factors = "learned constants" if config.noncontextual_b else "of the token"
    dtypes = {str(info.dtype).removeprefix("torch.") for info in tensors}
    sliding = (config.layer_types or []).count("sliding_attention")
    rows = {
        "parameters": f"{parameters:,}",
        "layers, hidden size, MLP": f"{config.num_hidden_layers}, {config.hidden_size}, {config.intermediate_size}",
        "heads, head size": str(config.num_attention_heads)
        + (f" ({config.num_key_value_heads} of keys and values)" if config.num_key_value_groups > 1 else "")
        + f", {config.head_dim}",
        "ranks of Q, K, V": ", ".join(str(rank) for rank in ranks),
        "A factors": a_factors + (f", {config.head_factor_act} of them" if config.head_factor_act else ""),
        "B factors": b_factors
        + (", values have those of the keys" if config.shared_b else "")
        + (f", products of {config.b_dim} and {config.c_factor_dim} features" if config.c_factor_dim else ""),
        "QK norm": config.qk_norm
        and ("of heads" if config.qk_norm == "heads" else "of queries' heads and of B of keys"),
        "sliding window": sliding
        and f"{config.sliding_window} tokens, in {sliding} of {config.num_hidden_layers} layers",
        "context, vocabulary": f"{config.max_position_embeddings:,}, {config.vocab_size:,}",
        "weights": checked.content["dtype"]
        + (f" as they are loaded; stored in {' and '.join(sorted(dtypes))}" if len(dtypes) > 1 else ""),
    }
    return table(("", ""), [(name, value) for name, value in rows.items() if value])


def cache_of(checked: CheckedFolder, conversion: dict) -> str:
    """The table of bytes per token; and a sentence beside the source, if its bytes are known."""
    dtype = getattr(torch, checked.content["dtype"])
    sizes: dict[str, float] = cache_bytes(checked.config, dtype)
    own, sentence = sizes["T6, this model"], ""
    if source := source_cache_bytes(checked.config, dtype, conversion):
        name, size = source
        sizes = {"T6, this model": own, name: size} | sizes
        sentence = f"The cache is no smaller than that of {name}.\n\n"
        if own < size:
            sentence = f"The cache is {size / own:.2f} times smaller than that of {name}.\n\n"
    rows_in = "" if checked.config.cache_dtype is None else f", this model's rows in {checked.config.cache_dtype}"
    head = (f"bytes per token, {checked.content['dtype']}{rows_in}", "", "beside this model")
    return sentence + table(head, [(name, f"{size:,.0f}", f"{size / own:.2f}x") for name, size in sizes.items()])


def conversion_results(conversion: dict) -> str:
    """What the conversion cost, as it measured it on held-out text and by questions about long texts."""
    rows = conversion.get("perplexity") or []
    if not rows:
        return ""
    cells = [(row["model"], f"{row['cache_bytes_per_token']:,.0f}", f"{row['perplexity']:.4f}") for row in rows]
    text = table(("held-out text", "cache, bytes per token", "perplexity"), cells)
    text = f"\n{text}\n\n![Perplexity and what is found against cache size](conversion.png)\n"
    if found := conversion.get("retrieval"):
        cells = [(row["model"], f"{row['found']:.1%}", f"{row['log_probability']:.3f}") for row in found]
        text += f"\n{table(('facts in long texts', 'values found', 'log-probability of a token, nats'), cells)}\n"
        if all(row.get("loss_by_position") for row in found):
            heads = [f"{bucket['first']:,}" for bucket in found[0]["loss_by_position"]]
            cells = [(row["model"], *(f"{bucket['loss']:.3f}" for bucket in row["loss_by_position"])) for row in found]
            text += f"\n{table(('loss, nats, by tokens before, at least', *heads), cells)}\n"
    if warning := conversion.get("retrieval_warning"):
        text += f"\n**Warning:** {warning}.\n"
    return text


def license_of(args: argparse.Namespace, data: dict, base_model: str | None, converted: bool) -> dict[str, str]:
    """The card's fields on the license of the weights. That of a base model cannot be known here: the card points to it."""
    if args.license:
        if args.license != "other":
            return {"license": args.license}
        return {"license": "other", "license_name": "see-license-file", "license_link": "LICENSE"}
    if data.get("license"):
        return {key: data[key] for key in ("license", "license_name", "license_link") if key in data}
    if not converted and not base_model:
        return {"license": "apache-2.0"}
    if base_model:
        name = base_model if isinstance(base_model, str) else base_model[0]
        link = f"{constants.ENDPOINT}/{name}"
        return {"license": "other", "license_name": "that-of-the-base-model", "license_link": link}
    if (args.folder / "LICENSE").is_file():
        return {"license": "other", "license_name": "see-license-file", "license_link": "LICENSE"}
    raise UploadError(
        "the license of converted weights is that of their source: pass --license (as in the source's card) or --base-model"
    )


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---", *("---:" for _ in head[1:])) if len(head) > 2 else tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
