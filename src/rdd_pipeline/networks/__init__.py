"""Segmentation networks: build, load, save, and import published ones."""

from rdd_pipeline.networks.checkpoint import (
    NetworkCheckpoint,
    NetworkHeader,
    import_state_dict,
    import_teacher,
    load_checkpoint,
    read_header,
    save_checkpoint,
)
from rdd_pipeline.networks.files import read_state_dict
from rdd_pipeline.networks.network import (
    PUBLISHED,
    NetworkOutput,
    SegmentationNetwork,
    build_network,
    network_from_params,
)
from rdd_pipeline.networks.preprocessing import Preprocessing
from rdd_pipeline.networks.published import convert_published

__all__ = [
    "PUBLISHED",
    "NetworkCheckpoint",
    "NetworkHeader",
    "NetworkOutput",
    "Preprocessing",
    "SegmentationNetwork",
    "build_network",
    "convert_published",
    "import_state_dict",
    "import_teacher",
    "load_checkpoint",
    "network_from_params",
    "read_header",
    "read_state_dict",
    "save_checkpoint",
]
