"""Masks of new images by a trained network."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
