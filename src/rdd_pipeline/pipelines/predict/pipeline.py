"""Wiring of predict."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.lazy import Lazy
from rdd_pipeline.pipelines.node import Node

_nodes = Lazy("rdd_pipeline.pipelines.predict.nodes")


def create_pipeline(**kwargs: Any) -> Pipeline:
    """A trained network and the images of `params:predict` -> masks, overlays, a table."""
    return Pipeline(
        [
            Node(
                _nodes.plan_predictions,
                name="plan_predictions",
                inputs={
                    "predict": "params:predict",
                    "data": "params:data",
                    "trainer": "params:trainer",
                    "models_folder": "models_folder",
                    "predictions_folder": "predictions_folder",
                },
                outputs="prediction_plan",
                tags=["checks"],
            ),
            Node(
                _nodes.predict_images,
                name="predict_images",
                inputs={"plan": "prediction_plan", "predict": "params:predict"},
                outputs=["prediction_table", "prediction_problems"],
                tags=["gpu"],
            ),
        ]
    )
