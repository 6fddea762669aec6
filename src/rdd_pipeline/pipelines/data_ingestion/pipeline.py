"""Wiring of data_ingestion."""

from typing import Any

from kedro.pipeline import Node, Pipeline

from .nodes import index_images, preview_images


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Folder of labeled images -> index, label set, statistics, preview."""
    return Pipeline(
        [
            Node(
                index_images,
                name="index_images_node",
                inputs={"raw_images": "raw_images", "data": "params:data"},
                outputs=["raw_index", "label_set", "label_statistics", "data_tags"],
                tags=["data"],
            ),
            Node(
                preview_images,
                name="preview_images_node",
                inputs={
                    "raw_images": "raw_images",
                    "raw_index": "raw_index",
                    "label_set": "label_set",
                    "data": "params:data",
                },
                outputs="data_preview",
                tags=["data", "figures"],
            ),
        ]
    )
