"""Regions of labeled images whose label both networks contradict alike: likely label errors.

After the training a student and its teacher still find some pixels hard. Where both are sure of
one and the same other class, the label is the likelier culprit. That takes its idea from confident
learning (Northcutt et al. 2021, arXiv 1911.00068), which ranks examples by how far the probability
of the label lies below that of the predicted class; here two networks have to agree, and pixels are
put together to connected regions, because people correct regions.

Suffixes: C classes, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdd_pipeline.evaluation.predict import Band

LEAST = 0.5
"""Score of a region that is worth a look: half a pixel."""


class Opinion(NamedTuple):
    """What a network holds of the labels of one image."""

    classes: Tensor
    """(H, W) int64, the most probable ones."""
    margin: Tensor
    """(H, W) float32 in [0, 1], their probability less that of the label."""


class Suspect(NamedTuple):
    """A connected region with one label and one class that both networks see instead."""

    label: int
    suggested: int
    score: float
    """Sum over the pixels of the smaller one of both margins: about how many pixels are wrong."""
    top: int
    left: int
    mask: NDArray[np.bool_]
    """(rows, columns) of the region in its box."""


def opinion(bands: Iterable[Band], label_HW: Tensor, ignore_index: int) -> Opinion:
    """Of one network; full-size probabilities exist for one band at a time.

    Args:
        bands: Of `predict.score_bands`, for this image.
        label_HW: On the device of the bands.
        ignore_index: Pixels of this label get the margin 0.
    """
    classes, margins, row = [], [], 0
    for band in bands:
        probabilities = band.probabilities()
        label = label_HW[row : row + probabilities.shape[1]]
        row += probabilities.shape[1]
        ignored = label == ignore_index
        given = torch.where(ignored, 0, label.long())[None]
        best, found = probabilities.max(dim=0)
        classes.append(found)
        margins.append(torch.where(ignored, 0.0, best - probabilities.gather(0, given)[0]))
    return Opinion(torch.cat(classes), torch.cat(margins))


def find_suspects(label_HW: Tensor, first: Opinion, second: Opinion) -> list[Suspect]:
    """Regions of one image, the highest score first; those below `LEAST` are left out.

    Args:
        label_HW: Train ids.
        first: Of one network.
        second: Of the other one.
    """
    from scipy.ndimage import find_objects, label, sum_labels  # training must not need scipy

    weight = torch.minimum(first.margin, second.margin).cpu().double().numpy()
    agreed = (first.classes == second.classes).cpu().numpy() & (weight > 0)
    given = label_HW.cpu().numpy().astype(np.int64)
    seen = first.classes.cpu().numpy()
    pairs = np.where(agreed, given * 256 + seen, -1)
    found = []
    for pair in np.unique(pairs[agreed]):
        regions, count = label(pairs == pair, np.ones((3, 3)))
        scores = sum_labels(weight, regions, np.arange(1, count + 1))
        for number, (box, score) in enumerate(zip(find_objects(regions), scores, strict=True), 1):
            if score >= LEAST:
                mask = regions[box] == number
                of, to = divmod(int(pair), 256)
                found.append(Suspect(of, to, float(score), box[0].start, box[1].start, mask))
    return sorted(found, key=lambda suspect: (-suspect.score, suspect.top, suspect.left))
