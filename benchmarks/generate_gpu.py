"""
Tokens per second of decoding on a GPU: T6 beside Llama with MHA of the same parameters, and beside GQA-8 at 8B.

    python benchmarks/generate_gpu.py --output generate.json
    python benchmarks/generate_gpu.py --plot generate.json generate.png

Weights and caches are random: the caches are filled as if a prompt of the given length had been read. `graph` is a
decoding step (model, logits and argmax) captured in a CUDA graph and replayed, over a cache with room for more tokens
than it holds for T6, and over one of exactly that length for Llama, whose SDPA is fastest without a mask; the fastest
of torch's back ends counts. The largest context is that of one sequence with which such a step, without a graph,
still finds memory, to 1%. `generate()` is timed after all else: with its default cache, and at 128k with a static one,
for which Transformers compiles the model.

    python benchmarks/generate_gpu.py --short

times steps over short contexts instead, as a graph and (without --skip-generate) by `generate()` with a static cache: T6 with the
factors of a layer from one product, stored by one kernel, and with neither, and what each takes of the time of what it is held
against.
"""

import argparse

from options import add_output, batch_and_tokens, describe, draw, draw_bar_panels, save


EIGHT_B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "head_dim": 128, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "t6-xl": lambda: AutoConfig.from_pretrained(DIRECTORY / "t6-xl"),
    "llama-mha-xl": lambda: AutoConfig.from_pretrained(DIRECTORY / "llama-mha-xl"),
    "T6 8B (16, 2, 2)": lambda: T6Config(**EIGHT_B, q_rank=16, k_rank=2, v_rank=2),
    "T6 8B (8, 1, 1)": lambda: T6Config(**EIGHT_B, q_rank=8, k_rank=1, v_rank=1),
    "Llama 8B, GQA-8": lambda: LlamaConfig(**EIGHT_B, num_key_value_heads=8),
}


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--skip-generate", action="store_true", help="leave out the times of generate()")
    parser.add_argument("--short", action="store_true", help="short contexts alone, fused and not")
    parser.add_argument(
        "--skip-unfused", action="store_true", help="with --short, leave out T6 without its fused ways"
    )
    parser.add_argument(
        "--runs",
        type=batch_and_tokens,
        nargs="+",
        metavar="BxN",
        help="of --short: others than 1x1024 32x1024 1x8192",
    )
    add_output(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from gpu import copy_bandwidth, machine, release_memory
from timing import call_seconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicLayer
from turns import Turns

from configuration.make_configs import DIRECTORY
from modeling_t6 import T6Cache, T6Config, factor_product_t6, stored_factors_t6
from modeling_t6.cache_t6 import CACHE_NAME, factor_layouts
from modeling_t6.factor_product_t6 import packed_factors


REFERENCES = {  # what a model is held against
    "t6-xl": "llama-mha-xl",
    "llama-mha-xl": "llama-mha-xl",
    "T6 8B (16, 2, 2)": "Llama 8B, GQA-8",
    "T6 8B (8, 1, 1)": "Llama 8B, GQA-8",
    "Llama 8B, GQA-8": "Llama 8B, GQA-8",
}
# Batch sizes at a context: the largest common one, and what T6 fits beside.
RUNS = {
    "t6-xl": ((8, 32768), (2, 131072), (8, 131072)),
    "llama-mha-xl": ((8, 32768), (2, 131072), (3, 131072)),
    "T6 8B (16, 2, 2)": ((8, 32768), (4, 131072), (8, 131072)),
    "T6 8B (8, 1, 1)": ((8, 32768), (4, 131072), (8, 131072)),
    "Llama 8B, GQA-8": ((8, 32768), (4, 131072)),
}
SHORT_RUNS = ((1, 1024), (32, 1024), (1, 8192))
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


def bytes_per_token(config) -> int:
    return sum(2 * heads * size for idx in range(config.num_hidden_layers) for heads, size in row_shapes(config, idx))


def static_cache(config, batch: int, tokens: int) -> StaticCache:
    """A random one that holds `tokens` tokens of each sequence and has room for more."""
    cache = StaticCache(config=config, max_cache_len=tokens + 128)
    for layer_idx, layer in enumerate(cache.layers):
        empty = [
            torch.empty(batch, heads, 0, size, device="cuda", dtype=torch.bfloat16)
            for heads, size in row_shapes(config, layer_idx)
        ]
        layer.lazy_initialization(*empty)
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(tokens)
    return cache


def step_cache(config, batch: int, tokens: int):
    """A random cache that holds `tokens` tokens of each sequence and takes one more."""
    if isinstance(config, T6Config):
        return static_cache(config, batch, tokens)
    cache = DynamicCache()
    for layer_idx in range(config.num_hidden_layers):
        layer = FullLayer()
        layer.keys, layer.values = random_states(config, layer_idx, batch, tokens + 1)
        layer.is_initialized, layer.dtype, layer.device = True, torch.bfloat16, layer.keys.device
        cache.layers.append(layer)
    return cache


def backends(config) -> tuple[SDPBackend, ...]:
    """Those to choose from: one for T6, which decodes with FlashTPA whatever it is."""
    return BACKENDS[:1] if isinstance(config, T6Config) else BACKENDS


def replay_seconds(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """Seconds of one of `count` replays, one after another."""
    return call_seconds(lambda: [graph.replay() for _ in range(count)], "cuda") / count


def graph_step(model, batch: int, tokens: int) -> dict:
    config, best = model.config, None
    cache = step_cache(config, batch, tokens)
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    token = torch.randint(0, config.vocab_size, (batch, 1), device="cuda")
    positions = torch.full((1, 1), tokens, device="cuda")
    for backend in backends(config):
        torch.cuda.reset_peak_memory_stats()
        try:
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            # While a graph is captured Transformers makes a mask that it leaves out otherwise: Llama is faster without.
            no_mask = mock.patch("transformers.masking_utils.is_tracing", return_value=False)
            with torch.cuda.stream(stream), sdpa_kernel(backend), torch.no_grad(), no_mask, packed_factors(model):
                step = lambda: model(token, position_ids=positions, **{CACHE_NAME: cache}).logits.argmax(-1)  # noqa: E731
                step()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    token.copy_(step())
                graph.replay()
                seconds = replay_seconds(graph, 12)
            del graph
        except RuntimeError:
            continue
        if best is None or seconds < best["seconds"]:
            best = {"seconds": seconds, "backend": backend.name, "peak_bytes": torch.cuda.max_memory_allocated()}
    if best is None:
        raise torch.OutOfMemoryError("No back end finds the memory that it needs.")
    return best | {"cache_bytes": cache_bytes}


def plain_step(model, tokens: int, backend: SDPBackend) -> dict:
    """One sequence's step over a cache of `tokens` tokens, without a graph: its time and memory."""
    torch.cuda.reset_peak_memory_stats()
    cache = step_cache(model.config, 1, tokens)
    token = torch.randint(0, model.config.vocab_size, (1, 1), device="cuda")
    positions = torch.full((1, 1), tokens, device="cuda")

    def step() -> None:
        model(token, position_ids=positions, **{CACHE_NAME: cache}).logits.argmax(-1)

    with sdpa_kernel(backend), torch.no_grad():
        times = [call_seconds(step, "cuda") for _ in range(4)]
    return {
        "tokens": tokens,
        "seconds": statistics.median(times[1:]),
        "cache_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "backend": backend.name,
    }


def largest_context(model, fastest: str | None) -> dict:
    """The largest context of one sequence, with the back end named `fastest` unless it does not take so many tokens."""
    choices = sorted(backends(model.config), key=lambda backend: backend.name != fastest)
    release_memory()
    tokens = torch.cuda.mem_get_info()[0] // bytes_per_token(model.config)
    while tokens >= 1024:
        tokens -= tokens % 1024
        for backend in choices:
            release_memory()
            try:
                return plain_step(model, tokens, backend)
            except RuntimeError as error:
                # Of memory that libraries take by themselves, CUDA and cuBLAS speak in their own words.
                if any(words in str(error) for words in ("out of memory", "ALLOC_FAILED")):
                    break
                print(f"{backend.name} does not take {tokens:,} tokens: {error}", flush=True)
        tokens = tokens * 99 // 100
    raise RuntimeError("No context of 1,024 tokens fits.")


def generate_step(model, batch: int, tokens: int, static: bool = False, new: int = 24) -> float:
    """Seconds a token of `generate()`, from the times of a short and a long run."""
    return next(generate_steps(model, batch, tokens, static, new, warm=2))


def generate_steps(model, batch: int, tokens: int, static: bool, new: int, warm: int) -> Iterator[float]:
    """After `warm` short runs, at the first of which Transformers compiles: seconds a token, as often as they are asked for."""
    config = model.config
    ids = torch.randint(0, config.vocab_size, (batch, tokens + 1), device="cuda")
    cache = static_cache(config, batch, tokens) if static else None

    def seconds(count: int) -> float:
        nonlocal cache
        if static:
            for layer in cache.layers:
                layer.cumulative_length.fill_(tokens)
        else:
            cache = T6Cache(config=config) if isinstance(config, T6Config) else DynamicCache(config=config)
            for layer_idx in range(config.num_hidden_layers):
                cache.update(*random_states(config, layer_idx, batch, tokens), layer_idx)
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, CACHE_NAME: cache}
        return call_seconds(lambda: model.generate(ids, **options), "cuda")

    for _ in range(warm - 1):
        seconds(4)
    while True:
        short = seconds(4)
        yield (seconds(4 + new) - short) / new


def build(name: str):
    torch.manual_seed(0)
    with torch.device("cuda"):
        config = MODELS[name]()
        attention = "flash_tpa" if isinstance(config, T6Config) else "sdpa"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def family(name: str) -> list[str]:
    """The models that are held against the same one, with it."""
    return [other for other in MODELS if REFERENCES[other] == REFERENCES[name]]


def rates(data: dict, name: str, context: int) -> dict[int, float]:
    """Tokens per second of a model by batch size."""
    rows = (row for row in data["results"] if row["model"] == name and row["context"] == context)
    return {row["batch"]: row["batch"] / row["seconds"] for row in rows}


def equal_batch(data: dict, name: str, context: int) -> int | None:
    """The largest batch that a model and all that it is held against were run with."""
    measured = [rates(data, other, context) for other in family(name)]
    return max(set.intersection(*map(set, filter(None, measured))), default=None) if any(measured) else None


def print_ratios(data: dict) -> None:
    largest = {row["model"]: row["tokens"] for row in data["largest"]}
    for name, reference in REFERENCES.items():
        if name == reference:
            continue
        for context in (32768, 131072):
            own, other = rates(data, name, context), rates(data, reference, context)
            if not own or not other:
                continue
            batch = equal_batch(data, name, context)
            line = f"{name} / {reference}, {context:,} tokens, tokens/s: "
            if batch is not None:
                line += f"{own[batch] / other[batch]:.2f} at batch {batch}, "
            line += f"{own[max(own)] / other[max(other)]:.2f} at batch {max(own)} against {max(other)}"
            print(line)
        if name in largest and reference in largest:
            print(f"{name} / {reference}, largest context: {largest[name] / largest[reference]:.2f}")


def print_largest(data: dict) -> None:
    tokens = {row["model"]: row["tokens"] for row in data["largest"]}
    print(f"{'largest context':20}{'tokens':>12}{'of Llama':>10}{'cache':>12}{'peak memory':>13}{'step':>12}")
    for row in data["largest"]:
        name = row["model"]
        ratio = f"{row['tokens'] / tokens[REFERENCES[name]]:.2f}" if REFERENCES[name] in tokens else ""
        print(
            f"{name:20}{row['tokens']:12,}{ratio:>10}{row['cache_bytes'] / 2**30:8.1f} GiB"
            f"{row['peak_bytes'] / 2**30:9.1f} GiB{row['seconds'] * 1e3:9.2f} ms"
        )


def plot(data: dict, figure) -> None:
    """Each model beside what it is held against: bytes of cache, tokens per second at the longest context, and what fits."""
    largest = {row["model"]: row for row in data["largest"]}
    context = max(row["context"] for row in data["results"])
    batches = {name: equal_batch(data, name, context) for name in MODELS}
    names = [name for name in MODELS if name in largest and batches[name] in rates(data, name, context)]
    of_batches = " and ".join(dict.fromkeys(str(batches[name]) for name in names))
    # A gap between the groups that are held against one another.
    places = [place + 0.5 * sum(REFERENCES[n] == n for n in names[:place]) for place in range(len(names))]
    colors = ["tab:gray" if REFERENCES[name] == name else "tab:blue" for name in names]
    kib = [largest[name]["cache_bytes"] / largest[name]["tokens"] / 1024 for name in names]
    speeds = [rates(data, name, context)[batches[name]] for name in names]
    contexts = [largest[name]["tokens"] / 1e6 for name in names]
    panels = (
        ("KiB of cache for a token", "{:,.0f}", kib),
        (f"tokens per second at {context // 1024}k, batch {of_batches}", "{:,.0f}", speeds),
        ("largest context, million tokens", "{:.1f}", contexts),
    )
    axes = draw_bar_panels(figure, panels, places, colors)
    axes[0].set_yticks(places, names)
    figure.supxlabel(f"bfloat16: {data['machine']}", fontsize=8)


def measure(names: list[str], skip_generate: bool, output: Path | None) -> None:
    bandwidth = copy_bandwidth()
    data = {"machine": machine(), "copy_bandwidth": bandwidth, "results": [], "largest": []}

    print(f"{machine()}; bfloat16; copies move {bandwidth / 1e12:.2f} TB/s")
    print(f"{'model':20}{'batch x context':>16}{'graph':>11}{'tokens/s':>10}{'peak memory':>13}{'cache':>12}")
    for name in names:
        model, fastest = build(name), None
        for batch, tokens in RUNS[name]:
            release_memory()
            try:
                row = {"model": name, "batch": batch, "context": tokens} | graph_step(model, batch, tokens)
            except torch.OutOfMemoryError:
                print(f"{name:20}{f'{batch} x {tokens:,}':>16}  out of memory", flush=True)
                continue
            fastest = row["backend"]
            data["results"].append(row)
            save(data, output)
            print(
                f"{name:20}{f'{batch} x {tokens:,}':>16}{row['seconds'] * 1e3:8.2f} ms{batch / row['seconds']:10,.0f}"
                f"{row['peak_bytes'] / 2**30:9.1f} GiB{row['cache_bytes'] / 2**30:8.1f} GiB"
                f"{'' if len(backends(model.config)) == 1 else f'  {fastest}'}",
                flush=True,
            )
        data["largest"].append({"model": name} | largest_context(model, fastest))
        save(data, output)
        print(f"{name:20}largest context {data['largest'][-1]['tokens']:,}", flush=True)
        del model
        release_memory()
    print()
    print_largest(data)
    print()
    print_ratios(data)
    if skip_generate:
        return
    print()
    print(f"{'model':20}{'batch x context':>16}{'generate()':>12}{'tokens/s':>10}")
    for name in names:
        model = build(name)
        for row in (row for row in data["results"] if row["model"] == name):
            release_memory()
            batch, tokens = row["batch"], row["context"]
            # One static cache for each model, since each is a compilation.
            for static in (False, True) if (batch, tokens) == RUNS[name][1] else (False,):
                key = "generate_static_seconds" if static else "generate_seconds"
                try:
                    second = row[key] = generate_step(model, batch, tokens, static)
                except torch.OutOfMemoryError:
                    second = row[key] = None
                save(data, output)
                times = f"{second * 1e3:9.2f} ms{batch / second:10,.0f}" if second else f"{'out of memory':>22}"
                print(f"{name:20}{f'{batch} x {tokens:,}':>16}{times}{'  static, compiled' * static}", flush=True)
        del model
        release_memory()


def short_steps(
    turns: Turns, name: str, fused: bool | None, runs: list[tuple[int, int]], skip_generate: bool
) -> list[list[float]]:
    """Seconds of a graph and of a token of `generate()`, for each of `runs`. The models compile at the same time."""
    stored_factors_t6.FUSED = factor_product_t6.PACK = fused is not False
    torch._dynamo.config.automatic_dynamic_shapes = False  # each run with a compilation of its own
    model = build(name)
    steps = [] if skip_generate else [generate_steps(model, *run, static=True, new=120, warm=2) for run in runs]
    for step in steps:
        next(step)
    with turns.mine():
        times = []
        for run in runs:
            release_memory()
            times.append([graph_step(model, *run)["seconds"]])
        for row, step in zip(times, steps):
            row.append(next(step))
    return times


def measure_short(
    names: list[str], runs: list[tuple[int, int]], skip_generate: bool, skip_unfused: bool, output: Path | None
) -> None:
    """References first, whatever the order of `names`, so that each line shows its ratios."""
    data, seconds = {"machine": machine(), "short": []}, {}
    ways = (True,) if skip_unfused else (True, False)
    jobs = [
        (name, fused)
        for name in sorted(names, key=lambda name: REFERENCES[name] != name)
        for fused in (ways if isinstance(MODELS[name](), T6Config) else (None,))
    ]
    print(f"{machine()}; bfloat16; ratios are of times")
    print(f"{'model':20}{'fused':>6}{'batch x context':>16}{'graph':>11}{'ratio':>7}{'static':>12}{'ratio':>7}")
    with multiprocessing.Manager() as manager, ThreadPoolExecutor(len(jobs)) as threads:
        turns = Turns(manager, len(jobs))
        running = [threads.submit(turns.alone, short_steps, *job, runs, skip_generate) for job in jobs]
        for (name, fused), result in zip(jobs, running):
            for (batch, tokens), times in zip(runs, result.result()):
                seconds[name, batch, tokens] = times
                row = {"model": name, "fused": fused, "batch": batch, "context": tokens}
                data["short"].append(row | dict(zip(("seconds", "generate_static_seconds"), times)))
                save(data, output)
                reference = seconds.get((REFERENCES[name], batch, tokens))
                line = f"{name:20}{'' if fused is None else 'yes' if fused else 'no':>6}{f'{batch} x {tokens:,}':>16}"
                for own, other in zip(times, reference or (None, None)):
                    line += f"{own * 1e3:8.3f} ms" + (f"{own / other:7.3f}" if other else f"{'':7}")
                print(line, flush=True)


def main() -> None:
    args = parse_args()
    if args.short:
        return measure_short(args.models, args.runs or SHORT_RUNS, args.skip_generate, args.skip_unfused, args.output)
    if args.plot:
        draw(plot, args.plot, (10, 2.9))
    else:
        measure(args.models, args.skip_generate, args.output)


if __name__ == "__main__":
    main()
