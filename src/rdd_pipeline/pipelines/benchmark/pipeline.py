"""Wiring of benchmark."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.lazy import Lazy
from rdd_pipeline.pipelines import data_ingestion
from rdd_pipeline.pipelines.node import Node

_nodes = Lazy("rdd_pipeline.pipelines.benchmark.nodes")


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Networks that were trained -> a table of what they cost to run, and a figure."""
    return data_ingestion.create_pipeline() + Pipeline(
        [
            Node(
                _nodes.measure_networks,
                name="measure_networks",
                inputs=["images", "models_folder", "trained_metrics", "params:benchmark"],
                outputs="speed_table",
                tags=["benchmark"],
            ),
            Node(
                _nodes.draw_pareto,
                name="draw_pareto",
                inputs="speed_table",
                outputs="pareto_figure",
                tags=["figures"],
            ),
        ]
    )
