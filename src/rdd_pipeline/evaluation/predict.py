"""Whole-image prediction and evaluation, with optional scales and mirror images.

Suffixes: B images, C classes, H rows, W columns; lower-case h, w at the network's stride.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdd_pipeline.evaluation.confusion import confusion_matrix, sum_over_ranks
from rdd_pipeline.networks.preprocessing import Preprocessing
from rdd_pipeline.networks.resizing import bilinear

Average = Literal["softmax", "logits"]

_SCORES_AT_ONCE = 2**24
"""Full-size scores of one image that exist at the same time: 64 MB in float32."""


class LabeledBatch(Protocol):
    """Images of equal size and their labels, as `data.loading` hands them out."""

    @property
    def images(self) -> Tensor:
        """(B, 3, H, W) uint8."""

    @property
    def labels(self) -> Tensor | Sequence[Tensor]:
        """(B, H', W') or B maps of any sizes; integers."""


def predict_logits(
    network: nn.Module,
    preprocessing: Preprocessing,
    images: Tensor,
    *,
    size: tuple[int, int],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    average: Average = "softmax",
    precision: torch.dtype | None = None,
) -> Tensor:
    """Class scores of whole images at full size; call it on a network in eval mode.

    Args:
        network: Returns a tuple with `logits` (B, C, h, w).
        preprocessing: What the network was trained on.
        images: (B, 3, H, W) uint8, on the network's device.
        size: (rows, columns) of the result, usually of the labels.
        scales: Each one is a pass over the images, resized by this factor.
        flip: Also pass the mirrored images.
        average: What several passes average: class probabilities or logits.
        precision: Autocast type of the passes; None: as the network's parameters.

    Returns:
        (B, C, *size) float32: logits upsampled with align_corners=True. Several passes with
        `average="softmax"` return the mean probability instead; the argmax is meant the same way.
    """
    views = _views(network, preprocessing, images, scales, flip, precision)
    return _fuse(views, size, average)


def predict_labels(
    network: nn.Module,
    preprocessing: Preprocessing,
    images: Tensor,
    *,
    sizes: Sequence[tuple[int, int]],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    average: Average = "softmax",
    precision: torch.dtype | None = None,
) -> list[Tensor]:
    """Class of every pixel, one (H_i, W_i) int64 map per image, at `sizes[i]`.

    The network sees all images at once, but full-size scores exist for one image at a time, and
    of a large one for a band of rows: 150 classes at 2000 x 3000 are 3.6 GB for each pass. Other
    arguments as in `predict_logits`.
    """
    views = _views(network, preprocessing, images, scales, flip, precision)
    return [
        _classes([view[i : i + 1] for view in views], size, average) for i, size in enumerate(sizes)
    ]


def evaluate(
    network: nn.Module,
    preprocessing: Preprocessing,
    batches: Iterable[LabeledBatch],
    *,
    num_classes: int,
    ignore_index: int = 255,
    device: torch.device | str | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    average: Average = "softmax",
    precision: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Confusion matrix of a network over a split.

    The network runs in eval mode without gradients; afterwards every submodule is back in the
    mode it was in, also after an error.

    Args:
        network: Returns a tuple with `logits`.
        preprocessing: What the network was trained on.
        batches: Images and labels. Logits are upsampled to the size of the labels, which need
            not be that of the images.
        num_classes: C.
        ignore_index: Label of pixels that do not count.
        device: Where to compute; None: where the network is.
        scales: See `predict_logits`.
        flip: See `predict_logits`.
        average: See `predict_logits`.
        precision: See `predict_logits`.
        group: Processes that each bring different images; None: this process alone.

    Returns:
        (C, C) int64 counts over all batches and ranks, rows are labels; on the CPU.
    """
    place = torch.device(device) if device is not None else _device_of(network)
    total = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=place)
    with evaluation_mode(network):
        for batch in batches:
            maps = [label.to(place, non_blocking=True) for label in batch.labels]
            predictions = predict_labels(
                network,
                preprocessing,
                batch.images.to(place, non_blocking=True),
                sizes=[(label.shape[-2], label.shape[-1]) for label in maps],
                scales=scales,
                flip=flip,
                average=average,
                precision=precision,
            )
            for prediction, label in zip(predictions, maps, strict=True):
                total += confusion_matrix(prediction, label, num_classes, ignore_index)
    return sum_over_ranks(total, group).cpu()


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; then each submodule's own mode again.

    `network.train()` would not do: a frozen batch norm inside a training network is in eval mode.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _views(
    network: nn.Module,
    preprocessing: Preprocessing,
    images: Tensor,
    scales: Sequence[float],
    flip: bool,
    precision: torch.dtype | None,
) -> list[Tensor]:
    """(B, C, h, w) float32 logits of every pass, mirrored ones turned back."""
    if not scales:
        raise ValueError("scales is empty: name at least one factor, such as (1.0,).")
    inputs = preprocessing.normalize(images)
    views = []
    for scale in scales:
        size = tuple(round(side * scale) for side in inputs.shape[-2:])
        scaled = inputs if size == inputs.shape[-2:] else bilinear(inputs, size)
        for mirrored in (False, True) if flip else (False,):
            with torch.autocast(inputs.device.type, dtype=precision, enabled=precision is not None):
                logits: Tensor = network(scaled.flip(-1) if mirrored else scaled).logits
            # Mirroring at the network's stride equals mirroring after an align_corners upsampling.
            views.append((logits.flip(-1) if mirrored else logits).float())
    return views


def _classes(views: Sequence[Tensor], size: tuple[int, int], average: Average) -> Tensor:
    """Best class of every pixel of one image, (H, W), from its passes (1, C, h, w)."""
    height, width = size
    rows = max(1, _SCORES_AT_ONCE // (views[0].shape[1] * width))
    if rows >= height:
        return _fuse(views, size, average)[0].argmax(dim=0)
    bands = (slice(top, min(top + rows, height)) for top in range(0, height, rows))
    return torch.cat([_fuse(views, size, average, band)[0].argmax(dim=0) for band in bands])


def _fuse(
    views: Sequence[Tensor], size: tuple[int, int], average: Average, rows: slice | None = None
) -> Tensor:
    """Mean over the passes, (B, C, *size) float32; of the given rows only, where there are any."""
    total = torch.zeros((), device=views[0].device)
    for view in views:
        logits = bilinear(view, size) if rows is None else _band(view, size, rows)
        if len(views) == 1:
            return logits
        total = total + (logits.softmax(dim=1) if average == "softmax" else logits)
    return total / len(views)


def _band(view: Tensor, size: tuple[int, int], rows: slice) -> Tensor:
    """Some rows of `bilinear(view, size)`, equal to them up to rounding."""
    height, width = size
    last = view.shape[-2] - 1
    places = torch.arange(rows.start, rows.stop, device=view.device, dtype=torch.float64)
    places *= last / max(height - 1, 1)
    lower = places.long().clamp_(max=max(last - 1, 0))
    weight = (places - lower).to(view.dtype).unsqueeze(1)
    first = rows.start * last // max(height - 1, 1)
    below = view[..., first : (rows.stop - 1) * last // max(height - 1, 1) + 2, :]
    wide = bilinear(below, (below.shape[-2], width))
    lower -= first
    upper = (lower + 1).clamp_(max=wide.shape[-2] - 1)
    return torch.lerp(wide[..., lower, :], wide[..., upper, :], weight)


def _device_of(network: nn.Module) -> torch.device:
    parameter = next(network.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")
