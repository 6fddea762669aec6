"""Wiring of the table that every pipeline which trains ends with."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline

from rdd_pipeline.lazy import Lazy
from rdd_pipeline.pipelines.node import Node

_nodes = Lazy("rdd_pipeline.pipelines.summary_nodes")


def summary_pipeline(pipeline: str, methods: Sequence[str], output: str | None = None) -> Pipeline:
    """The last node of a pipeline.

    Args:
        pipeline: Its name.
        methods: What it trains besides the teacher: the table waits for them.
        output: Data set with the table; None: ``summary_{pipeline}``.
    """
    return Pipeline(
        [
            Node(
                _nodes.make_summarize_node.made_with(pipeline, name=f"summarize_{pipeline}"),
                name=f"summarize_{pipeline}",
                inputs=[
                    "metrics_teacher",
                    "trained_metrics",
                    "reporting_folder",
                    *(f"metrics_{method}" for method in methods),
                ],
                outputs=output or f"summary_{pipeline}",
                tags=["evaluation", "summary"],
            )
        ],
        namespace="results",
        prefix_datasets_with_namespace=False,
        tags=["shared"],
    )
