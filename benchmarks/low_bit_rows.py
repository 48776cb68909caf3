"""
What rows of a cache in 16, 8 and 4 bits hold and lose, side by side: bytes of a token, perplexity, how far predictions are
from those of the model without a cache, answers found in long texts, and the time of a decoding step.

    python benchmarks/low_bit_rows.py examples/t6-tiny-shakespeare HELD_OUT

Windows of the text are read through a `T6Cache` of each dtype: a token sees the rows of those before it as they are stored, as
in decoding. `--samples 4` asks for what `python -m conversion evaluate` asks, at the length of a window.
"""

import argparse
from pathlib import Path

from options import describe, table_head, table_row


ROWS = {"16 bits": "model", "float8_e4m3fn": "float8_e4m3fn", "int4": "int4"}


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("model", type=Path, metavar="FOLDER", help="a T6 with its tokenizer")
    parser.add_argument("text", type=Path, metavar="FILE", help="UTF-8, which the model did not see")
    parser.add_argument("--window", type=int, metavar="N", help="tokens (the model's context)")
    parser.add_argument("--windows", type=int, metavar="N", help="as many from the beginning of the text (all)")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="of each task (none)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of the model (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="decoding steps (%(default)s)")
    parser.add_argument("--device", help="(cuda if there is one, else cpu)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import statistics
import sys

import torch
from timing import call_seconds

from conversion.evaluate.caches import make_cache
from conversion.evaluate.evaluation import (
    all_samples,
    bytes_per_token,
    context_of,
    load_model,
    measure_windows,
    score_all,
)
from conversion.evaluate.options import TASK_NAMES
from conversion.files.devices import find_device
from conversion.files.errors import ConversionError
from conversion.files.tokenizer import load_tokenizer
from conversion.smaller import text as texts
from conversion.smaller.languages import find_language
from modeling_t6 import T6ForCausalLM
from modeling_t6.cache_t6 import CACHE_NAME


@torch.inference_mode()
def step_seconds(model: T6ForCausalLM, ids: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of a decoded token behind `ids` [1, seq], by rows: in turns, whatever else the machine does."""
    caches = {name: {CACHE_NAME: make_cache(model, kind)} for name, kind in ROWS.items()}
    times = {name: [] for name in ROWS}
    for cache in caches.values():
        model(ids, **cache)
    for _ in range(repeats):
        for name, cache in caches.items():
            times[name].append(call_seconds(lambda cache=cache: model(ids[:, :1], **cache), ids.device.type))
            cache[CACHE_NAME].crop(-1)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    args = parse_args()
    device, dtype = find_device(args.device), getattr(torch, args.dtype)
    model, _ = load_model(args.model, dtype, device)
    if not isinstance(model, T6ForCausalLM):
        raise ConversionError(f"{args.model} is no T6: model_type={model.config.model_type!r}")
    model.config.cache_dtype = None  # beside which the others are measured
    tokenizer, text = load_tokenizer(args.model), texts.read_text(args.text)
    length = args.window or context_of(model)
    windows = texts.windows(tokenizer, text, length, str(args.text), args.windows)
    samples = {}
    if args.samples:
        language = find_language(tokenizer, model.config.vocab_size, text)
        samples = all_samples(language, list(TASK_NAMES), [length], args.samples)
    seconds = step_seconds(model, windows[:1].to(device), args.repeats)
    print(f"{args.model.name}, {args.dtype} on {device}: {len(windows)} windows of {length} tokens")
    columns = ("bytes per token", "smaller", "perplexity", "KL, nats", "same choice", "found", "ms a step")
    print(table_head("rows", *columns))
    for name, kind in ROWS.items():
        found = f"{score_all(model, kind, name, language, samples, args.batch_size)['found']:.0%}" if samples else ""
        row = measure_windows(model, kind, name, windows, args.batch_size, model)
        size = bytes_per_token(model, kind, dtype)
        plain = bytes_per_token(model, "model", dtype)
        cells = [f"{size:,.0f}", f"{plain / size:.2f}x", f"{row['perplexity']:.3f}", f"{row['kl']:.5f}"]
        cells += [f"{row['first_choice']:.1%}", found, f"{seconds[name] * 1e3:.2f}"]
        print(table_row(name, *cells), flush=True)


if __name__ == "__main__":
    try:
        main()
    except ConversionError as error:
        sys.exit(str(error))
