"""Fingerprints of four jobs as they were when their trainings were done: that work is reused.

The values were computed by the code of commit e32e765 (TRAINING_FORMAT 4). When they have to
change, raise TRAINING_FORMAT, which says so to everyone, and compute them anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rdd_pipeline.config import (
    AugmentParams,
    MethodsParams,
    NetworkParams,
    OptimizerParams,
    RddParams,
    RecipeParams,
    Size,
)
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.labels import LabelSet, make_color_lookup
from rdd_pipeline.data.layouts import get_layout
from rdd_pipeline.training.job import TrainingJob

FOLDERS = LabelSet(
    name="fields",
    names=("crop", "weed"),
    colors=((10, 200, 10), (200, 10, 10)),
    lookup=make_color_lookup({(0, 255, 0): 0, (255, 0, 0): 1}, ignored=((0, 0, 0),)),
)


def _images(labels: LabelSet, image_size: Size | None = None) -> Images:
    images = Images(Path("somewhere"), (), labels, image_size)
    vars(images)["index_digest"] = "index"  # in the place of the digest of samples
    return images


def _demonstration() -> TrainingJob:
    """TSE stage of the generated scenes, after the TFE stage."""
    return TrainingJob(
        method="tse",
        stage="tse",
        seed=0,
        network=NetworkParams(name="pspnet_test_resnet", output_stride=8, width=32),
        recipe=RecipeParams(
            iterations=320,
            batch_size=8,
            validate_every=160,
            class_weights=True,
            optimizer=OptimizerParams(name="adamw", lr=0.004, weight_decay=0.01, warmup=20),
            augment=AugmentParams(crop=(64, 96), scale_min=0.75, scale_max=1.5),
        ),
        rdd=RddParams(tfe_length=0.1, mode="xor", threshold=0.3, min_kept=0.05),
        precision="float32",
    )


def _quick() -> TrainingJob:
    """Plain KD of `--env=scenes/quick`."""
    return TrainingJob(
        method="kd",
        seed=3,
        network=NetworkParams(name="pspnet_test_resnet", output_stride=8, width=32),
        recipe=RecipeParams(
            iterations=150,
            batch_size=8,
            validate_every=75,
            class_weights=True,
            optimizer=OptimizerParams(name="adamw", lr=0.004, weight_decay=0.01, warmup=20),
            augment=AugmentParams(crop=(64, 96), scale_min=0.75, scale_max=1.5),
        ),
        methods=MethodsParams(options={"cirkd": {"cirkd_memory": {"pixel_slots": 2000}}}),
    )


def _published() -> TrainingJob:
    """RDD in one go on Cityscapes, as published."""
    return TrainingJob(
        method="tse",
        network=NetworkParams(
            name="deeplabv3_resnet18.tv_in1k", pretrained=True, output_stride=8, width=128
        ),
        recipe=RecipeParams(
            iterations=40000,
            batch_size=16,
            validate_every=2000,
            class_weights=True,
            optimizer=OptimizerParams(lr=0.02),
            augment=AugmentParams(crop=(512, 1024)),
        ),
        rdd=RddParams(tfe_length=0.1, min_kept=0.0477),
        methods=MethodsParams(preset="reference_code"),
        precision="bfloat16",
    )


def _own_images() -> TrainingJob:
    """Someone's own images with colored masks, resized; CIRKDv2, last weights."""
    return TrainingJob(
        method="cirkdv2",
        network=NetworkParams(
            name="deeplabv3_mobilenetv2_100", pretrained=True, output_stride=16, width=64
        ),
        recipe=RecipeParams(
            iterations=4000,
            batch_size=8,
            validate_every=400,
            keep="last",
            optimizer=OptimizerParams(name="adamw", lr=0.001, weight_decay=0.01, warmup=100),
            augment=AugmentParams(crop=(384, 384)),
        ),
        methods=MethodsParams(cross_image="local", scale_by_positions=False),
    )


@pytest.mark.parametrize(
    ("make", "images", "start", "expected"),
    [
        (_demonstration, _images(get_layout("scenes").labels), "start", "6094fb874834ba83"),
        (_quick, _images(get_layout("scenes").labels), None, "28ff28c8ef252661"),
        (_published, _images(get_layout("cityscapes").labels), None, "d59a8d49679f22dc"),
        (_own_images, _images(FOLDERS, (384, 512)), None, "ae6a490a4db5ce5b"),
    ],
)
def test_the_fingerprint_of_earlier_work_stays(make, images, start, expected):
    fingerprint = make().fingerprint(images, teacher_digest="teacher", start_digest=start)
    assert fingerprint == expected
