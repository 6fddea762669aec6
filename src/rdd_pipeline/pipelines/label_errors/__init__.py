"""Training images whose labels are likely wrong, by what teacher and student contradict alike."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
