"""What teacher and students cost to run, and their accuracy over it."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
