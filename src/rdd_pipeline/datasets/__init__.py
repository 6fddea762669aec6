"""Kedro datasets of this project: file input and output only.

The classes are imported when they are first asked for, so that listing pipelines needs no torch.
"""

from importlib import import_module
from typing import Any

from rdd_pipeline.lazy import importing

_MODULES = {
    "FolderDataset": "folder",
    "ImagesDataset": "images",
    "MetricsDataset": "metrics",
    "NetworksDataset": "networks",
    "TrainedMetricsDataset": "metrics",
    "TrainingStatesDataset": "training_states",
    "WholeCSVDataset": "whole",
    "WholeFigureDataset": "whole",
    "WholeJSONDataset": "whole",
    "WholeTextDataset": "whole",
}

__all__ = [
    "FolderDataset",
    "ImagesDataset",
    "MetricsDataset",
    "NetworksDataset",
    "TrainedMetricsDataset",
    "TrainingStatesDataset",
    "WholeCSVDataset",
    "WholeFigureDataset",
    "WholeJSONDataset",
    "WholeTextDataset",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with importing():
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
