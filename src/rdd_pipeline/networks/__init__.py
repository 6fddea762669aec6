"""Segmentation networks: build, load, save, and import those of the papers."""

from rdd_pipeline.networks.checkpoint import (
    NetworkCheckpoint,
    NetworkHeader,
    import_state_dict,
    import_teacher,
    load_checkpoint,
    save_checkpoint,
)
from rdd_pipeline.networks.cirkd_names import convert_cirkd_names
from rdd_pipeline.networks.files import read_state_dict
from rdd_pipeline.networks.foreign import permit
from rdd_pipeline.networks.network import (
    PAPER_NETWORKS,
    Network,
    NetworkOutput,
    SegmentationNetwork,
    build_network,
    network_from_params,
)
from rdd_pipeline.networks.preprocessing import Preprocessing

__all__ = [
    "PAPER_NETWORKS",
    "Network",
    "NetworkCheckpoint",
    "NetworkHeader",
    "NetworkOutput",
    "Preprocessing",
    "SegmentationNetwork",
    "build_network",
    "convert_cirkd_names",
    "import_state_dict",
    "import_teacher",
    "load_checkpoint",
    "network_from_params",
    "permit",
    "read_state_dict",
    "save_checkpoint",
]
