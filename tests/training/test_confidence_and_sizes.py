"""What TFE takes for confidence, sizes of comparison and of images, backbones apart: by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.testing import assert_close

from rdd_pipeline.collectives import ALONE
from rdd_pipeline.config import MethodsParams, NetworkParams, OptimizerParams, TeacherParams
from rdd_pipeline.networks import (
    NetworkCheckpoint,
    Preprocessing,
    import_teacher,
    network_from_params,
    save_checkpoint,
)
from rdd_pipeline.training.build import build
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.schedule import build_optimizer
from rdd_pipeline.training.synchronized import MicroBatches
from rdd_pipeline.training.training import Training
from tests.training.conftest import CPU, LABELS, STUDENT, TEACHER

DEVICE = torch.device("cpu")
IMAGES = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
TARGETS = torch.randint(0, 3, (2, 32, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def blind() -> NetworkCheckpoint:
    """A teacher without auxiliary head, surer of some pixels than of others."""
    params = TEACHER.model_copy(update={"auxiliary": False})
    torch.manual_seed(3)
    network = network_from_params(params, num_classes=3)
    network.classifier.weight.data *= 100
    return NetworkCheckpoint.from_network(network, params=params, label_names=LABELS.names)


def step_of(job, images, teacher, parts=1):
    micro_batches = MicroBatches(ALONE, parts=parts)
    return build(Training(job, images, teacher), CPU, DEVICE, micro_batches).step.eval()


def upsampled(maps):
    return F.interpolate(maps, size=(32, 32), mode="bilinear", align_corners=True)


def tfe_by_hand(step, teacher, confidence, aux_weight=0.4):
    """Mean over the pixels of w * (CE + 0.4 CE of the auxiliary head)."""
    network, seen = teacher.build(), teacher.header.preprocessing.normalize(IMAGES)
    main = network(seen).logits
    if confidence == "flip":
        second = network(seen.flip(3)).logits.flip(3)
        p, q = main.softmax(1), second.softmax(1)
        w = torch.exp(-(q * (q / p).log()).sum(1, keepdim=True))
    else:
        p = main.softmax(1)
        w = 1 + (p * p.log()).sum(1, keepdim=True) / torch.tensor(3.0).log()
    assert 0 < w.min() < w.max() <= 1
    own = step.student(Preprocessing.imagenet().normalize(IMAGES))
    ce = sum(
        weight * F.cross_entropy(upsampled(logits), TARGETS, reduction="none")
        for weight, logits in ((1, own.logits), (aux_weight, own.aux_logits))
    )
    return (upsampled(w)[:, 0] * ce).mean()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("confidence", ["flip", "entropy"])
def test_a_teacher_with_one_head_weighs_pixels_otherwise(
    make_job, blocks, blind, confidence, parts
):
    job = make_job("tse", rdd={"confidence": confidence}, recipe={"gradient_accumulation_steps": 2})
    step = step_of(job, blocks.images, blind)
    with torch.no_grad():
        expected = tfe_by_hand(step, blind, confidence)
    if parts == 1:
        found = step(IMAGES, TARGETS, 1)
    else:
        found = step.backward_in_parts(IMAGES, TARGETS, 1, MicroBatches(ALONE, parts=2), 0)
    assert_close(found.parts["task"], expected)
    # TSE looks at no mirrored image, whose teacher would cost a second forward.
    calls = []
    step.teacher.network.register_forward_hook(lambda *_: calls.append(1))
    step(IMAGES, TARGETS, 6)
    assert len(calls) == 1


def test_confidence_decides_the_fingerprint_where_it_is_not_the_published_one(
    make_job, blocks, blind
):
    def fingerprint(method="tse", **rdd):
        return Training(make_job(method, rdd=rdd), blocks.images, blind).fingerprint

    prints = {fingerprint(), fingerprint(confidence="flip"), fingerprint(confidence="entropy")}
    assert len(prints) == 3
    assert fingerprint(confidence="heads") == fingerprint()
    assert fingerprint("kd", confidence="flip") == fingerprint("kd")


def test_maps_are_compared_at_the_student_s_size_where_that_is_asked_for(make_job, blocks):
    """A teacher of stride 8 and a student of stride 16, KD by hand."""
    params = TEACHER.model_copy(update={"name": "fcn_test_resnet", "output_stride": 8})
    teacher = NetworkCheckpoint.from_network(
        network_from_params(params, num_classes=3), params=params, label_names=LABELS.names
    )
    losses = {}
    for where in ("teacher", "student"):
        job = make_job("kd", methods=MethodsParams(compare_at=where))
        step = step_of(job, blocks.images, teacher)
        losses[where] = step(IMAGES, TARGETS, 1).parts["kd"]
        with torch.no_grad():
            t = teacher.build()(teacher.header.preprocessing.normalize(IMAGES)).logits
            s = step.student(Preprocessing.imagenet().normalize(IMAGES)).logits
        assert (t.shape[-1], s.shape[-1]) == (4, 2)
        size = (t if where == "teacher" else s).shape[-2:]
        t, s = (
            F.interpolate(x, size=size, mode="bilinear", align_corners=True).log_softmax(1)
            for x in (t, s)
        )
        assert_close(losses[where], (t.exp() * (t - s)).sum(1).mean())
    assert losses["teacher"] != losses["student"]


@pytest.mark.parametrize("method", ["at", "cirkd", "mgd", "dsd", "ifvd"])
def test_losses_are_built_for_the_size_at_which_they_compare(make_job, blocks, method):
    params = TEACHER.model_copy(update={"name": "fcn_test_resnet", "output_stride": 8})
    teacher = NetworkCheckpoint.from_network(
        network_from_params(params, num_classes=3), params=params, label_names=LABELS.names
    )
    weights = {}
    for where in ("teacher", "student"):
        job = make_job(method, methods=MethodsParams(compare_at=where))
        step = step_of(job, blocks.images, teacher)
        assert step(IMAGES, TARGETS, 1).total.isfinite()
        weights[where] = step.objective.weights
    if method == "at":  # 16 and 4 positions
        assert weights["teacher"]["at"] == 4 * weights["student"]["at"]


def test_the_size_of_comparison_decides_the_fingerprint_of_what_distils(make_job, blocks, teacher):
    def fingerprint(method, **methods):
        job = make_job(method, methods=MethodsParams(**methods))
        return Training(job, blocks.images, teacher).fingerprint

    assert fingerprint("kd", compare_at="student") != fingerprint("kd")
    assert fingerprint("baseline", compare_at="student") == fingerprint("baseline")


# ---- larger images for the teacher


def test_a_teacher_sees_larger_images_than_its_student(make_job, blocks, teacher, tmp_path):
    save_checkpoint(teacher, tmp_path / "teacher.safetensors")
    large = TEACHER.model_copy(update={"image_scale": 1.5})
    found = import_teacher(
        TeacherParams(network=large, weights=tmp_path / "teacher.safetensors"), LABELS.names
    )
    assert found.header.preprocessing.scale == 1.5
    seen = found.header.preprocessing.normalize(IMAGES)
    resized = F.interpolate(IMAGES.float(), size=(48, 48), mode="bilinear", align_corners=True)
    assert_close(seen, teacher.header.preprocessing.normalize(resized))
    step = step_of(make_job("kd"), blocks.images, found)
    shapes = []
    step.teacher.network.register_forward_hook(
        lambda _, inputs, out: shapes.append(inputs[0].shape)
    )
    step(IMAGES, TARGETS, 1)
    assert shapes == [(2, 3, 48, 48)]
    prints = {Training(make_job("kd"), blocks.images, t).fingerprint for t in (teacher, found)}
    assert len(prints) == 2


# ---- backbones


@pytest.fixture
def pretrained(monkeypatch, tmp_path) -> NetworkParams:
    network = network_from_params(STUDENT, num_classes=3)
    path = tmp_path / "backbone.pth"
    torch.save(
        {
            key.replace("_", "."): value
            for key, value in network.backbone.features.state_dict().items()
        },
        path,
    )
    return STUDENT.model_copy(update={"pretrained": path})


@pytest.mark.parametrize("parts", [1, 2])
def test_a_frozen_backbone_stays_as_it_is_and_the_rest_learns(make_job, blocks, pretrained, parts):
    recipe = {"backbone": "frozen", "iterations": 2, "gradient_accumulation_steps": parts}
    job = make_job("baseline", network=pretrained, recipe=recipe)
    before = build(
        Training(job, blocks.images), CPU, DEVICE, MicroBatches(ALONE)
    ).step.student.state_dict()
    after = train(Training(job, blocks.images), CPU).state.student
    for key, value in before.items():
        same = torch.equal(after[key], value)
        assert same or not key.startswith("backbone."), key
        assert not same or not key.startswith("classifier."), key


def test_a_frozen_backbone_of_random_weights_is_refused(make_job):
    with pytest.raises(
        ValidationError, match="backbone of fcn_test_efficientnet has random weights"
    ):
        make_job("baseline", recipe={"backbone": "frozen"})


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_backbone_learns_by_a_rate_of_its_own(make_job, blocks, name):
    """The first step of SGD without momentum and decay is lr times the gradient."""
    steps = {}
    for factor in (1.0, 0.1, 0.0):
        optimizer = OptimizerParams(
            name=name, lr=0.05, momentum=0, weight_decay=0, backbone_lr_factor=factor
        )
        job = make_job(
            "baseline", recipe={"optimizer": optimizer, "iterations": 1, "validate_every": 1}
        )
        torch.manual_seed(0)
        start = build(Training(job, blocks.images), CPU, DEVICE, MicroBatches(ALONE)).step.student
        result = train(Training(job, blocks.images), CPU).state.student
        steps[factor] = {
            key: result[key] - value.detach() for key, value in start.named_parameters()
        }
    for key, step in steps[1.0].items():
        share = (
            {1.0: 1.0, 0.1: 0.1, 0.0: 0.0}
            if key.startswith("backbone.")
            else dict.fromkeys((0.1, 0.0), 1.0)
        )
        for factor in (0.1, 0.0):
            assert_close(steps[factor][key], share[factor] * step, atol=2e-6, rtol=1e-3)


def test_a_training_with_two_rates_goes_on_where_it_stopped(make_job, blocks, tmp_path):
    optimizer = OptimizerParams(lr=0.05, backbone_lr_factor=0.1)
    job = make_job("baseline", recipe={"optimizer": optimizer})
    whole = train(Training(job, blocks.images), CPU)
    training = Training(job, blocks.images).stored_in(tmp_path)
    short = training.job.model_copy()
    components = build(Training(short, blocks.images), CPU, DEVICE, MicroBatches(ALONE))
    components.load(whole.state)
    assert [group.get("lr_factor", 1) for group in components.optimizer.param_groups] == [1, 0.1]
    assert train(training, CPU).network.digest() == whole.network.digest()


def test_one_rate_is_one_group_as_ever():
    layer = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(OptimizerParams(), layer.parameters(), backbone=layer.parameters())
    assert len(optimizer.param_groups) == 1
    assert "lr_factor" not in optimizer.param_groups[0]
