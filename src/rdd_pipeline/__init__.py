"""Small segmentation networks by Relative Difficulty Distillation, as a Kedro project."""

import os
import sys
from typing import TYPE_CHECKING, Any

from rdd_pipeline.interruptions import is_command, leave_at_signals

# Before anything is imported that takes time.
if is_command(sys.argv, sys.orig_argv):
    leave_at_signals()

# Nothing in this project phones home. Here, because each command and each notebook imports this
# before the libraries that would; kedro-telemetry is also off by the file .telemetry.
for _name in (
    "DO_NOT_TRACK",
    "KEDRO_DISABLE_TELEMETRY",
    "MLFLOW_DISABLE_TELEMETRY",
    "HF_HUB_DISABLE_TELEMETRY",
):
    os.environ.setdefault(_name, "true")

# What torch lacks on Apple's GPUs runs on the CPU. Torch reads it when it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rdd_pipeline.inference.model import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # when it is first asked for: it needs torch
        from rdd_pipeline.inference.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
