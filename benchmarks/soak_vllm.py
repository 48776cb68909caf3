"""
Runs vLLM's server for a while under clients that disconnect in mid-stream, and looks at what is left: no page lost, no wrong
answer, memory flat.

    python benchmarks/soak_vllm.py examples/t6-tiny-shakespeare --minutes 30 --output soak.json

Greedy answers are known from the same server, asked one prompt at a time before. Half of the prompts begin as another does, and
share its pages. Then each client asks for one after another and, half of the time, leaves after a random number of tokens, which
may be none. An answer that was not left must be the known one. Rounding differs between batches: where an answer first
differs, the server is asked in the end, alone, for the log-probabilities of both tokens, and the answer is wrong unless they
are within --tie of each other. With float32 (--dtype) there should be none of these, either.

A page is lost if vLLM says that one is in use when nobody asks any more. Memory is that of all processes of the server and
of the GPU, sampled all the time: flat means that the median of the last quarter is within --growth of the second one's. The exit
code is 1 if any of it fails.
"""

import argparse
import json
import sys
from pathlib import Path

from options import add_output, describe, save


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("folder", type=Path, help="a model with its weights")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(8, 160), metavar=("FROM", "TO"))
    parser.add_argument("--new-tokens", type=int, nargs=2, default=(16, 96), metavar=("FROM", "TO"))
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument(
        "--engine", type=json.loads, default={}, metavar="JSON", help="more arguments of vLLM's LLM(...)"
    )
    parser.add_argument("--tie", type=float, default=0.05, help="in nats, of tokens that rounding may swap")
    parser.add_argument("--growth", type=float, default=0.02, help="part by which memory may grow")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser, plots=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import asyncio
import contextlib
import os
import random
import statistics
import tempfile
import time
import urllib.request

from vllm_server import Server, complete, gpu_query, machine, session


def resident_bytes(leader: int) -> int:
    """Of all processes of the session that a process leads."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # of processes that end meanwhile
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def make_prompts(args: argparse.Namespace, vocab_size: int, generator: random.Random) -> list[tuple[list[int], int]]:
    """Prompts, every other one a piece of the one before with other tokens behind it, and how many tokens to answer."""
    prompts = []
    for i in range(args.prompts):
        prompt = [generator.randrange(vocab_size) for _ in range(generator.randint(*args.prompt_tokens))]
        if i % 2:
            shared = prompts[-1][0][: generator.randint(1, args.prompt_tokens[1])]
            prompt = shared + prompt[: max(1, args.prompt_tokens[1] - len(shared))]
        prompts.append((prompt, generator.randint(*args.new_tokens)))
    return prompts


class Soak:
    """Clients of one server, and what they saw."""

    def __init__(self, server: Server, prompts: list[tuple[list[int], int]], seed: int):
        self.server, self.prompts, self.seed = server, prompts, seed
        self.completed = self.left = 0
        self.errors: list[str] = []
        self.others: list[tuple[int, list[int]]] = []  # prompts whose answers were not the known ones
        self.samples: list[dict[str, float]] = []

    async def learn(self) -> None:
        """What the right answers are, asked for one at a time."""
        async with session() as client:
            self.known = [(await complete(client, self.server.url, *pair)).tokens for pair in self.prompts]

    async def client(self, number: int, until: float) -> None:
        generator = random.Random(f"{self.seed} {number}")
        async with session() as client:
            while time.perf_counter() < until:
                index = generator.randrange(len(self.prompts))
                prompt, new_tokens = self.prompts[index]
                leave_after = generator.randrange(new_tokens) if generator.random() < 0.5 else None
                try:
                    answer = await complete(client, self.server.url, prompt, new_tokens, leave_after)
                except Exception as error:  # whatever a client may see: all are counted, and fail the run
                    self.errors.append(repr(error))
                    await asyncio.sleep(1)
                    continue
                if leave_after is not None:
                    self.left += 1
                else:
                    self.completed += 1
                    if answer.tokens != self.known[index]:
                        self.others.append((index, answer.tokens))

    async def watch(self, until: float, every: float) -> None:
        start = time.perf_counter()
        while time.perf_counter() < until:
            sample = {"second": time.perf_counter() - start, "resident_bytes": resident_bytes(self.server.process.pid)}
            if (used := await asyncio.to_thread(gpu_query, "memory.used")) is not None:
                sample["gpu_bytes"] = int(used) * 2**20
            metrics = await asyncio.to_thread(self.server.metrics)
            sample["running"] = metrics["vllm:num_requests_running"]
            sample["cache_usage"] = metrics["vllm:kv_cache_usage_perc"]
            self.samples.append(sample)
            await asyncio.sleep(every)

    async def run(self, clients: int, seconds: float) -> None:
        until = time.perf_counter() + seconds
        watching = asyncio.create_task(self.watch(until, min(5.0, seconds / 40)))
        await asyncio.gather(*(self.client(number, until) for number in range(clients)))
        await watching

    def idle_metrics(self) -> dict[str, float]:
        """What vLLM counts once it says that it runs nothing, or after a minute."""
        for _ in range(60):
            metrics = self.server.metrics()
            names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
            if not any(metrics[name] for name in names):
                break
            time.sleep(1)
        return metrics

    def log_probabilities(self, prompt: list[int]) -> dict[int, float]:
        """Of the 20 likeliest next tokens, as many as the server gives."""
        body = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 20,
        }
        request = urllib.request.Request(
            f"{self.server.url}/v1/completions",
            json.dumps(body | {"return_tokens_as_token_ids": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            top = json.load(response)["choices"][0]["logprobs"]["top_logprobs"][0]
        return {int(token.removeprefix("token_id:")): value for token, value in top.items()}

    @staticmethod
    def distance(values: dict[int, float], known: int, other: int) -> float:
        return abs(values[known] - values[other]) if known in values and other in values else float("inf")

    def gaps(self) -> list[float]:
        """For each answer that was not the known one, how far its first other token is from the known one, in nats: infinitely if it is not likely."""
        found: dict[tuple[int, int, int], float] = {}
        gaps = []
        for index, tokens in self.others:
            known = self.known[index]
            place = next(i for i, (a, b) in enumerate(zip(known, tokens)) if a != b)
            key = (index, place, tokens[place])
            if key not in found:
                values = self.log_probabilities(self.prompts[index][0] + known[:place])
                found[key] = self.distance(values, known[place], tokens[place])
            gaps.append(found[key])
        return gaps


def growth(samples: list[dict[str, float]], name: str) -> tuple[float, float, float]:
    """Medians of the second and the last quarter of the samples, and by what part the last is larger."""
    values = [sample[name] for sample in samples]
    quarter = max(1, len(values) // 4)
    early, late = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
    return early, late, late / early - 1


def main() -> None:
    args = parse_args()
    config = json.loads((args.folder / "config.json").read_text(encoding="utf-8"))
    prompts = make_prompts(args, config["vocab_size"], random.Random(args.seed))
    engine = {"dtype": args.dtype, "skip_tokenizer_init": True, "max_num_seqs": args.clients}
    engine |= {"max_model_len": args.prompt_tokens[1] + args.new_tokens[1]} | args.engine
    with tempfile.TemporaryDirectory() as directory, Server(args.folder, engine, Path(directory) / "log") as server:
        server.wait()
        versions = f"{machine()}, vLLM {server.version()}"
        print(f"{versions}, {args.folder}", flush=True)
        soak = Soak(server, prompts, args.seed)
        before = server.metrics()
        start = time.perf_counter()
        asyncio.run(soak.learn())
        print(f"{len(prompts)} answers known after {time.perf_counter() - start:.0f} s", flush=True)
        asyncio.run(soak.run(args.clients, 60 * args.minutes))
        after = soak.idle_metrics()
        gaps = soak.gaps()

    pages = int(after["num_gpu_blocks"])
    lost = round(after["vllm:kv_cache_usage_perc"] * pages)
    still_running = int(after["vllm:num_requests_running"] + after["vllm:num_requests_waiting"])
    ties = [gap for gap in gaps if gap <= args.tie]
    wrong = len(gaps) - len(ties)
    memory = {name: growth(soak.samples, name) for name in ("resident_bytes", "gpu_bytes") if name in soak.samples[0]}
    preempted = int(after["vllm:num_preemptions_total"] - before["vllm:num_preemptions_total"])
    most = max(sample["cache_usage"] for sample in soak.samples)
    print(
        f"{args.minutes:g} minutes, {args.clients} clients: {soak.completed:,} answers, {soak.left:,} left in mid-stream, ",
        end="",
    )
    print(f"{preempted:,} preempted, up to {most:.1%} of {pages:,} pages in use")
    print(f"pages in use in the end: {lost}; requests: {still_running}")
    print(f"wrong answers: {wrong}; others at a tie: {len(ties)}, at most {max(ties, default=0):.4f} nats apart")
    print(f"errors: {len(soak.errors)}{': ' + soak.errors[0] if soak.errors else ''}")
    for name, (early, late, part) in memory.items():
        print(f"{name}: {early / 2**20:,.1f} MiB in the second quarter, {late / 2**20:,.1f} in the last ({part:+.2%})")
    failures = {
        "pages lost": lost > 0,
        "requests left": still_running > 0,
        "wrong answers": wrong > 0,
        "errors": bool(soak.errors),
        "memory grows": any(part > args.growth for *_, part in memory.values()),
        "nothing was asked": not (soak.completed and soak.left),
    }
    failed = [name for name, value in failures.items() if value]
    data = {name: str(value) if name == "folder" else value for name, value in vars(args).items() if name != "output"}
    data |= {
        "machine": versions,
        "completed": soak.completed,
        "left": soak.left,
        "preempted": preempted,
        "pages": pages,
        "pages_lost": lost,
        "wrong": wrong,
        "ties": ties,
        "errors": soak.errors,
        "memory": memory,
        "failed": failed,
        "samples": soak.samples,
    }
    save(data, args.output)
    print(f"failed: {', '.join(failed)}" if failed else "passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
