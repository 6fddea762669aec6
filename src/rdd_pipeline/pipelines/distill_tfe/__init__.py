"""First stage of RDD: teacher-full evaluated, easy pixels first."""

from .pipeline import create_pipeline, tfe_pipeline

__all__ = ["create_pipeline", "tfe_pipeline"]
