"""
How many tokens of cache fit into the same memory under continuous batching: T6 beside MHA with T6's heads, and beside MHA
of the same number of parameters. The engine of Transformers makes the paged caches, and says for how many tokens they have
room.

    python benchmarks/serving_cache.py --output serving.json

Then the shipped model serves requests with a small cache, and so does its MHA twin, with random weights: the most requests
that were under way at once, and the steps of the engine until all were answered. Runs on a CPU.
"""

import argparse

from options import ROOT, add_output, describe, save, table_head, table_row


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--memory", type=int, default=2**32, help="bytes of each cache that is counted")
    parser.add_argument("--page-size", type=int, default=256, help="tokens of a page in these")
    parser.add_argument("--served-memory", type=int, default=3 * 2**20, help="bytes of each cache that serves")
    parser.add_argument("--requests", type=int, default=32, help="that are served, of 64 tokens and 64 new ones")
    add_output(parser, plots=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import dataclasses
import inspect
import time

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.distributed import DistributedHelper

import modeling_t6  # noqa: F401  registers T6
from configuration.make_configs import DIRECTORY
from configuration.twins import mha_twin
from modeling_t6.paged_t6 import PagedConfig


SHIPPED = ROOT / "examples" / "t6-tiny-shakespeare"
# The number of tokens of a page is called `block_size` in older versions.
PAGE_SIZE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"


def sdpa_twin(config: PreTrainedConfig) -> PreTrainedConfig:
    twin = mha_twin(config)
    twin._attn_implementation = "sdpa"  # which the engine asks for
    return twin


def settings(num_blocks: int, page_size: int) -> ContinuousBatchingConfig:
    fields = {PAGE_SIZE: page_size, "num_blocks": num_blocks, "max_batch_tokens": 256, "max_memory_percent": 0.9}
    return ContinuousBatchingConfig(
        **fields, max_requests_per_batch=256, max_blocks_per_request=0, use_async_batching=False
    )


def nbytes(cache: PagedAttentionCache) -> int:
    """Bytes of the tensors of the engine's cache."""
    tensors = [*cache.key_cache, *cache.value_cache] if hasattr(cache, "key_cache") else [cache.cache_tensor]
    return sum(tensor.nbytes for tensor in tensors)


def paged_cache(config: PreTrainedConfig | PagedConfig, num_blocks: int, page_size: int) -> PagedAttentionCache:
    """The engine's cache for a model, in bfloat16, on a device that allots no memory."""
    arguments = {"config": config, "device": torch.device("meta"), "dtype": torch.bfloat16}
    arguments["continuous_batching_config"] = settings(num_blocks, page_size)
    arguments["distributed_helper"] = DistributedHelper(None, None)
    if "tp_plan" in inspect.signature(PagedAttentionCache).parameters:
        arguments["tp_plan"] = {}
    return PagedAttentionCache(**arguments)


def blocks_that_fit(config: PreTrainedConfig | PagedConfig, num_bytes: int, page_size: int) -> tuple[int, float]:
    """The blocks, of `page_size` tokens of all layers, of the engine's cache of at most `num_bytes`; bytes of a block."""
    few, more = (nbytes(paged_cache(config, num_blocks, page_size)) for num_blocks in (2, 4))
    block = (more - few) / 2  # what comes on top is for the engine's padding
    num_blocks = 2 + int((num_bytes - few) / block)
    if num_blocks < 1:
        raise ValueError(f"A block of {page_size} tokens takes {block:,.0f} bytes, more than the {num_bytes:,} given.")
    cache = paged_cache(config, num_blocks, page_size)
    if nbytes(cache) > num_bytes:
        raise RuntimeError(f"{num_blocks} blocks take {nbytes(cache):,} bytes, more than the {num_bytes:,} given.")
    return cache.num_blocks, block


@dataclasses.dataclass
class Capacity:
    """What fits into one cache: tokens, the bytes of each, and requests of 2,048 tokens, in whole blocks."""

    tokens: int
    bytes_per_token: float
    requests: int


def capacity(config: PreTrainedConfig | PagedConfig, num_bytes: int, page_size: int) -> Capacity:
    num_blocks, block = blocks_that_fit(config, num_bytes, page_size)
    return Capacity(num_blocks * page_size, block / page_size, num_blocks // -(-2048 // page_size))


@dataclasses.dataclass
class Served:
    """How a set of requests went: the most at once, forward passes, and seconds."""

    most_at_once: int
    steps: int
    seconds: float


def serve(
    model: PreTrainedModel, num_blocks: int, page_size: int, prompts: list[list[int]], new_tokens: int
) -> Served:
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=new_tokens),
        continuous_batching_config=settings(num_blocks, page_size),
    )
    at_once = []
    step = manager._generation_step

    def counted_step():
        at_once.append(len(manager.batch_processor.scheduler.active_requests))
        step()

    manager._generation_step = counted_step
    manager.add_requests(prompts)
    start = time.perf_counter()
    manager.start()
    for _ in prompts:
        output = manager.get_result(timeout=600)
        if output is None or output.error is not None or len(output.generated_tokens) != new_tokens:
            raise RuntimeError(f"A request was not answered: {output}.")
    seconds = time.perf_counter() - start
    manager.stop(block=True)
    return Served(max(at_once), len(at_once), seconds)


def main() -> None:
    args = parse_args()
    results = {"transformers": transformers.__version__, "torch": torch.__version__}
    results |= {name: value for name, value in vars(args).items() if name != "output"} | {"capacity": {}, "served": {}}
    print(f"tokens of cache in {args.memory / 2**20:,.0f} MiB, bfloat16 (bytes per token; requests of 2,048 tokens)")
    print(table_head("model", "T6", "MHA, same heads", "more", "MHA, same parameters", "more"))
    for name in ("t6-small", "t6-xl", SHIPPED.name):
        config = AutoConfig.from_pretrained(SHIPPED if name == SHIPPED.name else DIRECTORY / name)
        configs = {"t6": PagedConfig(config), "same_heads": sdpa_twin(config)}
        if name != SHIPPED.name:
            configs["same_parameters"] = AutoConfig.from_pretrained(
                DIRECTORY / name.replace("t6", "llama-mha"), attn_implementation="sdpa"
            )
        held = {key: capacity(config, args.memory, args.page_size) for key, config in configs.items()}
        results["capacity"][name] = {key: dataclasses.asdict(value) for key, value in held.items()}
        cells = [f"{x.tokens:,} ({x.bytes_per_token:,.0f}; {x.requests:,})" for x in held.values()]
        ratios = [f"{held['t6'].tokens / x.tokens:.1f}x" for x in held.values()]
        row = [name, cells[0]] + [cell for pair in zip(cells[1:], ratios[1:]) for cell in pair]
        print(table_row(*row, *[""] * (6 - len(row))))

    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.bfloat16)
    torch.manual_seed(0)
    twin = AutoModelForCausalLM.from_config(sdpa_twin(model.config), dtype=torch.bfloat16)
    prompts = torch.randint(2, model.config.vocab_size, (args.requests, 64)).tolist()
    print(
        f"\n{SHIPPED.name}: {args.requests} requests of 64 tokens and 64 new ones, {args.served_memory / 2**20:g} MiB of "
        f"cache, {torch.get_num_threads()} threads"
    )
    print(table_head("", "tokens of cache", "requests at once", "steps", "seconds"))
    for name, served_model, config in (("T6", model, PagedConfig(model.config)), ("MHA twin", twin, twin.config)):
        blocks, _ = blocks_that_fit(config, args.served_memory, page_size=16)
        outcome = serve(served_model, blocks, 16, prompts, new_tokens=64)
        results["served"][name] = dataclasses.asdict(outcome) | {"tokens": 16 * blocks}
        print(table_row(name, f"{16 * blocks:,}", outcome.most_at_once, outcome.steps, f"{outcome.seconds:.1f}"))

    save(results, args.output)


if __name__ == "__main__":
    main()
