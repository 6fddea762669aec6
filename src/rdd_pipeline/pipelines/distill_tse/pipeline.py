"""Wiring of distill_tse."""

from typing import Any

from kedro.pipeline import Node, Pipeline

from rdd_pipeline.pipelines import distill_tfe
from rdd_pipeline.pipelines._wiring import method_pipeline

from .nodes import draw_pixels, summarize


def create_pipeline(**kwargs: Any) -> Pipeline:
    """The whole job: the TSE stage goes on from the state in which the TFE stage ended."""
    results = Pipeline(
        [
            Node(
                draw_pixels,
                name="draw_pixels_node",
                inputs={
                    "raw_images": "raw_images",
                    "raw_index": "raw_index",
                    "label_set": "label_set",
                    "teacher_weights": "teacher_weights",
                    "student_weights": "student_tse",
                    "data": "params:data",
                    "rdd": "params:rdd",
                    "evaluation": "params:evaluation",
                },
                outputs="pixels_tse",
                tags=["figures"],
            ),
            Node(
                summarize,
                name="summarize_node",
                inputs={
                    "metrics_teacher": "metrics_teacher",
                    "metrics_tse": "metrics_tse",
                    "trained_metrics": "trained_metrics",
                    "reporting_folder": "reporting_folder",
                },
                outputs="summary",
                tags=["evaluation"],
            ),
        ]
    )
    return (
        distill_tfe.create_pipeline()
        + method_pipeline("tse", stage="tse", start="state_tfe")
        + results
    )
