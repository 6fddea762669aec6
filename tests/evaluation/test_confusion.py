from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.evaluation.confusion import Scores, confusion_matrix, sum_over_ranks

DATA = Path(__file__).parents[1] / "vectors"


def _random(seed: int = 0, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randint(0, classes, (3, 7, 5), generator=generator)
    labels = torch.randint(0, classes, (3, 7, 5), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return predictions, labels


def test_counts_what_a_loop_over_pixels_counts() -> None:
    predictions, labels = _random()
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for prediction, label in zip(predictions.flatten(), labels.flatten(), strict=True):
        if label != 255:
            expected[label, prediction] += 1
    matrix = confusion_matrix(predictions, labels, 4)
    assert matrix.dtype == torch.int64
    assert torch.equal(matrix, expected)


def test_agrees_with_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    predictions, labels = _random(1)
    expected = functional.multiclass_confusion_matrix(
        predictions, labels, num_classes=4, ignore_index=255
    )
    assert torch.equal(confusion_matrix(predictions, labels, 4), expected)
    iou = functional.multiclass_jaccard_index(
        predictions, labels, num_classes=4, ignore_index=255, average="none"
    )
    assert Scores.from_matrix(expected).iou == pytest.approx(iou.tolist())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_may_have_any_integer_type(dtype: torch.dtype) -> None:
    predictions, labels = _random()
    expected = confusion_matrix(predictions, labels, 4)
    assert torch.equal(confusion_matrix(predictions.to(dtype), labels.to(dtype), 4), expected)


def test_leaves_its_arguments_alone() -> None:
    predictions, labels = (tensor.int() for tensor in _random())
    before = predictions.clone(), labels.clone()
    confusion_matrix(predictions, labels, 4)
    assert torch.equal(predictions, before[0])
    assert torch.equal(labels, before[1])


def test_many_classes_do_not_overflow() -> None:
    predictions = torch.full((1, 2), 254)
    matrix = confusion_matrix(predictions, torch.full((1, 2), 253, dtype=torch.uint8), 255, 255)
    assert matrix[253, 254] == 2
    assert matrix.sum() == 2


def test_matches_the_reference_numbers() -> None:
    data = np.load(DATA / "losses_c19.npz")
    labels = torch.from_numpy(data["target"].astype(np.int64))
    logits = F.interpolate(
        torch.from_numpy(data["student_logits"]),
        size=labels.shape[-2:],
        mode="bilinear",
        align_corners=True,
    )
    matrix = confusion_matrix(logits.argmax(1), labels, 19, ignore_index=-1)
    scores = Scores.from_matrix(matrix)
    assert matrix.diagonal().tolist() == data["metric/intersection"].tolist()
    assert scores.iou == pytest.approx(data["metric/iou_per_class"].tolist(), abs=1e-6)
    assert scores.miou == pytest.approx(data["metric/miou"].item(), abs=1e-6)
    expected = data["metric/pixel_accuracy_over_valid"].item()
    assert scores.pixel_accuracy == pytest.approx(expected, abs=1e-6)


def test_no_valid_pixel_gives_zeros_and_undefined_scores() -> None:
    empty = torch.zeros(0, 4, 4, dtype=torch.int64)
    for predictions, labels in [
        (empty, empty),
        (torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), 255)),
    ]:
        matrix = confusion_matrix(predictions, labels, 3)
        assert matrix.tolist() == [[0] * 3] * 3
        scores = Scores.from_matrix(matrix)
        assert math.isnan(scores.miou)
        assert math.isnan(scores.pixel_accuracy)
        assert scores.classes_in_mean == 0
        assert scores.pixels == 0


def test_a_class_that_occurs_nowhere_is_left_out_of_the_mean() -> None:
    scores = Scores.from_matrix(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    assert scores.iou[:2] == (0.75, 0.8)
    assert math.isnan(scores.iou[2])
    assert scores.miou == pytest.approx((0.75 + 0.8) / 2)
    assert scores.classes_in_mean == 2
    assert scores.pixel_accuracy == pytest.approx(7 / 8)
    assert scores.mean_accuracy == pytest.approx((0.75 + 1.0) / 2)


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    scores = Scores.from_matrix(torch.tensor([[3, 1], [0, 0]]))
    assert scores.iou == (0.75, 0.0)
    assert scores.classes_in_mean == 2
    assert scores.mean_accuracy == 0.75


@pytest.mark.parametrize("wrong", [4, 77, 254, -1, -300])
def test_a_wrong_label_is_named(wrong: int) -> None:
    predictions, labels = _random()
    labels[1, 2, 3] = wrong
    with pytest.raises(DataProblem, match=rf"values \[{wrong}\], expected 0 to 3 or 255"):
        confusion_matrix(predictions, labels, 4)


@pytest.mark.parametrize("wrong", [4, 20, -1])
def test_a_prediction_outside_the_classes_is_refused(wrong: int) -> None:
    predictions, labels = _random()
    predictions[0, 0, 0] = wrong
    with pytest.raises(ValueError, match=r"expected \[0, 4\)"):
        confusion_matrix(predictions, labels, 4)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) and labels \(1, 4, 4\) differ in shape"):
        confusion_matrix(torch.zeros(1, 2, 2).long(), torch.zeros(1, 4, 4).long(), 2)


def test_without_a_group_the_matrix_is_its_own_sum() -> None:
    matrix = torch.eye(2, dtype=torch.int64)
    assert sum_over_ranks(matrix) is matrix


def test_sums_over_the_ranks_of_a_group(tmp_path: Path) -> None:
    """One process is enough to see the call; the sum over several is torch's own."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rdzv", rank=0, world_size=1)
    try:
        matrix = torch.tensor([[2**53 + 1, 1], [2, 3]])
        total = sum_over_ranks(matrix, dist.group.WORLD)
        assert torch.equal(total, matrix)
        assert total is not matrix
    finally:
        dist.destroy_process_group()
