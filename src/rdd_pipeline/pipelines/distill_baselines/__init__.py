"""The student alone and every other method, under one recipe."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
