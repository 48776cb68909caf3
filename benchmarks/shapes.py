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
"""Shapes of caches whose attention the GPU benchmarks time."""

from typing import NamedTuple


class CacheShape(NamedTuple):
    """One layer's cache of factors: `dtype` is its name in torch, `rank` that of keys and of values."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    rank: int
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of keys and values, without the padding of their rows."""
        itemsize = {"bfloat16": 2, "float8_e4m3fn": 1}[self.dtype]
        return 2 * self.batch * self.tokens * self.rank * (self.heads + self.head_dim) * itemsize
