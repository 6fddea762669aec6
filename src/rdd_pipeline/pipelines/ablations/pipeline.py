"""Wiring of ablations."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.distillation.methods import ABLATIONS
from rdd_pipeline.pipelines import train_teacher
from rdd_pipeline.pipelines.method_pipeline import methods_pipeline
from rdd_pipeline.pipelines.summary import summary_pipeline


def create_pipeline(**kwargs: Any) -> Pipeline:
    """The teacher, the student alone for comparison, and every ablation of RDD."""
    methods = ("baseline", *ABLATIONS)
    return (
        train_teacher.teacher_pipeline()
        + methods_pipeline(methods)
        + summary_pipeline("ablations", methods)
    )
