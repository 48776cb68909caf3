"""
T6 in training and prefill on a GPU beside Llama with multi-head attention and the same number of parameters, in one run.

    python benchmarks/beside_twin.py --output beside_twin.json      # t6-small 16 x 1024, t6-medium 8 x 1024, t6-xl prefill

A training step is forward and backward of the model in bfloat16: with each layer compiled and without the head, which is the same
for both, and eager with the head and the loss. `kernels` is the time of its kernels by torch's profiler, `attention` of those
that compute softmax attention. Prefill is a forward pass without gradients over one long sequence, of --layers layers. T6 and its
twin take turns; times are medians, ratios those of T6 to the twin. `--profile` lists the kernels of both.
"""

import argparse

from options import add_output, batch_and_tokens, describe, save


def job(text: str) -> tuple[str, int, int]:
    try:
        name, shape = text.split(":")
        return name, *batch_and_tokens(shape)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected SIZE:BATCHxLENGTH, for example small:16x1024, got {text!r}"
        ) from None


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument(
        "--train", type=job, nargs="*", default=[("small", 16, 1024), ("medium", 8, 1024)], metavar="SIZE:BxN"
    )
    parser.add_argument("--prefill", type=job, nargs="*", default=[("xl", 1, 32768)], metavar="SIZE:BxN")
    parser.add_argument("--layers", type=int, default=6, help="of the models of --prefill")
    parser.add_argument("--rounds", type=int, default=8, help="in which both take their turn")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--profile", action="store_true", help="list the kernels of a step, and write them")
    add_output(parser, plots=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import re
from collections.abc import Callable

import torch
from gpu import machine, release_memory
from timing import median_seconds
from training_step import kernels_of, make_model, make_step
from transformers import AutoConfig

from configuration.make_configs import DIRECTORY


NAMES = ("t6", "llama-mha")
# Names of softmax attention's kernels in PyTorch: FlashAttention, cuDNN with what it does before and after its backward pass,
# memory-efficient. torch.compile's own kernels are named after their neighbours.
ATTENTION = re.compile(r"^(?!triton_).*(flash|fmha|sdpa|attention|cudnn::fusion)", re.IGNORECASE)


def steps(config, device: str, batch: int, length: int, compiled: bool) -> Callable:
    """A training step; not compiled, it includes the head and the loss."""
    return make_step(config, device, batch, length, compiled, with_loss=not compiled)


def prefills(config, device: str, batch: int, length: int, layers: int) -> Callable:
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    model = make_model(config, device).eval()
    ids = torch.randint(0, config.vocab_size, (batch, length), device=device)

    @torch.no_grad()
    def prefill():
        model.model(ids, use_cache=False)

    return prefill


def compare(title: str, calls: dict[str, Callable], args) -> dict:
    median_seconds(calls, 3, args.device)  # not counted: they compile, and fill the allocator
    seconds = median_seconds(calls, args.rounds, args.device)
    result = {"seconds": seconds, "kernels": {name: kernels_of(call, args.device, 3) for name, call in calls.items()}}
    sums = {
        "step": seconds,
        "kernels": {name: sum(row[1] for row in rows) for name, rows in result["kernels"].items()},
        "attention": {
            name: sum(row[1] for row in rows if ATTENTION.search(row[0])) for name, rows in result["kernels"].items()
        },
    }
    sums["all but attention"] = {name: sums["kernels"][name] - sums["attention"][name] for name in calls}
    result["sums"] = sums
    if not args.profile:
        del result["kernels"]
    for part, times in sums.items():
        t6, twin = (times[name] for name in NAMES)
        ratio = f"{t6 / twin:6.2f}" if twin else ""
        print(f"{title:46} {part:18} T6 {t6 * 1e3:9.2f} ms   MHA {twin * 1e3:9.2f} ms   {ratio}", flush=True)
    if args.profile:
        for name, rows in result["kernels"].items():
            print(f"  kernels of {name}:")
            for key, time_of, count in rows[:14]:
                print(f"  {time_of * 1e3:9.3f} ms {count:6.0f} x  {key[:110]}")
    return result


def measure(args) -> dict:
    head = machine() if args.device == "cuda" else f"CPU, torch {torch.__version__}"
    print(f"{head}; bfloat16")
    results = {}
    for make, jobs in ((steps, args.train), (prefills, args.prefill)):
        for size, batch, length in jobs:
            ways = {"compiled": True, "eager, with loss": False} if make is steps else {"prefill": args.layers}
            for way, option in ways.items():
                configs = {name: AutoConfig.from_pretrained(DIRECTORY / f"{name}-{size}") for name in NAMES}
                calls = {name: make(config, args.device, batch, length, option) for name, config in configs.items()}
                title = f"{size}, {batch} x {length}, {way}"
                results[title] = compare(title, calls, args)
                del calls
                torch._dynamo.reset()
                release_memory()
    return {"machine": head, "results": results}


def main() -> None:
    args = parse_args()
    save(measure(args), args.output)


if __name__ == "__main__":
    main()
