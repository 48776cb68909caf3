"""Two processes, started by torchrun, equal one in all that a T6 does: the cases of `distributed_cases.py`."""

import os
import subprocess
import sys
from pathlib import Path

from .distributed_cases import CASES


ROOT = Path(__file__).parents[2]
# As `once_but` does with parameters: with the oldest Transformers, a case of each way to share out a model.
EVERYWHERE = [
    "tensor parallel: TPA",
    "tensor parallel: non-contextual A",
    "tensor parallel: norms of shared B",
    "tensor parallel: gradient checkpointing",
    "tensor parallel: classifier",
    "tensor parallel: converted Llama",
    "tensor parallel: 47 heads",
    "pipeline: mixed layers",
    "FSDP2",
    "DDP by accelerate",
    "example: tensor",
]


def test_two_processes(tmp_path, pytestconfig):
    cases = EVERYWHERE if pytestconfig.option.markexpr == "not once" else list(CASES)
    environment = os.environ | {
        "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{ROOT}:{ROOT / 'examples'}",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    script = ["-m", "tests.modeling_t6.distributed_cases", str(tmp_path), *cases]
    result = subprocess.run(
        [sys.executable, *launch, *script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-5000:]
    for rank in range(2):
        assert (tmp_path / f"PASSED-{rank}").read_text().splitlines() == cases
