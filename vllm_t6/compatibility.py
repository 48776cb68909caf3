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
"""What differs between the versions of vLLM that the plugin runs in"""

import vllm
from packaging.version import Version
from vllm.logger import init_logger


logger = init_logger(f"vllm.{__name__}")

# Minor versions with which the whole plugin was tested: on a GPU, and in the CPU build.
TESTED_VERSIONS = ("0.26", "0.32")


def warn_of_untested_version() -> None:
    version = Version(vllm.__version__)
    if f"{version.major}.{version.minor}" not in TESTED_VERSIONS:
        logger.warning(
            "T6's plugin was tested with vLLM %s, and this is %s: if anything fails, try one of those first.",
            " and ".join(TESTED_VERSIONS),
            vllm.__version__,
        )
