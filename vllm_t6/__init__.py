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
"""vLLM plugin: T6 models served from pages of factors, in a vLLM as it is"""


def register() -> None:
    """
    What vLLM calls in each of its processes (entry point `vllm.general_plugins`): makes known the configuration of T6
    folders, which then load without their own code, and the class that serves them.
    """
    from vllm import ModelRegistry

    import modeling_t6  # noqa: F401  registers T6's classes with Transformers' Auto classes

    from .cache_dtype import follow_cache_dtype

    follow_cache_dtype()

    # By name: vLLM looks at the class in a process of its own, so that nothing here touches a GPU.
    ModelRegistry.register_model("T6ForCausalLM", "vllm_t6.model:T6ForCausalLM")
