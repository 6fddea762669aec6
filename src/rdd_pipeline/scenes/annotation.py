"""Label noise as people make it: drifted outlines, missed small objects, wrong classes.

Training labels of real data sets are wrong at some of the pixels, and not at random ones. Here the
right label map of a generated scene becomes one that a hurried annotator might have drawn. The
image stays as it is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rdd_pipeline.scenes.canvas import smooth_noise
from rdd_pipeline.scenes.objects import Random, Raw, chance

Labels = NDArray[np.int64]

MISTAKEN: dict[Raw, tuple[Raw, ...]] = {
    Raw.SKY: (Raw.BUILDING, Raw.TREE),
    Raw.BUILDING: (Raw.FENCE, Raw.TREE, Raw.SKY),
    Raw.POLE: (Raw.SIGN, Raw.TREE),
    Raw.ROAD: (Raw.PAVEMENT,),
    Raw.PAVEMENT: (Raw.ROAD,),
    Raw.TREE: (Raw.BUILDING, Raw.FENCE),
    Raw.SIGN: (Raw.POLE, Raw.BUILDING),
    Raw.FENCE: (Raw.BUILDING, Raw.PAVEMENT),
    Raw.CAR: (Raw.BUILDING, Raw.FENCE),
    Raw.PEDESTRIAN: (Raw.BICYCLIST,),
    Raw.BICYCLIST: (Raw.PEDESTRIAN,),
}
"""What a class is mistaken for."""

_SMALL = 0.01
"""An object is small up to this share of the image, and easily missed."""
_DRIFTS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06)
"""How far outlines may drift, in heights of the image."""


def misannotate(rng: Random, labels: Labels, objects: Labels, share: float) -> Labels:
    """A label map of which about `share` of the pixels are wrong.

    Outlines drift until a third of that share is wrong; small objects are missed, the more of them
    the larger the share, and get the label of what is beside them; then objects get a class that
    theirs is mistaken for, the last one in part, until the share is reached.

    Args:
        rng: Decides everything.
        labels: (H, W) of `Raw` values.
        objects: (H, W) number of the object that each pixel shows.
        share: Wrong pixels, 0 to 1.

    Returns:
        (H, W); equal to `labels` for a share of 0.
    """
    if share <= 0:
        return labels
    noisy, objects = _drifted(rng, labels, objects, share / 3)
    numbers, areas = np.unique(objects, return_counts=True)
    small = numbers[areas <= _SMALL * labels.size]
    for number in small[rng.random(len(small)) < min(0.9, 2 * share)]:
        noisy = _without(noisy, objects == number)
    for number in rng.permutation(numbers):
        missing = round(share * labels.size) - int((noisy != labels).sum())
        if missing <= 0:
            break
        right = (objects == number) & (noisy == labels) & (labels != Raw.VOID)
        _mistake(rng, noisy, right, missing)
    return noisy


def _drifted(rng: Random, labels: Labels, objects: Labels, share: float) -> tuple[Labels, Labels]:
    """Both maps, warped smoothly so far that at most `share` of the labels change."""
    height, width = labels.shape
    rows, columns = np.indices(labels.shape)
    down, right = (smooth_noise(rng, height, width, max(2, height // 6)) for _ in range(2))
    warped = labels, objects
    for drift in _DRIFTS:
        y = np.clip(np.rint(rows + drift * height * down), 0, height - 1).astype(np.int64)
        x = np.clip(np.rint(columns + drift * height * right), 0, width - 1).astype(np.int64)
        if (labels[y, x] != labels).mean() > share:
            break
        warped = labels[y, x], objects[y, x]
    return warped[0].copy(), warped[1]


def _without(labels: Labels, hidden: NDArray[np.bool_]) -> Labels:
    """Labels with the hidden pixels continued from the nearest one to their left, or right."""
    width = labels.shape[1]
    columns = np.broadcast_to(np.arange(width), labels.shape)
    left = np.maximum.accumulate(np.where(hidden, -1, columns), axis=1)
    right = np.minimum.accumulate(np.where(hidden, width, columns)[:, ::-1], axis=1)[:, ::-1]
    source = np.where(left >= 0, left, right)
    seen = source < width  # a row that is hidden from end to end stays as it is
    beside = np.take_along_axis(labels, np.where(seen, source, 0), axis=1)
    return np.where(hidden & seen, beside, labels)


def _mistake(rng: Random, labels: Labels, right: NDArray[np.bool_], most: int) -> None:
    """Give an object, given by its pixels that are still right, another class, in place.

    At most `most` pixels change; of a larger object those on one side.
    """
    rows, columns = np.nonzero(right)
    if not len(rows):
        return
    side = columns if chance(rng, 0.5) else -columns
    chosen = np.argsort(side, kind="stable")[:most]
    # An object may show several classes, e.g. a tree its trunk.
    values, counts = np.unique(labels[rows, columns], return_counts=True)
    choices = MISTAKEN[Raw(int(values[counts.argmax()]))]
    wrong = choices[int(rng.integers(len(choices)))]
    labels[rows[chosen], columns[chosen]] = int(wrong)
