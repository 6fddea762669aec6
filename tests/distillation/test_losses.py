"""Losses look at the right maps of both networks, and RDD beside another method weighs pixels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from rdd_pipeline.config import RddParams
from rdd_pipeline.distillation.methods import LOSSES, METHODS, RDD_PLUS, find_method
from rdd_pipeline.distillation.objective import Objective
from rdd_pipeline.losses.af_dcd import af_dcd_contrast_loss
from rdd_pipeline.losses.at import at_loss
from rdd_pipeline.losses.base import DistillationLoss, LossContext
from rdd_pipeline.losses.cirkd import cirkd_minibatch_loss
from rdd_pipeline.losses.cwd import cwd_feature_loss, cwd_loss
from rdd_pipeline.losses.dist import dist_loss
from rdd_pipeline.losses.dsd import csd_loss, psd_loss
from rdd_pipeline.losses.fitnet import fitnet_loss
from rdd_pipeline.losses.ifvd import ifvd_loss
from rdd_pipeline.losses.kd import kd_loss
from rdd_pipeline.losses.mgd import mgd_loss
from rdd_pipeline.losses.skd import discriminator_loss, generator_loss, skd_pairwise_loss
from rdd_pipeline.networks import NetworkOutput

CLASSES, SIZE = 4, (32, 32)


def _output(
    seed: int, width: int, side: int = 8, *, auxiliary: bool = True, gradient: bool = False
) -> NetworkOutput:
    generator = torch.Generator().manual_seed(seed)

    def draw(channels: int) -> Tensor:
        maps = torch.randn(2, channels, side, side, generator=generator)
        return maps.requires_grad_(gradient)

    main, aux = draw(CLASSES), draw(CLASSES)
    return NetworkOutput(
        main, aux if auxiliary else None, draw(width), (draw(width // 2), draw(width + 4))
    )


STUDENT, TEACHER = _output(1, 8), _output(2, 12)
CONTEXT = LossContext(STUDENT, TEACHER)
LABELS = torch.randint(0, CLASSES, (2, *SIZE), generator=torch.Generator().manual_seed(3))
LABELS[:, :5] = 255


def _module(name: str, context: LossContext = CONTEXT, **options) -> DistillationLoss:
    torch.manual_seed(0)
    return replace(LOSSES[name], options=options).module(context)


def _losses(name: str, **options) -> dict[str, Tensor]:
    return LOSSES[name].by_name(_module(name, **options)(STUDENT, TEACHER, LABELS))


STATELESS = {
    "kd": lambda: kd_loss(STUDENT.logits, TEACHER.logits),
    "at": lambda: at_loss(STUDENT.feature, TEACHER.feature),
    "skd_pairwise": lambda: skd_pairwise_loss(STUDENT.feature, TEACHER.feature),
    "ifvd": lambda: ifvd_loss(STUDENT.feature, TEACHER.feature, LABELS, num_classes=CLASSES),
    "cwd_logits": lambda: cwd_loss(STUDENT.logits, TEACHER.logits),
    "psd": lambda: psd_loss(
        [STUDENT.aux_logits, STUDENT.feature, STUDENT.logits],
        [TEACHER.aux_logits, TEACHER.feature, TEACHER.logits],
    ),
    "csd": lambda: csd_loss(STUDENT.logits, TEACHER.logits),
    "cirkd_minibatch": lambda: cirkd_minibatch_loss(STUDENT.feature, TEACHER.feature),
    "dist": lambda: (
        dist_loss(STUDENT.logits, TEACHER.logits)
        + 0.4 * dist_loss(STUDENT.aux_logits, TEACHER.aux_logits)
    ),
}


@pytest.mark.parametrize("name", STATELESS)
def test_a_loss_without_state_is_its_function_of_the_right_maps(name):
    assert_close(_losses(name), {name: STATELESS[name]()})


def test_adapters_bring_the_student_to_the_teachers_width():
    for name, function in (
        ("fitnet", fitnet_loss),
        ("cwd_feature", cwd_feature_loss),
    ):
        loss = _module(name)
        assert loss.adapter.weight.shape == (12, 8, 1, 1)
        expected = function(loss.adapter(STUDENT.feature), TEACHER.feature)
        assert_close(loss(STUDENT, TEACHER, LABELS), expected)


def test_the_published_divisor_of_cwd_is_the_students_width():
    ours, published = (
        _losses("cwd_feature", divisor=d)["cwd_feature"] for d in ("teacher", "student")
    )
    assert_close(published * 8, ours * 12)


def test_masked_generation_sees_the_last_stages():
    loss = _module("mgd", mask_ratio=0.0)  # no randomness
    completed = loss.generator(STUDENT.stages[1], (8, 8))
    assert completed.shape == TEACHER.stages[1].shape
    expected = (completed - TEACHER.stages[1]).square().sum() / 2
    assert_close(loss(STUDENT, TEACHER, LABELS), expected)


def test_af_dcd_takes_as_many_groups_as_divide_the_width():
    loss = _module("af_dcd", mask_ratio=0.0)
    assert loss.groups == 16  # the last stage has 16 channels
    odd = LossContext(
        STUDENT, TEACHER._replace(stages=(TEACHER.stages[0], torch.zeros(2, 14, 8, 8)))
    )
    assert _module("af_dcd", odd).groups == 14
    losses = loss(STUDENT, TEACHER, LABELS)
    completed = loss.generator(STUDENT.stages[1], (8, 8))
    assert_close(
        losses["af_dcd_contrast"],
        af_dcd_contrast_loss(completed, TEACHER.stages[1], groups=16),
    )
    assert_close(losses["af_dcd_feature"], mgd_loss(completed, TEACHER.stages[1]))


def test_dsd_and_dist_do_without_auxiliary_heads():
    student = _output(1, 8, auxiliary=False)
    psd = _module("psd")(student, TEACHER, LABELS)
    maps = [[n.feature, n.logits] for n in (student, TEACHER)]
    assert_close(psd, psd_loss(*maps))
    dist = _module("dist")(student, TEACHER, LABELS)
    assert_close(dist, dist_loss(student.logits, TEACHER.logits))


def test_each_side_of_the_adversary_learns_from_its_own_loss_only():
    student = _output(1, 8, gradient=True)
    loss = _module("skd_holistic")
    weights = dict(loss.discriminator.named_parameters())
    losses = loss(student, TEACHER, LABELS)

    losses["skd_generator"].backward(retain_graph=True)
    assert student.logits.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in weights.values())

    student.logits.grad = None
    losses["skd_discriminator"].backward()
    assert student.logits.grad is None
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in weights.values())


def test_the_adversary_plays_the_hinge_game():
    """In evaluation mode, where scoring changes nothing, against the plain functions."""
    loss = _module("skd_holistic").eval()
    score = loss.discriminator
    losses = loss(STUDENT, TEACHER, LABELS)
    assert_close(losses["skd_generator"], generator_loss(score(STUDENT.logits)))
    expected = discriminator_loss(score(TEACHER.logits), score(STUDENT.logits))
    assert_close(losses["skd_discriminator"], expected)


def test_cirkdv2_sees_the_refined_feature():
    loss = _module("cirkdv2", pixel_slots=20, region_slots=10, channel_slots=9).eval()
    refined = loss.refine(STUDENT.feature)
    losses = loss(STUDENT, TEACHER, LABELS)
    expected = cirkd_minibatch_loss(refined, TEACHER.feature)
    assert_close(losses["cirkd_minibatch"], expected)
    assert_close(losses["fitnet"], fitnet_loss(loss.adapter(refined), TEACHER.feature))


@pytest.mark.parametrize(("ours", "theirs"), [(8, 16), (16, 8), (10, 8)])
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].losses])
def test_networks_of_other_stride_and_width_suit_every_module(name, ours, theirs):
    student, teacher = _output(1, 10, ours, gradient=True), _output(2, 24, theirs)
    context = LossContext(student, teacher)
    memory = {"pixel_slots": 20, "region_slots": 10}
    for spec in METHODS[name].losses:
        options = {"cirkd_memory": memory, "cirkdv2": memory}.get(spec.name, {})
        found = _module(spec.name, context, **options)(student, teacher, LABELS)
        losses = spec.by_name(found)
        assert set(losses) == set(spec.weights)
        for loss in losses.values():
            assert loss.dim() == 0
            assert loss.isfinite()
            loss.backward(retain_graph=True)


# ---- RDD beside another method


def _pixel_gradient(name: str, iteration: int) -> Tensor:
    """Gradient of a method's total with respect to the student's logits."""
    student = _output(1, 8, gradient=True)
    torch.manual_seed(0)  # the same adapters for both
    objective = Objective(
        find_method(name),
        rdd=RddParams(tfe_length=5, min_kept=0.1),
        iterations=10,
        aux_weight=0.4,
        class_weights=None,
        ignore_index=255,
        context=CONTEXT,
    )
    objective(student, TEACHER, LABELS, iteration).total.backward()
    return student.logits.grad


@pytest.mark.parametrize("iteration", [1, 7], ids=["TFE", "TSE"])
@pytest.mark.parametrize("name", ["cwd", "at", "dsd", "cirkd", "dist"])
def test_rdd_beside_a_method_weighs_pixels_and_does_not_only_scale(name, iteration):
    plain, plus = (_pixel_gradient(n, iteration) for n in (name, f"tse_{name}"))
    # The losses are the same in both: what is left is the gradient of the task loss. The first
    # rows of positions hold no label. A task loss that is only scaled has the same direction.
    task = _pixel_gradient("baseline", iteration)[:, :, 2:]
    weighed = plus[:, :, 2:] - (plain[:, :, 2:] - task)
    norms = weighed.norm(dim=1) / task.norm(dim=1)
    assert norms.max() > 1.5 * norms.min()
    assert F.cosine_similarity(weighed.flatten(), task.flatten(), dim=0) < 0.99


def test_the_tfe_weight_beside_a_method_is_that_of_each_pixel():
    """In the published scripts the cross-entropy was a number already when it was weighed."""
    sure, unsure = TEACHER.aux_logits.clone(), TEACHER.aux_logits.clone()
    sure[..., :4] = TEACHER.logits[..., :4]  # heads agree on the left half of the image
    student = _output(1, 8, gradient=True)
    objective = Objective(
        RDD_PLUS["tse_cwd"],
        rdd=RddParams(tfe_length=5),
        iterations=10,
        aux_weight=0.0,
        class_weights=None,
        ignore_index=255,
        context=CONTEXT,
    )
    gradients = []
    for aux in (sure, unsure):
        output = objective(student, TEACHER._replace(aux_logits=aux), LABELS, 1)
        gradients.append(torch.autograd.grad(output.total, student.logits)[0].abs().sum((0, 1)))
    change = (gradients[0] - gradients[1]).abs()
    assert change[:, :3].mean() > 10 * change[:, 5:].mean()


# --- half precision -------------------------------------------------------------------------------

WITH_LOSSES = {
    name: method
    for name, method in (METHODS | RDD_PLUS).items()
    if method.losses and not name.startswith("tse_")  # beside RDD they are the same
}


def _bfloat16(output: NetworkOutput) -> NetworkOutput:
    """What a network returns under autocast."""
    logits, aux, feature, stages = output
    half = torch.bfloat16
    return NetworkOutput(
        logits.to(half),
        None if aux is None else aux.to(half),
        feature.to(half),
        tuple(stage.to(half) for stage in stages),
    )


def _float32(output: NetworkOutput) -> NetworkOutput:
    logits, aux, feature, stages = output
    return NetworkOutput(
        logits.float(),
        None if aux is None else aux.float(),
        feature.float(),
        tuple(stage.float() for stage in stages),
    )


@pytest.mark.parametrize("name", WITH_LOSSES)
def test_outputs_in_bfloat16_are_computed_in_float32(name):
    student = _bfloat16(_output(4, 8, 16))
    teacher = _bfloat16(_output(5, 12, 16))
    context = LossContext(student, teacher)

    def losses(of: NetworkOutput, against: NetworkOutput) -> dict[str, Tensor]:
        values = {}
        for spec in WITH_LOSSES[name].losses:
            torch.manual_seed(0)
            module = spec.module(context)
            torch.manual_seed(1)
            values |= spec.by_name(module(of, against, LABELS))
        return values

    leaves = [
        tensor.requires_grad_() for tensor in (student.logits, student.feature, student.stages[1])
    ]
    half = losses(student, teacher)
    assert {value.dtype for value in half.values()} == {torch.float32}
    assert_close(half, losses(_float32(student), _float32(teacher)), rtol=0, atol=0)
    torch.stack(list(half.values())).sum().backward()
    reached = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert reached
    assert all(torch.isfinite(gradient).all() for gradient in reached)
