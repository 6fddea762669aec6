"""RDD with one setting changed: the rows of the published ablation tables."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
