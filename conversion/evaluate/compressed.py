"""What source and result find in long texts, for the report of a compression."""

import argparse
from pathlib import Path

import torch

from modeling_t6 import T6Config

from ..files.tokenizer import load_tokenizer
from ..smaller import text as texts
from ..smaller.languages import Language, find_language
from ..smaller.stages import stage
from .evaluation import bytes_per_token, context_of, load_model, measure_windows, score_all
from .report import warning
from .tasks import TASKS, Sample, TooShort, make_samples


WINDOWS = 32  # of held-out text, for the loss by position
LONGEST = 8192  # by default: a pass over a context of 128k takes as long as the compression


def retrieval_samples(
    args: argparse.Namespace, tokenizer: Path, config: T6Config
) -> tuple[Language, dict[tuple[str, int], list[Sample]]] | None:
    """
    A language, and samples in it by task and length, those that fit: as long as the windows, and as the context but at most `LONGEST` tokens. Their
    filler is the text on which perplexity is measured.
    """
    if args.retrieval_samples == 0:
        return None
    if args.held_out is not None:
        text = texts.read_text(args.held_out)
    else:
        text = texts.split_held_out(texts.read_text(args.calibration))[1]
    language = find_language(load_tokenizer(tokenizer), config.vocab_size, text)
    context = config.max_position_embeddings
    samples = {}
    for length in sorted({texts.window_length(args.window, context), min(context, LONGEST)}):
        for task in TASKS:
            try:
                samples[task, length] = make_samples(language, task, length, args.retrieval_samples, args.seed)
            except TooShort as error:
                print(f"retrieval is measured without a task: {str(error).removeprefix('--lengths ')}", flush=True)
    return language, samples


def compare_retrieval(
    args: argparse.Namespace,
    source: Path,
    result: Path,
    questions: tuple[Language, dict[tuple[str, int], list[Sample]]] | None,
    held_out: torch.Tensor,
    device: str,
) -> dict:
    """What source and result find, and their loss by position in the windows `held_out` [n, length], as fields of the report."""
    if questions is None or not questions[1]:
        return {}
    rows, windows = [], texts.evenly_spaced(held_out, WINDOWS)
    with stage("retrieval"):
        for name, folder in (("source", source), ("result", result)):
            model, stored = load_model(folder, getattr(torch, args.compute_dtype), device)
            window = texts.window_length(args.window, context_of(model))
            row = score_all(model, "model", name, *questions, args.batch_size, window)
            row["cache_bytes_per_token"] = bytes_per_token(model, "model", stored)
            rows.append(row | measure_windows(model, "model", name, windows, args.batch_size, None))
            del model
    message = warning(*rows)
    return {"retrieval": rows} | ({} if message is None else {"retrieval_warning": message})
