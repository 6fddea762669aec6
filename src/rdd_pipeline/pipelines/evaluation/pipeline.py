"""Wiring of evaluation."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.lazy import Lazy
from rdd_pipeline.pipelines.node import Node

_nodes = Lazy("rdd_pipeline.pipelines.evaluation.nodes")
_examples = Lazy("rdd_pipeline.pipelines.evaluation.examples")


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Metrics of everything trained for this data set -> two tables, figures, one report."""
    return Pipeline(
        [
            Node(
                _nodes.compare_methods,
                name="compare_methods",
                inputs=["trained_metrics", "params:evaluation"],
                outputs="comparison_table",
                tags=["evaluation"],
            ),
            Node(
                _nodes.compare_by_class,
                name="compare_by_class",
                inputs="trained_metrics",
                outputs="class_table",
                tags=["evaluation"],
            ),
            Node(
                _nodes.draw_comparison,
                name="draw_comparison",
                inputs="comparison_table",
                outputs="comparison_figure",
                tags=["figures"],
            ),
            Node(
                _nodes.draw_classes,
                name="draw_classes",
                inputs="class_table",
                outputs="class_figure",
                tags=["figures"],
            ),
            Node(
                _nodes.draw_cost,
                name="draw_cost",
                inputs="comparison_table",
                outputs="cost_figure",
                tags=["figures"],
            ),
            Node(
                _nodes.draw_calibration,
                name="draw_calibration",
                inputs="trained_metrics",
                outputs="calibration_figure",
                tags=["figures"],
            ),
            Node(
                _examples.show_examples,
                name="show_examples",
                inputs={
                    "trained_metrics": "trained_metrics",
                    "comparison_table": "comparison_table",
                    "ingested_images": "ingested_images",
                    "models_folder": "models_folder",
                    "work_folder": "work_folder",
                    "evaluation": "params:evaluation",
                    "trainer": "params:trainer",
                },
                outputs="comparison_examples",
                tags=["figures"],
            ),
            Node(
                _nodes.write_report,
                name="write_report",
                inputs={
                    "trained_metrics": "trained_metrics",
                    "comparison_table": "comparison_table",
                    "class_table": "class_table",
                    "work_folder": "work_folder",
                    "reporting_folder": "reporting_folder",
                    "examples": "comparison_examples",
                },
                outputs="comparison_report",
                tags=["figures"],
            ),
        ]
    )
