"""
What vLLM serves of T6, beside Llama with the same number of parameters: random weights, greedy, random prompts as token ids.

    python benchmarks/serve_vllm.py throughput --output throughput.json
    python benchmarks/serve_vllm.py long --output long.json
    python benchmarks/serve_vllm.py latency --output latency.json
    python benchmarks/serve_vllm.py --plot throughput.json throughput.png

throughput: many requests at once, no prefix caching. Tokens per second are new tokens over the time from the first prompt to
the last token, prefill included. Tokens of cache are vLLM's own number of blocks times their size; bytes per token are those
of the tensors that vLLM allotted for the cache over these tokens, beside what the model's rows take.

long: as many requests of one long context as fit into the same bytes of cache, which are those of --requests requests of the model
that needs most. Each prompt is read once, really and into pages that it shares with no other request; then vLLM's prefix
caching finds these pages again, and two runs that differ in nothing but --steps decoded tokens are timed: the difference is of
decoding steps over a full cache alone. The memory is a part of the GPU's, since reading more prompts would take longer.

latency: time to first token and between tokens of streamed answers of vLLM's server, requests coming at random
(Poisson) at given rates.

A model is a folder of configuration/, or any other with a config.json. Each runs in a process of its own, by default after the
one before has ended; with --together all start at once, which saves minutes where memory is enough for all, and are then
measured in turn. On a CPU:

    VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/serve_vllm.py throughput --models A B --engine '{"enforce_eager": true}' ...
"""

import argparse
import json

from options import add_output, describe, draw, draw_bar_panels, save, table_head, table_row


SMALL = ["llama-mha-small", "llama-gqa-small", "t6-small"]
XL = ["llama-mha-xl", "llama-gqa-xl", "t6-xl"]


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument(
        "--plot", nargs=2, metavar=("JSON", "PNG"), help="draw what an earlier run of throughput wrote"
    )
    commands = parser.add_subparsers(dest="command", metavar="{throughput,long,latency}")

    def command(name: str, models: list[str], requests: int | None) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=f"--help: its options; by default {', '.join(models)}")
        added.add_argument("--models", nargs="+", default=models, metavar="MODEL", help="the first is held against")
        added.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
        added.add_argument(
            "--engine", type=json.loads, default={}, metavar="JSON", help="more arguments of vLLM's LLM(...)"
        )
        added.add_argument("--seed", type=int, default=0)
        if requests is not None:
            added.add_argument("--requests", type=int, default=requests)
        if requests != 512:
            added.add_argument("--together", action="store_true", help="start all models at once, measure in turn")
        add_output(added, plots=False)
        return added

    def lengths(added: argparse.ArgumentParser) -> None:
        added.add_argument("--prompt-tokens", type=int, nargs=2, default=(100, 900), metavar=("FROM", "TO"))
        added.add_argument("--new-tokens", type=int, default=96)

    throughput = command("throughput", SMALL, 512)
    lengths(throughput)
    throughput.add_argument("--memory", type=float, default=0.5, help="part of the GPU's that vLLM may use")
    throughput.add_argument("--repeats", type=int, default=3, help="runs, after one that is not timed")
    long = command("long", XL, 4)
    long.add_argument("--context", type=int, default=32768, help="tokens of a prompt")
    long.add_argument("--steps", type=int, default=96, help="decoded tokens of each request that are timed")
    latency = command("latency", SMALL, None)
    lengths(latency)
    latency.add_argument("--rates", type=float, nargs="+", default=(4, 16, 64), help="requests that come in a second")
    latency.add_argument("--seconds", type=float, default=15, help="for which they come")
    latency.add_argument("--cache", type=int, default=2**34, help="bytes")
    args = parser.parse_args()
    if (args.command is None) == (args.plot is None):
        parser.error("a command is wanted: throughput, long, latency, or --plot")
    return args


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import asyncio
import concurrent.futures
import contextlib
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from turns import Turns, alone
from vllm_server import Server, at_times, complete, machine, model_folders, session


SHORT = 8  # decoded tokens of the shorter of two runs


def random_prompts(count: int, lengths: tuple[int, int], vocab_size: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(generator.randint(*lengths))] for _ in range(count)]


def vocab_size(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]


def engine_settings(args: argparse.Namespace, **settings) -> dict:
    """Of `LLM(...)` or a server; the last word is the user's."""
    settings |= {"dtype": args.dtype, "load_format": "dummy", "skip_tokenizer_init": True, "seed": args.seed}
    return settings | args.engine


def row_bytes(folder: Path, settings: dict) -> int:
    """Bytes that the rows of one token take in all layers: of factors for T6, else of keys and values."""
    import torch
    from transformers import AutoConfig

    from modeling_t6 import T6Config
    from modeling_t6.cache_t6 import factor_layouts

    config = AutoConfig.from_pretrained(folder)
    if isinstance(config, T6Config):
        numbers = sum(layout.width for i in range(config.num_hidden_layers) for layout in factor_layouts(config, i))
    else:
        numbers = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    fp8 = str(settings.get("kv_cache_dtype", "auto")).startswith("fp8")
    return numbers * (1 if fp8 else getattr(torch, settings["dtype"]).itemsize)


def all_row_bytes(folders: list[Path], settings: dict) -> list[int]:
    return [row_bytes(folder, settings) for folder in folders]


def allotted_bytes(worker) -> int:
    """Bytes of the tensors of a worker's cache, each counted once."""
    storages, left = {}, list(worker.model_runner.kv_caches)
    while left:
        value = left.pop()
        if isinstance(value, (list, tuple)):
            left += value
        else:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def start_engine(folder: Path, settings: dict):
    """The engine, and what is known of it once it has started."""
    # In this process, which measures nothing else; if the environment says otherwise, `allotted_bytes` must travel.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    start = time.perf_counter()
    import torch
    import vllm

    llm = vllm.LLM(str(folder), **settings)
    cache = llm.llm_engine.vllm_config.cache_config
    tokens = cache.num_gpu_blocks * cache.block_size
    facts = {
        "start_seconds": time.perf_counter() - start,
        "versions": f"vLLM {vllm.__version__}, torch {torch.__version__}",
        "num_blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "tokens": tokens,
        "bytes_per_token": sum(llm.collective_rpc(allotted_bytes)) / tokens,
    }
    return llm, facts


def run(llm, prompts: list[list[int]], new_tokens: int) -> tuple[float, list]:
    """Seconds until all prompts have their `new_tokens`, and the outputs."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    for output in outputs:
        if len(output.outputs[0].token_ids) != new_tokens:
            raise RuntimeError(f"{len(output.outputs[0].token_ids)} tokens were answered, not {new_tokens}.")
    return seconds, outputs


def throughput_of(folder: Path, settings: dict, prompts: list[list[int]], new_tokens: int, repeats: int) -> dict:
    llm, facts = start_engine(folder, settings)
    seconds = [run(llm, prompts, new_tokens)[0] for _ in range(1 + repeats)][1:]
    rate = len(prompts) * new_tokens / statistics.median(seconds)
    total = (len(prompts) * new_tokens + sum(map(len, prompts))) / statistics.median(seconds)
    facts["row_bytes"] = row_bytes(folder, settings)
    return facts | {"seconds": seconds, "tokens_per_second": rate, "total_tokens_per_second": total}


def measure_throughput(args: argparse.Namespace, folders: dict[str, Path]) -> dict:
    settings = engine_settings(args, gpu_memory_utilization=args.memory, enable_prefix_caching=False)
    rows = {}
    for name, folder in folders.items():
        prompts = random_prompts(args.requests, args.prompt_tokens, vocab_size(folder), args.seed)
        rows[name] = alone(throughput_of, folder, settings, prompts, args.new_tokens, args.repeats)
        print(f"{name}: {rows[name]['tokens_per_second']:,.0f} new tokens/s", flush=True)
    return rows


def print_throughput(args: argparse.Namespace, rows: dict) -> None:
    reference = next(iter(rows))
    spread = "-".join(map(str, args.prompt_tokens))
    print(
        f"\n{args.requests} requests of {spread} prompt tokens and {args.new_tokens} new ones, {args.dtype}, ", end=""
    )
    print(f"{args.memory:g} of the memory; median of {args.repeats} runs, and the slowest and fastest")
    columns = ("with prompts", "tokens of cache", f"of {reference}", "bytes per token", "of rows")
    print(table_head("", "new tokens/s", f"of {reference}", *columns))
    for name, row in rows.items():
        speeds = [args.requests * args.new_tokens / seconds for seconds in row["seconds"]]
        cells = [f"{row['tokens_per_second']:,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f})"]
        cells += [f"{row['tokens_per_second'] / rows[reference]['tokens_per_second']:.2f}"]
        cells += [f"{row['total_tokens_per_second']:,.0f}", f"{row['tokens']:,}"]
        cells += [f"{row['tokens'] / rows[reference]['tokens']:.2f}"]
        print(table_row(name, *cells, f"{row['bytes_per_token']:,.0f}", f"{row['row_bytes']:,}"))


def long_of(turns: Turns, folder: Path, settings: dict, context: int, steps: int, seed: int) -> dict:
    llm, facts = start_engine(folder, settings)
    with turns.mine():
        return facts | time_long(llm, facts, vocab_size(folder), context, steps, seed)


def time_long(llm, facts: dict, vocab_size: int, context: int, steps: int, seed: int) -> dict:
    # A page that a run frees is not taken again while there are pages that none has used: with as many of these as all
    # runs take, the prompts' own stay.
    taken = [1, SHORT, SHORT, SHORT + steps]
    pages = -(-context // facts["block_size"])
    pages += sum(1 + -(-new // facts["block_size"]) for new in taken)
    count = (facts["num_blocks"] - 1) // pages  # one is vLLM's own
    if count == 0:
        raise RuntimeError(f"No request of {context:,} tokens fits into {facts['tokens']:,} tokens of cache.")
    if count > (most := llm.llm_engine.vllm_config.scheduler_config.max_num_seqs):
        raise RuntimeError(
            f"{count} requests fit, of which {most} run at once: --engine '{{\"max_num_seqs\": {count}}}'"
        )
    prompts = random_prompts(count, (context, context), vocab_size, seed)
    prefill_seconds, _ = run(llm, prompts, 1)
    run(llm, prompts, SHORT)  # of another shape than the one before; not timed
    times = []
    for new in (SHORT, SHORT + steps):
        seconds, outputs = run(llm, prompts, new)
        times.append(seconds)
        for output in outputs:
            if output.num_cached_tokens < context - 2 * facts["block_size"]:
                raise RuntimeError(f"Of {context:,} tokens of a prompt, {output.num_cached_tokens:,} were still held.")
    step = (times[1] - times[0]) / steps
    return {
        "requests": count,
        "prefill_seconds": prefill_seconds,
        "step_seconds": step,
        "tokens_per_second": count / step,
    }


def groups(args: argparse.Namespace, folders: dict[str, Path]) -> list[dict[str, Path]]:
    """The models that start together."""
    return [folders] if args.together else [{name: folder} for name, folder in folders.items()]


def fixed_cache(num_bytes: int) -> dict:
    """Settings for so many bytes of cache, whatever else runs on the GPU: the part is what must be free at the start."""
    return {"kv_cache_memory_bytes": num_bytes, "gpu_memory_utilization": 0.1}


def measure_long(args: argparse.Namespace, folders: dict[str, Path]) -> dict:
    length = args.context + SHORT + args.steps
    needs = dict(zip(folders, alone(all_row_bytes, list(folders.values()), engine_settings(args))))
    # 3% for the pages that `time_long` leaves free.
    cache = fixed_cache(int(1.03 * max(needs.values()) * length * args.requests))
    settings = engine_settings(args, enable_prefix_caching=True, max_num_seqs=256, max_model_len=length, **cache)
    rows = {}
    for group in groups(args, folders):
        with multiprocessing.Manager() as manager, concurrent.futures.ThreadPoolExecutor(len(group)) as threads:
            turns = Turns(manager, len(group))
            running = {
                name: threads.submit(turns.alone, long_of, folder, settings, args.context, args.steps, args.seed)
                for name, folder in group.items()
            }
            for name, result in running.items():
                rows[name] = result.result() | {"row_bytes": needs[name]}
                print(f"{name}: {rows[name]['tokens_per_second']:,.0f} tokens/s", flush=True)
    return rows


def print_long(args: argparse.Namespace, rows: dict) -> None:
    reference = next(iter(rows))
    print(f"\n{args.context:,} tokens of context, {args.dtype}; decoding alone, over {args.steps} steps")
    columns = ("requests", "cache, GiB", "ms per step", "tokens/s", f"of {reference}")
    print(table_head("", *columns, "bytes per token", "of rows", "prefill, s", "start, s"))
    for name, row in rows.items():
        cells = [row["requests"], f"{row['tokens'] * row['bytes_per_token'] / 2**30:.2f}"]
        cells += [f"{row['step_seconds'] * 1e3:.2f}", f"{row['tokens_per_second']:,.0f}"]
        cells += [f"{row['tokens_per_second'] / rows[reference]['tokens_per_second']:.2f}"]
        cells += [f"{row['bytes_per_token']:,.0f}", f"{row['row_bytes']:,}"]
        print(table_row(name, *cells, f"{row['prefill_seconds']:.1f}", f"{row['start_seconds']:.0f}"))


def percentile(values: list[float], part: float) -> float:
    """The smallest value that a `part` of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


async def at_rate(url: str, rate: float, seconds: float, prompts: list[list[int]], new_tokens: int, seed: int) -> dict:
    generator, starts, start = random.Random(seed), [], 0.0
    while (start := start + generator.expovariate(rate)) < seconds or not starts:
        starts.append(start)
    async with session() as client:
        calls = [complete(client, url, prompts[i % len(prompts)], new_tokens) for i in range(len(starts))]
        answers = await at_times(starts, calls)
    last = max(answer.times[-1] for answer in answers)
    first_token = [answer.first_token_seconds for answer in answers]
    between = [gap for answer in answers for gap in answer.inter_token_seconds]
    return {
        "rate": rate,
        "requests": len(answers),
        "tokens_per_second": len(answers) * new_tokens / (last - min(answer.asked for answer in answers)),
        "first_token_median": statistics.median(first_token),
        "first_token_99": percentile(first_token, 0.99),
        "between_median": statistics.median(between),
        "between_99": percentile(between, 0.99),
    }


def latency_of(server: Server, args: argparse.Namespace, vocab_size: int) -> dict:
    prompts = random_prompts(512, args.prompt_tokens, vocab_size, args.seed)
    asyncio.run(at_rate(server.url, 100, 0.2, prompts, args.new_tokens, args.seed + 1))  # not timed
    rates = [
        asyncio.run(at_rate(server.url, rate, args.seconds, prompts, args.new_tokens, args.seed))
        for rate in args.rates
    ]
    return {"versions": f"vLLM {server.version()}", "rates": rates}


def measure_latency(args: argparse.Namespace, folders: dict[str, Path]) -> dict:
    settings = engine_settings(args, enable_prefix_caching=False, **fixed_cache(args.cache))
    rows = {}
    for group in groups(args, folders):
        with contextlib.ExitStack() as stack:
            servers = {
                name: stack.enter_context(Server(folder, settings, folder / "server.log"))
                for name, folder in group.items()
            }
            for server in servers.values():
                server.wait()
            for name, server in servers.items():
                rows[name] = latency_of(server, args, vocab_size(group[name]))
                print(f"{name}: done", flush=True)
    return rows


def print_latency(args: argparse.Namespace, rows: dict) -> None:
    spread = "-".join(map(str, args.prompt_tokens))
    print(
        f"\nrequests of {spread} prompt tokens and {args.new_tokens} new ones that come in {args.seconds:g} s, {args.dtype}; ms"
    )
    columns = ("first token, median", "99th", "between tokens, median", "99th")
    print(table_head("", "requests/s", "requests", "new tokens/s", *columns))
    for name, row in rows.items():
        for x in row["rates"]:
            cells = [f"{x['rate']:g}", x["requests"], f"{x['tokens_per_second']:,.0f}"]
            cells += [f"{x[key] * 1e3:.1f}" for key in ("first_token_median", "first_token_99")]
            cells += [f"{x[key] * 1e3:.2f}" for key in ("between_median", "between_99")]
            print(table_row(name, *cells))


def plot(data: dict, figure) -> None:
    """Tokens per second and tokens of cache of each model beside the others."""
    rows = data["models"]
    panels = (
        ("new tokens per second", "{:,.0f}", [row["tokens_per_second"] for row in rows.values()]),
        ("tokens of cache, millions", "{:,.2f}", [row["tokens"] / 1e6 for row in rows.values()]),
    )
    colors = ["tab:blue" if "t6" in name else "tab:gray" for name in rows]
    draw_bar_panels(figure, panels, list(rows), colors)
    figure.supxlabel(f"{data['dtype']}: {data['machine']}", fontsize=8)


MEASURES = {
    "throughput": (measure_throughput, print_throughput),
    "long": (measure_long, print_long),
    "latency": (measure_latency, print_latency),
}


def main() -> None:
    args = parse_args()
    if args.plot:
        draw(plot, args.plot, (8, 1.9))
        return
    measure, print_rows = MEASURES[args.command]
    if args.command == "long":
        context = args.context + SHORT + args.steps
    else:
        context = args.prompt_tokens[1] + args.new_tokens
    with tempfile.TemporaryDirectory() as directory:
        folders = model_folders(args.models, Path(directory), context)
        rows = measure(args, folders)
    data = {name: value for name, value in vars(args).items() if name not in ("output", "plot")}
    data |= {"machine": f"{machine()}, {next(iter(rows.values()))['versions']}", "models": rows}
    print(f"\n{data['machine']}", end="")
    print_rows(args, rows)
    save(data, args.output)


if __name__ == "__main__":
    main()
