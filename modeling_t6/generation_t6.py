# Copyright 2026 The T6 for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The hooks of `generate()` and continuous batching that a model with a cache of factors overrides"""

import functools

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.utils import logging

from .attention_t6 import choose_attention
from .cache_t6 import (
    CACHE_DTYPES,
    CACHE_NAME,
    T6Cache,
    allocate_static_cache,
    dtype_name,
    quantization_group_size,
    store_static_rows,
    stored_dtype_of,
)
from .configuration_t6 import T6Config
from .factor_product_t6 import packed_factors
from .masks_t6 import create_attention_masks
from .paged_t6 import page_factors


logger = logging.get_logger(__name__)


class T6GenerationMixin(GenerationMixin):
    """
    `GenerationMixin` for a model with a language modelling head whose base model is a [`T6Model`], `self.model`.

    `generate()` and `GenerationConfig` take a `cache_dtype` for the rows of the cache: `"float8_e4m3fn"`, `"int4"`, or `None`
    for the `cache_dtype` of the model's configuration. See [`T6Cache`].
    """

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        with packed_factors(self):
            return super().generate(*args, **kwargs)

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *args,
        **kwargs,
    ) -> ContinuousBatchingManager:
        """As in every model, with a cache whose pages hold factors."""
        asked = continuous_batching_config
        if asked is None:  # where older versions expect it
            asked = getattr(generation_config or self.generation_config, "continuous_batching_config", None)
        if getattr(generation_config or self.generation_config, "cache_dtype", None) is not None:
            raise ValueError("Continuous batching keeps rows of the model's dtype: leave `cache_dtype` out.")
        manager = super().init_continuous_batching(generation_config, continuous_batching_config, *args, **kwargs)
        return page_factors(manager, asked if asked is not None else ContinuousBatchingConfig())

    def create_masks_for_generate(
        self,
        config: T6Config,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None = None,
        **kwargs,
    ):
        """The masks that `generate()` creates before each step over a static cache."""
        model, cache = self.model, self.model.cache_of_this_stage(kwargs[CACHE_NAME])
        attend = choose_attention(model.config, inputs_embeds, cache)
        return create_attention_masks(model.config, attend, inputs_embeds, attention_mask, cache, position_ids)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # whose parameters `generate()` looks at
    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, next_sequence_length: int | None = None, *args, **kwargs
    ) -> dict:
        # LongRoPE switches from its short to its long factors at this length. Cached rows were rotated with the short ones, so
        # all tokens are computed again, as in Phi-3.
        cache, num_new = kwargs.get(CACHE_NAME), next_sequence_length or input_ids.shape[1]
        if isinstance(cache, Cache) and self._switches_long_rope(cache, num_new, kwargs.get("attention_mask")):
            if input_ids.shape[1] == cache.get_seq_length() + num_new:
                kwargs[CACHE_NAME] = T6Cache(config=self.config, dtype=dtype_name(cache), offloading=cache.offloading)
                if any(getattr(layer, "record_past", False) for layer in cache.layers):  # they are cropped later
                    kwargs[CACHE_NAME].activate_past_recording()
                next_sequence_length = None
            else:
                logger.warning_once(
                    "LongRoPE switches to its long factors at this length, and the cached rows were rotated with the short ones. "
                    "`generate()` would compute all tokens again, but was not given all of their `input_ids`: the rows stay."
                )
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, *args, **kwargs)

    def _switches_long_rope(self, cache: Cache, num_new: int, attention_mask: torch.Tensor | None) -> bool:
        """Whether long RoPE rotates by other factors in this step, of `num_new` tokens, than it did for those in the cache."""
        rope = self.config.rope_parameters
        if rope["rope_type"] != "longrope":
            return False
        past = int(cache.get_seq_length())
        length = past + num_new
        # Where B_K is rotated when it is read, positions are those of rows, padding included.
        if isinstance(attention_mask, torch.Tensor) and not self.config.rotates_on_read:
            tokens = attention_mask != 0
            past, length = (int(some.sum(dim=-1).max()) for some in (tokens[:, :past], tokens[:, :length]))
        return 0 < past <= rope["original_max_position_embeddings"] < length

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        """As in every model; `cache_dtype`, which Transformers does not know, becomes a field of the configuration."""
        is_given, cache_dtype = "cache_dtype" in kwargs, kwargs.pop("cache_dtype", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if is_given:
            generation_config.cache_dtype = cache_dtype
        rope = self.config.rope_parameters
        if rope["rope_type"] == "longrope" and generation_config.prefill_chunk_size is not None:
            # Pieces of a prompt are not computed anew: the first is to show by which factors the others are rotated.
            least = rope["original_max_position_embeddings"] + 1
            generation_config.prefill_chunk_size = max(generation_config.prefill_chunk_size, least)
        return generation_config, model_kwargs

    def _get_static_cache_init_shape(self) -> None:
        # This hook has one width for keys and values: see `_prepare_cache_for_generation`.
        return None

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs):
        """
        As in every model, except that dynamic caches become `T6Cache`s, static ones are allocated for rows of factors, and
        quantised ones get a group size that divides the width of a row.
        """
        if "cache" in model_kwargs:  # given by the user, under the name that `forward` uses
            model_kwargs[CACHE_NAME] = model_kwargs.pop("cache")
        stored_dtype = self._stored_dtype(generation_config, model_kwargs.get(CACHE_NAME))
        user_defined = model_kwargs.get(CACHE_NAME) is not None
        if generation_config.cache_implementation == "quantized":
            cache_config = generation_config.cache_config or {}
            generation_config.cache_config = {"q_group_size": quantization_group_size(self.config), **cache_config}
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        if user_defined:
            return
        if type(cache) is DynamicCache:
            # A CPU has nowhere to offload to. Weights on disk, whose device is "meta", are used on an accelerator.
            has_accelerator = self.device.type != "cpu" and torch.accelerator.is_available()
            offloading = cache.offloading and has_accelerator
            dtype = getattr(generation_config, "cache_dtype", None)
            model_kwargs[CACHE_NAME] = T6Cache(config=self.config, dtype=dtype, offloading=offloading)
            if any(getattr(layer, "record_past", False) for layer in cache.layers):  # assisted decoding, which crops
                model_kwargs[CACHE_NAME].activate_past_recording()
            return
        if not isinstance(cache, StaticCache):
            return
        if stored_dtype is None:
            stored_dtype = stored_dtype_of(self.config.cache_dtype, self.config, "cache_dtype")
        if stored_dtype is not None:
            store_static_rows(cache, self.config, stored_dtype)
        if len(set(getattr(self, "hf_device_map", {}).values())) <= 1:
            batch_size = args[1] if len(args) > 1 else kwargs["batch_size"]
            batch_size *= max(generation_config.num_beams, generation_config.num_return_sequences)
            if self.device.type != "meta":  # else weights are on disk, and the first update allocates the cache
                layers = self.model.layers_of_this_stage()
                allocate_static_cache(cache, self.config, batch_size, self.dtype, self.device, layers)

    def _stored_dtype(self, generation_config: GenerationConfig, cache: Cache | None) -> torch.dtype | None:
        """
        The dtype of the tensors that hold rows of `cache_dtype`, or `None`.

        Raises:
            ValueError: if `cache_dtype` contradicts the given cache or another option.
        """
        dtype = getattr(generation_config, "cache_dtype", None)
        stored_dtype = stored_dtype_of(dtype, self.config, "cache_dtype")
        if dtype is None:
            return None
        if cache is not None and CACHE_DTYPES.get(dtype_name(cache)) != stored_dtype:
            raise ValueError(
                f"`cache_dtype`={dtype} and the `{CACHE_NAME}` that is given differ: it must be a "
                f"`T6Cache(config=model.config, dtype={dtype!r})`, or `cache_dtype` left out."
            )
        if generation_config.use_cache is False:
            raise ValueError(f"`cache_dtype`={dtype} needs a cache, and `use_cache` is False.")
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                f"`cache_dtype`={dtype} is for dynamic and static caches, got `cache_implementation`='quantized'."
            )
        return stored_dtype
