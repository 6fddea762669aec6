"""RDD's task losses and cross-entropy on a GPU: float32 whatever the switches say, right pixels.

The expected numbers are computed in float64 on the CPU, in plain torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from rdd_pipeline.collectives import ALONE
from rdd_pipeline.losses.cross_entropy import cross_entropy_loss
from rdd_pipeline.losses.ohem import _smallest, ohem_mask
from rdd_pipeline.losses.pixelwise import log_prob_of_label, pixel_labels
from rdd_pipeline.losses.rdd import selected_pixels, teacher_confidence, tfe_loss, tse_loss

from .compare import assert_as_float64, assert_value

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("reckless")]

BORDER = 1e-6  # p may lie on the other side of a threshold when it is that near
SIZES = {  # batch, classes, size of the logits, size of the labels
    "realistic": (2, 19, (33, 65), (256, 512)),
    "odd": (3, 7, (13, 9), (101, 67)),
    "wide": (1, 150, (17, 33), (129, 257)),
}
KEPT = {"kept-0": 0, "kept-count": 20_000, "kept-share": 0.33}
MODES = ("xor", "or", "and", "ohem")


class Maps(NamedTuple):
    """Logits of both networks' both heads, and labels with ignored areas."""

    student: Tensor
    student_aux: Tensor
    teacher: Tensor
    teacher_aux: Tensor
    labels: Tensor
    class_weights: Tensor


@lru_cache
def maps(size: str) -> Maps:
    """Networks that have learned something: most pixels are easy, and not the same ones hard."""
    images, classes, small, large = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, classes, (images, 1, 9, 9), generator=generator)
    labels = F.interpolate(coarse.float(), size=large)[:, 0].to(torch.uint8)
    truth = F.interpolate(coarse.float(), size=small)[:, 0].long()
    known = F.one_hot(truth, classes).movedim(-1, 1)

    def logits(sure: float) -> Tensor:
        noise = torch.randn(images, classes, *small, generator=generator)
        return 2 * noise + sure * known

    labels[:, : large[0] // 9] = 255
    labels[0, :, -5:] = 255
    weights = 0.5 + torch.rand(classes, generator=generator)
    return Maps(logits(6), logits(4), logits(8), logits(6), labels, weights)


def up(logits: Tensor, labels: Tensor) -> Tensor:
    return F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=True)


def pixel_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, H, W), 0 where ignored."""
    return F.cross_entropy(up(logits, labels), labels.long(), ignore_index=255, reduction="none")


@lru_cache
def label_probability(size: str, which: str) -> Tensor:
    """(N, H, W) float64, 1 where the pixel is ignored."""
    logits: Tensor = getattr(maps(size), which)
    with torch.autocast("cpu", enabled=False):
        return (-pixel_ce(logits.double(), maps(size).labels)).exp()


def expected_border(size: str, which: str, threshold: float, kept: int | float) -> float:
    """The p up to which a pixel is hard, by sorting."""
    p = label_probability(size, which).flatten()
    count = min(len(p), round(kept * len(p)) if isinstance(kept, float) else kept)
    return max(threshold, float(p.sort().values[count - 1])) if count else threshold


def assert_hard(found: Tensor, size: str, which: str, threshold: float, kept: int | float) -> None:
    border, p = expected_border(size, which, threshold, kept), label_probability(size, which)
    expected = (p <= border) & (maps(size).labels != 255)
    wrong = (found.cpu() != expected) & ((p - border).abs() > BORDER)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} pixels"
    assert 0 < float(expected.float().mean()) < 1


def plain_mean(
    logits: Tensor, labels: Tensor, chosen: Tensor, class_weights: Tensor | None
) -> Tensor:
    """(Weighted) mean cross-entropy of the chosen pixels."""
    left = torch.where(chosen, labels.long(), 255)
    return F.cross_entropy(up(logits, labels), left, class_weights, ignore_index=255)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threshold", [0.7, 0.9])
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_the_hard_pixels_are_those_of_float64(size, threshold, kept, device):
    for which in ("student", "teacher"):
        found = ohem_mask(
            getattr(maps(size), which).to(device),
            maps(size).labels.to(device),
            threshold=threshold,
            min_kept=kept,
        )
        assert_hard(found, size, which, threshold, kept)


def _check_tse(
    size: str, device: torch.device, *, auxiliary: bool, weighted: bool, **settings: Any
) -> None:
    """Pixels chosen on the device are right, and so are value and gradient over them."""
    m = maps(size)
    heads = ["", "_aux"] if auxiliary else [""]
    masks = []
    for head in heads:
        student, teacher = getattr(m, f"student{head}"), getattr(m, f"teacher{head}")
        found = selected_pixels(
            student.to(device), teacher.to(device), m.labels.to(device), **settings
        )
        about = settings["threshold"], settings["min_kept"]
        assert_hard(found.hard_student, size, f"student{head}", *about)
        assert_hard(found.hard_teacher, size, f"teacher{head}", *about)
        masks.append(found.selected.cpu())
        assert 0 < float(masks[-1].float().mean()) < 1

    def expected(
        *students: Tensor, labels: Tensor, class_weights: Tensor | None = None, **_: Any
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for weight, logits, chosen in zip((1.0, 0.4), students, masks, strict=False):
            total = total + weight * plain_mean(logits, labels, chosen, class_weights)
        return total

    def loss(student: Tensor, student_aux: Tensor | None = None, **rest: Any) -> Tensor:
        return tse_loss(student, student_aux_logits=student_aux, **rest, **settings).loss

    students = [m.student, m.student_aux] if auxiliary else [m.student]
    rest = {"labels": m.labels, "teacher_logits": m.teacher, "teacher_aux_logits": m.teacher_aux}
    if weighted:
        rest["class_weights"] = m.class_weights
    assert_as_float64(loss, students, rest, device, expected=expected)


@pytest.mark.parametrize("threshold", [0.7, 0.5])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("mode", MODES)
def test_tse_is_that_of_float64(mode, kept, weighted, threshold, device):
    settings = {"mode": mode, "min_kept": kept, "threshold": threshold}
    _check_tse("realistic", device, auxiliary=threshold == 0.7, weighted=weighted, **settings)


@pytest.mark.parametrize("size", ["odd", "wide"])
@pytest.mark.parametrize("mode", MODES)
def test_tse_of_odd_sizes_is_that_of_float64(mode, size, device):
    settings = {"mode": mode, "min_kept": 0.2, "threshold": 0.7}
    _check_tse(size, device, auxiliary=True, weighted=True, **settings)


@pytest.mark.parametrize("size", SIZES)
def test_tse_with_a_class_floor_is_that_of_float64(size, device):
    """Which pixels fill a class up is not handed out: a pixel or two may be others."""
    m = maps(size)

    def loss(place: torch.device, dtype: torch.dtype, floor: float) -> Tensor:
        return tse_loss(
            m.student.to(place, dtype),
            m.labels.to(place),
            teacher_logits=m.teacher.to(place, dtype),
            min_kept=0.1,
            class_floor=floor,
        ).loss

    found = loss(device, torch.float32, 0.3)
    with torch.autocast("cpu", enabled=False):
        expected, without = (loss(torch.device("cpu"), torch.float64, f) for f in (0.3, 0.0))
    assert expected != without
    assert_value(found, expected, 1e-3 if size == "odd" else 1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reduction", ["paper", "valid"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("auxiliary", [True, False], ids=["aux", "main"])
def test_tfe_is_that_of_float64(auxiliary, weighted, reduction, size, device):
    m = maps(size)

    def expected(
        *students: Tensor,
        labels: Tensor,
        teacher_logits: Tensor,
        teacher_aux_logits: Tensor,
        class_weights: Tensor | None = None,
    ) -> Tensor:
        kl = F.kl_div(
            teacher_logits.log_softmax(1),
            teacher_aux_logits.log_softmax(1),
            reduction="none",
            log_target=True,
        ).sum(1, keepdim=True)
        w = up((-kl).exp(), labels)[:, 0]
        valid = labels != 255
        count = float(labels.numel() if reduction == "paper" else valid.sum())
        if class_weights is not None:
            of_class = class_weights[torch.where(valid, labels, 0).long()]
            w, count = w * of_class, count * float(of_class[valid].mean())
        pixels = sum(a * pixel_ce(s, labels) for a, s in zip((1, 0.4), students, strict=False))
        return (w * pixels).sum() / count

    def loss(student: Tensor, student_aux: Tensor | None = None, **rest: Any) -> Tensor:
        return tfe_loss(student, student_aux_logits=student_aux, reduction=reduction, **rest).loss

    students = [m.student, m.student_aux] if auxiliary else [m.student]
    rest = {"labels": m.labels, "teacher_logits": m.teacher, "teacher_aux_logits": m.teacher_aux}
    if weighted:
        rest["class_weights"] = m.class_weights
    assert_as_float64(loss, students, rest, device, expected=expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("auxiliary", [True, False], ids=["aux", "main"])
def test_cross_entropy_is_that_of_float64(auxiliary, weighted, size, device):
    m = maps(size)

    def expected(*students: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        valid = labels != 255
        means = [plain_mean(logits, labels, valid, class_weights) for logits in students]
        return means[0] + (0.4 * means[1] if auxiliary else 0)

    def loss(student: Tensor, student_aux: Tensor | None = None, **rest: Any) -> Tensor:
        return cross_entropy_loss(student, student_aux_logits=student_aux, **rest).loss

    students = [m.student, m.student_aux] if auxiliary else [m.student]
    rest = {"labels": m.labels} | ({"class_weights": m.class_weights} if weighted else {})
    assert_as_float64(loss, students, rest, device, expected=expected)


@pytest.mark.parametrize("size", SIZES)
def test_the_teachers_confidence_is_that_of_float64(size, device):
    m = maps(size)
    large = m.labels.shape[-2:]
    found = teacher_confidence(m.teacher.to(device), m.teacher_aux.to(device), size=large)
    with torch.autocast("cpu", enabled=False):
        expected = teacher_confidence(m.teacher.double(), m.teacher_aux.double(), size=large)
    assert float((found.double().cpu() - expected).abs().max()) < 1e-5


def test_what_is_logged_is_that_of_float64(device):
    m = maps("realistic")

    def statistics(place: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        logits = {
            "teacher_logits": m.teacher.to(place, dtype),
            "teacher_aux_logits": m.teacher_aux.to(place, dtype),
            "student_aux_logits": m.student_aux.to(place, dtype),
        }
        student, labels = m.student.to(place, dtype), m.labels.to(place)
        return (
            tse_loss(student, labels, min_kept=0.2, **logits).statistics
            | tfe_loss(student, labels, **logits).statistics
        )

    found = statistics(device, torch.float32)
    with torch.autocast("cpu", enabled=False):
        expected = statistics(torch.device("cpu"), torch.float64)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_value(found[name], value, 1e-4)


def test_half_precision_logits_are_only_rounded_once(device):
    """Networks under autocast hand out bfloat16: the loss of those very numbers, in float32."""
    m = maps("realistic")
    students, teacher = [m.student.bfloat16()], m.teacher.bfloat16()

    def loss(student: Tensor, **rest: Any) -> Tensor:
        return tfe_loss(student, m.labels.to(student.device), **rest).loss

    given = {"teacher_logits": teacher.float(), "teacher_aux_logits": m.teacher_aux}
    assert_as_float64(loss, [students[0].float()], given, device)
    value = loss(
        students[0].to(device),
        teacher_logits=teacher.to(device),
        teacher_aux_logits=m.teacher_aux.to(device),
    )
    with torch.autocast("cpu", enabled=False):
        wanted = loss(
            students[0].double(),
            teacher_logits=teacher.double(),
            teacher_aux_logits=m.teacher_aux.double(),
        )
    assert_value(value, wanted)


def test_without_a_valid_pixel_all_is_zero(device):
    m = maps("odd")
    nothing = torch.full_like(m.labels, 255).to(device)
    student = m.student.to(device).requires_grad_()
    loss = tse_loss(student, nothing, teacher_logits=m.teacher.to(device), min_kept=0.5).loss
    loss = loss + cross_entropy_loss(student, nothing).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert not student.grad.any()


def test_kth_smallest_of_millions_is_that_of_a_sort(device):
    values = torch.rand(3_000_001, generator=torch.Generator().manual_seed(0)) ** 6
    values[::3] = 1.0
    ordered = values.sort().values
    for k in (1, 100_000, 1_500_000, len(values)):
        found = _smallest(values.to(device), k, ALONE, on_cpu=device.type == "cpu")
        assert found.item() == ordered[k - 1].item(), k


def test_log_probabilities_of_a_whole_batch_and_their_gradient(device):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2, 19, 64, 128, generator=generator)
    labels = torch.randint(0, 19, (2, 512, 1024), generator=generator, dtype=torch.uint8)
    labels[:, ::7] = 255
    weight = torch.rand(labels.shape, generator=generator)

    def value_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.requires_grad_()
        pixels = pixel_labels(labels, num_classes=19, ignore_index=255)
        value = log_prob_of_label(logits, pixels)
        return value, torch.autograd.grad((weight.to(value) * value).sum(), logits)[0]

    exact, exact_gradient = value_and_gradient(logits.double(), labels)
    value, gradient = value_and_gradient(logits.to(device), labels.to(device))
    assert_close(value.cpu(), exact.float(), rtol=1e-5, atol=1e-5)
    assert_close(gradient.cpu(), exact_gradient.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(gradient, value_and_gradient(logits.to(device), labels.to(device))[1])
