"""Two processes, started by torchrun, equal one in all that a T6 does: the cases of `distributed_cases.py`."""

import os
import subprocess
import sys
from pathlib import Path

from .distributed_cases import CASES


ROOT = Path(__file__).parents[2]


def test_two_processes(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{ROOT}:{ROOT / 'examples'}",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ["-m", "tests.modeling_t6.distributed_cases", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, *launch, *script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-5000:]
    for rank in range(2):
        assert (tmp_path / f"PASSED-{rank}").read_text().splitlines() == list(CASES)
