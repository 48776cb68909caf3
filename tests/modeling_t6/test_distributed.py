"""Two processes equal one in all that a T6 does: the cases of `distributed_cases.py`."""

import os
from pathlib import Path

from .. import processes
from .distributed_cases import CASES


ROOT = Path(__file__).parents[2]
# What torchrun does, without starting Python anew: the first process that fails ends the other.
START = """
import os
import torch.multiprocessing

def start(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    from tests.modeling_t6 import distributed_cases
    distributed_cases.main()

torch.multiprocessing.start_processes(start, nprocs=2, start_method="fork")
"""
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
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(processes.free_port()),
    }
    outcome = processes.run(START, str(tmp_path), *cases, env=environment, cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr[-5000:]
    for rank in range(2):
        assert (tmp_path / f"PASSED-{rank}").read_text().splitlines() == cases
