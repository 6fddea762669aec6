"""Wiring of export."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.lazy import Lazy
from rdd_pipeline.pipelines import data_ingestion
from rdd_pipeline.pipelines.node import Node

_nodes = Lazy("rdd_pipeline.pipelines.export.nodes")


def create_pipeline(**kwargs: Any) -> Pipeline:
    """A network that was trained -> files in several formats, each with its verdict."""
    return data_ingestion.create_pipeline() + Pipeline(
        [
            Node(
                _nodes.choose_network,
                name="choose_network",
                inputs=["images", "models_folder", "trained_metrics", "params:export"],
                outputs="exported_network",
                tags=["checks"],
            ),
            Node(
                _nodes.export_network,
                name="export_network",
                inputs={
                    "exported_network": "exported_network",
                    "images": "images",
                    "export_folder": "export_folder",
                    "export": "params:export",
                    "trainer": "params:trainer",
                },
                outputs="export_verdicts",
                tags=["export"],
            ),
            Node(
                _nodes.refuse_deviations,
                name="refuse_deviations",
                inputs="export_verdicts",
                outputs=None,
                tags=["export"],
            ),
        ]
    )
