"""Wiring of data_ingestion."""

from typing import Any

from kedro.pipeline import Pipeline

from rdd_pipeline.lazy import Lazy
from rdd_pipeline.pipelines.node import Node

_nodes = Lazy("rdd_pipeline.pipelines.data_ingestion.nodes")


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Folder of labeled images -> report, statistics, checked images with packs, preview."""
    return Pipeline(
        [
            Node(
                _nodes.inspect_images,
                name="inspect_images",
                inputs={
                    "raw_images": "raw_images",
                    "image_cache": "image_cache",
                    "data": "params:data",
                },
                outputs=["inspection", "label_statistics", "image_problems", "ingestion_report"],
                tags=["data"],
            ),
            Node(
                _nodes.index_images,
                name="index_images",
                inputs=["inspection", "params:data"],
                outputs=["indexed_images", "image_index", "data_tags"],
                tags=["data"],
            ),
            Node(
                _nodes.pack_images,
                name="pack_images",
                inputs={
                    "indexed_images": "indexed_images",
                    "image_cache": "image_cache",
                    "data": "params:data",
                },
                outputs=["images", "packed_images"],
                tags=["data"],
            ),
            Node(
                _nodes.preview_images,
                name="preview_images",
                inputs="images",
                outputs="data_preview",
                tags=["data", "figures"],
            ),
        ],
        namespace="data",
        prefix_datasets_with_namespace=False,
        tags=["shared"],
    )
