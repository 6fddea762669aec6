"""One confusion matrix over a whole split, and the scores that follow from it.

Suffixes: B images, H rows, W columns, C classes. Rows of a matrix are labels, columns predictions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.evaluation.boundaries import boundary_iou
from rdd_pipeline.evaluation.calibration import expected_calibration_error


def confusion_matrix(
    predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255
) -> Tensor:
    """Count pixels by (label, prediction).

    Args:
        predictions: Class of every pixel, any shape, any integer type.
        labels: Same shape; `ignore_index` marks pixels that count nowhere.
        num_classes: C; every other label must lie in [0, C).
        ignore_index: Value of ignored pixels.

    Returns:
        (C, C) int64 counts on the labels' device: rows are labels, columns predictions. Add the
        matrices of batches and ranks; the scores of the sum are those of the whole split.

    Raises:
        ValueError: Shapes differ, or a prediction lies outside [0, C).
        DataProblem: A label is neither in [0, C) nor `ignore_index`.
    """
    if predictions.shape != labels.shape:
        raise ValueError(
            f"Predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} differ in "
            "shape. Upsample the logits to the size of the labels before the argmax."
        )
    # One bincount over (label + 1) * C + prediction. Labels are clamped to [-1, C] so that wrong
    # ones fall into rows 0 and C + 1, ignored ones get the last row: no boolean indexing, which
    # is ten times slower, and a wrong label cannot pass as another class.
    rows = labels.to(torch.int32).clamp(-1, num_classes).add_(1)
    rows = torch.where(labels == ignore_index, num_classes + 2, rows)
    index = rows.mul_(num_classes).add_(predictions.to(torch.int32)).flatten()
    low, high = (predictions.amin(), predictions.amax()) if len(index) else (0, 0)
    if int(low) < 0 or int(high) >= num_classes:
        raise ValueError(
            f"Predictions lie in [{int(low)}, {int(high)}], expected [0, {num_classes}): the "
            f"network and the label set differ in their number of classes ({num_classes})."
        )
    counts = torch.bincount(index, minlength=(num_classes + 3) * num_classes)
    table = counts.view(num_classes + 3, num_classes)
    if int(table[0].sum() + table[num_classes + 1].sum()):
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= num_classes))]
        raise DataProblem(
            f"Labels hold the values {sorted(set(wrong.tolist()))[:10]}, expected 0 to "
            f"{num_classes - 1} or {ignore_index} (ignored). Check the label set of the data."
        )
    return table[1 : num_classes + 1].clone()


def sum_over_ranks(matrix: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum counts over the processes of a group; of integers exactly.

    Args:
        matrix: Counts of this rank's images, each image on one rank only.
        group: None: the counts are returned as they are.

    Returns:
        The sum, the same on every rank, on the device it came from.
    """
    if group is None:
        return matrix
    # gloo sums on the CPU, nccl on the GPU.
    device = torch.device("cpu" if dist.get_backend(group) == "gloo" else matrix.device)
    total = matrix.to(device, copy=True)
    dist.all_reduce(total, group=group)
    return total.to(matrix.device)


@dataclass(frozen=True)
class Scores:
    """What one confusion matrix says; every value a fraction in [0, 1], not percent.

    Attributes:
        miou: Mean intersection over union of the classes that occur; NaN when none does.
        iou: One value per class; NaN where neither label nor prediction has the class.
        classes_in_mean: How many classes `miou` averages.
        pixel_accuracy: Share of the valid pixels that are right; NaN without a valid pixel.
        mean_accuracy: Mean recall of the classes that occur among the labels.
        pixels: Number of valid pixels.
        boundary_miou: Mean of `boundary_iou` over the classes that occur near an edge; NaN also
            where boundaries were not counted.
        boundary_iou: One value per class, see `boundaries`; empty where not counted.
        calibration_error: Expected calibration error, see `calibration`; NaN where not counted.
            Less is better.
    """

    miou: float
    iou: tuple[float, ...]
    classes_in_mean: int
    pixel_accuracy: float
    mean_accuracy: float
    pixels: int
    boundary_miou: float = math.nan
    boundary_iou: tuple[float, ...] = ()
    calibration_error: float = math.nan

    @classmethod
    def from_matrix(
        cls, matrix: Tensor, boundary: Tensor | None = None, calibration: Tensor | None = None
    ) -> Scores:
        """Scores of counts over a split.

        Args:
            matrix: (C, C) pixels, labels in rows and predictions in columns.
            boundary: Sum of `boundaries.boundary_counts`.
            calibration: Sum of `calibration.calibration_counts`.
        """
        counts = matrix.detach().cpu().double()  # in this order: MPS has no float64
        hits = counts.diagonal()
        labeled, predicted = counts.sum(1), counts.sum(0)
        # 0 / 0 is NaN: exactly the classes that do not occur.
        iou = hits / (labeled + predicted - hits)
        recall = hits / labeled
        present = iou.isfinite()
        edges = torch.zeros(0) if boundary is None else boundary_iou(boundary)
        return cls(
            miou=iou[present].mean().item(),
            iou=tuple(iou.tolist()),
            classes_in_mean=int(present.sum()),
            pixel_accuracy=(hits.sum() / counts.sum()).item(),
            mean_accuracy=recall[recall.isfinite()].mean().item(),
            pixels=int(matrix.sum()),
            boundary_miou=edges[edges.isfinite()].mean().item(),
            boundary_iou=tuple(edges.tolist()),
            calibration_error=(
                math.nan if calibration is None else expected_calibration_error(calibration)
            ),
        )


NUMBERS = tuple(field.name for field in fields(Scores) if field.type == "float")
"""The numbers in `Scores`."""

METRICS = {
    name: {"miou": "mIoU", "boundary_miou": "boundary mIoU"}.get(name, name.replace("_", " "))
    for name in NUMBERS
    if name != "calibration_error"  # a gain would be a loss
}
"""What tables and figures may be about, with its name in words: the more, the better."""
