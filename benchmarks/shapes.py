"""Shapes of caches whose attention the GPU benchmarks time."""

from typing import NamedTuple


class CacheShape(NamedTuple):
    """
    One layer's cache of factors: `dtype` is as in `T6Cache`, `rank` that of keys and of values, `groups` how many heads
    share one of A.
    """

    batch: int
    tokens: int
    heads: int
    head_dim: int
    rank: int
    dtype: str
    groups: int = 1

    @property
    def num_bytes(self) -> int:
        """Of keys and values, without the padding of their rows."""
        a, b = self.heads // self.groups, self.head_dim
        if self.dtype == "int4":
            a_and_b = a + b // 2 + 4 * -(-b // 32)  # B's scales and zero points, too
        else:
            a_and_b = (a + b) * {"bfloat16": 2, "float8_e4m3fn": 1}[self.dtype]
        return 2 * self.batch * self.tokens * self.rank * a_and_b
