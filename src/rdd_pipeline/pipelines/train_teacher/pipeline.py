"""Wiring of train_teacher."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.lazy import Lazy
from rdd_pipeline.pipelines import data_ingestion
from rdd_pipeline.pipelines.method_pipeline import method_pipeline
from rdd_pipeline.pipelines.node import Node
from rdd_pipeline.pipelines.summary import summary_pipeline

_nodes = Lazy("rdd_pipeline.pipelines.train_teacher.nodes")
_method_nodes = Lazy("rdd_pipeline.pipelines.method_nodes")


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Everything up to a teacher that is trained (or imported) and evaluated, and its scores."""
    return teacher_pipeline() + summary_pipeline("train_teacher", ())


def teacher_pipeline() -> Pipeline:
    """The same without the table, for pipelines that go on."""
    networks = Pipeline(
        [
            Node(
                _nodes.import_weights,
                name="import_weights",
                inputs={"images": "images", "teacher": "params:teacher"},
                outputs="given_teacher",
            ),
            Node(
                _method_nodes.measure_networks,
                name="measure_networks",
                inputs={
                    "images": "images",
                    "given_teacher": "given_teacher",
                    "teacher": "params:teacher",
                    "student": "params:student",
                    "teacher_recipe": "params:teacher_recipe",
                    "recipe": "params:recipe",
                    "work_folder": "work_folder",
                },
                outputs="measured_networks",
                tags=["checks"],
            ),
            Node(
                _method_nodes.check_networks,
                name="check_networks",
                inputs={
                    "images": "images",
                    "measured_networks": "measured_networks",
                    "teacher_recipe": "params:teacher_recipe",
                    "recipe": "params:recipe",
                    "rdd": "params:rdd",
                    "methods": "params:methods",
                },
                outputs="network_plan",
                tags=["checks"],
            ),
        ],
        namespace="teacher",
        prefix_datasets_with_namespace=False,
        tags=["shared"],
    )
    return data_ingestion.create_pipeline() + networks + method_pipeline("teacher")
