"""Every distillation loss on a GPU: value and gradient of float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdd_pipeline.distillation.methods import LOSSES, METHODS, RDD_PLUS, LossSpec
from rdd_pipeline.losses.af_dcd import af_dcd_contrast_loss
from rdd_pipeline.losses.at import at_loss
from rdd_pipeline.losses.base import LossContext
from rdd_pipeline.losses.bpkd import bpkd_losses
from rdd_pipeline.losses.cirkd import cirkd_minibatch_loss
from rdd_pipeline.losses.cwd import cwd_feature_loss, cwd_loss
from rdd_pipeline.losses.dist import dist_loss
from rdd_pipeline.losses.dkd import dkd_losses
from rdd_pipeline.losses.dsd import csd_loss, psd_loss
from rdd_pipeline.losses.fitnet import fitnet_loss
from rdd_pipeline.losses.ifvd import ifvd_loss
from rdd_pipeline.losses.kd import kd_loss
from rdd_pipeline.losses.mgd import mgd_loss
from rdd_pipeline.losses.skd import skd_pairwise_loss
from rdd_pipeline.losses.standardized import standardized_kd_loss
from rdd_pipeline.networks import NetworkOutput

from .compare import assert_as_float64, assert_gradient, assert_value
from .draws import draw_alike

pytestmark = pytest.mark.gpu

CLASSES = 11
BATCH, SMALL, LARGE = 3, (17, 33), (129, 257)
WIDTHS = (24, 48)  # of the student's and the teacher's features
STAGES = ((16, 32), (32, 64))


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _labels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, CLASSES, (BATCH, 1, 7, 7), generator=generator).float()
    labels = F.interpolate(coarse, size=LARGE)[:, 0].to(torch.uint8)
    labels[:, :20] = 255
    return labels


def _output(seed: int, width: int, stages: tuple[int, int], size: tuple[int, int]) -> NetworkOutput:
    """What a network would return; features positive, but without the ties of a ReLU's zeros."""
    return NetworkOutput(
        3 * _draw(seed, BATCH, CLASSES, *size),
        2 * _draw(seed + 1, BATCH, CLASSES, *size),
        F.softplus(_draw(seed + 2, BATCH, width, *size)),
        (
            F.softplus(_draw(seed + 3, BATCH, stages[0], *size)),
            F.softplus(_draw(seed + 4, BATCH, stages[1], *size)),
        ),
    )


LABELS = _labels()
TEACHER = _output(100, WIDTHS[1], STAGES[1], SMALL)
STUDENTS = {
    "same-stride": _output(0, WIDTHS[0], STAGES[0], SMALL),
    "other-stride": _output(50, WIDTHS[0], STAGES[0], (9, 17)),
}
ADAPTED = F.softplus(_draw(7, BATCH, WIDTHS[1], *SMALL))

FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kd": lambda s, t, _: kd_loss(s, t),
    "kd at 4": lambda s, t, _: kd_loss(s, t, temperature=4.0),
    "cwd logits": lambda s, t, _: cwd_loss(s, t),
    "dist": lambda s, t, _: dist_loss(s, t),
    "bpkd edge": lambda s, t, y: bpkd_losses(s, t, y).edge,
    "bpkd body": lambda s, t, y: bpkd_losses(s, t, y).body,
    "dkd target": lambda s, t, y: dkd_losses(s, t, y).target,
    "dkd rest": lambda s, t, y: dkd_losses(s, t, y).rest,
    "kd standardized": lambda s, t, y: standardized_kd_loss(s, t),
    "csd": lambda s, t, _: csd_loss(s, t),
    "fitnet": lambda s, t, _: fitnet_loss(s, t),
    "at": lambda s, t, _: at_loss(s, t),
    "ifvd": lambda s, t, y: ifvd_loss(s, t, y, num_classes=CLASSES),
    "cwd feature": lambda s, t, _: cwd_feature_loss(s, t),
    "psd": lambda s, t, _: psd_loss([s, s[:, :5]], [t, t[:, :5]]),
    "mgd": lambda s, t, _: mgd_loss(s, t),
    "af-dcd": lambda s, t, _: af_dcd_contrast_loss(s, t, pool=2),
    "skd pairwise": lambda s, t, _: skd_pairwise_loss(s, t),
    "cirkd minibatch": lambda s, t, _: cirkd_minibatch_loss(s, t),
}
OF_LOGITS = (
    "kd",
    "kd at 4",
    "cwd logits",
    "dist",
    "bpkd edge",
    "bpkd body",
    "csd",
    "dkd target",
    "dkd rest",
    "kd standardized",
)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("reckless")
def test_a_loss_without_layers_is_that_of_float64_whatever_the_switches_say(name, device):
    student, teacher = ADAPTED, TEACHER.feature
    if name in OF_LOGITS:
        student, teacher = STUDENTS["same-stride"].logits, TEACHER.logits
    loss = FUNCTIONS[name]
    assert_as_float64(lambda s, t, y: loss(s, t, y), [student], {"t": teacher, "y": LABELS}, device)


@pytest.fixture
def same_draws(monkeypatch):
    draw_alike(monkeypatch)


OPTIONS: dict[str, dict[str, Any]] = {
    "cirkd_memory": {"pixel_slots": 200, "region_slots": 50, "pixel_contrast": 300},
    "cirkdv2": {"pixel_slots": 200, "region_slots": 50, "channel_slots": 300},
}


@pytest.mark.parametrize("stride", STUDENTS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("same_draws")
def test_a_loss_with_its_layers_is_that_of_float64(name, stride, device):
    """All losses of it, the gradients of the student and of the layers, and the queues."""
    student = STUDENTS[stride]
    torch.manual_seed(0)
    spec = replace(LOSSES[name], options=OPTIONS.get(name, {}))
    loss = spec.module(LossContext(student, TEACHER))
    for layer, parameter in loss.named_parameters():
        if layer.endswith("gate"):  # starts at 0, where attention has no gradient
            nn.init.constant_(parameter, 0.5)
    _without_kinks(loss)

    found = _computed(spec, copy.deepcopy(loss), student, device, torch.float32)
    expected = _computed(spec, loss, student, torch.device("cpu"), torch.float64)
    assert found[0].keys() == expected[0].keys() == set(spec.weights)
    for each, value in expected[0].items():
        assert_value(found[0][each], value, 2e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(gradient.norm()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        if float(gradient.norm()) > 1e-12 * largest:
            assert_gradient(found[1][name], gradient, 5e-4)
        else:  # of a bias that a softmax or a norm takes out again
            assert float(found[1][name].norm()) < 1e-4 * largest
    for name, buffer in expected[2].items():
        assert_gradient(found[2][name].double(), buffer.double(), 1e-4)


def _without_kinks(module: nn.Module) -> None:
    """Of 100,000 activations one is within rounding of 0, where the gradient jumps."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU | nn.LeakyReLU):
            setattr(module, name, nn.Softplus())
        _without_kinks(child)


def _computed(
    spec: LossSpec,
    loss: nn.Module,
    student: NetworkOutput,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, gradients by name, buffers; on the CPU."""

    def moved(output: NetworkOutput, *, learns: bool) -> NetworkOutput:
        def one(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype, copy=True).requires_grad_(learns)

        assert output.aux_logits is not None
        stages = (one(output.stages[0]), one(output.stages[1]))
        return NetworkOutput(
            one(output.logits), one(output.aux_logits), one(output.feature), stages
        )

    loss = loss.to(device, dtype).train()
    ours, theirs = moved(student, learns=True), moved(TEACHER, learns=False)
    losses = spec.by_name(loss(ours, theirs, LABELS.to(device)))
    # Scales of the losses differ by orders: none may hide another one's gradient.
    total = sum(value / float(value.detach().abs().clamp(min=1e-6)) for value in losses.values())
    total.backward()
    leaves = {
        "logits": ours.logits,
        "aux_logits": ours.aux_logits,
        "feature": ours.feature,
        "stage": ours.stages[1],
        **dict(loss.named_parameters()),
    }
    gradients = {
        name: leaf.grad.double().cpu() for name, leaf in leaves.items() if leaf.grad is not None
    }
    return (
        {name: value.detach() for name, value in losses.items()},
        gradients,
        {name: buffer.detach().cpu() for name, buffer in loss.named_buffers()},
    )


def test_every_loss_is_looked_at():
    used = {spec.name for m in {**METHODS, **RDD_PLUS}.values() for spec in m.losses}
    assert used == set(LOSSES)
