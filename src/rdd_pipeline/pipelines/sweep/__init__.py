"""Trainings of one method with other settings: all that were asked for, ranked on val."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
