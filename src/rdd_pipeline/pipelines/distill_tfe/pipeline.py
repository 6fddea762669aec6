"""Wiring of distill_tfe."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.pipelines import train_teacher
from rdd_pipeline.pipelines.method_pipeline import method_pipeline
from rdd_pipeline.pipelines.summary import summary_pipeline


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Everything up to the end of the TFE stage; hands on the whole training state."""
    return tfe_pipeline() + summary_pipeline("distill_tfe", ("tfe",))


def tfe_pipeline() -> Pipeline:
    """The same without the table, for the pipeline that goes on."""
    return train_teacher.teacher_pipeline() + method_pipeline("tfe")
