"""Labelled images -> checked index, label statistics, preview."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
