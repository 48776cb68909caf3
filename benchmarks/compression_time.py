"""
Time and memory of a compression of a large model: random weights in the shapes of Llama-3-8B, or others, random text.

    python benchmarks/compression_time.py --cache-ratio 4

It prints the seconds of each stage, and the most memory of the device that each took, beside the weights.
"""

import argparse
from pathlib import Path

from options import describe, save


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--cache-ratio", type=float, default=4.0)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--intermediate-size", type=int, default=14336)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8, help="key/value heads")
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--reconstruct-steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", help="(cuda if there is one, else cpu)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file to write")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import time

import torch
from transformers import LlamaConfig

from conversion.files.devices import find_device
from conversion.smaller.compress import compress
from conversion.smaller.languages import Tokens
from conversion.smaller.pipeline import QUESTIONS, QUESTIONS_LENGTH, changes_cache
from conversion.smaller.questions import make_questions
from conversion.smaller.reconstruct import reconstruct
from conversion.smaller.stages import fast_products
from conversion.sources.families import make_plan
from modeling_t6 import T6ForCausalLM


WINDOW = 1024


@torch.no_grad()
def random_model(config: LlamaConfig, dtype: torch.dtype, device: str) -> T6ForCausalLM:
    """What an exact conversion of a Llama with random weights would be."""
    plan = make_plan(config)
    with torch.device("meta"):
        model = T6ForCausalLM(plan.config)
    model = model.to(dtype).to_empty(device=device).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name in plan.constants:
            parameter.copy_(plan.constants[name])
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=plan.config).to(
        device
    )  # whose frequencies are no parameters
    return model.requires_grad_(False)


def main() -> None:
    args = parse_args()
    device, dtype = find_device(args.device), getattr(torch, args.dtype)
    on_gpu = torch.device(device).type == "cuda"
    config = LlamaConfig(
        hidden_size=args.hidden_size, intermediate_size=args.intermediate_size, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.groups, vocab_size=args.vocab_size,
        max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False,
    )  # fmt: skip
    found: dict = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "dtype": args.dtype}
    begun = time.time()

    def took(name: str, start: float) -> None:
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        found[name] = {"seconds": time.time() - start, "peak_bytes": peak}
        memory = "" if peak is None else f", at most {peak / 2**30:.1f} GiB"
        print(f"== {name}: {time.time() - start:.1f} s{memory}", flush=True)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()

    start = time.time()
    model = random_model(config, dtype, device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    print(f"{model.num_parameters():,} parameters, {weights / 2**30:.1f} GiB of weights", flush=True)
    ids = torch.randint(args.vocab_size, (max(2, args.calibration_tokens // WINDOW), WINDOW), device=device)
    count = max(2, int(QUESTIONS * ids.numel() / QUESTIONS_LENGTH))
    questions = make_questions(Tokens(args.vocab_size), QUESTIONS_LENGTH, count).to(device)
    took("making the model", start)
    with fast_products():
        start = time.time()
        result = compress(
            model, ids, cache_ratio=args.cache_ratio, questions=questions, batch_size=args.batch_size,
            cache_dtypes=(None, "float8_e4m3fn", "int4"),
        )  # fmt: skip
        took("compressing", start)
        print(f"keys {result.config.k_rank}, values {result.config.v_rank}, rows {result.config.cache_dtype}")
        start = time.time()
        if args.reconstruct_steps and changes_cache(result.config, model.config):
            reconstruct(result, model, ids, args.reconstruct_steps, questions=questions)
            took("reconstructing", start)
    took("all", begun)
    save(found, args.output)


if __name__ == "__main__":
    main()
