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
"""The dtype of pages, where a folder's configuration says one and whoever starts vLLM does not"""

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform


logger = init_logger(f"vllm.{__name__}")


class FollowCacheDtype(VerifyAndUpdateConfig):
    """What vLLM asks before it plans a cache."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        cache_dtype = getattr(vllm_config.model_config.hf_text_config, "cache_dtype", None)
        if current_platform.is_cuda() and not current_platform.has_device_capability(89):
            return  # a GPU that has no float8, whose kernels read rows of the model's dtype alone
        if cache_dtype == "float8_e4m3fn" and vllm_config.cache_config.cache_dtype == "auto":
            vllm_config.cache_config.cache_dtype = "fp8"
            logger.info(
                "Pages hold rows in 8 bits, as the model's `cache_dtype` says; kv_cache_dtype='bfloat16' does not."
            )


def follow_cache_dtype() -> None:
    """Called in each of vLLM's processes, before a model is looked at."""
    MODELS_CONFIG_MAP["T6ForCausalLM"] = FollowCacheDtype
