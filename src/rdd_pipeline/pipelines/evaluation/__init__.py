"""One table and figures over whatever has been trained."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
