"""The folder of an MLflow model: weights, this package's source, no pickle."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

import rdd_pipeline

NEEDED = (
    *("mlflow", "huggingface-hub", "numpy", "pandas", "pillow", "pydantic", "pyyaml", "rich"),
    *("safetensors", "timm", "torch", "torchvision"),
)
"""What the loader imports."""


def write_model(folder: Path, weights: Path, facts: Mapping[str, Any]) -> None:
    """Make the folder of an MLflow model.

    `mlflow.pyfunc.load_model` gives what `serving.loader` describes. This package lies in the
    folder as source, because no package index has it; weights are the safetensors file as it is.

    The signature names the output alone: MLflow can describe an array of images or a column of
    encoded ones, and would refuse the other. `serving.loader` takes both and checks them itself.

    Args:
        folder: Must not exist.
        weights: A network of this project.
        facts: Further plain values for the model's metadata.
    """
    # It would say in the middle of a training that it looks at the example.
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    mlflow.pyfunc.save_model(
        folder,
        loader_module="rdd_pipeline.serving.loader",
        data_path=str(weights),
        code_paths=[str(Path(rdd_pipeline.__file__).parent)],
        pip_requirements=requirements(),
        signature=ModelSignature(
            outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1), "mask")])
        ),
        input_example=example(),
        metadata=dict(facts),
    )


def example() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One image (1, 32, 48, 3): gray from black to white."""
    row = np.linspace(0, 255, 48).astype(np.uint8)
    return np.broadcast_to(row[None, None, :, None], (1, 32, 48, 3)).copy()


def requirements() -> list[str]:
    """The packages that the loader needs, as they are installed here."""
    found = []
    for name in NEEDED:
        try:
            # Without the build (2.15.0+cu132): package indexes have the plain version.
            found.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return found
