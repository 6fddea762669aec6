"""Small segmentation networks by Relative Difficulty Distillation, as a Kedro project."""

import os

# What torch lacks on Apple's GPUs runs on the CPU. Torch reads it when it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

__version__ = "0.1.0"
