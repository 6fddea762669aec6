"""NCCL finds its processes through the store of `launching`, and leaves without waiting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

SCRIPT = """
import time, torch, torch.distributed as dist
from rdd_pipeline.config import TrainerParams
from rdd_pipeline.launching.exchange import host
from rdd_pipeline.launching.worker import _init_process_group
import os
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="meeting")
_init_process_group(torch.device("cuda", 0), TrainerParams(), host(TrainerParams()))
values = torch.ones(3, device="cuda")
for _ in range(100):
    dist.all_reduce(values)
dist.barrier()
time.sleep(5)  # NCCL's watchdog looks into the store by a thread of its own
torch.cuda.synchronize()
dist.destroy_process_group()
print(values.tolist())
"""


def test_nccl_meets_in_the_store():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[1.0, 1.0, 1.0]"
