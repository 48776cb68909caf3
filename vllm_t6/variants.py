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
"""What the plugin does not serve, each refused by name when a model is loaded, or named where it is served otherwise"""

from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import get_act_and_mul_fn

from modeling_t6.configuration_t6 import T6Config
from modeling_t6.flash_tpa_t6 import MAX_HEAD_DIM


logger = init_logger(f"vllm.{__name__}")


def refuse_unserved_variants(config: T6Config, vllm_config: VllmConfig) -> None:
    """
    Raises:
        ValueError: for a variant that has no kernel on pages, or that vLLM's way of batching cannot serve.
    """
    for field in ("noncontextual_b", "shared_b", "c_factor_dim"):
        if getattr(config, field):
            raise ValueError(
                f"vLLM cannot serve a T6 model with `{field}`={getattr(config, field)!r}: there is no kernel on pages for "
                "it. Transformers' engine serves it (`t6-serve`)."
            )
    try:
        get_act_and_mul_fn(config.hidden_act)
    except ValueError as error:
        raise ValueError(f"vLLM cannot serve a T6 model with `hidden_act`={config.hidden_act!r}: {error}") from None
    if config.head_dim > MAX_HEAD_DIM:
        raise ValueError(f"vLLM cannot serve a T6 model with `head_dim` above {MAX_HEAD_DIM}, got {config.head_dim}.")
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        raise ValueError("vLLM cannot serve a T6 model with `decode_context_parallel_size` above 1.")
    if vllm_config.cache_config.kv_cache_dtype_skip_layers:
        raise ValueError("vLLM cannot serve a T6 model with `kv_cache_dtype_skip_layers`: all layers have one dtype.")
    if envs.VLLM_BATCH_INVARIANT:
        raise ValueError("vLLM cannot serve a T6 model with VLLM_BATCH_INVARIANT: a batch is divided as a whole.")
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type == "dynamic":
        raise ValueError(
            "vLLM cannot serve a T6 model with `rope_type`='dynamic': its frequencies follow the length of each request."
        )
    if config.head_factor_act == "softmax" and vllm_config.parallel_config.tensor_parallel_size > 1:
        raise ValueError(
            "vLLM cannot serve a T6 model with `head_factor_act`='softmax' by tensor parallelism: it goes over all heads."
        )


def warn_of_cache_dtype(config: T6Config, vllm_config: VllmConfig) -> None:
    """Says that pages hold other rows, in more bytes, than the `cache_dtype` of the folder's configuration."""
    asked = vllm_config.cache_config.cache_dtype
    is_float8 = asked in ("fp8", "fp8_e4m3")
    if config.cache_dtype is None or config.cache_dtype == "float8_e4m3fn" and is_float8:
        return
    logger.warning(
        "The model's `cache_dtype` is %r, which vLLM's pages do not follow: `kv_cache_dtype` is %r, and rows take more bytes "
        "than in Transformers' caches.%s",
        config.cache_dtype,
        asked,
        "" if is_float8 else " kv_cache_dtype='fp8' holds them in 8 bits.",
    )
