"""Wiring of evaluation."""

from typing import Any

from kedro.pipeline import Node, Pipeline

from .nodes import compare_methods, draw_comparison


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Metrics of everything trained for this data set -> one table, one figure."""
    return Pipeline(
        [
            Node(
                compare_methods,
                name="compare_methods_node",
                inputs="trained_metrics",
                outputs="comparison_table",
                tags=["evaluation"],
            ),
            Node(
                draw_comparison,
                name="draw_comparison_node",
                inputs="comparison_table",
                outputs="comparison_figure",
                tags=["figures"],
            ),
        ]
    )
