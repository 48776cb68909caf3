"""
A training step of t6-medium on a GPU: K and V form_heads, and rebuilt from their factors in the backward pass.

    python benchmarks/training_step.py --output training.json

Forward and backward of the whole model, 8 sequences of 2048 tokens in bfloat16, eager and with each layer compiled;
and what one attention layer keeps from its forward to its backward pass. `materialised` is the way of the research
code: heads as a matrix product of their factors, then SDPA.
"""

import argparse
import json
import statistics

import torch
from gpu import machine
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_t6 import modeling_t6 as model_code
from modeling_t6.attention_t6 import form_heads


def rebuilt(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """
    Heads as a sum of outer products: torch.compile fuses it with RoPE and the layout that attention wants, and rebuilds
    heads from the factors in the backward pass, where it would keep the result of a matrix product.
    """
    return sum(a[..., r, :, None] * b[..., r, None, :] for r in range(a.shape[-2])) / a.shape[-2]


def seconds_and_peak(step, repeats: int = 6) -> tuple[float, int]:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times), torch.cuda.max_memory_allocated()


def measure(config, function, compiled: bool, batch: int, length: int) -> dict:
    model_code.form_heads = function
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    ids = torch.randint(0, config.vocab_size, (batch, length), device="cuda")

    def step():
        model.zero_grad(set_to_none=True)
        hidden = model.model(ids, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()  # the head and the loss are the same for every model

    row = dict(zip(("step_seconds", "step_peak_bytes"), seconds_and_peak(step)))

    attention = model.model.layers[0].self_attn
    if compiled:
        attention = torch.compile(attention)
    hidden = torch.randn(batch, length, config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(length, device="cuda")[None])

    def attention_step():
        attention(hidden, positions)[0].backward(torch.ones_like(hidden))

    row["attention_seconds"], _ = seconds_and_peak(attention_step, 20)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = attention(hidden, positions)[0]
    row["attention_saved_bytes"] = torch.cuda.memory_allocated() - before
    del output
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configuration/t6-medium")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--output", metavar="JSON")
    args = parser.parse_args()
    config = AutoConfig.from_pretrained(args.config)
    config.max_position_embeddings = max(config.max_position_embeddings, args.length)
    print(f"{machine()}; {args.config}, {args.batch} x {args.length} tokens, bfloat16")
    results = {}
    for name, function, compiled in (
        ("materialised, eager", form_heads, False),
        ("materialised, compiled", form_heads, True),
        ("rebuilt, compiled", rebuilt, True),
    ):
        torch.cuda.empty_cache()
        row = results[name] = measure(config, function, compiled, args.batch, args.length)
        print(
            f"{name:24} step {row['step_seconds'] * 1e3:7.1f} ms, peak {row['step_peak_bytes'] / 2**30:6.2f} GiB; "
            f"one attention layer {row['attention_seconds'] * 1e3:6.2f} ms, keeps {row['attention_saved_bytes'] / 2**20:6.0f} MiB",
            flush=True,
        )
    if args.output:
        with open(args.output, "w") as file:
            json.dump({"machine": machine(), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
