"""
Tokens per second of decoding on a GPU: T6 beside Llama with MHA of the same parameters, and beside GQA-8 at 8B.

    python benchmarks/generate_gpu.py --output generate.json

Weights and caches are random: the caches are filled as if a prompt of the given length had been read. `graph` is a
decoding step (model, logits and argmax) captured in a CUDA graph and replayed, over a cache with room for more tokens
than it holds for T6, and over one of exactly that length for Llama, whose SDPA is fastest without a mask; the fastest
of torch's back ends counts. `generate` is `generate()` with its default cache.
"""

import argparse
import json
import time

import torch
from gpu import copy_bandwidth, machine
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicLayer

from modeling_t6 import T6Cache, T6Config
from modeling_t6.cache_t6 import CACHE_NAME, factor_layouts


EIGHT_B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "head_dim": 128, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "t6-xl": lambda: AutoConfig.from_pretrained("configuration/t6-xl"),
    "llama-mha-xl": lambda: AutoConfig.from_pretrained("configuration/llama-mha-xl"),
    "T6 8B (16, 2, 2)": lambda: T6Config(**EIGHT_B, q_rank=16, k_rank=2, v_rank=2),
    "T6 8B (8, 1, 1)": lambda: T6Config(**EIGHT_B, q_rank=8, k_rank=1, v_rank=1),
    "Llama 8B, GQA-8": lambda: LlamaConfig(**EIGHT_B, num_key_value_heads=8),
}
# Batch sizes at a context: the largest common one, and what T6 fits beside.
RUNS = {
    "t6-xl": ((8, 32768), (2, 131072), (8, 131072)),
    "llama-mha-xl": ((8, 32768), (2, 131072), (3, 131072)),
    "T6 8B (16, 2, 2)": ((8, 32768), (4, 131072), (8, 131072)),
    "T6 8B (8, 1, 1)": ((8, 32768), (4, 131072), (8, 131072)),
    "Llama 8B, GQA-8": ((8, 32768), (4, 131072)),
}
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class FullLayer(DynamicLayer):
    """A layer that holds exactly what was put into it, and overwrites its last token."""

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] - 1


def row_shapes(config, layer_idx: int) -> list[tuple[int, int]]:
    """Heads and sizes of the cached keys and values."""
    if isinstance(config, T6Config):
        return [(1, layout.width) for layout in factor_layouts(config, layer_idx)]
    return [(config.num_key_value_heads, config.head_dim)] * 2


def random_states(config, layer_idx: int, batch: int, tokens: int) -> list[torch.Tensor]:
    return [
        torch.empty(batch, heads, tokens, size, device="cuda", dtype=torch.bfloat16).normal_()
        for heads, size in row_shapes(config, layer_idx)
    ]


def step_cache(config, batch: int, tokens: int):
    if isinstance(config, T6Config):
        cache = StaticCache(config=config, max_cache_len=tokens + 128)
        for layer_idx, layer in enumerate(cache.layers):
            states = random_states(config, layer_idx, batch, tokens + 128)
            layer.lazy_initialization(*(x[:, :, :1] for x in states))
            layer.keys, layer.values = states
            layer.cumulative_length.fill_(tokens)
        return cache
    cache = DynamicCache()
    for layer_idx in range(config.num_hidden_layers):
        layer = FullLayer()
        layer.keys, layer.values = random_states(config, layer_idx, batch, tokens + 1)
        layer.is_initialized, layer.dtype, layer.device = True, torch.bfloat16, layer.keys.device
        cache.layers.append(layer)
    return cache


def graph_step(model, batch: int, tokens: int) -> dict:
    config, best = model.config, None
    cache = step_cache(config, batch, tokens)
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    token = torch.randint(0, config.vocab_size, (batch, 1), device="cuda")
    positions = torch.full((1, 1), tokens, device="cuda")
    for backend in BACKENDS if not isinstance(config, T6Config) else BACKENDS[:1]:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream), sdpa_kernel(backend), torch.no_grad():
                step = lambda: model(token, position_ids=positions, **{CACHE_NAME: cache}).logits.argmax(-1)  # noqa: E731
                step()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    token.copy_(step())
                graph.replay()
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(12):
                    graph.replay()
                torch.cuda.synchronize()
                seconds = (time.perf_counter() - start) / 12
            del graph
        except RuntimeError:
            continue
        if best is None or seconds < best["seconds"]:
            best = {"seconds": seconds, "backend": backend.name}
    return best | {"cache_bytes": cache_bytes}


def generate_step(model, batch: int, tokens: int, new: int = 24) -> float:
    """Seconds a token of `generate()`, from the times of a short and a long run."""
    config, times = model.config, []
    ids = torch.randint(0, config.vocab_size, (batch, tokens + 1), device="cuda")
    for count in (2, 2, 2 + new):
        cache = T6Cache(config=config) if isinstance(config, T6Config) else DynamicCache(config=config)
        for layer_idx in range(config.num_hidden_layers):
            cache.update(*random_states(config, layer_idx, batch, tokens), layer_idx)
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, **{CACHE_NAME: cache})
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        del cache
    return (times[2] - times[1]) / new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--output", metavar="JSON")
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{machine()}; bfloat16; copies move {bandwidth / 1e12:.2f} TB/s")
    print(
        f"{'model':20}{'batch x context':>16}{'graph':>11}{'tokens/s':>10}{'generate()':>12}{'tokens/s':>10}{'peak memory':>13}"
    )
    results = []
    for name in args.models:
        torch.manual_seed(0)
        with torch.device("cuda"):
            config = MODELS[name]()
            attention = "flash_tpa" if isinstance(config, T6Config) else "sdpa"
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=attention
            ).eval()
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        for batch, tokens in RUNS[name]:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            row = {"model": name, "batch": batch, "context": tokens} | graph_step(model, batch, tokens)
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
            try:
                row["generate_seconds"] = generate_step(model, batch, tokens)
            except torch.OutOfMemoryError:
                row["generate_seconds"] = None
            results.append(row)
            second = row["generate_seconds"]
            generated = f"{second * 1e3:9.2f} ms{batch / second:10,.0f}" if second else f"{'out of memory':>22}"
            print(
                f"{name:20}{f'{batch} x {tokens:,}':>16}{row['seconds'] * 1e3:8.2f} ms{batch / row['seconds']:10,.0f}{generated}"
                f"{row['peak_bytes'] / 2**30:9.1f} GiB  cache {row['cache_bytes'] / 2**30:.1f} GiB {row['backend']}",
                flush=True,
            )
            if args.output:
                with open(args.output, "w") as file:
                    json.dump({"machine": machine(), "copy_bandwidth": bandwidth, "results": results}, file, indent=1)
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
