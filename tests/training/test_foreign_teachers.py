"""Teachers of other code teach students, with and without a second head, in any class order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rdd_pipeline.config import AugmentParams, NetworkParams, TeacherParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import NetworkCheckpoint
from rdd_pipeline.networks.checkpoint import import_teacher
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.training import Training
from tests.networks.modules import MASK2FORMER, SEGFORMER
from tests.training.conftest import CPU, LABELS

SMP = {"arch": "unet", "encoder_name": "tu-resnet10t"}
ADAPTERS = {
    "smp": ("segmentation_models_pytorch", "smp", SMP),
    "segformer": ("transformers", "transformers", {"config": SEGFORMER}),
    "mask2former": ("transformers", "transformers", {"config": MASK2FORMER}),
}


RECIPE = {"iterations": 2, "validate_every": 2, "augment": AugmentParams(crop=(64, 64))}


def take(adapter: str, *, second: bool = False, **fields) -> NetworkCheckpoint:
    library, name, arguments = ADAPTERS[adapter]
    pytest.importorskip(library)
    module = f"rdd_pipeline.networks.adapters:{name}"
    if second:
        module = "tests.networks.modules:with_second_head"
        arguments = {"of": name, **arguments}
    params = TeacherParams(
        network=NetworkParams(name="deeplabv3_resnet101"),
        module=module, arguments=arguments, **fields,
    )  # fmt: skip
    return import_teacher(params, LABELS.names)


@pytest.mark.parametrize(
    ("adapter", "second", "methods"),
    [
        ("smp", False, ["kd", "cwd"]),
        ("smp", True, ["tse", "tse_mgd"]),
        ("segformer", False, ["kd", "fitnet"]),
        ("segformer", True, ["tse", "dsd"]),
        ("mask2former", False, ["kd"]),
    ],
)
def test_a_teacher_of_another_library_teaches_a_student(make_job, blocks, adapter, second, methods):
    teacher = take(adapter, second=second, classes=("sky", "ground", "block"))
    for method in methods:
        job = make_job(method, recipe=RECIPE, rdd={"tfe_length": 2})
        result = train(Training(job, blocks.images, teacher), CPU)
        assert result.state.iteration == 2
        assert all(row["loss"] > 0 for row in result.history if "loss" in row)
    stages = {"tfe_share" in row for row in result.history if "loss" in row}
    assert stages == {method.startswith("tse") for method in methods[-1:]}


def test_permuted_classes_teach_what_the_same_network_in_our_order_teaches(make_job, blocks):
    theirs = ("sky", "cow", "ground", "block")
    teacher = take("smp", classes=theirs)
    order = [theirs.index(name) for name in LABELS.names]
    tensors = {
        key: value[order] if key.startswith("model.segmentation_head") else value
        for key, value in teacher.tensors.items()
    }
    module = teacher.header.module.model_copy(update={"channels": 3, "order": None})
    ours = NetworkCheckpoint(tensors, teacher.header.model_copy(update={"module": module}))
    job = make_job("kd", recipe={"iterations": 2, "validate_every": 2})
    results = [train(Training(job, blocks.images, t), CPU) for t in (teacher, ours)]
    assert results[0].network.digest() == results[1].network.digest()
    assert results[0].fingerprint != results[1].fingerprint


def test_what_decides_the_teacher_decides_the_fingerprint(make_job, blocks):
    found = take("smp")
    others = [
        replace(found, tensors={k: v + 1 for k, v in found.tensors.items()}),
        take("smp", classes=(0, 2, 1)),
        take("smp", mean=(1.0, 2.0, 3.0), std=(1.0, 1.0, 1.0)),
    ]
    job = make_job("kd")
    prints = {Training(job, blocks.images, t).fingerprint for t in (found, *others)}
    assert len(prints) == 4


def test_a_teacher_of_other_classes_ends_before_anything_is_trained(make_job, blocks):
    with pytest.raises(UserError, match="gives logits of 5 classes, the label set has 3"):
        train(Training(make_job("kd"), blocks.images, _of_five_classes()), CPU)


def test_an_image_that_the_teacher_cannot_take_is_named(make_job, blocks):
    """Its last map has one position, which a norm of that network cannot take."""
    with pytest.raises(UserError, match="cannot be run on an image of 32 x 32: Expected more than"):
        train(Training(make_job("kd"), blocks.images, take("mask2former")), CPU)


def _of_five_classes() -> NetworkCheckpoint:
    params = TeacherParams(
        network=NetworkParams(name="deeplabv3_resnet101"),
        module="tests.networks.modules:plain",
        arguments={"num_classes": 5},
    )
    return import_teacher(params, LABELS.names)


@pytest.mark.parametrize("head", ["unet", "fpn", "segformer"])
def test_a_student_has_a_head_of_segmentation_models_pytorch(make_job, blocks, teacher, head):
    pytest.importorskip("segmentation_models_pytorch")
    network = NetworkParams(name=f"{head}_test_efficientnet", width=32)
    for method in ("tse_cwd", "mgd"):
        job = make_job(method, network=network, recipe=RECIPE, rdd={"tfe_length": 2})
        result = train(Training(job, blocks.images, teacher), CPU)
        assert result.network.build()(torch.zeros(1, 3, 64, 64)).logits.isfinite().all()
