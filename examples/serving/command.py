"""`transformers serve`, with the class of T6 where that command looks for the classes of models."""

import functools
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path


def cache_room(engine) -> int:
    """Tokens of one request for which the cache of a continuous batching engine has room; waits until the cache is made."""
    while engine.batch_processor is None and engine.is_running():
        time.sleep(0.01)
    if engine.batch_processor is None:
        return sys.maxsize  # the engine has failed, and says so of each request
    cache = engine.batch_processor.cache
    tokens = cache.num_blocks * engine.continuous_batching_config.block_size
    return tokens // getattr(cache, "num_groups", 1)  # 5.17 counts the blocks of full and of sliding layers together


def within_context(generate: Callable) -> Callable:
    """
    A manager's method of generation that ends each answer where the model's context or the engine's cache ends: a request
    that goes on for longer than the cache holds ends the whole engine.

    Raises:
        HTTPException: status 400, if nothing can be generated.
    """

    @functools.wraps(generate)
    def limited(manager, model, processor, inputs, gen_config, *args, **kwargs):
        from fastapi import HTTPException

        ids = inputs["input_ids"]
        length = len(ids) if isinstance(ids, list) else ids.shape[-1]
        room = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
        if getattr(manager, "_cb", None) is not None:
            room = min(room, cache_room(manager._cb))
        most = room if gen_config.max_new_tokens is None else gen_config.max_new_tokens
        if most < 1:
            raise HTTPException(400, f"The most tokens to generate must be at least 1, got {most}.")
        if length >= room:
            raise HTTPException(
                400, f"The prompt has {length} tokens: with those to generate there is room for {room}."
            )
        gen_config.max_new_tokens = min(most, room - length)
        return generate(manager, model, processor, inputs, gen_config, *args, **kwargs)

    return limited


def check_name(name: str) -> None:
    """Ends the process with one line if `name` is neither a folder nor a name on the Hub, with @REVISION or :FILE at most."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(re.split("[@:]", name)[0])
    except HFValidationError:
        if not Path(name).exists():
            sys.exit(f"error: there is no folder {name}; names on the Hub are NAME or OWNER/NAME")


def main() -> None:
    """Runs `transformers serve` with this process's arguments."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        check_name(sys.argv[1])

    import transformers
    from transformers.cli.serving.utils import CBGenerateManager, GenerateManager
    from transformers.cli.transformers import main as transformers_command

    import modeling_t6

    transformers.T6ForCausalLM = modeling_t6.T6ForCausalLM
    for manager in (GenerateManager, CBGenerateManager):
        for name in ("generate_streaming", "generate_non_streaming"):
            setattr(manager, name, within_context(getattr(manager, name)))
    sys.argv.insert(1, "serve")
    try:
        transformers_command()
    except OSError as error:  # of a model that is not there, or is not whole
        sys.exit(f"error: {' '.join(str(error).split())}")
