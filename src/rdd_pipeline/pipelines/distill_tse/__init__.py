"""The main job: images -> teacher -> TFE stage -> TSE stage -> evaluated student."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
