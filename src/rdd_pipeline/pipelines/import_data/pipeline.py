"""Wiring of import_data."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.lazy import Lazy
from rdd_pipeline.pipelines.node import Node

_nodes = Lazy("rdd_pipeline.pipelines.import_data.nodes")


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Folder of a labeling tool -> data set of the layout `folders`, environment, summary."""
    return Pipeline(
        [
            Node(
                _nodes.recognize_export,
                name="recognize_export",
                inputs={"raw_folder": "raw_folder", "import_data": "params:import_data"},
                outputs="found_export",
                tags=["data"],
            ),
            Node(
                _nodes.write_images,
                name="write_images",
                inputs={
                    "found": "found_export",
                    "environments_folder": "environments_folder",
                    "import_data": "params:import_data",
                },
                outputs="imported_data",
                tags=["data"],
            ),
            Node(
                _nodes.write_environment,
                name="write_environment",
                inputs={
                    "imported": "imported_data",
                    "environments_folder": "environments_folder",
                    "import_data": "params:import_data",
                },
                outputs="import_summary",
                tags=["data", "summary"],
            ),
        ]
    )
