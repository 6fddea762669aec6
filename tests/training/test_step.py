from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from rdd_pipeline.config import RddParams
from rdd_pipeline.distillation.methods import find_method
from rdd_pipeline.distillation.objective import Objective
from rdd_pipeline.losses.base import LossContext
from rdd_pipeline.networks import NetworkOutput, Preprocessing, network_from_params
from rdd_pipeline.training.step import TrainingStep

from .conftest import STUDENT

# Of terms without modules: no shape of it is looked at.
_MAPS = torch.zeros(1, 3, 2, 2, device="meta")
_OUTPUT = NetworkOutput(_MAPS, _MAPS, _MAPS, (_MAPS, _MAPS))
CONTEXT = LossContext(_OUTPUT, _OUTPUT)


def _objective(method: str) -> Objective:
    return Objective(
        find_method(method),
        rdd=RddParams(tfe_length=5),
        iterations=8,
        aux_weight=0.4,
        class_weights=None,
        ignore_index=255,
        context=CONTEXT if find_method(method).losses else None,
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 3, (2, 32, 32), generator=generator, dtype=torch.uint8)


def _step(method, teacher, *, preprocessing=None, autocast=None) -> TrainingStep:
    torch.manual_seed(0)
    return TrainingStep(
        network_from_params(STUDENT.model_copy(update={"dropout": 0.0}), num_classes=3),
        _objective(method),
        teacher=teacher.build() if teacher else None,
        student_preprocessing=Preprocessing.imagenet(),
        teacher_preprocessing=preprocessing or Preprocessing.imagenet(),
        autocast=autocast,
    )


def test_the_teacher_is_neither_trained_nor_saved(teacher):
    step = _step("kd", teacher)
    student = network_from_params(STUDENT, num_classes=3)
    assert sum(p.numel() for p in step.parameters()) == sum(p.numel() for p in student.parameters())
    assert len(step.state_dict()) == len(student.state_dict())


def test_no_gradient_reaches_the_teacher_and_it_stays_in_eval_mode(teacher, batch):
    step = _step("tse", teacher).train()
    network = step.teacher.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    step(*batch, 1).total.backward()
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is not None for parameter in step.student.parameters())


def test_each_network_is_fed_as_it_was_made_to_be(teacher, batch):
    step = _step("kd", teacher, preprocessing=Preprocessing.caffe_bgr())
    fed = {}
    network = step.teacher.network
    network.register_forward_pre_hook(lambda _, inputs: fed.update(teacher=inputs[0]))
    step.student.register_forward_pre_hook(lambda _, inputs: fed.update(student=inputs[0]))
    step(*batch, 1)
    images = batch[0].float()
    assert_close(fed["teacher"][:, 0], images[:, 2] - 104.00698793)
    assert_close(fed["student"][:, 0], (images[:, 0] / 255 - 0.485) / 0.229, rtol=1e-4, atol=1e-4)


def test_with_autocast_the_losses_are_float32(teacher, batch):
    output = _step("tse", teacher, autocast=torch.bfloat16)(*batch, 1)
    assert output.total.dtype == torch.float32
    assert_close(output.total, _step("tse", teacher)(*batch, 1).total, rtol=0.05, atol=0.05)


def test_a_method_without_teacher_needs_none(batch):
    output = _step("baseline", None)(*batch, 1)
    assert set(output.parts) == {"task"}
