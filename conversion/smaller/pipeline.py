"""The steps from an exact T6 model to one with a smaller cache: compression, healing, and the measurement of both."""

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from modeling_t6 import T6Cache, T6Config, T6ForCausalLM

from ..files.devices import find_device
from ..files.errors import ConversionError
from ..files.folders import new_folder
from ..files.tokenizer import load_tokenizer
from . import text
from .compress import compress
from .heal import COMPILED_STEPS, healed
from .languages import Language, find_language
from .measure import cache_bytes_per_token, perplexity
from .questions import make_questions
from .reconstruct import reconstruct
from .report import Row
from .stages import fast_products, stage
from .working import CHECKPOINTS, COMPRESSED_MODEL, EXACT_MODEL


QUESTIONS, QUESTIONS_LENGTH = 1 / 4, 2048  # beside the calibration's tokens, and in a window at most
# Part of the windows of healing. Single values are half of what these ask, so that an eighth of the windows asks for them, with which a
# quarter of the cache came to find all that its source does. More would take from the text, which is what perplexity is about.
HEALED_QUESTIONS = 1 / 4
# Parts of a perplexity: sums in another order, and weights or activations in half precision.
EXACT, ROUNDED = 2e-4, 1e-2


class Texts:
    """
    The token windows of all texts that a run reads; a text that cannot be used is found before any work.

    Attributes:
        held_out: for perplexity, [n, window].
        calibration: [n, window].
        questions: read beside the calibration; `None` for `--method mean-pool`.
        healing: [n, window], text and questions, or windows of token ids as they are given: who made these has the mix that the
            source was trained on. `None` without `--heal`.
    """

    def __init__(self, args: argparse.Namespace, source: Path, config: T6Config):
        tokenizer = load_tokenizer(source)
        length = text.window_length(args.window, config.max_position_embeddings)
        if not 2 <= length <= config.max_position_embeddings:
            raise ConversionError(f"--window {length}: expected 2 to {config.max_position_embeddings}")
        calibration = text.read_text(args.calibration)
        if args.held_out is not None:
            held_out, name = text.read_text(args.held_out), f"--held-out {args.held_out}"
        else:
            calibration, held_out = text.split_held_out(calibration)
            name = f"the last tenth of --calibration {args.calibration}"
        self.held_out = text.windows(tokenizer, held_out, length, name)
        whole = text.windows(tokenizer, calibration, length, f"--calibration {args.calibration}")
        self.calibration = text.evenly_spaced(whole, max(1, args.calibration_tokens // length))
        self.questions, language = None, find_language(tokenizer, config.vocab_size, calibration)
        if args.method == "fit":
            long = min(config.max_position_embeddings, QUESTIONS_LENGTH)
            count = max(2, int(QUESTIONS * self.calibration.numel() / long))
            self.questions = make_questions(language, long, count, args.seed)
        self.healing = None if args.heal is None else self._healing(args, tokenizer, whole, language)
        for ids in (self.held_out, self.calibration, self.healing):
            if ids is not None and ids.max() >= config.vocab_size:
                raise ConversionError(
                    f"{source}: the tokenizer makes token {ids.max()} of a text, and config.json has "
                    f"vocab_size={config.vocab_size}"
                )

    @staticmethod
    def _healing(
        args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, calibration: torch.Tensor, language: Language
    ) -> torch.Tensor:
        """
        Args:
            calibration: all windows of that text, which is not tokenised again: a long text takes long.
        """
        length = calibration.shape[1]
        most = None if args.heal_tokens is None else max(1, args.heal_tokens // length)
        if text.is_windows(args.heal):
            return text.read_windows(args.heal, length)[:most]
        if args.heal.resolve() == args.calibration.resolve():
            windows = calibration[:most]
        else:
            healing = text.read_text(args.heal)
            if args.held_out is None:
                healing = text.split_held_out(healing)[0]
            windows = text.windows(tokenizer, healing, length, f"--heal {args.heal}", most)
        if args.method != "fit":
            return windows
        count = int(HEALED_QUESTIONS * len(windows))
        questions = make_questions(language, length, count, args.seed + 1)
        return torch.cat([windows[: len(windows) - count], questions.ids])


def choose_device(args: argparse.Namespace) -> str:
    """
    Raises:
        ConversionError: if `--device` is none that computes here, or, to heal, not the first of its kind.
    """
    name = find_device(args.device)
    device = torch.device(name)
    if args.heal is not None and device.index:
        raise ConversionError(
            f"--device {name}: healing takes the first that it sees; expected {device.type}, with "
            f"CUDA_VISIBLE_DEVICES={device.index} in the environment"
        )
    return name


def check_same_model(rows: list[Row], rounded: bool) -> None:
    """Raises a `ConversionError` if the exact model is another than the source, as a stale one would be."""
    source, exact = rows[0].perplexity, rows[1].perplexity
    limit = ROUNDED if rounded else EXACT
    if not abs(exact / source - 1) <= limit:
        raise ConversionError(
            f"the exact model has perplexity {exact:.6g}, the source {source:.6g}: they differ by more than rounding "
            f"({limit:g} of it), so one is not the other's"
        )


def changes_cache(config: T6Config, source: T6Config) -> bool:
    """Whether a model reads other keys and values than the one that it was made of."""
    return any(getattr(config, name) != getattr(source, name) for name in ("k_rank", "v_rank", "cache_dtype"))


def smaller_model(
    args: argparse.Namespace, exact_model: T6ForCausalLM, texts: Texts, dtype: torch.dtype, device: str
) -> T6ForCausalLM:
    """The exact model with a smaller cache: fitted, and reconstructed."""
    calibration = texts.calibration.to(device)
    questions = None if texts.questions is None else texts.questions.to(device)
    cache_dtypes = [args.cache_dtype]
    if args.cache_dtype is None:
        cache_dtypes = ["model", "float8_e4m3fn"] + ["int4"] * (exact_model.config.head_dim % 2 == 0)
    model = compress(
        exact_model, calibration, args.k_rank, args.v_rank, cache_ratio=args.cache_ratio, method=args.method,
        batch_size=args.batch_size, questions=questions, dtype=dtype,
        cache_dtypes=[None if name == "model" else name for name in cache_dtypes],
    )  # fmt: skip
    if args.reconstruct_steps > 0 and changes_cache(model.config, exact_model.config):
        errors = reconstruct(model, exact_model, calibration, args.reconstruct_steps, args.seed, questions=questions)
        text = ", ".join(f"{before:.2%} to {after:.2%}" for before, after in errors)
        print(f"error of each attention's output, of its power: {text}")
    return model


def make_smaller(
    args: argparse.Namespace,
    source: Path,
    working: Path,
    folder: Path,
    texts: Texts,
    *,
    dtype: torch.dtype,
    device: str,
    rounded: bool,
) -> list[Row]:
    """
    Compresses and heals the exact model in `working`, and saves the result in `folder`, its weights in `dtype`.
    What is finished in `working` is not done again.

    Args:
        device: see `choose_device`.
        rounded: whether the weights of the exact model are rounded ones of the source.

    Returns:
        Cache size and perplexity of the source, the exact, the compressed and the healed model, each as it is saved.

    Raises:
        ConversionError: if source and exact model are not the same but for rounding.
    """
    compute_dtype = getattr(torch, args.compute_dtype)
    rows: list[Row] = []

    def load(cls, path: Path) -> PreTrainedModel:
        return cls.from_pretrained(path, dtype=compute_dtype).eval().to(device)

    def measure(name: str, model: PreTrainedModel) -> PreTrainedModel:
        cache_class = T6Cache if isinstance(model, T6ForCausalLM) else DynamicCache
        size = cache_bytes_per_token(model, cache_class(config=model.config), dtype.itemsize)
        with stage("measuring"):
            value = perplexity(model, texts.held_out, args.batch_size, name)
        if not math.isfinite(value):
            lower = "; lower --heal-learning-rate, and --overwrite begins anew" if name == "healed" else ""
            raise ConversionError(f"the {name} model has perplexity {value}: expected a number{lower}")
        print(f"perplexity, {name}: {value:.4f}", flush=True)
        rows.append(Row(name, size, value))
        return model

    def save(model: T6ForCausalLM, path: Path) -> None:
        model.to(dtype).save_pretrained(path, max_shard_size=args.max_shard_size)

    source_model = measure("source", load(AutoModelForCausalLM, source))
    compressed_folder = working / COMPRESSED_MODEL
    exact_model = measure("exact", load(T6ForCausalLM, working / EXACT_MODEL))
    check_same_model(rows, rounded or compute_dtype != torch.float32)
    if not compressed_folder.exists():
        with fast_products():
            model = smaller_model(args, exact_model, texts, dtype, device)
        with new_folder(compressed_folder) as new:
            save(model, new)
    del exact_model
    model = measure("compressed", load(T6ForCausalLM, compressed_folder))
    rows_in = "" if model.config.cache_dtype is None else f", rows of the cache in {model.config.cache_dtype}"
    print(f"ranks of the keys {model.config.k_rank}, of the values {model.config.v_rank}{rows_in}")
    if texts.healing is None:
        save(model, folder)
        return rows

    del model
    with stage("healing"):
        model, _ = healed(
            lambda: load(T6ForCausalLM, compressed_folder).float(), source_model, texts.healing, working / CHECKPOINTS,
            steps=args.heal_steps, batch_size=args.batch_size, accumulation=args.heal_accumulation,
            optimizer=args.heal_optimizer, learning_rate=args.heal_learning_rate, cross_entropy=args.heal_cross_entropy,
            seed=args.seed, device=device,
            compiled=torch.device(device).type == "cuda" and args.heal_steps >= COMPILED_STEPS,
        )  # fmt: skip
    save(model, folder)
    measure("healed", load(T6ForCausalLM, folder))
    return rows
