"""Wiring of data_ingestion."""

from typing import Any

from kedro.pipeline import Node, Pipeline

from .nodes import index_images, inspect_images, pack_images, preview_images


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Folder of labeled images -> report, statistics, checked images with packs, preview."""
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
                outputs=["inspection", "label_statistics", "image_problems", "ingestion_report"],
                tags=["data"],
            ),
            Node(
                index_images,
                name="index_images_node",
                inputs=["inspection", "params:data"],
                outputs=["indexed_images", "image_index", "data_tags"],
                tags=["data"],
            ),
            Node(
                pack_images,
                name="pack_images_node",
                inputs={
                    "indexed_images": "indexed_images",
                    "image_cache": "image_cache",
                    "data": "params:data",
                },
                outputs=["images", "packed_images"],
                tags=["data"],
            ),
            Node(
                preview_images,
                name="preview_images_node",
                inputs="images",
                outputs="data_preview",
                tags=["data", "figures"],
            ),
        ]
    )
