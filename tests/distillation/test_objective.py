from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from rdd_pipeline.config import MethodsParams, RddParams
from rdd_pipeline.distillation.methods import LossSpec, Method, find_method
from rdd_pipeline.distillation.objective import (
    Objective,
    ObjectiveOutput,
    check_auxiliary_head,
)
from rdd_pipeline.distillation.stages import RDD, stage_shares
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.base import DistillationLoss, LossContext, compare
from rdd_pipeline.losses.kd import kd_loss
from rdd_pipeline.losses.rdd import tfe_loss, tse_loss
from rdd_pipeline.networks import NetworkOutput

CLASSES, SIZE = 4, (16, 24)
WARMUP, ITERATIONS = 5, 9


def _output(seed: int, *, auxiliary: bool = True, gradient: bool = False) -> NetworkOutput:
    generator = torch.Generator().manual_seed(seed)

    def draw(channels: int) -> Tensor:
        return torch.randn(2, channels, 4, 6, generator=generator).requires_grad_(gradient)

    return NetworkOutput(
        draw(CLASSES), draw(CLASSES) if auxiliary else None, draw(8), (draw(6), draw(8))
    )


@pytest.fixture
def labels() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(0, CLASSES, (2, *SIZE), generator=generator, dtype=torch.uint8)
    labels[:, :3] = 255
    return labels


STUDENT, TEACHER = _output(1), _output(2)
WEIGHTS = torch.tensor([0.5, 1.0, 1.5, 2.0])


def _objective(method: Method, *, rdd: dict | None = None, **settings) -> Objective:
    return Objective(
        method,
        rdd=RddParams(**{"tfe_length": WARMUP, "min_kept": 0.1, **(rdd or {})}),
        **{
            "iterations": ITERATIONS,
            "aux_weight": 0.4,
            "class_weights": None,
            "ignore_index": 255,
            "context": LossContext(STUDENT, TEACHER),
            **settings,
        },
    )


def _cross_entropy(output: NetworkOutput, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Both heads, by torch alone."""

    def of(logits: Tensor) -> Tensor:
        full = F.interpolate(logits, SIZE, mode="bilinear", align_corners=True)
        return F.cross_entropy(full, labels.long(), weight, ignore_index=255)

    aux = 0.0 if output.aux_logits is None else 0.4 * of(output.aux_logits)
    return of(output.logits) + aux


# ---- when TFE, when TSE


def _tfe_share(rdd: RddParams, iteration: int, iterations: int) -> float:
    shares = stage_shares(RDD, rdd, iteration, iterations)
    assert shares.keys() == {"tfe", "tse"}
    assert sum(shares.values()) == 1
    return shares["tfe"]


@pytest.mark.parametrize(
    ("warmup", "iterations", "expected"),
    [
        (4, 6, [1, 1, 1, 0, 0, 0]),  # TFE while iteration < warmup
        (0, 3, [0, 0, 0]),
        (1, 3, [0, 0, 0]),
        (6, 6, [1, 1, 1, 1, 1, 0]),
    ],
)
def test_the_share_of_tfe_switches_at_the_warm_up(warmup, iterations, expected):
    rdd = RddParams(tfe_length=warmup)
    shares = [_tfe_share(rdd, i, iterations) for i in range(1, iterations + 1)]
    assert shares == expected


@pytest.mark.parametrize(("warmup", "iterations"), [(4, 10), (1, 5), (0, 4), (4000, 40_000)])
def test_the_annealed_share_is_the_published_formula(warmup, iterations):
    rdd = RddParams(tfe_length=warmup, annealed=True)
    for iteration in {1, max(warmup - 1, 1), max(warmup, 1), warmup + 1, iterations}:
        share = _tfe_share(rdd, iteration, iterations)
        if iteration < warmup:
            assert share == 1.0
        else:
            assert share == pytest.approx((iteration - iterations) / (warmup - iterations))
    assert _tfe_share(rdd, iterations, iterations) == 0.0


def test_an_annealed_run_that_ends_with_the_warm_up_has_one_step_of_tse():
    rdd = RddParams(tfe_length=6, annealed=True)
    assert [_tfe_share(rdd, i, 6) for i in (5, 6)] == [1.0, 0.0]


def _tfe(labels: Tensor, **options) -> Tensor:
    return tfe_loss(
        STUDENT.logits,
        labels,
        teacher_logits=TEACHER.logits,
        teacher_aux_logits=TEACHER.aux_logits,
        student_aux_logits=STUDENT.aux_logits,
        **options,
    ).loss


def _tse(labels: Tensor, **options) -> Tensor:
    return tse_loss(
        STUDENT.logits,
        labels,
        teacher_logits=TEACHER.logits,
        student_aux_logits=STUDENT.aux_logits,
        teacher_aux_logits=TEACHER.aux_logits,
        **{"min_kept": 0.1, **options},
    ).loss


@pytest.mark.parametrize("iteration", [1, 4, 5, 9])
def test_the_task_is_tfe_before_the_warm_up_and_tse_from_it_on(labels, iteration):
    parts = _objective(find_method("tse"))(STUDENT, TEACHER, labels, iteration).parts
    assert_close(parts["task"], _tfe(labels) if iteration < WARMUP else _tse(labels))


@pytest.mark.parametrize(("iteration", "share"), [(4, 1.0), (5, 1.0), (7, 0.5), (8, 0.25), (9, 0)])
def test_the_annealed_task_fades_from_tfe_to_tse(labels, iteration, share):
    objective = _objective(find_method("tse"), rdd={"annealed": True})
    task = objective(STUDENT, TEACHER, labels, iteration).parts["task"]
    assert_close(task, share * _tfe(labels) + (1 - share) * _tse(labels))


def test_statistics_are_those_of_what_was_computed(labels):
    objective = _objective(find_method("tse"), rdd={"annealed": True})
    tfe = {"teacher_confidence"}
    tse = {"chosen", "hard_student", "hard_teacher", "chosen_none", "aux_chosen"}
    for iteration, there, absent in ((1, tfe, tse), (7, tfe | tse, set()), (9, tse, tfe)):
        statistics = objective(STUDENT, TEACHER, labels, iteration).statistics
        assert there <= set(statistics)
        assert not absent & set(statistics)
        assert all(value.dim() == 0 and not value.requires_grad for value in statistics.values())


@pytest.mark.parametrize(
    "change",
    [{"mode": "or"}, {"mode": "ohem"}, {"threshold": 0.3}, {"min_kept": 3}, {"min_kept": 0.9}],
)
def test_settings_of_tse_reach_the_loss(labels, change):
    objective = _objective(find_method("tse"), rdd=change)
    task = objective(STUDENT, TEACHER, labels, WARMUP).parts["task"]
    assert_close(task, _tse(labels, **change))


def test_settings_of_tfe_and_of_the_task_reach_the_loss(labels):
    objective = _objective(find_method("tse"), rdd={"reduction": "valid"}, aux_weight=0.7)
    parts = objective(STUDENT, TEACHER, labels, 1).parts
    assert_close(parts["task"], _tfe(labels, reduction="valid", aux_weight=0.7))


def test_class_weights_reach_tse_and_the_plain_task(labels):
    objective = _objective(find_method("tse"), class_weights=WEIGHTS)
    parts = objective(STUDENT, TEACHER, labels, WARMUP).parts
    assert_close(parts["task"], _tse(labels, class_weights=WEIGHTS))
    plain = _objective(find_method("baseline"), class_weights=WEIGHTS)
    expected = _cross_entropy(STUDENT, labels, WEIGHTS)
    assert_close(plain(STUDENT, None, labels, 1).total, expected)


def test_class_weights_move_with_the_module_but_are_no_state():
    objective = _objective(find_method("baseline"), class_weights=WEIGHTS)
    assert objective.state_dict() == {}
    assert objective.to(torch.float64).class_weights.dtype == torch.float64


# ---- the sum


@pytest.mark.parametrize("auxiliary", [True, False])
def test_the_student_alone_minimizes_the_cross_entropy_of_its_heads(labels, auxiliary):
    student = _output(1, auxiliary=auxiliary)
    output = _objective(find_method("baseline"))(student, None, labels, 1)
    assert_close(output.total, _cross_entropy(student, labels))
    assert set(output.parts) == {"task"}


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("method", ["kd", "tse"])
def test_total_is_the_task_plus_the_weighted_losses(labels, method, weight):
    changes = MethodsParams(weights={method: {"kd": weight}})
    output = _objective(find_method(method, changes))(STUDENT, TEACHER, labels, 1)
    assert set(output.parts) == {"task", "kd"}
    assert_close(output.parts["kd"], kd_loss(STUDENT.logits, TEACHER.logits))  # unweighted
    assert_close(output.total, output.parts["task"] + weight * output.parts["kd"])


def test_several_losses_add_up_and_see_all_outputs(labels):
    class Distances(DistillationLoss):
        def __init__(self, context) -> None:
            super().__init__()

        def forward(self, student, teacher, labels):
            difference = student.feature - teacher.feature
            return {"l2": difference.square().mean(), "l1": difference.abs().mean()}

    method = Method(
        "two",
        (
            LossSpec("kd", compare("logits", kd_loss), 2.0, options={"temperature": 4.0}),
            LossSpec("distances", Distances, {"l2": 3.0, "l1": 0.5}),
        ),
    )
    output = _objective(method)(STUDENT, TEACHER, labels, 1)
    expected = (
        _cross_entropy(STUDENT, labels)
        + 2 * kd_loss(STUDENT.logits, TEACHER.logits, temperature=4.0)
        + 3 * F.mse_loss(STUDENT.feature, TEACHER.feature)
        + 0.5 * F.l1_loss(STUDENT.feature, TEACHER.feature)
    )
    assert_close(output.total, expected)
    assert set(output.parts) == {"task", "kd", "l2", "l1"}


def test_what_a_loss_trains_is_part_of_the_objective():
    class Adapter(DistillationLoss):
        def __init__(self, context) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 8, 1)
            self.register_buffer("queue", torch.zeros(3))

    objective = _objective(Method("with adapter", (LossSpec("adapter", Adapter, 1.0),)))
    assert set(objective.state_dict()) == {
        f"terms.adapter.{name}" for name in ("conv.weight", "conv.bias", "queue")
    }
    assert len(list(objective.parameters())) == 2


def _gradients(output: ObjectiveOutput, student: NetworkOutput) -> list[Tensor | None]:
    return list(
        torch.autograd.grad(output.total, [student.logits, student.aux_logits], allow_unused=True)
    )


@pytest.mark.parametrize("iteration", [1, WARMUP])
def test_only_the_student_gets_gradients(labels, iteration):
    student, teacher = _output(1, gradient=True), _output(2, gradient=True)
    output = _objective(find_method("tse"))(student, teacher, labels, iteration)
    output.total.backward()
    assert student.logits.grad.abs().sum() > 0
    assert student.aux_logits.grad.abs().sum() > 0
    assert teacher.logits.grad is None
    assert teacher.aux_logits.grad is None
    assert all(not part.requires_grad for part in output.parts.values())


@pytest.mark.parametrize("method", ["baseline", "kd", "tse"])
@pytest.mark.parametrize("iteration", [1, WARMUP])
def test_with_all_pixels_ignored_the_task_is_zero_with_zero_gradient(method, iteration):
    student = _output(1, gradient=True)
    labels = torch.full((2, *SIZE), 255, dtype=torch.uint8)
    changes = MethodsParams(weights={} if method == "baseline" else {method: {"kd": 0.0}})
    objective = _objective(find_method(method, changes))
    output = objective(student, TEACHER, labels, iteration)
    assert output.parts["task"] == 0
    for gradient in _gradients(output, student):
        assert gradient is None or not gradient.any()


# ---- auxiliary heads


@pytest.mark.parametrize(
    ("warmup", "rdd", "student", "message"),
    [
        (5, {}, True, "TFE compares"),
        (5, {}, False, "TFE compares"),
        (2, {}, False, "TFE compares"),
        (0, {"annealed": True}, False, "TFE compares"),
        (0, {}, True, None),
        (1, {"mode": "and"}, True, None),
        (1, {}, False, None),
        (5, {"confidence": "entropy"}, True, None),
        (0, {"annealed": True, "confidence": "entropy"}, False, None),
        (0, {"mode": "ohem"}, True, None),
    ],
)
def test_heads_that_are_missing_are_noticed_just_when_they_are_needed(
    labels, warmup, rdd, student, message
):
    params = RddParams(tfe_length=warmup, **rdd)

    def check(teacher: bool) -> None:
        check_auxiliary_head(params, warmup=warmup, iterations=ITERATIONS, teacher=teacher)

    check(True)
    if message is not None:
        with pytest.raises(UserError, match=message):
            check(False)
        return
    check(False)
    # What it lets pass can be computed in every iteration.
    objective = _objective(find_method("tse"), rdd={"tfe_length": warmup, **rdd})
    for iteration in range(1, ITERATIONS + 1):
        outputs = _output(1, auxiliary=student), _output(2, auxiliary=False)
        assert objective(*outputs, labels, iteration).total.isfinite()
