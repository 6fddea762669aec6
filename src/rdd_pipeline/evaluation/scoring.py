"""Scores of a trained network on the splits of a data set."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from rdd_pipeline.config import EvaluationParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.data.loading import Loader
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.confusion import METRICS, Scores
from rdd_pipeline.evaluation.predict import evaluate
from rdd_pipeline.networks import NetworkCheckpoint


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
        By split: the `METRICS` in [0, 1], ``classes_in_mean``, ``iou`` by class name (None: absent
        from labels and predictions) and the ``confusion`` matrix in pixels, rows = labels.

    Raises:
        UserError: None of the splits has images.
    """
    model, labels = network.build().to(device), images.labels
    loader = Loader()
    if group is not None:
        loader = Loader(rank=dist.get_rank(group), world_size=dist.get_world_size(group))
    results: dict[str, dict[str, Any]] = {}
    for split in params.splits:
        chosen = images.split(split)
        if not chosen.samples:
            continue
        matrix = evaluate(
            model,
            network.header.preprocessing,
            chosen.evaluation_batches(params.batch_size, loader),
            num_classes=labels.num_classes,
            ignore_index=labels.ignore_index,
            device=device,
            scales=params.scales,
            flip=params.flip,
            average=params.average,
            window=params.window_size,
            overlap=params.overlap,
            group=group,
        )
        results[split] = _as_json(Scores.from_matrix(matrix), labels, matrix)
    if not results:
        raise UserError(
            f"None of the splits {', '.join(params.splits)} has images. "
            "Set evaluation.splits to splits of the index."
        )
    return results


def _as_json(scores: Scores, labels: LabelSet, matrix: torch.Tensor) -> dict[str, Any]:
    iou = {
        name: None if value != value else value
        for name, value in zip(labels.names, scores.iou, strict=True)
    }
    return {
        **{name: getattr(scores, name) for name in METRICS},
        "classes_in_mean": scores.classes_in_mean,
        "iou": iou,
        "confusion": matrix.tolist(),
    }
