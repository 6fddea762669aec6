"""Wiring of train_teacher."""

from typing import Any

from kedro.pipeline import Node, Pipeline

from rdd_pipeline.pipelines import data_ingestion
from rdd_pipeline.pipelines._summary import summary_pipeline
from rdd_pipeline.pipelines._training import draw_history

from .nodes import check_networks, evaluate_teacher, train_teacher

_SHARED = {
    "images": "images",
    "work_folder": "work_folder",
}


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Everything up to a teacher that is trained (or imported) and evaluated, and its scores."""
    return teacher_pipeline() + summary_pipeline("train_teacher", ())


def teacher_pipeline() -> Pipeline:
    """The same without the table, for pipelines that go on."""
    check = Node(
        check_networks,
        name="check_networks_node",
        inputs={
            "images": "images",
            "teacher": "params:teacher",
            "student": "params:student",
            "teacher_recipe": "params:teacher_recipe",
            "recipe": "params:recipe",
            "rdd": "params:rdd",
            "methods": "params:methods",
            "seed": "params:seed",
            "seeds": "params:seeds",
            "trainer": "params:trainer",
        },
        outputs="network_plan",
        tags=["checks"],
    )
    teacher = Pipeline(
        [
            Node(
                train_teacher,
                name="train_teacher_node",
                inputs={
                    **_SHARED,
                    "network_plan": "network_plan",
                    "teacher": "params:teacher",
                    "teacher_recipe": "params:teacher_recipe",
                    "rdd": "params:rdd",
                    "methods": "params:methods",
                    "evaluation": "params:evaluation",
                    "seed": "params:seed",
                    "trainer": "params:trainer",
                },
                outputs=["weights", "history", "training"],
                tags=["gpu", "training"],
            ),
            Node(
                evaluate_teacher,
                name="evaluate_teacher_node",
                inputs={
                    **_SHARED,
                    "weights": "weights",
                    "training": "training",
                    "evaluation": "params:evaluation",
                    "trainer": "params:trainer",
                },
                outputs=["metrics", "confusion"],
                tags=["gpu", "evaluation"],
            ),
            Node(
                draw_history,
                name="draw_teacher_history_node",
                inputs="history",
                outputs="curves",
                tags=["figures"],
            ),
        ]
    )
    return (
        data_ingestion.create_pipeline()
        + Pipeline([check])
        + Pipeline(
            teacher,
            namespace="teacher",
            tags=["method_teacher"],
            inputs={*_SHARED, "network_plan"},
            outputs={
                "weights": "teacher_weights",
                "history": "history_teacher",
                "metrics": "metrics_teacher",
                "confusion": "confusion_teacher",
                "curves": "curves_teacher",
            },
            parameters={
                "params:teacher",
                "params:teacher_recipe",
                "params:rdd",
                "params:methods",
                "params:seed",
                "params:trainer",
                "params:evaluation",
            },
        )
    )
