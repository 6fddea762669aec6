"""Wiring of distill_tse."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.lazy import Lazy
from rdd_pipeline.pipelines import distill_tfe
from rdd_pipeline.pipelines.method_pipeline import method_pipeline
from rdd_pipeline.pipelines.node import Node
from rdd_pipeline.pipelines.summary import summary_pipeline

_nodes = Lazy("rdd_pipeline.pipelines.distill_tse.nodes")
_example_nodes = Lazy("rdd_pipeline.pipelines.example_nodes")


def create_pipeline(**kwargs: Any) -> Pipeline:
    """The whole job, and the student alone beside it.

    The TSE stage goes on from the state in which the TFE stage ended.
    """
    results = Pipeline(
        [
            Node(
                _nodes.draw_pixels,
                name="draw_pixels",
                inputs={
                    "images": "images",
                    "teacher_weights": "teacher_weights",
                    "student_weights": "student_tse",
                    "rdd": "params:rdd",
                    "evaluation": "params:evaluation",
                },
                outputs="pixels_tse",
                tags=["figures"],
            ),
            Node(
                _example_nodes.draw_side_by_side,
                name="draw_side_by_side",
                inputs={
                    "images": "images",
                    "teacher_weights": "teacher_weights",
                    "baseline_weights": "student_baseline",
                    "student_weights": "student_tse",
                    "metrics_baseline": "metrics_baseline",
                    "metrics_student": "metrics_tse",
                    "evaluation": "params:evaluation",
                    "trainer": "params:trainer",
                },
                outputs="side_by_side_tse",
                tags=["figures"],
            ),
            Node(
                _example_nodes.rank_images,
                name="rank_images",
                inputs={
                    "images": "images",
                    "student_weights": "student_tse",
                    "metrics_teacher": "metrics_teacher",
                    "metrics_baseline": "metrics_baseline",
                    "metrics_student": "metrics_tse",
                    "evaluation": "params:evaluation",
                    "trainer": "params:trainer",
                },
                outputs=["image_scores_tse", "worst_tse"],
                tags=["figures"],
            ),
        ],
        namespace="results",
        prefix_datasets_with_namespace=False,
        tags=["shared"],
    )
    return (
        distill_tfe.tfe_pipeline()
        + method_pipeline("tse")
        # What RDD is measured against; the same nodes as in distill_baselines.
        + method_pipeline("baseline")
        + results
        + summary_pipeline("distill_tse", ("baseline", "tse"), output="summary")
    )
