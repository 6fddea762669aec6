"""OHEM: which pixels are hard, by sorting everything."""

import pytest
import torch
import torch.nn.functional as F

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.ohem import ohem_mask
from rdd_pipeline.losses.rdd import selected_pixels
from tests.losses.case import Case
from tests.losses.reference import upsampled


@pytest.mark.parametrize("amount", ["few", "many"])
def test_hard_pixels_equal_the_reference(reference, amount):
    masks = selected_pixels(
        reference["student_logits"],
        reference["teacher_logits"],
        reference.labels,
        min_kept=int(reference[f"tse/OR/min_kept_{amount}/unweighted/min_kept"]),
        ignore_index=-1,
    )
    assert torch.equal(masks.hard_student, reference[f"tse/hard_student/min_kept_{amount}"])
    assert torch.equal(masks.hard_teacher, reference[f"tse/hard_teacher/min_kept_{amount}"])
    assert torch.equal(masks.selected, masks.hard_student ^ masks.hard_teacher)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("min_kept", [0, 1, 50, 400, 0.0, 0.25, 1.0, 10**9])
def test_hard_pixels_equal_sorting_everything(threshold, min_kept):
    case = Case()
    index = case.labels.masked_fill(case.labels == 255, 0)[:, None]
    p = upsampled(case.teacher, case.labels).softmax(1).gather(1, index)[:, 0]
    p[case.labels == 255] = 1
    count = min_kept if isinstance(min_kept, int) else round(min_kept * p.numel())
    tau = max([threshold, *sorted(p.flatten().tolist())[:count][-1:]])
    expected = (case.labels != 255) & (p <= tau + 1e-6)
    hard = ohem_mask(case.teacher, case.labels, threshold=threshold, min_kept=min_kept)
    assert torch.equal(hard, expected)


def test_ties_are_kept():
    logits = torch.zeros(1, 4, 2, 2)  # p = 1/4 everywhere
    labels = torch.randint(0, 4, (1, 8, 8))
    assert ohem_mask(logits, labels, threshold=0.0, min_kept=1).all()


def test_with_fewer_valid_pixels_than_min_kept_all_valid_ones_are_hard():
    case = Case()
    labels = torch.full_like(case.labels, 255)
    labels[0, 3, 4:9] = 1
    certain = F.one_hot(torch.ones(2, 5, 6, dtype=torch.long), 4).movedim(-1, 1) * 100.0
    assert torch.equal(ohem_mask(certain, labels), labels != 255)


def test_without_valid_pixel_nothing_is_hard():
    case = Case()
    assert not ohem_mask(case.teacher, torch.full_like(case.labels, 255)).any()


def test_hard_pixels_name_bad_settings():
    case = Case()
    with pytest.raises(UserError, match=r"threshold is 1\.5"):
        ohem_mask(case.teacher, case.labels, threshold=1.5)
    with pytest.raises(UserError, match="min_kept is -1"):
        ohem_mask(case.teacher, case.labels, min_kept=-1)
    with pytest.raises(UserError, match=r"min_kept is 2\.0"):
        ohem_mask(case.teacher, case.labels, min_kept=2.0)
