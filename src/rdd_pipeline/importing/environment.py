"""An environment for a data set: networks and recipe that fit images, classes and machine."""

from __future__ import annotations

from typing import NamedTuple

from rdd_pipeline.importing.write import Written

_ON_CPU = 320
_FRESH_ON_CPU = 256
"""Pixels of the longer side that two cores train in a quarter of an hour."""
_ON_GPU = 2048
_CROP = 512
_MANY = 32
"""Classes from which the heads are as wide as published."""


class Machine(NamedTuple):
    """What decides which networks can be trained here."""

    gpu: bool
    weights: bool
    """ImageNet weights are here or can be downloaded."""


class Networks(NamedTuple):
    """Names of a teacher and a student."""

    teacher: str
    student: str


PRETRAINED = Networks("deeplabv3_tf_efficientnet_lite2", "deeplabv3_mobilenetv2_100")
PRETRAINED_GPU = Networks("deeplabv3_resnet101", "deeplabv3_mobilenetv2_100")
# Without ImageNet large networks learn little from hundreds of images.
FRESH = Networks("pspnet_resnet10t", "pspnet_test_resnet")
FRESH_GPU = Networks("pspnet_resnet26t", "pspnet_resnet10t")


def networks_for(machine: Machine) -> Networks:
    """The pair of networks."""
    if machine.weights:
        return PRETRAINED_GPU if machine.gpu else PRETRAINED
    return FRESH_GPU if machine.gpu else FRESH


def backbones(machine: Machine) -> tuple[str, ...]:
    """Timm's names of what would be downloaded, with weights."""
    pair = PRETRAINED_GPU if machine.gpu else PRETRAINED
    names = {"deeplabv3_resnet101": "resnet101s.gluon_in1k"}
    return tuple(names.get(name, name.partition("_")[2]) for name in pair)


def image_size(written: Written, machine: Machine) -> tuple[int, int] | None:
    """(height, width) all images are resized to; None: they are small enough as they are."""
    height, width = written.sizes[0][0]
    most = _ON_GPU if machine.gpu else _ON_CPU if machine.weights else _FRESH_ON_CPU
    longest = max(max(size) for size, _ in written.sizes)
    if longest <= most:
        return None
    scale = most / max(height, width)
    return _sixteenths(min(1.0, scale) * height), _sixteenths(min(1.0, scale) * width)


def _sixteenths(side: float) -> int:
    return max(64, round(side / 16) * 16)


def parameters_text(written: Written, machine: Machine) -> str:
    """`parameters.yml` of the environment."""
    size = image_size(written, machine)
    height, width = size or written.sizes[0][0]
    if machine.gpu or machine.weights:
        crop = min(height, _CROP), min(width, _CROP)
    else:  # half of an image: twice the steps in the same time
        crop = min(height, max(64, height // 2)), min(width, max(64, width // 2))
    crop = _whole(crop[0], height), _whole(crop[1], width)
    pair = networks_for(machine)
    iterations = (4000, 4000) if machine.gpu else (300, 300) if machine.weights else (480, 320)
    wide = len(written.classes) > _MANY
    if machine.weights:
        head = f", pretrained: true, output_stride: 16, width: {128 if wide else 64}"
        teacher = student = head
        if pair.teacher == "deeplabv3_resnet101":
            teacher = ", pretrained: true"
    else:
        teacher, student = f", width: {128 if wide else 64}", f", width: {64 if wide else 32}"
    weights = "\n  class_weights: true # those of labels.yaml" if written.weighted else ""
    rate = 0.001 if machine.weights else 0.003
    resized = f", image_size: [{size[0]}, {size[1]}]" if size else ""
    small = height * width <= 320 * 320
    lines = [
        f"# Chosen by import_data for {len(written.classes)} classes, images of "
        f"{written.sizes[0][0][1]} x {written.sizes[0][0][0]} and",
        f"# {_machine_text(machine)}. Adapt it as you like.",
        f"data: {{layout: folders{resized}}}",
        "",
        f"teacher: {{network: {{name: {pair.teacher}{teacher}}}}}",
        f"student: {{name: {pair.student}{student}}}",
        "",
        "teacher_recipe: &recipe",
        f"  iterations: {iterations[0]}",
        f"  batch_size: 8{weights}",
        f"  validate_every: {max(1, iterations[0] // (10 if machine.gpu else 3))}",
        f"  optimizer: {{name: adamw, lr: {rate}, weight_decay: 0.01, warmup: "
        f"{100 if machine.gpu else 30}}}",
        f"  augment: {{crop: [{crop[0]}, {crop[1]}], scale_min: 0.75, scale_max: 1.5}}",
        "recipe:",
        "  <<: *recipe",
        f"  iterations: {iterations[1]}",
        f"  validate_every: {max(1, iterations[1] // (10 if machine.gpu else 2))}",
        "",
        "# A teacher that was trained here for the first time finds many pixels hard: the variant",
        "# OR takes the task loss from the student's and the teacher's. Published: mode: xor.",
        "rdd: {mode: or, min_kept: 0.05}",
    ]
    if not small:
        lines += ["", "evaluation: {batch_size: 2} # whole images, also while training"]
    return "\n".join(lines) + "\n"


def _whole(crop: int, side: int) -> int:
    """Of a crop that is smaller than the image a multiple of 16."""
    return crop if crop == side else max(16, crop // 16 * 16)


def _machine_text(machine: Machine) -> str:
    place = "a GPU" if machine.gpu else "CPU"
    return place + (
        " with ImageNet weights"
        if machine.weights
        else " without ImageNet weights (no network; `pretrained: true` or a file is better)"
    )
