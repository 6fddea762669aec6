"""Scores of a trained network on the splits of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rdd_pipeline.allocation import freed_memory_kept
from rdd_pipeline.config import EvaluationParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.loading import Loader
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.boundaries import boundary_counts
from rdd_pipeline.evaluation.calibration import BINS, calibration_counts
from rdd_pipeline.evaluation.confusion import NUMBERS, Scores, confusion_matrix, sum_over_ranks
from rdd_pipeline.evaluation.predict import evaluation_mode, score_bands
from rdd_pipeline.networks import Network, NetworkCheckpoint, Preprocessing

SCORES_FORMAT = 2
"""Raised when `score_splits` returns more than before: remembered scores are then made anew."""


@dataclass(frozen=True)
class Measured:
    """What is counted in one pass over a split; all of it adds up over the processes.

    Attributes:
        confusion: (C, C) int64 pixels, see `confusion.confusion_matrix`.
        boundary: (3, C) int64 pixels, see `boundaries.boundary_counts`.
        calibration: (3, `BINS`) float64, see `calibration.calibration_counts`.
        image_miou: (N) float64, mIoU of each image by its position, over the classes that occur in
            it; NaN without a labeled pixel.
    """

    confusion: Tensor
    boundary: Tensor
    calibration: Tensor
    image_miou: Tensor

    def scores(self) -> Scores:
        """Of the whole split."""
        return Scores.from_matrix(self.confusion, self.boundary, self.calibration)


def score_splits(
    network: NetworkCheckpoint,
    images: Images,
    params: EvaluationParams,
    *,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate on every split of `params.splits` that has images.

    Returns:
        By split: the `NUMBERS` in [0, 1], ``classes_in_mean``, ``iou`` and ``boundary_iou`` by
        class name (None: absent from labels and predictions), the ``confusion`` matrix in pixels,
        rows = labels, ``calibration`` (pixels, mean confidence and accuracy of each bin) and
        ``images`` (name and mIoU of each, in the order of the split; None: no labeled pixel).

    Raises:
        UserError: None of the splits has images, or the network's scores are not finite.
    """
    model = network.build().to(device)
    results = {}
    for split in params.splits:
        chosen = images.split(split)
        if chosen.samples:
            measured = measure(
                model, network.header.preprocessing, chosen, params, device=device, group=group
            )
            if not measured.calibration.isfinite().all():
                raise UserError(
                    f"{network.header.network.name} gives class scores that are not finite on "
                    f"split {split}: its weights are damaged or its training diverged. Give other "
                    "weights, or train it with a smaller learning rate."
                )
            results[split] = _as_json(measured, chosen)
    if not results:
        raise UserError(
            f"None of the splits {', '.join(params.splits)} has images. "
            "Set evaluation.splits to splits of the index."
        )
    return results


def measure(
    model: Network,
    preprocessing: Preprocessing,
    images: Images,
    params: EvaluationParams,
    *,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> Measured:
    """Everything that is counted, in one pass; of one image at a time.

    Args:
        model: On `device`; it is in the mode it was in afterwards.
        preprocessing: What it was trained on.
        images: All are predicted, whatever their split.
        params: How they are predicted.
        device: Where.
        group: Processes that share the images; None: this process alone.
    """
    classes, ignored = images.labels.num_classes, images.labels.ignore_index
    loader = Loader()
    if group is not None:
        loader = Loader(rank=dist.get_rank(group), world_size=dist.get_world_size(group))
    found = Measured(
        torch.zeros(classes, classes, dtype=torch.int64),
        torch.zeros(3, classes, dtype=torch.int64),
        torch.zeros(3, BINS, dtype=torch.float64),
        torch.zeros(len(images.samples), dtype=torch.float64),
    )
    with evaluation_mode(model), freed_memory_kept(device.type):
        for batch in images.evaluation_batches(params.batch_size, loader):
            labels = batch.labels.to(device, non_blocking=True)
            each = score_bands(
                model,
                preprocessing,
                batch.images.to(device, non_blocking=True),
                sizes=[(labels.shape[-2], labels.shape[-1])] * len(labels),
                **params.prediction(),
            )
            for position, label, bands in zip(batch.indices, labels, each, strict=True):
                best, confidences = zip(*(band.best() for band in bands), strict=True)
                prediction, confidence = torch.cat(best), torch.cat(confidences)
                matrix = confusion_matrix(prediction, label, classes, ignored).cpu()
                found.confusion.add_(matrix)
                found.boundary.add_(boundary_counts(prediction, label, classes, ignored).cpu())
                found.calibration.add_(
                    calibration_counts(confidence, prediction == label, label != ignored)
                )
                found.image_miou[position] = Scores.from_matrix(matrix).miou
    return Measured(*(sum_over_ranks(part, group) for part in vars(found).values()))


def _as_json(measured: Measured, images: Images) -> dict[str, Any]:
    scores, names = measured.scores(), images.labels.names
    pixels, confidence, hits = measured.calibration
    bins = torch.stack([pixels, confidence / pixels, hits / pixels], dim=1)
    return {
        **{name: getattr(scores, name) for name in NUMBERS},
        "classes_in_mean": scores.classes_in_mean,
        "iou": dict(zip(names, map(_known, scores.iou), strict=True)),
        "boundary_iou": dict(zip(names, map(_known, scores.boundary_iou), strict=True)),
        "confusion": measured.confusion.tolist(),
        "calibration": [[int(row[0]), _known(row[1]), _known(row[2])] for row in bins.tolist()],
        "images": [
            [sample.name, _known(round(miou, 6))]
            for sample, miou in zip(images.samples, measured.image_miou.tolist(), strict=True)
        ],
    }


def _known(value: float) -> float | None:
    return None if value != value else value
