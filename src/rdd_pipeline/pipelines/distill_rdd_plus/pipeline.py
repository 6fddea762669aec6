"""Wiring of distill_rdd_plus."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.distillation.methods import RDD_PLUS
from rdd_pipeline.pipelines import train_teacher
from rdd_pipeline.pipelines.method_pipeline import methods_pipeline
from rdd_pipeline.pipelines.summary import summary_pipeline


def create_pipeline(**kwargs: Any) -> Pipeline:
    """The teacher and every method beside RDD."""
    return (
        train_teacher.teacher_pipeline()
        + methods_pipeline(tuple(RDD_PLUS))
        + summary_pipeline("distill_rdd_plus", tuple(RDD_PLUS))
    )
