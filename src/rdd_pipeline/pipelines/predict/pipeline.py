"""Wiring of predict."""

from typing import Any

from kedro.pipeline import Node, Pipeline

from .nodes import plan_predictions, predict_images


def create_pipeline(**kwargs: Any) -> Pipeline:
    """A trained network and the images of `params:predict` -> masks, overlays, a table."""
    return Pipeline(
        [
            Node(
                plan_predictions,
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
                predict_images,
                name="predict_images",
                inputs={"plan": "prediction_plan", "predict": "params:predict"},
                outputs=["prediction_table", "prediction_problems"],
                tags=["gpu"],
            ),
        ]
    )
