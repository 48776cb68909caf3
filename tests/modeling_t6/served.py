"""
`examples/serve.py` that can be asked how much of its cache is free: `python -m tests.modeling_t6.served FOLDER ...`
writes a line of JSON to stdout for each SIGUSR1.
"""

import json
import runpy
import signal
import sys
import weakref
from pathlib import Path

from transformers.generation.continuous_batching import PagedAttentionCache


def pages(cache: PagedAttentionCache) -> dict[str, int]:
    """Bytes of the engine's cache, the tokens for which it has room, and the blocks of them that no request holds."""
    if hasattr(cache, "key_cache"):
        nbytes = sum(tensor.nbytes for tensor in cache.key_cache + cache.value_cache)
        free = cache.get_num_free_blocks()
        return {"nbytes": nbytes, "tokens": cache.num_pages, "blocks": cache.num_blocks, "free": free}
    blocks = free = 0
    for allocator in cache.cache_allocators.values():
        blocks += cache.num_sectors * allocator.blocks_per_sector
        # Free to be taken are sectors of no allocator, free blocks of its own, and those kept for prompts to come.
        free += cache.pool.num_free_sectors * allocator.blocks_per_sector
        free += cache.pool.count_free_blocks(allocator.index) + len(allocator.ledger.cached_blocks)
    tokens = max(allocator.tokens_per_page * allocator.num_blocks for allocator in cache.cache_allocators.values())
    return {"nbytes": cache.cache_tensor.nbytes, "tokens": tokens, "blocks": blocks, "free": free}


caches, make = weakref.WeakSet(), PagedAttentionCache.__init__


def make_and_remember(self, *args, **kwargs) -> None:
    make(self, *args, **kwargs)
    caches.add(self)


def report(*args) -> None:
    print(json.dumps([pages(cache) for cache in caches]), flush=True)


if __name__ == "__main__":
    PagedAttentionCache.__init__ = make_and_remember
    signal.signal(signal.SIGUSR1, report)
    examples = Path(__file__).parents[2] / "examples"
    sys.path.insert(0, str(examples))  # as for a script
    runpy.run_path(str(examples / "serve.py"), run_name="__main__")
