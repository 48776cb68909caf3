"""
Attention of one decoding step on the CPU: factor space, K and V rebuilt from the factors, and SDPA over a cached MHA.

    python benchmarks/decode_attention.py --threads 2 --output cpu.json

All three get the same query and as many layers of cache as no processor cache holds, like the layers of a model.
Factor space and cached MHA are timed in turns, so that their ratio holds whatever else the machine does. A second table
times appending the rows of one token to T6Cache, and to a DynamicCache of as many numbers.
"""

import argparse

from options import add_output, describe, save


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs=3, default=(6, 2, 2), metavar=("Q", "K", "V"))
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=(2048, 8192, 32768, 131072))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_output(parser, plots=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import statistics
from collections.abc import Callable

import torch
from timing import call_seconds
from torch import nn
from transformers.cache_utils import DynamicCache

from modeling_t6 import T6Cache, T6Config
from modeling_t6.cache_t6 import factor_layouts
from modeling_t6.factor_space_t6 import chunks_of_rows, factor_space_attention, matmul_dtype
from modeling_t6.factors_t6 import form_heads


LARGER_THAN_PROCESSOR_CACHES = 128 * 2**20  # bytes


def second_call_seconds(functions: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each function, called in turns: of the second of two calls, as one decoding step follows another."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()
            times[name].append(call_seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def attention_row(config: T6Config, seq_length: int, repeats: int, dtype: torch.dtype) -> dict[str, float]:
    """Median seconds a layer of the three ways to attend with one query to `seq_length` cached tokens."""
    heads, head_dim, scaling = config.num_attention_heads, config.head_dim, config.head_dim**-0.5
    layouts = factor_layouts(config, 0)
    bytes_per_layer = sum(layout.width for layout in layouts) * seq_length * dtype.itemsize
    num_layers = max(1, LARGER_THAN_PROCESSOR_CACHES // bytes_per_layer)
    query = torch.randn(1, 1, heads, head_dim).to(dtype)

    def heads_from_factors(factors) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(form_heads(a, b).transpose(1, 2) for a, b in factors)

    def factor_space(rows) -> torch.Tensor:
        return factor_space_attention(query, *chunks_of_rows(layouts, rows, matmul_dtype(query)), None, scaling)[0]

    def sdpa(heads: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query.transpose(1, 2), *heads, scale=scaling).transpose(1, 2)

    layers_of_rows, layers_of_heads = [], []
    for _ in range(num_layers):
        rows = tuple(torch.randn(1, 1, seq_length, layout.width).to(dtype) for layout in layouts)
        factors = tuple(layout.unpack(x) for layout, x in zip(layouts, rows))
        layers_of_rows.append(rows)
        # A cached MHA holds [batch, heads, seq, head_dim], contiguous.
        layers_of_heads.append(tuple(states.contiguous() for states in heads_from_factors(factors)))
    expected = sdpa(layers_of_heads[0])
    error = (factor_space(layers_of_rows[0]) - expected).abs().max() / expected.abs().max()
    assert error < (1e-4 if dtype == torch.float32 else 5e-2), f"the paths disagree: relative error {error:.1e}"

    times = second_call_seconds(
        {
            "factor space": lambda: [factor_space(rows) for rows in layers_of_rows],
            "cached MHA": lambda: [sdpa(heads) for heads in layers_of_heads],
        },
        repeats,
    )
    times = {name: seconds / num_layers for name, seconds in times.items()}
    # Apart from the others: handing its large temporaries back to the system would slow down whatever comes next.
    return times | second_call_seconds({"rebuilt K, V": lambda: sdpa(heads_from_factors(factors))}, repeats)


def append_row(config: T6Config, seq_length: int, repeats: int, dtype: torch.dtype) -> dict[str, float]:
    """Median seconds of appending one token to a cache of `seq_length` tokens of one layer."""
    row = {}
    for name, cache in (("T6Cache", T6Cache()), ("DynamicCache", DynamicCache())):
        rows = tuple(torch.randn(1, 1, seq_length, layout.width).to(dtype) for layout in factor_layouts(config, 0))
        new = tuple(tensor[:, :, :1].clone() for tensor in rows)
        cache.update(*rows, 0)
        cache.update(*new, 0)  # the first append after a prompt makes room for as many tokens again
        row |= second_call_seconds({name: lambda cache=cache, new=new: cache.update(*new, 0)}, repeats)
    return row


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    q_rank, k_rank, v_rank = args.ranks
    config = T6Config(
        num_attention_heads=args.num_heads, head_dim=args.head_dim, q_rank=q_rank, k_rank=k_rank, v_rank=v_rank
    )

    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, one query, h={args.num_heads}, "
        f"d={args.head_dim}, ranks {tuple(args.ranks)}; medians of {args.repeats}"
    )
    print("cached tokens  factor space   cached MHA (SDPA)    rebuilt K, V")
    data = {name: value for name, value in vars(args).items() if name != "output"}
    data |= {"device": "cpu", "versions": f"torch {torch.__version__}", "attention": [], "append": []}
    with torch.inference_mode():
        for seq_length in args.seq_lengths:
            row = attention_row(config, seq_length, args.repeats, dtype)
            data["attention"].append({"tokens": seq_length} | row)
            save(data, args.output)
            fast = row["factor space"]
            print(
                f"{seq_length:13,}  {fast * 1e3:9.3f} ms"
                + "".join(f"  {row[name] * 1e3:9.3f} ms {row[name] / fast:5.1f}x" for name in list(row)[1:])
            )
        print("\ncached tokens  append to T6Cache   to DynamicCache")
        for seq_length in args.seq_lengths:
            row = append_row(config, seq_length, args.repeats * 10, dtype)
            data["append"].append({"tokens": seq_length} | row)
            save(data, args.output)
            print(f"{seq_length:13,}  {row['T6Cache'] * 1e6:14.1f} us  {row['DynamicCache'] * 1e6:12.1f} us")


if __name__ == "__main__":
    main()
