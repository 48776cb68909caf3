"""Two processes equal one in all that a T6 does: the cases of `distributed_cases.py`."""

import os
from pathlib import Path

from .. import processes
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
    code = "from tests.modeling_t6.distributed_cases import main"
    outcome = processes.run_in_two(code, str(tmp_path), *cases, env=environment, cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr[-5000:]
    for rank in range(2):
        assert (tmp_path / f"PASSED-{rank}").read_text().splitlines() == cases
