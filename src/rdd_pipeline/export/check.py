"""Whether an exported file computes what the network does, on real images.

Suffixes: N images, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rdd_pipeline.config import Size
from rdd_pipeline.evaluation.confusion import Scores, confusion_matrix
from rdd_pipeline.export.latency import measure_latency
from rdd_pipeline.export.module import ExportedNetwork
from rdd_pipeline.networks.resizing import bilinear

Runner = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of images as the file takes them: masks (N, H, W) and what decides them (N, C, H, W)."""


class Labeled(NamedTuple):
    """An image (3, H, W) and its train ids (H, W), uint8."""

    image: Tensor
    label: Tensor


def other_sizes(size: Size) -> tuple[Size, Size]:
    """(height, width) to check beside the images' own: three quarters, made odd, and half of it."""
    height, width = size
    odd = (max(3 * height // 4, 32) | 1, max(3 * width // 4, 32) | 1)
    return odd, (max(height // 2, 32), max(width // 2, 32))


@torch.no_grad()
def compare(
    module: ExportedNetwork,
    run: Runner,
    samples: Sequence[Labeled],
    *,
    sizes: Sequence[Size],
    ignore_index: int,
) -> dict[str, Any]:
    """Compare with torch at the images' own size and others, and by the labels at their own.

    At the last of the other sizes images go in pairs, so that the batch is not always 1.

    Returns:
        ``sizes``: for each ``size`` the ``images``, the share of ``equal_pixels`` and the
        ``largest_difference`` of what decides the masks (logits, or probabilities where those are
        the output); ``equal_pixels``: the smallest of the shares; ``miou_before`` and
        ``miou_after`` in [0, 1].
    """
    rows: list[dict[str, Any]] = []
    classes = module.num_classes
    matrices = torch.zeros(2, classes, classes, dtype=torch.int64)
    for number, size in enumerate((None, *sizes)):
        equal = pixels = 0
        largest = 0.0
        step = 2 if number and number == len(sizes) else 1
        for first in range(0, len(samples), step):
            chosen = samples[first : first + step]
            images = module.prepared(torch.stack([_resized(s.image, size) for s in chosen]))
            expected = module.scores(images)
            before = expected.argmax(dim=1)
            after, found = run(images)
            equal += int((before == after).sum())
            pixels += before.numel()
            largest = max(largest, float((expected - found).abs().max()))
            if size is None:
                label = chosen[0].label[None]
                for place, mask in enumerate((before, after)):
                    matrices[place] += confusion_matrix(mask, label, classes, ignore_index)
        rows.append(
            {
                "size": list(size or samples[0].image.shape[-2:]),
                "images": len(samples),
                "equal_pixels": equal / pixels,
                "largest_difference": largest,
            }
        )
    before_after = [Scores.from_matrix(matrix).miou for matrix in matrices]
    return {
        "sizes": rows,
        "equal_pixels": min(row["equal_pixels"] for row in rows),
        "largest_difference": max(row["largest_difference"] for row in rows),
        "miou_before": before_after[0],
        "miou_after": before_after[1],
    }


def milliseconds(call: Callable[[Tensor], object], image: Tensor) -> float:
    """Median time of one image."""
    with torch.no_grad():
        return measure_latency(lambda: call(image), runs=9, seconds=10.0).median


def _resized(image: Tensor, size: Size | None) -> Tensor:
    if size is None:
        return image
    return bilinear(image[None].float(), size)[0].round().to(torch.uint8)
