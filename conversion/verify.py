"""
The source and the result side by side, in float32: docs/verification.md says what is compared.

Models are compared by what they compute alone. Windows and changes of RoPE take effect at lengths that a large model takes long to
reach; there, a few tokens are computed behind a cache that was filled with the same numbers in both.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from modeling_t6 import T6Cache, T6Config, T6ForCausalLM
from modeling_t6.cache_t6 import CACHE_NAME, cache_nbytes

from .files.checkpoints import Checkpoint
from .files.companions import generation_config
from .files.errors import ConversionError, reason
from .files.memory import available_memory
from .sources.official import research_logits


EXACT = 3e-5  # of the largest logit: float32 has 7 digits, and a model adds up thousands of numbers in many layers
ROUNDED = 0.1  # weights rounded to half precision are another model, but not one as far away as a wrong one
OFFICIAL = 1e-4
LENGTH = 72  # tokens of a short text
PADDED = 7
NEW = 16
REAL = 512  # tokens: texts of this length are computed as they are, longer ones behind a cache


@dataclass
class Comparison:
    logit_difference: float
    cache_bytes: float
    source_cache_bytes: float | None = None
    greedy_tokens: int = 0
    depth: int = LENGTH

    def __str__(self) -> str:
        text = f"logits differ by {self.logit_difference:.1e} of the largest, at lengths up to {self.depth:,}; "
        text += f"cache {self.cache_bytes:,.0f} bytes per token in float32"
        if self.source_cache_bytes is not None:
            text += f", the source's {self.source_cache_bytes:,.0f}; {self.greedy_tokens} greedy tokens are equal"
        return text


def fits_in_memory(numbers: int, cache_numbers: int = 0) -> bool:
    """
    Whether source and result, `numbers` weights and a cache of `cache_numbers` each, fit into what is free, in float32 and
    with room to run.
    """
    return 2.5 * 4 * (numbers + cache_numbers) < available_memory()


def random_ids(vocab_size: int, *shape: int) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def windows(config: PreTrainedConfig) -> set[int]:
    """The lengths from which layers of a model may forget: what its configuration says, read by the model or not."""
    return {getattr(config, name, None) or 0 for name in ("sliding_window", "attention_chunk_size")} - {0}


def switches(config: PreTrainedConfig) -> set[int]:
    """The lengths from which a model rotates by other factors than before."""
    rope = config.rope_parameters
    kinds = {"longrope": rope.get("original_max_position_embeddings"), "dynamic": config.max_position_embeddings}
    return {length for kind, length in kinds.items() if kind == rope.get("rope_type") and length}


def contexts(config: PreTrainedConfig) -> set[int]:
    """Positions from which on some RoPE is another than the default one's."""
    return {config.max_position_embeddings, config.rope_parameters.get("original_max_position_embeddings")} - {None}


def depths(*configs: PreTrainedConfig) -> list[int]:
    """Lengths a little past every window, and every length from which a model rotates by other factors."""
    return sorted({length + NEW for config in configs for length in windows(config) | switches(config)})


def cache_numbers(config: T6Config) -> int:
    """Of the deepest cache that verification fills for an exact model."""
    return (
        max(depths(config), default=0) * config.num_hidden_layers * (config.k_rank + config.v_rank) * config.head_dim
    )


class Pair:
    """
    The source and the result, called alike.

    Args:
        limit: largest difference of logits, as a part of the largest.
        exact: whether greedy tokens are to be equal.
    """

    def __init__(self, source: PreTrainedModel, result: PreTrainedModel, limit: float, exact: bool, name: str = ""):
        self.models, self.limit, self.exact, self.name = (source, result), limit, exact, name
        self.difference = 0.0
        for model in self.models:  # its own settings are compared by themselves
            model.generation_config = GenerationConfig()

    def check(self, case: str, expected: torch.Tensor, found: torch.Tensor) -> None:
        difference = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        if not difference <= self.limit:
            raise ConversionError(
                f"verification failed: logits differ by {difference:.1e} of the largest, over {self.limit:.0e}, "
                f"{case}{self.name}"
            )
        self.difference = max(self.difference, difference)

    def run(self, case: str, ids: torch.Tensor, real: torch.Tensor | None = None, **kwargs) -> None:
        """Compares the logits of tokens without a cache; with `real`, of those tokens alone."""
        real = slice(None) if real is None else real
        logits = [model(ids, use_cache=False, **kwargs).logits[real] for model in self.models]
        self.check(case, *logits)

    def filled_caches(self, ids: torch.Tensor) -> list[DynamicCache]:
        caches = [DynamicCache(), DynamicCache()]
        logits = [
            model(ids, use_cache=True, **{CACHE_NAME: cache}).logits for model, cache in zip(self.models, caches)
        ]
        self.check("filling a cache", *logits)
        return caches

    def run_behind(self, case: str, caches: list[DynamicCache], ids: torch.Tensor) -> None:
        logits = [
            model(ids, use_cache=True, **{CACHE_NAME: cache}).logits for model, cache in zip(self.models, caches)
        ]
        self.check(case, *logits)

    def generate(self, case: str, ids: torch.Tensor, mask: torch.Tensor, new: int, use_cache: bool) -> None:
        """Compares greedy tokens, and the logits that they are taken from."""
        outputs = []
        for model in self.models:
            options = {}
            if use_cache and not isinstance(model, T6ForCausalLM):
                # Whole: by its configuration, a cache may forget what the model would see.
                options[CACHE_NAME] = DynamicCache()
            outputs.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=new,
                    pad_token_id=0,
                    use_cache=use_cache,
                    return_dict_in_generate=True,
                    output_logits=True,
                    disable_compile=True,
                    **options,
                )  # fmt: skip
            )
        expected, found = (torch.stack(output.logits, dim=1) for output in outputs)  # [batch, new, vocab]
        tokens = [output.sequences[:, ids.shape[1] :] for output in outputs]
        # A tie may break either way: what follows the first token that differs is another text.
        same = (tokens[0] == tokens[1]).long().cumprod(-1).bool()
        comparable = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], dim=1)
        self.check(case, expected[comparable], found[comparable])


def deep_cache(cache: DynamicCache, length: int, outside: int = 0) -> DynamicCache:
    """
    A cache of `length` tokens made of those of a short one, each in a size of its own. The values of the first `outside`
    tokens, which a window hides, and of some that it does not, are large. Factors and keys, being linear in them, are
    enlarged alike.
    """
    generator = torch.Generator().manual_seed(1)
    key_sizes, value_sizes = 0.5 + torch.rand(2, length, 1, generator=generator)
    value_sizes[: outside + 4] *= 10
    deep = DynamicCache()
    for index, layer in enumerate(cache.layers):
        order = torch.arange(length) % layer.keys.shape[2]
        keys, values = layer.keys[:, :, order] * key_sizes, layer.values[:, :, order] * value_sizes
        deep.update(keys, values, index)
    return deep


@torch.no_grad()
def compare(pair: Pair) -> Comparison:
    """
    Runs both models of a pair on everything in which a conversion could go wrong.

    Raises:
        ConversionError: naming the first case in which they differ.
    """
    configs = [model.config for model in pair.models]
    vocab_size = configs[1].vocab_size
    ids = random_ids(vocab_size, 2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :PADDED] = 0
    try:
        pair.models[0](ids[:1, :2])
    except Exception as error:  # whatever a model raises whose configuration does not fit together
        raise ConversionError(f"verification failed: Transformers cannot run the source: {reason(error)}") from error
    pair.run(f"for {LENGTH} tokens", ids)
    pair.run("for a batch with padding on the left", ids, real=mask.bool(), attention_mask=mask)
    for context in sorted(set().union(*map(contexts, configs))):
        for start in (context - LENGTH // 2, context + 1):
            positions = torch.arange(LENGTH)[None] + max(0, start)
            pair.run(f"at positions {positions[0, 0]} to {positions[0, -1]}", ids[:1], position_ids=positions)
    pair.run(f"for {LENGTH} tokens after longer texts", ids)

    compare_embeddings(pair)

    caches = pair.filled_caches(ids)
    per_token = [cache_nbytes(cache) / ids.numel() for cache in caches]
    allowed = 4 * sum(largest_row(x.shape[1], x.shape[3]) for one in caches[0].layers for x in (one.keys, one.values))
    for token in random_ids(vocab_size, 2, 3).split(1, dim=1):
        pair.run_behind("behind a cache", caches, token)
    hidden = set().union(*map(windows, configs))
    for depth in depths(*configs):
        if depth <= REAL:
            pair.run(f"for {depth} tokens", random_ids(vocab_size, 1, depth))
        outside = max((depth - window for window in hidden if window < depth), default=0)
        caches = [deep_cache(cache, depth, outside) for cache in pair.filled_caches(ids[:1])]
        pair.run_behind(f"behind a cache of {depth} tokens", caches, ids[:1, :3])

    changes = sorted(set().union(*map(switches, configs)))
    for switch in changes:
        compare_steps(pair, switch)
    if pair.exact:
        for use_cache in (True, False):
            how = "with" if use_cache else "without"
            pair.generate(f"generating {how} a cache", ids, mask, NEW, use_cache)
            for switch in changes:
                if 3 < switch <= REAL:
                    text = random_ids(vocab_size, 1, switch - 2)
                    case = f"generating {how} a cache across token {switch}"
                    pair.generate(case, text, torch.ones_like(text), 5, use_cache)
    if per_token[1] > allowed:
        raise ConversionError(
            f"verification failed: {per_token[1]} bytes of cache per token, the source has {per_token[0]}"
        )
    return Comparison(
        pair.difference, per_token[1], per_token[0], NEW if pair.exact else 0, max([LENGTH + NEW, *depths(*configs)])
    )


def largest_row(heads: int, head_dim: int) -> int:
    """Numbers in a token's row of the cache: kernels read multiples of 8, up to which the factors of a head are filled."""
    return heads * (head_dim if heads * head_dim % 8 == 0 else head_dim + 7)


class Entered(Exception):
    """The hidden states that enter the first layer of a model, which is to compute no more than them."""

    def __init__(self, states: torch.Tensor):
        self.states = states


def compare_embeddings(pair: Pair) -> None:
    """
    Compares what enters the first layer for every token of the vocabulary: texts hold a few of them. Taken without its mean,
    which a family without means in its norms may have lost, and as the layer's norm gives it, which is blind to sizes.
    """

    def entering(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def stop(module, args, kwargs):
            raise Entered(args[0] if args else kwargs["hidden_states"])

        layer = model.model.layers[0]
        with layer.register_forward_pre_hook(stop, with_kwargs=True):
            try:
                model.model(ids, use_cache=False)
            except Entered as entered:
                states = entered.states[0]
        return states - states.mean(-1, keepdim=True), layer.input_layernorm(states)

    for ids in torch.arange(pair.models[1].config.vocab_size).split(LENGTH):
        for expected, found in zip(*(entering(model, ids[None]) for model in pair.models)):
            # Of each token by itself; those that nothing was learned of may be as good as zero, and rounded to it.
            sizes = expected.abs().amax(-1)
            differences = (found - expected).abs().amax(-1) / sizes.clamp(min=1e-3 * sizes.max().item() + 1e-30)
            if not (differences <= pair.limit).all():
                token = ids[(~(differences <= pair.limit)).nonzero()[0, 0]].item()
                raise ConversionError(
                    f"verification failed: the embedding of token {token} differs by {differences.max().item():.1e} of its "
                    f"largest number, over {pair.limit:.0e}{pair.name}"
                )


def compare_steps(pair: Pair, length: int) -> None:
    """Compares what `generate()` feeds the models behind a cache of `length` tokens: one token, or all of them anew."""
    ids = random_ids(pair.models[0].config.vocab_size, 1, length + 1)
    fed = []
    for model, cache in zip(pair.models, pair.filled_caches(ids[:, :3])):
        inputs = model.prepare_inputs_for_generation(
            ids, next_sequence_length=1, attention_mask=torch.ones_like(ids), use_cache=True,
            **{CACHE_NAME: deep_cache(cache, length)},
        )  # fmt: skip
        cache = inputs.get(CACHE_NAME)
        fed.append((inputs["input_ids"].shape[1], cache is not None and cache.get_seq_length() > 0))
    if fed[0] == (1, False):
        raise ConversionError(
            f"verification failed: from token {length + 1} on, generate() of Transformers {transformers.__version__} loses "
            "the source's text, dropping its cache and feeding it one token: expected a version that computes all anew"
        )
    if fed[0] != fed[1]:
        told = [f"{count} tokens, {'with' if cached else 'without'} the cache" for count, cached in fed]
        raise ConversionError(
            f"verification failed: behind a cache of {length} tokens, generate() feeds the source {told[0]}, and the "
            f"result {told[1]}{pair.name}"
        )


def load_source(folder: Path) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:  # whatever a family's constructor raises
        raise ConversionError(f"Transformers cannot load {folder}: {reason(error)}") from error


def compare_generation(source: Path, result: Path) -> None:
    """Raises a `ConversionError` that names the setting by which `generate()` would go otherwise with the result."""
    expected, found = generation_config(source), generation_config(result)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ConversionError(
                f"verification failed: generation_config.json has {name}={found.get(name)!r}, the source has "
                f"{expected.get(name)!r}"
            )


def check_tensors(result: Path) -> None:
    """Raises a `ConversionError` that names a tensor in `result` that is not as its configuration says: loading makes up for it."""
    config, stored = T6Config.from_pretrained(result), Checkpoint(result).tensors
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in T6ForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    for name in sorted(shapes.keys() ^ stored.keys()):
        what = "is unknown to config.json, and in" if name in stored else "is missing from"
        raise ConversionError(f"verification failed: {name} {what} the weights")
    for name, shape in shapes.items():
        if stored[name].shape != tuple(shape):
            raise ConversionError(
                f"verification failed: {name} has shape {list(stored[name].shape)}, by config.json it is {list(shape)}"
            )


def check_fields(result: Path, expected: dict[str, object], source_dtype: torch.dtype | None) -> None:
    """
    Compares what no logits show of a configuration, and servers, evaluations and fine-tuning go by.

    Args:
        expected: fields of the source.
        source_dtype: that of its configuration.

    Raises:
        ConversionError: naming the field that is another.
    """
    config = T6Config.from_pretrained(result)
    for name, value in expected.items():
        if (found := getattr(config, name)) != value:
            raise ConversionError(f"verification failed: config.json has {name}={found!r}, the source has {value!r}")
    dtypes = {info.dtype for info in Checkpoint(result).tensors.values()}
    if config.dtype not in dtypes or (source_dtype in dtypes and config.dtype != source_dtype):
        raise ConversionError(
            f"verification failed: config.json has dtype={config.dtype}, the source {source_dtype}, and tensors are stored "
            f"in {', '.join(sorted(map(str, dtypes)))}"
        )


def fields_of(config: PreTrainedConfig) -> dict[str, object]:
    """What `check_fields` expects of the result of a source of Transformers."""
    names = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(config, name) for name in names} | {"cache_dtype": None}


def compare_with_transformers(source: Path, result: Path, rounded: bool = False) -> Comparison:
    """
    Compares two folders: their models whole, and how they generate.

    Raises:
        ConversionError: naming the case in which they differ, or if the factors need more room than K and V did.
    """
    compare_generation(source, result)
    check_tensors(result)
    source_model, model = load_source(source), T6ForCausalLM.from_pretrained(result, dtype=torch.float32).eval()
    found = compare(Pair(source_model, model, ROUNDED if rounded else EXACT, not rounded))
    config = AutoConfig.from_pretrained(source)
    check_fields(result, fields_of(config), config.dtype)
    return found


@torch.no_grad()
def compare_with_research_code(arguments: dict, checkpoint, result: Path, rounded: bool = False) -> Comparison:
    """Compares logits of random tokens with those that the research code computes from its own weights."""
    check_tensors(result)
    check_fields(result, {"max_position_embeddings": arguments["block_size"]}, None)
    model = T6ForCausalLM.from_pretrained(result, dtype=torch.float32).eval()
    ids = random_ids(model.config.vocab_size, 2, min(LENGTH, model.config.max_position_embeddings))
    state = {name: tensor.float() for name, tensor in checkpoint}
    expected = research_logits(arguments, state, ids)
    cache = T6Cache(config=model.config)
    found = model(ids, **{CACHE_NAME: cache}).logits
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    limit = ROUNDED if rounded else OFFICIAL
    if not difference <= limit:
        raise ConversionError(
            f"verification failed: logits differ by {difference:.1e} of the largest, over {limit:.0e}"
        )
    return Comparison(difference, cache.nbytes / ids.numel(), depth=ids.shape[1])
