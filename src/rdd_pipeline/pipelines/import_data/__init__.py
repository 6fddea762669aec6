"""A labeling tool's export -> data set, environment, and the command that trains on it."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
