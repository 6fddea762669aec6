"""Small images, networks and parameters of the tests of nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from rdd_pipeline.config import (
    AugmentParams,
    DataParams,
    EvaluationParams,
    MethodsParams,
    NetworkParams,
    OptimizerParams,
    RddParams,
    RecipeParams,
    TeacherParams,
    TrainerParams,
)
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.networks import NetworkCheckpoint, network_from_params
from rdd_pipeline.pipelines.data_ingestion.nodes import (
    index_images,
    inspect_images,
)
from rdd_pipeline.pipelines.method_nodes import (
    Plan,
    make_plan_node,
)

STUDENT = NetworkParams(name="fcn_test_efficientnet", width=8, output_stride=16)


TEACHER = NetworkParams(name="deeplabv3_test_efficientnet", width=8, output_stride=16)


RECIPE = RecipeParams(
    iterations=2,
    batch_size=2,
    validate_every=2,
    optimizer=OptimizerParams(lr=0.05),
    augment=AugmentParams(crop=(32, 32)),
)


CPU = TrainerParams(device="cpu", precision="float32")


FOLDER = DataParams(layout="camvid", workers=1)


def change(params, **fields):
    return params.model_copy(update=fields)


NO_AUXILIARY = TeacherParams(network=change(TEACHER, auxiliary=False))


class Ingested(NamedTuple):
    """What ingestion hands on."""

    images: Images
    index: pd.DataFrame
    statistics: pd.DataFrame
    tags: dict[str, str]
    report: str


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def ingest(images: Path, data: DataParams) -> Ingested:
    """The two nodes that make the index, one after the other as Kedro runs them."""
    cache = images.parent / "cache"
    inspection, statistics, _, report = inspect_images(images, cache, data)
    checked, index, tags = index_images(inspection, data)
    return Ingested(checked, index, statistics, tags, report)


def checkpoint(params: NetworkParams = TEACHER, seed: int = 0) -> NetworkCheckpoint:
    """A network with random weights for CamVid's classes."""
    torch.manual_seed(seed)
    network = network_from_params(params, num_classes=11)
    return NetworkCheckpoint.from_network(network, params=params, label_names=CAMVID.names)


def plan(method: str, images: Images, **given: Any) -> Plan:
    """Jobs of `method` under these parameters, with the networks that they name."""
    networks = {
        role: {"network": given.pop(role, params).model_dump(mode="json"), "given": False}
        for role, params in (("teacher", TEACHER), ("student", STUDENT))
    }
    defaults = {
        "recipe": RECIPE,
        "rdd": RddParams(tfe_length=1, min_kept=0.1),
        "methods": MethodsParams(),
        "evaluation": EvaluationParams(),
        "seed": 0,
    }
    return make_plan_node(method)(images, networks, **{**defaults, **given})
