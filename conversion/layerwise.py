"""Models too large to run whole, compared layer by layer: one layer of each at a time, with the weights that it has."""

import copy
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from modeling_t6 import T6Config, T6ForCausalLM

from .files.checkpoints import Checkpoint
from .files.errors import ConversionError
from .sources.families import EMBEDDINGS, HEAD
from .verify import (
    EXACT,
    ROUNDED,
    Comparison,
    Pair,
    check_fields,
    check_tensors,
    compare,
    compare_generation,
    fields_of,
    fits_in_memory,
)


ROWS = 4096  # of the vocabulary, at a time
BY_LAYER = ("layer_types", "no_rope_layers", "k_rank", "v_rank")  # fields with an entry for each layer


def one_layer(config: PreTrainedConfig, layer: int, vocab_size: int) -> PreTrainedConfig:
    """The configuration of a model with one layer and some tokens of another."""
    config = copy.deepcopy(config)
    for name in BY_LAYER:
        if isinstance(value := getattr(config, name, None), list):
            setattr(config, name, [value[layer]])
    config.num_hidden_layers, config.vocab_size = 1, vocab_size
    config.tie_word_embeddings = False  # each of the two may have its own rows
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config


def load_layer(
    model_class, config: PreTrainedConfig, checkpoint: Checkpoint, layer: int, rows: slice
) -> PreTrainedModel:
    """A model of the one layer of `checkpoint`, its embeddings and output layer for the tokens `rows`, in float32."""
    config = one_layer(config, layer, rows.stop - rows.start)
    with no_init_weights():
        make = model_class if issubclass(model_class, PreTrainedModel) else model_class.from_config
        model = make(config).float().eval()
    state = {}
    for name in model.state_dict():
        stored = name.replace("model.layers.0.", f"model.layers.{layer}.")
        if name in (EMBEDDINGS, HEAD):
            other = HEAD if name == EMBEDDINGS else EMBEDDINGS
            state[name] = checkpoint.read(stored if stored in checkpoint.tensors else other, rows).float()
        else:
            state[name] = checkpoint.read(stored).float()
    model.load_state_dict(state, assign=True)
    return model


def compare_layers(
    source: Path, config: PreTrainedConfig, checkpoint: Checkpoint, result: Path, rounded: bool = False
) -> Comparison:
    """
    Compares every layer of two folders as `verify.compare` compares whole models, and all rows of the embeddings and the
    output layers.

    Args:
        config, checkpoint: of the source.

    Raises:
        ConversionError: naming the case and the layer in which they differ, or if not even one layer fits into memory.
    """
    compare_generation(source, result)
    check_tensors(result)
    t6_config, t6_checkpoint = T6Config.from_pretrained(result), Checkpoint(result)
    count, vocab_size = t6_config.num_hidden_layers, t6_config.vocab_size
    largest = max(
        sum(info.numel for name, info in t6_checkpoint.tensors.items() if f".layers.{layer}." in name)
        for layer in range(count)
    )
    if not fits_in_memory(largest + 2 * min(ROWS, vocab_size) * t6_config.hidden_size):
        raise ConversionError("source and result cannot be compared: not even a layer of both fits into memory; "
                              "--no-verify writes a model that nothing has verified")  # fmt: skip

    def pair(layer: int, rows: slice) -> Pair:
        models = (
            load_layer(AutoModelForCausalLM, config, checkpoint, layer, rows),
            load_layer(T6ForCausalLM, t6_config, t6_checkpoint, layer, rows),
        )
        limit = ROUNDED if rounded else EXACT
        return Pair(*models, limit, not rounded, f" in layer {layer} with tokens from {rows.start} on")

    found, first = [], slice(0, min(ROWS, vocab_size))
    for layer in tqdm(range(count), desc="verifying", unit="layer"):
        found.append(compare(pair(layer, first)))
    for start in range(ROWS, vocab_size, ROWS):
        rows = slice(start, min(start + ROWS, vocab_size))
        last = pair(count - 1, rows)
        with torch.no_grad():
            ids = torch.arange(rows.stop - start)[None].split(512, dim=1)
            for part in ids:
                last.run("for all tokens", part)
        found.append(Comparison(last.difference, 0))
    check_fields(result, fields_of(config), config.dtype)
    return Comparison(
        max(part.logit_difference for part in found),
        sum(part.cache_bytes for part in found),
        sum(part.source_cache_bytes or 0 for part in found),
        found[0].greedy_tokens,
        found[0].depth,
    )
