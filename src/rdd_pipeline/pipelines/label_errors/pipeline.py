"""Wiring of label_errors."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.lazy import Lazy
from rdd_pipeline.pipelines import data_ingestion
from rdd_pipeline.pipelines.node import Node

_nodes = Lazy("rdd_pipeline.pipelines.example_nodes")


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Teacher and RDD student that were trained -> regions of labels they contradict, ranked."""
    return data_ingestion.create_pipeline() + Pipeline(
        [
            Node(
                _nodes.find_label_errors,
                name="find_label_errors",
                inputs={
                    "images": "images",
                    "teacher_weights": "teacher_weights",
                    "student_weights": "student_tse",
                    "evaluation": "params:evaluation",
                    "trainer": "params:trainer",
                    "work_folder": "work_folder",
                },
                outputs=["label_errors", "label_errors_figure"],
                tags=["gpu", "figures"],
            ),
        ]
    )
