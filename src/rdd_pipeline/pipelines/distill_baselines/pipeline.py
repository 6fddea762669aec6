"""Wiring of distill_baselines."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.distillation.methods import METHODS
from rdd_pipeline.pipelines import train_teacher
from rdd_pipeline.pipelines._training import method_pipeline

RDD_STAGES = ("tfe", "tse")
"""Methods with pipelines of their own."""


def create_pipeline(**kwargs: Any) -> Pipeline:
    """The teacher, the student alone and every method beside RDD itself."""
    methods = [name for name in METHODS if name not in RDD_STAGES]
    return train_teacher.create_pipeline() + sum(
        (method_pipeline(name) for name in methods), start=Pipeline([])
    )
