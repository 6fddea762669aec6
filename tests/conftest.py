"""Settings of the whole test session; what needs Kedro is in tests/kedro_fixtures.py.

No test computes much: one thread is faster than two that wait for each other, and the suite runs
beside itself under pytest-xdist. No test asks the network for anything.
"""

import os

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "DO_NOT_TRACK": "true",
    "KEDRO_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402 - it reads OMP_NUM_THREADS when it is imported

torch.set_num_threads(1)
