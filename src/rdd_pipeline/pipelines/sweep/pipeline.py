"""Wiring of sweep."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.lazy import Lazy
from rdd_pipeline.pipelines import train_teacher
from rdd_pipeline.pipelines.method_pipeline import planned_from
from rdd_pipeline.pipelines.node import Node

_nodes = Lazy("rdd_pipeline.pipelines.sweep.nodes")

_method_nodes = Lazy("rdd_pipeline.pipelines.method_nodes")


def create_pipeline(**kwargs: Any) -> Pipeline:
    """One teacher, a training for each setting under it, and which of them val likes best."""
    return train_teacher.teacher_pipeline() + Pipeline(
        [
            Node(
                _method_nodes.make_plan_node.made_with("baseline", name="plan_baseline"),
                name="plan_untuned",
                inputs=planned_from("baseline"),
                outputs="plan_untuned",
                tags=["checks"],
            ),
            Node(
                _nodes.plan_trials,
                name="plan_trials",
                inputs=["images", "network_plan", "params:sweep", "plan_untuned"],
                outputs="plan_trials",
                tags=["checks"],
            ),
            Node(
                _nodes.train_trials,
                name="train_trials",
                inputs={
                    "images": "images",
                    "trials": "plan_trials",
                    "teacher_weights": "teacher_weights",
                    "sweep": "params:sweep",
                    "trainer": "params:trainer",
                    "work_folder": "work_folder",
                },
                outputs="sweep_table",
                tags=["gpu", "trials"],
            ),
            Node(
                _nodes.draw_sweep,
                name="draw_sweep",
                inputs=["images", "sweep_table", "params:sweep"],
                outputs="sweep_figure",
                tags=["figures"],
            ),
            Node(
                _nodes.summarize_sweep,
                name="summarize_sweep",
                inputs=["sweep_table", "plan_trials", "params:sweep", "reporting_folder"],
                outputs="summary_sweep",
                tags=["evaluation", "summary"],
            ),
        ],
        namespace="sweep",
        prefix_datasets_with_namespace=False,
        tags=["shared"],
    )
