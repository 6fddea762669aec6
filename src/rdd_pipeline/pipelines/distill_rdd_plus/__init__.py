"""RDD in the place of the task loss of every other method: tse_cwd, tse_cirkd, ..."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
