"""Wiring of evaluation."""

from typing import Any

from kedro.pipeline import Node, Pipeline

from .nodes import (
    compare_by_class,
    compare_methods,
    draw_classes,
    draw_comparison,
    draw_cost,
    write_report,
)


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Metrics of everything trained for this data set -> two tables, figures, one report."""
    return Pipeline(
        [
            Node(
                compare_methods,
                name="compare_methods_node",
                inputs=["trained_metrics", "params:evaluation"],
                outputs="comparison_table",
                tags=["evaluation"],
            ),
            Node(
                compare_by_class,
                name="compare_by_class_node",
                inputs="trained_metrics",
                outputs="class_table",
                tags=["evaluation"],
            ),
            Node(
                draw_comparison,
                name="draw_comparison_node",
                inputs="comparison_table",
                outputs="comparison_figure",
                tags=["figures"],
            ),
            Node(
                draw_classes,
                name="draw_classes_node",
                inputs="class_table",
                outputs="class_figure",
                tags=["figures"],
            ),
            Node(
                draw_cost,
                name="draw_cost_node",
                inputs="comparison_table",
                outputs="cost_figure",
                tags=["figures"],
            ),
            Node(
                write_report,
                name="write_report_node",
                inputs={
                    "trained_metrics": "trained_metrics",
                    "comparison_table": "comparison_table",
                    "class_table": "class_table",
                    "work_folder": "work_folder",
                },
                outputs="comparison_report",
                tags=["figures"],
            ),
        ]
    )
