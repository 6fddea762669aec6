"""Every method takes a step on a GPU, in both precisions; in float32 it is the CPU's step."""

from __future__ import annotations

import copy
import math
import warnings
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from rdd_pipeline.config import MethodsParams, OptimizerParams, RddParams
from rdd_pipeline.distillation.methods import METHODS, RDD_PLUS, RDD_STAGES, find_method
from rdd_pipeline.distillation.objective import Objective, ObjectiveOutput
from rdd_pipeline.losses.base import LossContext
from rdd_pipeline.networks import Preprocessing, SegmentationNetwork, build_network
from rdd_pipeline.networks.probe import output_shapes
from rdd_pipeline.training.schedule import build_adversary_optimizer, build_optimizer
from rdd_pipeline.training.step import TrainingStep

from .draws import draw_alike

pytestmark = pytest.mark.gpu

BATCH, CLASSES, SIZE = 4, 11, (128, 160)
EVERY = [*METHODS, *RDD_PLUS, "rdd_class_floor"]
STUDENTS = {"cnn": "deeplabv3_test_resnet", "transformer": "fcn_test_vit"}
TEACHER = "pspnet_test_resnet"
OPTIONS = MethodsParams(
    options={
        f"{prefix}{name}": {module: {"pixel_slots": 200, "region_slots": 40}}
        for prefix in ("", "tse_")
        for name, module in (("cirkd", "cirkd_memory"), ("cirkdv2", "cirkdv2"))
    }
)


@lru_cache
def _network(name: str, width: int, seed: int) -> SegmentationNetwork:
    torch.manual_seed(seed)
    # Dropout draws other numbers on another device.
    return build_network(name, num_classes=CLASSES, width=width, dropout=0.0)


@lru_cache
def _context(student: str) -> LossContext:
    return LossContext(
        output_shapes(_network(STUDENTS[student], 16, 0), SIZE),
        output_shapes(_network(TEACHER, 32, 1), SIZE),
    )


@lru_cache
def _batch() -> tuple[Tensor, Tensor]:
    """Images on which the teacher's classes can be seen, a fifth of the pixels ignored."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, CLASSES, (BATCH, 1, 8, 10), generator=generator)
    labels = coarse.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, 0].to(torch.uint8)
    noise = torch.randint(0, 60, (BATCH, 3, *SIZE), generator=generator)
    images = (labels.unsqueeze(1) * 18 + noise).to(torch.uint8)
    labels[:, :24] = 255
    return images, labels


class Step:
    """Networks, losses and optimizers of one method on one device."""

    def __init__(
        self, method: str, student: str, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        definition = find_method(method, OPTIONS)
        teacher = None
        if definition.needs_teacher:
            teacher = copy.deepcopy(_network(TEACHER, 32, 1)).to(device).eval()
            teacher.requires_grad_(False)
        torch.manual_seed(2)
        objective = Objective(
            definition,
            rdd=definition.settings(RddParams(min_kept=0.3)),
            iterations=100,
            aux_weight=0.4,
            class_weights=torch.linspace(0.5, 1.5, CLASSES),
            ignore_index=255,
            context=_context(student) if definition.needs_teacher else None,
        )
        self.module = TrainingStep(
            copy.deepcopy(_network(STUDENTS[student], 16, 0)),
            objective,
            teacher=teacher,
            student_preprocessing=Preprocessing.imagenet(),
            teacher_preprocessing=Preprocessing.caffe_bgr(),
            autocast=autocast,
        )
        self.module.to(device).to(memory_format=torch.channels_last)
        self.module.train()
        against = [p for module in objective.adversaries() for p in module.parameters()]
        ids = {id(p) for p in against}
        mine = [p for p in self.module.parameters() if id(p) not in ids]
        self.optimizers = [build_optimizer(OptimizerParams(lr=0.01), mine)]
        adversary = build_adversary_optimizer(against)
        if adversary is not None:
            self.optimizers.append(adversary)
        images, labels = _batch()
        self.images = images.to(device).contiguous(memory_format=torch.channels_last)
        self.labels = labels.to(device)

    def losses(self, iteration: int) -> ObjectiveOutput:
        """Forward and backward pass."""
        output: ObjectiveOutput = self.module(self.images, self.labels, iteration)
        output.total.backward()
        return output

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _iteration(method: str) -> int:
    """In the stage that the method is about."""
    return 1 if method == "tfe" else 50


CASES = [
    *[pytest.param(name, "cnn", id=f"{name}-cnn") for name in EVERY],
    *[pytest.param(name, "transformer", id=f"{name}-transformer") for name in METHODS],
]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "student"), CASES)
def test_a_step_is_finite_and_moves_every_layer(method, student, precision, device):
    autocast = torch.bfloat16 if precision == "bfloat16" else None
    step = Step(method, student, device, autocast)
    before = [p.detach().clone() for p in step.module.student.parameters()]
    # As `set_up` has it on CUDA.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    for iteration in (1, 50):  # RDD's TFE stage, and its TSE stage
        output = step.losses(iteration)
        assert output.total.dtype == torch.float32
        for name, value in (output.parts | output.statistics).items():
            assert math.isfinite(value), name
        for name, parameter in step.module.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
            assert parameter.dtype == torch.float32
        step.update()
    after = list(step.module.student.parameters())
    assert all(p.isfinite().all() for p in after)
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize(("method", "student"), CASES)
def test_a_step_in_float32_is_that_of_the_cpu(method, student, device, monkeypatch):
    """Losses one by one, then the student's whole gradient."""
    draw_alike(monkeypatch)
    found, expected = (
        Step(method, student, place, None) for place in (device, torch.device("cpu"))
    )
    iteration = _iteration(method)
    ours, theirs = found.losses(iteration), expected.losses(iteration)
    assert ours.parts.keys() == theirs.parts.keys()
    for name, value in theirs.parts.items():
        # Networks round, and a pixel in 10,000 may change sides.
        assert float(ours.parts[name]) == pytest.approx(float(value), rel=2e-3, abs=1e-7), name
    gradients = [
        torch.cat([p.grad.flatten().cpu() for p in step.module.student.parameters()])
        for step in (found, expected)
    ]
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    assert error < 0.05, f"gradient off by {error:.1e}"


@pytest.mark.parametrize("method", ["kd", "tfe", "tse", "tse_cwd"])
def test_bfloat16_is_near_float32(method, device, monkeypatch):
    draw_alike(monkeypatch)
    found, expected = (
        Step(method, "cnn", device, autocast).losses(_iteration(method))
        for autocast in (torch.bfloat16, None)
    )
    for name, value in expected.parts.items():
        assert float(found.parts[name]) == pytest.approx(float(value), rel=0.1), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", EVERY)
def test_a_step_waits_for_the_device_once(method, precision, cuda):
    """For the scalars, in one transfer; nothing else may hold the launching of kernels up."""
    step = Step(method, "cnn", cuda, torch.bfloat16 if precision == "bfloat16" else None)
    step.losses(_iteration(method))  # constants are made once
    step.update()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            output = step.losses(_iteration(method))
            values = [output.total.detach(), *output.parts.values(), *output.statistics.values()]
            torch.stack([value.float() for value in values]).tolist()
            step.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing" in str(w.message)]
    assert len(waits) == 1, [f"{w.filename}:{w.lineno}" for w in waits]


def test_every_stage_is_looked_at():
    assert set(RDD_STAGES) <= set(EVERY)
