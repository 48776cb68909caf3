"""
What the processes have imported that are forked for tests. They can interpret kernels that are defined while `TRITON_INTERPRET`
is set, as it must have been for those of Triton's own language; vLLM warms its own up, and fails with interpreted ones.
"""

import os


os.environ["TRITON_INTERPRET"] = "1"
import triton.language  # noqa: E402, F401


del os.environ["TRITON_INTERPRET"]
from . import common  # noqa: E402, F401


def interpret_kernels() -> None:
    """Of those that are defined from now on."""
    os.environ["TRITON_INTERPRET"] = "1"
