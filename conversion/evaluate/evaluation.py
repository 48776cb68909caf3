"""An evaluation: models and caches one after the other, on the same samples and windows."""

import argparse
import platform
import random
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from modeling_t6 import T6ForCausalLM

from ..files.devices import find_device
from ..files.errors import ConversionError, reason
from ..files.folders import read_json
from ..files.names import matching_files
from ..files.tokenizer import TOKENIZER_FILES, load_tokenizer
from ..smaller import text as texts
from ..smaller.languages import Language, Sentences, find_language
from ..smaller.measure import cache_bytes_per_token, logits_in_pieces
from ..smaller.report import shown_command
from . import report
from .agreement import Agreement
from .caches import RoundedCache, can_be_rounded, make_cache
from .options import SHORTEST
from .positions import LossByPosition
from .score import score_samples
from .tasks import Sample, make_samples


NAMES = {"8": " in 8 bits", "4": " in 4 bits", "float8_e4m3fn": " in float8", "int4": " in int4", "model": ""}


def load_model(folder: Path, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, torch.dtype]:
    """
    A model, to be measured in `dtype`, and the dtype that its folder says.

    Raises:
        ConversionError: if it is no folder of a causal language model.
    """
    if not folder.is_dir():
        raise ConversionError(f"{folder} is no folder: expected one with a model")
    content = read_json(folder / "config.json")
    cls = T6ForCausalLM if content.get("model_type") == "t6" else AutoModelForCausalLM
    more = {} if cls is T6ForCausalLM else {"trust_remote_code": False}
    try:
        model = cls.from_pretrained(folder, dtype=dtype, **more).eval().to(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a configuration's or a file's reading raises
        raise ConversionError(f"{folder} cannot be loaded: {reason(error)}") from error
    stored = content.get("dtype") or content.get("torch_dtype") or "float32"
    return model, getattr(torch, str(stored).removeprefix("torch."))


def context_of(model: PreTrainedModel) -> int:
    return model.config.get_text_config(decoder=True).max_position_embeddings


def refuse_others(folder: Path, model: PreTrainedModel) -> None:
    """Raises a `ConversionError` if a model does not say its context, or keeps what is no keys and values."""
    if not hasattr(model.config.get_text_config(decoder=True), "max_position_embeddings"):
        raise ConversionError(
            f"{folder / 'config.json'} has no max_position_embeddings: expected a model with a context"
        )
    if not all(hasattr(layer, "keys") for layer in make_cache(model).layers):
        raise ConversionError(f"{folder}: expected a model all of whose layers cache keys and values")


def find_lengths(asked: list[int] | None, context: int) -> list[int]:
    if asked is None:
        found = []
        while SHORTEST << len(found) < context:
            found.append(SHORTEST << len(found))
        return [*found, context]
    for length in asked:
        if length > context:
            raise ConversionError(f"--lengths {length}: the model's context is {context}")
    return asked


def all_samples(
    language: Language, tasks: list[str], lengths: list[int], count: int, seed: int = 0
) -> dict[tuple[str, int], list[Sample]]:
    """Samples by task and length."""
    return {(task, length): make_samples(language, task, length, count, seed) for length in lengths for task in tasks}


def score_all(
    model: PreTrainedModel,
    kind: str,
    name: str,
    language: Language,
    samples: dict[tuple[str, int], list[Sample]],
    batch_size: int,
    window: int | None = None,
) -> dict:
    """
    What a model finds with a `kind` of cache (see `make_cache`): by task and length, and in all.

    Args:
        batch_size: samples at a time; of such as are longer than `window`, if there is one, as many as have its tokens.
    """
    scores = []
    with tqdm(total=sum(map(len, samples.values())), desc=f"retrieval, {name}", unit="sample") as bar:
        for (task, length), some in samples.items():
            count = batch_size if window is None else max(1, batch_size * window // max(window, length))
            score = score_samples(
                model, lambda: make_cache(model, kind), language, some, count, bar, context_of(model)
            )
            scores.append({"task": task, "length": length} | vars(score))
    means = {key: report.mean(scores, key) for key in ("found", "exact", "log_probability")}
    return {"model": name, **means, "scores": scores}


@torch.no_grad()
def measure_windows(
    model: PreTrainedModel,
    kind: str,
    name: str,
    windows: torch.Tensor,
    batch_size: int,
    source: PreTrainedModel | None,
) -> dict:
    """Loss by position in the windows [n, length], all read through the cache, and the agreement with a source's own."""
    losses, agreement = LossByPosition(windows.shape[1]), Agreement()
    for batch in tqdm(windows.split(batch_size), desc=f"windows, {name}", unit="batch"):
        batch = batch.to(model.device)
        ids, targets, start = batch[:, :-1], batch[:, 1:], 0
        expected = logits_in_pieces(source, ids) if source is not None else None
        for logits in logits_in_pieces(model, ids, make_cache(model, kind)):
            losses.add(logits, targets[:, start : start + logits.shape[1]], start)
            start += logits.shape[1]
            if expected is not None:
                agreement.add(logits, next(expected))
    result = {"perplexity": torch.tensor(losses.loss).exp().item(), "loss_by_position": losses.by_position()}
    return result | ({} if source is None else {"kl": agreement.kl, "first_choice": agreement.first_choice})


def bytes_per_token(model: PreTrainedModel, kind: str, dtype: torch.dtype) -> float:
    """Bytes of a `kind` of cache for each token, of a model whose numbers are `dtype` when it is used."""
    cache = make_cache(model, kind)
    size = cache_bytes_per_token(model, cache, dtype.itemsize)
    if isinstance(cache, RoundedCache):
        batch, length = cache.layers[0].keys.shape[0], cache.layers[0].keys.shape[2]
        return sum(layer.packed_nbytes for layer in cache.layers) / (batch * length)
    return size


def refuse_caches(folder: Path, model: PreTrainedModel, kinds: list[str]) -> None:
    """Raises a `ConversionError` if a T6 has no such cache."""
    for kind in kinds if isinstance(model, T6ForCausalLM) else ():
        try:
            make_cache(model, kind)
        except ValueError as error:
            raise ConversionError(f"--cache-dtypes {kind}: {folder}: {error}") from error


def make_windows(
    language: Language,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | None,
    length: int,
    args: argparse.Namespace,
) -> torch.Tensor:
    """Windows [n, length] of the text, spread over it, or of what fills the room between facts."""
    if text is not None and isinstance(language, Sentences):
        whole = texts.windows(tokenizer, text, length, f"--text {args.text}")
        return texts.evenly_spaced(whole, args.windows)
    generator = random.Random(args.seed)
    return torch.tensor([sum(language.fill(generator, length), []) for _ in range(args.windows)])


def load_models(args: argparse.Namespace, device: str) -> list[tuple[Path, PreTrainedModel, torch.dtype]]:
    """
    FOLDER, behind the source if one is named: the folder, its model, and the dtype that it says.

    Raises:
        ConversionError: if one cannot be evaluated, they do not know the same tokens, or FOLDER has no such caches as are asked for.
    """
    dtype, loaded = getattr(torch, args.compute_dtype), []
    for folder in [args.folder] if args.beside is None else [args.beside, args.folder]:
        loaded.append((folder, *load_model(folder, dtype, device)))
    sizes = [model.config.get_text_config().vocab_size for _, model, _ in loaded]
    if len(set(sizes)) > 1:
        raise ConversionError(
            f"{args.folder} has vocab_size={sizes[1]}, and {args.beside} {sizes[0]}: expected the same"
        )
    for folder, model, _ in loaded:
        refuse_others(folder, model)
    if not isinstance(loaded[-1][1], T6ForCausalLM) and args.cache_dtypes != ["model"]:
        raise ConversionError(
            f"--cache-dtypes {','.join(args.cache_dtypes)}: {args.folder} is no T6, whose caches have them"
        )
    return loaded


def cache_kinds(args: argparse.Namespace, folder: Path, model: PreTrainedModel, is_source: bool) -> list[str]:
    """The kinds of cache (see `make_cache`) with which a model is measured."""
    if is_source and can_be_rounded(model):
        return ["model", "8", "4"]
    if isinstance(model, T6ForCausalLM):
        return args.cache_dtypes
    if is_source:
        name = folder.resolve().name
        print(f"{name} is not measured in 8 and 4 bits: not all of its layers keep all keys and values", flush=True)
    return ["model"]


def evaluate(args: argparse.Namespace) -> None:
    """
    Measures FOLDER, beside a source if one is named, prints the table, and writes the report that is asked for.

    Raises:
        ConversionError: naming the option, folder or field that is not as it must be.
    """
    text = None if args.text is None else texts.read_text(args.text)
    loaded = load_models(args, find_device(args.device))
    source = loaded[0][1] if args.beside is not None else None
    tokenizer = load_tokenizer(args.folder) if matching_files(args.folder, TOKENIZER_FILES) else None
    language = find_language(tokenizer, loaded[0][1].config.get_text_config().vocab_size, text)
    if not isinstance(language, Sentences):
        print("no tokenizer that writes sentences: the tasks are told in bare token ids", flush=True)
        if text is not None:
            raise ConversionError(f"--text {args.text}: {args.folder} has no tokenizer that writes sentences")
    lengths = find_lengths(args.lengths, min(context_of(model) for _, model, _ in loaded))
    samples = all_samples(language, args.tasks, lengths, args.samples, args.seed)
    windows = make_windows(language, tokenizer, text, lengths[-1], args)
    for folder, model, _ in loaded:
        refuse_caches(folder, model, args.cache_dtypes)

    rows = []
    for folder, model, stored in loaded:
        kinds = cache_kinds(args, folder, model, is_source=model is source)
        for kind in kinds:
            name = folder.resolve().name + NAMES[kind]
            row = score_all(model, kind, name, language, samples, args.batch_size)
            row["cache_bytes_per_token"] = bytes_per_token(model, kind, stored)
            rows.append(row | measure_windows(model, kind, name, windows, args.batch_size, source))
    print(report.table(rows), flush=True)
    content = {
        "command": shown_command(args.words),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "lengths": lengths,
        "samples": args.samples,
        "windows": len(windows),
        "models": rows,
    }  # fmt: skip
    worst = min(rows[-len(kinds) :], key=lambda row: row["found"])  # of FOLDER's caches
    if source is not None and (message := report.warning(rows[0], worst)):
        content["warning"] = message = f"{worst['model']}: {message}"
        print(f"warning: {message}", flush=True)
    if args.output is not None:
        report.write(args.output, content)
        print(f"{args.output} and {args.output.with_suffix('.png').name} hold the figures and a picture")
