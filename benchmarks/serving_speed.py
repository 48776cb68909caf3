"""
Tokens per second of Transformers' own engine, `generate_batch`: T6, whose pages hold factors, beside Llama with MHA of the
same parameters, by turns, with CUDA graphs where the engine records them, and without.

    python benchmarks/serving_speed.py --output serving_speed.json
    python benchmarks/serving_speed.py --models t6-small --rounds 1 --profile

Weights are random, prompts of random lengths, the same for all. A turn is the time from the first request to the last
answer, after a few requests that are not timed. `engine` leaves graphs and overlapped steps to the engine, `eager` has
neither, `graphs` asks for graphs of all steps; how many answers are the same in the first two is printed at the end, all of them in `--dtype float32`. On a GPU; on a CPU
it shows that it runs.
"""

import argparse

from options import ROOT, add_output, describe, save, table_head, table_row


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["llama-mha-small", "t6-small"], help="of configuration/, or folders"
    )
    parser.add_argument("--modes", nargs="+", choices=("engine", "eager", "graphs"), default=["engine", "eager"])
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--prompt", type=int, nargs=2, default=(100, 900), metavar=("FEWEST", "MOST"), help="tokens")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--page-size", type=int, default=256)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--profile", action="store_true", help="show what each turn's time goes to, in a turn of its own"
    )
    add_output(parser, plots=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import cProfile
import io
import pstats
import random
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager

import modeling_t6  # noqa: F401  registers T6
from configuration.make_configs import DIRECTORY


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE_SIZE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
SHOWN = 18  # lines of a profile


def random_model(name: str, dtype: str) -> PreTrainedModel:
    folder = DIRECTORY / name if (DIRECTORY / name).is_dir() else Path(name)
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):  # which T6 starts at zero
                    weight.normal_(std=weight.shape[-1] ** -0.5)
    return model


def random_prompts(args: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    generator = random.Random(0)
    lengths = [generator.randint(*args.prompt) for _ in range(args.requests)]
    return [[generator.randrange(2, vocab_size) for _ in range(length)] for length in lengths]


def start(model: PreTrainedModel, args: argparse.Namespace, mode: str) -> ContinuousBatchingManager:
    """An engine with room for all requests at once, its graphs recorded."""
    most_pages = -(-(args.prompt[1] + args.new_tokens) // args.page_size) + 1
    fields = {PAGE_SIZE: args.page_size, "num_blocks": args.requests * most_pages * 5 // 4, "max_batch_tokens": 8192}
    fields["allow_block_sharing"] = False  # else a turn would find the prompts of the one before
    if mode == "eager":
        fields |= {"use_cuda_graph": False, "use_async_batching": False}
    elif mode == "graphs":
        fields["use_cuda_graph"] = True
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=args.new_tokens),
        continuous_batching_config=ContinuousBatchingConfig(**fields, max_requests_per_batch=args.requests),
    )
    manager.warmup()
    manager.start()
    return manager


def answer(
    manager: ContinuousBatchingManager, prompts: list[list[int]], new_tokens: int
) -> tuple[float, list[list[int]]]:
    """Seconds until all are answered, and the answers."""
    begin = time.perf_counter()
    names, answers = manager.add_requests(prompts, max_new_tokens=new_tokens), {}
    for _ in prompts:
        output = manager.get_result(timeout=300)
        if output is None or output.error is not None or len(output.generated_tokens) != new_tokens:
            raise RuntimeError(f"A request was not answered: {output and output.error}.")
        answers[output.request_id] = output.generated_tokens
    return time.perf_counter() - begin, [answers[name] for name in names]


def show_profile(manager: ContinuousBatchingManager, prompts: list[list[int]], new_tokens: int) -> None:
    """The kernels and the functions of the engine's thread that take longest, of two turns."""
    if DEVICE == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            seconds, _ = answer(manager, prompts, new_tokens)
            torch.cuda.synchronize()
        events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in events) * 1e-6
        print(f"GPU busy for {total:.2f} of {seconds:.2f} s; milliseconds, calls, kernel")
        for event in events[:SHOWN]:
            print(f"{event.self_device_time_total * 1e-3:9.1f} {event.count:8,} {event.key[:110]}")
    profiler, body = cProfile.Profile(), manager._generation_loop_body
    manager._generation_loop_body = lambda *args, **kwargs: profiler.runcall(body, *args, **kwargs)
    answer(manager, prompts, new_tokens)
    manager._generation_loop_body = body
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(SHOWN)
    print(text.getvalue().replace(f"{ROOT}/", ""))


def turn(
    model: PreTrainedModel, args: argparse.Namespace, mode: str, profile: bool = False
) -> tuple[dict, list[list[int]]]:
    """What is told of a turn, and its answers."""
    prompts = random_prompts(args, model.config.vocab_size)
    manager = start(model, args, mode)
    steps = 0
    step = manager._generation_step

    def counted_step():
        nonlocal steps
        steps += 1
        step()

    try:
        answer(manager, prompts[:: max(1, len(prompts) // 8)], 4)
        manager._generation_step = counted_step
        seconds, answers = answer(manager, prompts, args.new_tokens)
        counted, config = steps, manager.continuous_batching_config
        if profile:
            show_profile(manager, prompts, args.new_tokens)
        told = {
            "tokens_per_second": len(prompts) * args.new_tokens / seconds,
            "seconds": seconds,
            "steps": counted,
            "attention": model.config._attn_implementation,
            "graphs": config.cuda_graph_booleans,
            "overlapped": bool(config.use_async_batching),
        }
        return told, answers
    finally:
        manager.stop(block=True)


def main() -> None:
    args = parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(
        f"{device}, torch {torch.__version__}, Transformers {transformers.__version__}: {args.requests} requests of",
        end=" ",
    )
    print(f"{args.prompt[0]} to {args.prompt[1]} tokens and {args.new_tokens} new ones")
    columns = ("tokens/s", "seconds", "steps", "attention", "graphs of prompts, decoding", "overlapped")
    print(table_head("model", "mode", *columns, words=2))
    models = {name: random_model(name, args.dtype) for name in args.models}
    turns, answers = {(name, mode): [] for mode in args.modes for name in args.models}, {}
    for round_ in range(args.rounds):
        for name, mode in turns:
            try:
                result, answers[name, mode] = turn(
                    models[name], args, mode, profile=args.profile and round_ == args.rounds - 1
                )
            except (RuntimeError, MemoryError) as error:
                print(table_row(name, mode, f"failed: {error}"), flush=True)
                continue
            turns[name, mode].append(result)
            cells = [f"{result['tokens_per_second']:,.0f}", f"{result['seconds']:.2f}", result["steps"]]
            cells += [result["attention"], result["graphs"], result["overlapped"]]
            print(table_row(name, mode, *cells), flush=True)
    medians = {
        key: statistics.median(result["tokens_per_second"] for result in results)
        for key, results in turns.items()
        if results
    }
    first = args.models[0]
    for (name, mode), median in medians.items():
        if name != first and (first, mode) in medians:
            print(f"{name} / {first}, {mode}: {median / medians[first, mode]:.2f}")
    for name in args.models:
        both = [answers[name, mode] for mode in args.modes[:2] if (name, mode) in answers]
        if len(both) == 2:
            same = sum(one == other for one, other in zip(*both))
            print(f"{name}: {same} of {args.requests} answers are the same in {' and '.join(args.modes[:2])}")
    results = {f"{name}, {mode}": results for (name, mode), results in turns.items()}
    save(
        {"device": device, "torch": torch.__version__, "transformers": transformers.__version__} | results, args.output
    )


if __name__ == "__main__":
    main()
