"""Prediction and evaluation, of whole images or by a sliding window, with scales and mirror images.

Suffixes: B images, C classes, H rows, W columns; lower-case h, w at the network's stride.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdd_pipeline.evaluation.confusion import confusion_matrix, sum_over_ranks
from rdd_pipeline.networks.preprocessing import Preprocessing
from rdd_pipeline.networks.resizing import bilinear

Average = Literal["softmax", "logits"]

_SCORES_AT_ONCE = 2**24
"""Full-size scores of one image that exist at the same time: 64 MB in float32."""
_PIXELS_AT_ONCE = 2**21
"""Of the windows that are predicted together."""
OVERLAP = 0.25
"""Share of a window that the next one covers too, at least."""


class Band(NamedTuple):
    """Class scores of some whole rows of an image."""

    scores: Tensor
    """(C, rows, W) float32; the best class has the highest."""
    are_logits: bool
    """They are probabilities otherwise."""

    def probabilities(self) -> Tensor:
        """(C, rows, W), which sum to 1 over the classes."""
        return self.scores.softmax(dim=0) if self.are_logits else self.scores

    def classes(self) -> Tensor:
        """(rows, W) int64, the best class of each pixel, of equal ones the first."""
        return self.scores.max(dim=0).indices  # seven times faster than argmax on a CPU

    def best(self) -> tuple[Tensor, Tensor]:
        """`classes` and the probability of each, (rows, W) float32 in [0, 1]."""
        best, classes = self.scores.max(dim=0)
        return classes, (best - self.scores.logsumexp(dim=0)).exp() if self.are_logits else best


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
    window: tuple[int, int] | None = None,
    overlap: float = OVERLAP,
) -> list[Tensor]:
    """Class of every pixel, one (H_i, W_i) int64 map per image, at `sizes[i]`.

    Arguments as in `score_bands`.
    """
    each = score_bands(
        network,
        preprocessing,
        images,
        sizes=sizes,
        scales=scales,
        flip=flip,
        average=average,
        precision=precision,
        window=window,
        overlap=overlap,
    )
    return [torch.cat([band.classes() for band in bands]) for bands in each]


def score_bands(
    network: nn.Module,
    preprocessing: Preprocessing,
    images: Tensor,
    *,
    sizes: Sequence[tuple[int, int]],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    average: Average = "softmax",
    precision: torch.dtype | None = None,
    window: tuple[int, int] | None = None,
    overlap: float = OVERLAP,
) -> Iterator[Iterator[Band]]:
    """Class scores of each image as bands of rows, from top to bottom.

    Full-size scores exist for one band at a time: 150 classes at 2000 x 3000 are 3.6 GB for each
    pass. Without a window the network sees all images at once. With one it sees windows that lie
    evenly over an image, and their scores are averaged with weights that fall linearly from a
    window's middle to its edges, where context is missing; a window that holds the image is the
    image. What is kept are the scores of `window[0]` rows: 270 MB for 11 classes and 1024 x 6000
    pixels.

    Args:
        network: Returns a tuple with `logits` (B, C, h, w).
        preprocessing: What the network was trained on.
        images: (B, 3, H, W) uint8, on the network's device.
        sizes: (rows, columns) of the result of each image.
        scales: Each one is a pass over the image or window, resized by this factor.
        flip: Also pass the mirrored images.
        average: What several passes, and windows that overlap, average.
        precision: Autocast type of the passes; None: as the network's parameters.
        window: (rows, columns) of the images; None: they are predicted as a whole.
        overlap: Share of a window, from 0 to below 1, that the next one covers too, at least.

    Yields:
        Per image its bands, of which one image's are to be used before the next one's.
    """
    own = (images.shape[-2], images.shape[-1])
    look = partial(_views, network, preprocessing, scales=scales, flip=flip, precision=precision)
    if window is None or (window[0] >= own[0] and window[1] >= own[1]):
        views = look(images)
        for i, size in enumerate(sizes):
            yield _whole([view[i : i + 1] for view in views], size, average)
        return
    fitted = (min(window[0], own[0]), min(window[1], own[1]))
    at_once = max(1, int(_PIXELS_AT_ONCE / (math.prod(fitted) * max(scales) ** 2)))
    for image, size in zip(images, sizes, strict=True):
        bands = _blended(partial(_scores, look, average), image, fitted, overlap, at_once)
        yield (
            Band(scores, average == "logits")
            for scores in (bands if size == own else _resized(bands, own[0], size))
        )


def window_starts(side: int, window: int, overlap: float) -> list[int]:
    """Where windows begin that cover a side evenly, overlapping by at least this share of one."""
    if window >= side:
        return [0]
    step = max(1, window - math.ceil(overlap * window))
    count = math.ceil((side - window) / step)
    return [round(number * (side - window) / count) for number in range(count + 1)]


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
    window: tuple[int, int] | None = None,
    overlap: float = OVERLAP,
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
        window: See `score_bands`.
        overlap: See `score_bands`.
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
                window=window,
                overlap=overlap,
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
        size = tuple(max(1, round(side * scale)) for side in inputs.shape[-2:])
        scaled = inputs if size == inputs.shape[-2:] else bilinear(inputs, size)
        for mirrored in (False, True) if flip else (False,):
            with torch.autocast(inputs.device.type, dtype=precision, enabled=precision is not None):
                logits: Tensor = network(scaled.flip(-1) if mirrored else scaled).logits
            # Mirroring at the network's stride equals mirroring after an align_corners upsampling.
            views.append((logits.flip(-1) if mirrored else logits).float())
    return views


def _whole(views: Sequence[Tensor], size: tuple[int, int], average: Average) -> Iterator[Band]:
    """Scores of one image from its passes (1, C, h, w)."""
    are_logits = average == "logits" or len(views) == 1
    height, width = size
    rows = max(1, _SCORES_AT_ONCE // (views[0].shape[1] * width))
    if rows >= height:
        yield Band(_fuse(views, size, average)[0], are_logits)
        return
    for top in range(0, height, rows):
        band = slice(top, min(top + rows, height))
        yield Band(_fuse(views, size, average, band)[0], are_logits)


def _scores(look: Callable[[Tensor], list[Tensor]], average: Average, windows: Tensor) -> Tensor:
    """What windows (B, 3, H, W) are blended by, (B, C, H, W): probabilities or logits."""
    views = look(windows)
    fused = _fuse(views, (windows.shape[-2], windows.shape[-1]), average)
    return fused.softmax(dim=1) if average == "softmax" and len(views) == 1 else fused


def _blended(
    predict: Callable[[Tensor], Tensor],
    image_3HW: Tensor,
    window: tuple[int, int],
    overlap: float,
    at_once: int,
) -> Iterator[Tensor]:
    """Weighted means of the scores of all windows, as bands (C, rows, W) from top to bottom.

    The weight of a pixel is a product of one for its row and one for its column, and the windows
    are a grid: so is the sum of the weights, and a row is finished with the last window over it.
    """
    rows, columns = window
    height, width = image_3HW.shape[-2:]
    tops, lefts = (window_starts(*sides, overlap) for sides in ((height, rows), (width, columns)))
    slope_rows, slope_columns = (_slope(side, image_3HW.device) for side in window)
    across = torch.zeros(width, device=image_3HW.device)
    for left in lefts:
        across[left : left + columns] += slope_columns
    down = torch.zeros(rows, device=image_3HW.device)
    total: Tensor | None = None
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        for group in (lefts[i : i + at_once] for i in range(0, len(lefts), at_once)):
            parts = [image_3HW[:, top : top + rows, left : left + columns] for left in group]
            scores = predict(torch.stack(parts)) * (slope_rows[:, None] * slope_columns)
            if total is None:
                total = scores.new_zeros(scores.shape[1], rows, width)
            for left, part in zip(group, scores, strict=True):
                total[:, :, left : left + columns] += part
        assert total is not None
        down += slope_rows
        done = following - top
        step = max(1, _SCORES_AT_ONCE // (len(total) * width))
        for first in range(0, done, step):
            band = slice(first, min(first + step, done))
            yield total[:, band] / (down[band, None] * across)
        # The next windows cover these too; copied, because the two places overlap.
        left_over = rows - done
        total[:, :left_over], down[:left_over] = total[:, done:].clone(), down[done:].clone()
        total[:, left_over:], down[left_over:] = 0, 0


def _slope(side: int, device: torch.device) -> Tensor:
    """Weights along a side of a window: 1 in its middle, falling linearly, above 0."""
    places = torch.arange(side, dtype=torch.float32, device=device)
    return (torch.minimum(places, side - 1 - places) + 1) / ((side + 1) // 2)


def _resized(bands: Iterable[Tensor], height: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """`bilinear` of an image of `height` rows that comes in bands (C, rows, W), to `size`."""
    kept: Tensor | None = None
    seen = given = 0
    places = torch.arange(size[0], dtype=torch.float64) * ((height - 1) / max(size[0] - 1, 1))
    for band in bands:
        wide = bilinear(band[None], (band.shape[-2], size[1]))[0]
        kept = wide if kept is None else torch.cat([kept, wide], dim=1)
        seen += band.shape[-2]
        # A row lies between two of the image, and both have to be here.
        stop = size[0] if seen == height else int(torch.searchsorted(places, seen - 1))
        if stop > given:
            lower = places[given:stop].long().clamp_(max=max(height - 2, 0))
            weight = (places[given:stop] - lower).to(wide.dtype).unsqueeze(1).to(wide.device)
            lower = (lower - (seen - kept.shape[1])).to(wide.device)
            upper = (lower + 1).clamp_(max=kept.shape[1] - 1)
            yield torch.lerp(kept[:, lower], kept[:, upper], weight)
            given = stop
        kept = kept[:, -1:]


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
