"""A trained network as ONNX, torch.export and int8 files, each checked against torch."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
