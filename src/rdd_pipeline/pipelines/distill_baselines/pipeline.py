"""Wiring of distill_baselines."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.distillation.methods import BASELINES
from rdd_pipeline.pipelines import train_teacher
from rdd_pipeline.pipelines.method_pipeline import methods_pipeline
from rdd_pipeline.pipelines.summary import summary_pipeline


def create_pipeline(**kwargs: Any) -> Pipeline:
    """The teacher, the student alone and every method beside RDD."""
    return (
        train_teacher.teacher_pipeline()
        + methods_pipeline(BASELINES)
        + summary_pipeline("distill_baselines", BASELINES)
    )
