"""
Bytes of cache per token and layer of the published architectures, counted in caches that hold tokens.

    python benchmarks/cache_size.py
"""

import argparse

from options import describe, table_head, table_row


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configuration.make_configs import DIRECTORY
from configuration.sizes import SIZES
from modeling_t6.cache_t6 import CACHE_NAME


def bytes_per_token_and_layer(folder: Path, dtype: torch.dtype, num_tokens: int = 32) -> float:
    """Bytes that one layer of the architecture in `folder` caches for a token."""
    # One layer and a small vocabulary and MLP cache the same.
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=1, vocab_size=64, intermediate_size=64)
    config.bos_token_id = config.eos_token_id = None
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.inference_mode():
        output = model(torch.arange(num_tokens)[None], use_cache=True)
    layer = getattr(output, CACHE_NAME).layers[0]
    return (layer.keys.nbytes + layer.values.nbytes) / num_tokens


def main() -> None:
    args = parse_args()
    print(f"bytes of cache per token and layer, {args.dtype}; T6 beside MHA with T6's own number of heads")
    print(table_head("architecture", "heads", "T6", "MHA, same heads", "smaller", "MHA, same parameters", "smaller"))
    dtype = getattr(torch, args.dtype)
    for size in SIZES:
        matched = bytes_per_token_and_layer(DIRECTORY / f"llama-mha-{size}", dtype)
        for name in (f"t6-{size}", f"t6-{size}-kvonly"):
            config = AutoConfig.from_pretrained(DIRECTORY / name)
            held = bytes_per_token_and_layer(DIRECTORY / name, dtype)
            same_heads = 2 * config.num_attention_heads * config.head_dim * dtype.itemsize
            cells = [f"{held:,.0f}", f"{same_heads:,}", f"{same_heads / held:.1f}x"]
            cells += [f"{matched:,.0f}", f"{matched / held:.1f}x"]
            print(table_row(name, config.num_attention_heads, *cells))


if __name__ == "__main__":
    main()
