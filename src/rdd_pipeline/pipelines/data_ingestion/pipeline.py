"""Wiring of data_ingestion."""

from typing import Any

from kedro.pipeline import Node, Pipeline

from .nodes import index_images, inspect_images, pack_images, preview_images


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Folder of labeled images -> report, index, label set, statistics, packed cache, preview."""
    return Pipeline(
        [
            Node(
                inspect_images,
                name="inspect_images_node",
                inputs={
                    "raw_images": "raw_images",
                    "image_cache": "image_cache",
                    "data": "params:data",
                },
                outputs=[
                    "checked_images",
                    "label_set",
                    "label_statistics",
                    "image_problems",
                    "ingestion_report",
                ],
                tags=["data"],
            ),
            Node(
                index_images,
                name="index_images_node",
                inputs={
                    "raw_images": "raw_images",
                    "checked_images": "checked_images",
                    "image_problems": "image_problems",
                    "data": "params:data",
                },
                outputs=["raw_index", "data_tags"],
                tags=["data"],
            ),
            Node(
                pack_images,
                name="pack_images_node",
                inputs={
                    "raw_images": "raw_images",
                    "image_cache": "image_cache",
                    "raw_index": "raw_index",
                    "label_set": "label_set",
                    "data": "params:data",
                },
                outputs="packed_images",
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
