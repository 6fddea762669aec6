"""The teacher: trained here, or imported from a checkpoint."""

from .pipeline import create_pipeline, teacher_pipeline

__all__ = ["create_pipeline", "teacher_pipeline"]
