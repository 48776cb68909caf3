"""
Memory and time of an exact conversion of a large sharded checkpoint: the shapes of Llama-2-7B, or others.

    python benchmarks/conversion_memory.py WORK    makes WORK/source and WORK/t6, 13.5 GB each, and removes them

The shards are sparse files of zeros, which take no room on disk and as much memory as any other when read. The peak is
the resident set of the converting process, the pages of the shard that it maps included.
"""

import argparse
from pathlib import Path

from options import ROOT, describe


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--intermediate-size", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--shard-size", type=int, default=5_000_000_000, help="bytes")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import json
import os
import shutil
import subprocess
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def write_sparse_checkpoint(folder: Path, config: LlamaConfig, shard_size: int) -> list[Path]:
    """A checkpoint of zeros in bfloat16, in shards of at most `shard_size` bytes, none of which is in memory or on disk."""
    folder.mkdir(parents=True)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    shards: list[dict] = [{}]
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * 2
        end = max((entry["data_offsets"][1] for entry in shards[-1].values()), default=0)
        if shards[-1] and end + nbytes > shard_size:
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + nbytes]}
    weight_map, paths = {}, []
    for index, header in enumerate(shards):
        path = folder / f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
        weight_map |= dict.fromkeys(header, path.name)
        paths.append(path)
    index = {"metadata": {"total_size": sum(path.stat().st_size for path in paths)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths


CHILD = """
import resource, sys
from conversion.__main__ import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def convert(source: Path, target: Path) -> tuple[float, int]:
    """Seconds of the conversion in a process of its own, and the most bytes that it had in memory."""
    start = time.time()
    command = [sys.executable, "-c", CHILD, "hf", str(source), str(target), "--no-verify"]
    output = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    return time.time() - start, int(output.split()[-1])


def main() -> None:
    args = parse_args()
    config = LlamaConfig(
        hidden_size=args.hidden_size, intermediate_size=args.intermediate_size, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, vocab_size=args.vocab_size,
    )  # fmt: skip
    source, target = args.work / "source", args.work / "t6"
    try:
        shards = write_sparse_checkpoint(source, config, args.shard_size)
        total, largest = (f(path.stat().st_size for path in shards) for f in (sum, max))
        seconds, peak = convert(source, target)
        written = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    finally:
        for folder in (source, target):
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(shards)} shards, {total / 1e9:.2f} GB, the largest {largest / 1e9:.2f} GB; {os.cpu_count()} cores")
    print(f"converted in {seconds:.0f} s, {written / 1e9:.2f} GB written")
    print(f"peak memory {peak / 1e9:.2f} GB; the largest shard and 1 GB are {largest / 1e9 + 1:.2f} GB")


if __name__ == "__main__":
    main()
