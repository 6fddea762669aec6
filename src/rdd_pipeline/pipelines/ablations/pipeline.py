"""Wiring of ablations."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.distillation.methods import ABLATIONS
from rdd_pipeline.pipelines._summary import summary_pipeline
from rdd_pipeline.pipelines._wiring import methods_pipeline
from rdd_pipeline.pipelines.train_teacher.pipeline import teacher_pipeline


def create_pipeline(**kwargs: Any) -> Pipeline:
    """The teacher, the student alone for comparison, and every ablation of RDD."""
    methods = ("baseline", *ABLATIONS)
    return teacher_pipeline() + methods_pipeline(methods) + summary_pipeline("ablations", methods)
