"""Settings of the whole test session; what needs Kedro is in tests/kedro_project.py.

No test computes much: one thread is faster than two that wait for each other, and the suite runs
beside itself under pytest-xdist. No test asks the network for anything.
"""

import os
import sys

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "DO_NOT_TRACK": "true",
    "KEDRO_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(_name, _value)
# A hundred commands are started: each would compile this project anew for 1.5 s in some containers.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest  # noqa: E402
import torch  # noqa: E402 - it reads OMP_NUM_THREADS when it is imported

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Before anything imports triton: its kernels run without a GPU, in tests/losses/test_fused.py.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# They mostly wait for processes of their own; a worker that got them last would be the last to end.
_FIRST = (
    *("test_launch.py", "test_distributed.py", "test_run.py", "test_main.py", "test_typed.py"),
    *("test_loop.py", "test_methods.py", "test_shared.py", "test_delivery.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, where several workers take one file after the other."""
    rank = {name: place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
