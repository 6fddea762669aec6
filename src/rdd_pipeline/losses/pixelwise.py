"""Log-probability of each pixel's label, at full size, without ever holding full-size logits.

The task losses of segmentation upsample C maps of logits eight times in each direction, although
all they want of them is one number for each pixel. Here image by image and band of rows by band of
rows is upsampled, reduced to that number and forgotten while it is still in the cache; the
backward pass does the same again and pulls the gradient back through the adjoint of the
upsampling. `benchmarks/losses.py` measures what it brings.

Suffixes: N images, C classes, H rows and W columns of the labels, h and w of the logits, R rows of
a band.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.kernels import fused_kernels
from rdd_pipeline.losses.maps import as_float, full_precision

# Elements of an upsampled band. CPU: a few bands fit in the cache (measured: twice or half as many
# are ten percent slower). Elsewhere: few large kernels, and still bounded memory.
_BAND_ELEMENTS_CPU = 2**18
_BAND_ELEMENTS_OTHER = 2**25
# Columns that are upsampled by one matrix product: in smaller blocks it is mostly zeros that are
# left out, in too small ones the product has little to do.
_COLUMNS_IN_BLOCK = 256


class PixelLabels(NamedTuple):
    """Checked labels.

    Attributes:
        labels: (N, H, W) as given: any integer type, any value where the pixel is ignored.
        valid: (N, H, W) bool, False where the pixel is ignored.
    """

    labels: Tensor
    valid: Tensor


def pixel_labels(labels_NHW: Tensor, *, num_classes: int, ignore_index: int) -> PixelLabels:
    """Separate classes from ignored pixels and check the values.

    Args:
        labels_NHW: (N, H, W), any integer type.
        num_classes: Valid labels are 0 ... num_classes - 1.
        ignore_index: Label of ignored pixels; may be negative.

    Raises:
        UserError: Wrong number of axes, not integers, or (checked on the CPU only, where looking
            costs nothing) a label that is neither a class nor ignored.
    """
    if labels_NHW.dim() != 3 or labels_NHW.is_floating_point() or labels_NHW.is_complex():
        raise UserError(
            f"Labels have shape {tuple(labels_NHW.shape)} and type {labels_NHW.dtype}; expected "
            "(batch, height, width) and an integer type, e.g. uint8."
        )
    valid = labels_NHW != ignore_index
    if _on_cpu(labels_NHW) and labels_NHW.numel() > 0:
        smallest, largest = (int(label) for label in torch.where(valid, labels_NHW, 0).aminmax())
        if smallest < 0 or largest >= num_classes:
            raise UserError(
                f"Found label {smallest if smallest < 0 else largest}, expected 0 to "
                f"{num_classes - 1} or {ignore_index} for ignored pixels. Check the label set, and "
                "that raw ids were mapped to classes."
            )
    return PixelLabels(labels_NHW, valid)


def log_prob_of_label(logits_NChw: Tensor, labels: PixelLabels) -> Tensor:
    """Log-probability of each pixel's label after bilinear upsampling to the labels' size.

    That is minus the cross-entropy of each pixel. Differentiable once in the logits.

    Args:
        logits_NChw: (N, C, h, w). Computed in float32 (float64 stays) also under autocast. NaN at
            positions that no valid pixel is interpolated from touches neither value nor gradient.
        labels: Of N images, H x W.

    Returns:
        (N, H, W), at most 0, in nats; 0 with zero gradient where the pixel is ignored.

    Raises:
        UserError: The shapes do not belong together.
    """
    if logits_NChw.dim() != 4 or logits_NChw.shape[0] != labels.labels.shape[0]:
        raise UserError(
            f"Logits {tuple(logits_NChw.shape)} do not fit labels "
            f"{tuple(labels.labels.shape)}: expected (batch, classes, height, width) with the "
            "labels' batch size."
        )
    logits_NChw = as_float(logits_NChw)
    fused = fused_kernels(logits_NChw)
    if fused is not None:
        bilinear = _Bilinear.between(logits_NChw, labels.labels)
        result: Tensor = fused.log_prob_of_label(logits_NChw, *labels, bilinear.horizontal)
    else:
        result = _LogProbOfLabel.apply(logits_NChw, *labels)
    return result


class _LogProbOfLabel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NChw: Tensor, labels_NHW: Tensor, valid_NHW: Tensor) -> Tensor:
        with full_precision(logits_NChw):
            bilinear = _Bilinear.between(logits_NChw, labels_NHW)
            # The sum shows whether there is a NaN. Elsewhere, looking means waiting for the device.
            if not _on_cpu(logits_NChw) or not bool(logits_NChw.sum().isfinite()):
                logits_NChw = bilinear.drop_unseen(logits_NChw, valid_NHW)

            def log_prob(part: _Part) -> Tensor:
                n, bands = part.image, []
                for rows, logits_RCW in bilinear.bands(logits_NChw[n], part.rows):
                    valid_R1W = valid_NHW[n, rows].unsqueeze(1)
                    index_R1W = torch.where(valid_R1W, labels_NHW[n, rows].unsqueeze(1), 0).long()
                    log_prob_R1W = logits_RCW.log_softmax(1).gather(1, index_R1W)
                    # Rounding may leave 1e-7 above 0, which would be a probability above 1.
                    bands.append(log_prob_R1W.clamp_(max=0).masked_fill_(~valid_R1W, 0))
                return torch.cat(bands).squeeze(1)

            log_prob_NHW = logits_NChw.new_empty(labels_NHW.shape)
            for part, log_prob_RW in _for_each_part(log_prob, logits_NChw, labels_NHW):
                log_prob_NHW[part.image, part.rows] = log_prob_RW
        ctx.save_for_backward(logits_NChw, labels_NHW, valid_NHW)
        return log_prob_NHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHW: Tensor) -> tuple[Tensor | None, None, None]:
        logits_NChw, labels_NHW, valid_NHW = ctx.saved_tensors
        with full_precision(logits_NChw):
            bilinear = _Bilinear.between(logits_NChw, labels_NHW)

            def pulled_back(part: _Part) -> Tensor:
                n = part.image
                grad_hCW = bilinear.zero_rows(logits_NChw[n], part.rows)
                for rows, logits_RCW in bilinear.bands(
                    logits_NChw[n], part.rows, needed_HW=grad_NHW[n]
                ):
                    valid_R1W = valid_NHW[n, rows].unsqueeze(1)
                    index_R1W = torch.where(valid_R1W, labels_NHW[n, rows].unsqueeze(1), 0).long()
                    grad_R1W = torch.where(valid_R1W, grad_NHW[n, rows].unsqueeze(1), 0)
                    # d log p_y / dz_c = [c = y] - p_c
                    grad_RCW = logits_RCW.softmax(1).mul_(-grad_R1W)
                    grad_RCW.scatter_add_(1, index_R1W, grad_R1W)
                    bilinear.add_adjoint(grad_RCW, rows, grad_hCW, part.rows)
                return bilinear.narrow(grad_hCW)

            grad_NChw = torch.zeros_like(logits_NChw)
            for part, grad_Chw in _for_each_part(pulled_back, logits_NChw, labels_NHW):
                # Neighboring parts share a row, so they are added, always in the same order.
                grad_NChw[part.image, :, bilinear.source_rows(part.rows)] += grad_Chw
        return grad_NChw, None, None


class _Part(NamedTuple):
    """Rows of one image's label map: what one thread works on."""

    image: int
    rows: slice


def _for_each_part(
    work: Callable[[_Part], Tensor], logits_NChw: Tensor, labels_NHW: Tensor
) -> Iterator[tuple[_Part, Tensor]]:
    """The work's results for all parts of all images, in order; on the CPU computed side by side.

    Bands are small. In torch's own way, threads that share each operation and wait for each other
    at its end, thousands of such waits take a hundred times as long as the work where other
    processes use the same cores (measured). Here each thread has parts to itself.
    """
    (images, height, width), classes = labels_NHW.shape, logits_NChw.shape[1]
    threads = torch.get_num_threads() if _on_cpu(logits_NChw) else 1
    if images * classes * height * width <= _BAND_ELEMENTS_CPU:
        threads = 1
    parts_of_image = 1 if threads == 1 else -(-2 * threads // max(1, images))
    rows_of_part = max(1, -(-height // parts_of_image))
    parts = [
        _Part(image, slice(start, min(start + rows_of_part, height)))
        for image in range(images)
        for start in range(0, height, rows_of_part)
    ]
    if threads == 1:
        for part in parts:
            yield part, work(part)
        return
    # New threads take over the number that is set now, and keep it.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from zip(parts, pool.map(torch.no_grad()(work), parts), strict=True)
    finally:
        torch.set_num_threads(threads)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


class _Bilinear(NamedTuple):
    """Bilinear resize with aligned corners, as ``up = vertical @ map_hw @ horizontal.T``.

    The matrices have the shapes (H, h) and (W, w). Products with them are to be computed inside
    `full_precision`.
    """

    vertical: Tensor
    horizontal: Tensor

    @classmethod
    def between(cls, logits_NChw: Tensor, labels_NHW: Tensor) -> _Bilinear:
        (h, w), (height, width) = logits_NChw.shape[-2:], labels_NHW.shape[-2:]
        kind = logits_NChw.dtype, logits_NChw.device
        return cls(_interpolation(height, h, *kind), _interpolation(width, w, *kind))

    def drop_unseen(self, logits_NChw: Tensor, valid_NHW: Tensor) -> Tensor:
        """Zero the logits that reach no valid pixel, so that a NaN there stays without effect."""
        weight_NHW = valid_NHW.to(logits_NChw.dtype)
        seen_Nhw = self.vertical.T @ weight_NHW @ self.horizontal
        return logits_NChw.masked_fill((seen_Nhw == 0).unsqueeze(1), 0)

    def bands(
        self, logits_Chw: Tensor, part: slice, needed_HW: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Upsampled bands of a part's rows: (rows of the label map, logits (R, C, W)).

        On the CPU, bands in which `needed_HW` is zero throughout are left out: selected pixels are
        often few. Elsewhere, looking would mean waiting for the device.
        """
        classes, width = logits_Chw.shape[0], len(self.horizontal)
        on_cpu = _on_cpu(logits_Chw)
        elements = _BAND_ELEMENTS_CPU if on_cpu else _BAND_ELEMENTS_OTHER
        # Columns first: that is done on the h rows there are, not on the H rows to come.
        below = self.source_rows(part)
        narrow = logits_Chw[:, below].transpose(0, 1).flatten(0, 1)
        wide = narrow.new_empty(len(narrow), width)
        for columns, sources in _blocks(self.horizontal, slice(0, width), _COLUMNS_IN_BLOCK):
            weights = self.horizontal[columns, sources]
            torch.mm(narrow[:, sources], weights.T, out=wide[:, columns])
        wide = wide.view(-1, classes * width)
        rows_in_band = max(1, elements // max(1, classes * width))
        for rows, sources in _blocks(self.vertical, part, rows_in_band):
            if needed_HW is None or not on_cpu or bool(needed_HW[rows].any()):
                band = self.vertical[rows, sources] @ wide[_shifted(sources, below)]
                yield rows, band.view(-1, classes, width)

    def zero_rows(self, logits_Chw: Tensor, part: slice) -> Tensor:
        """Zeros (h', C * W) for `add_adjoint` to add to, for the h' `source_rows` of the part."""
        below = self.source_rows(part)
        return logits_Chw.new_zeros(
            below.stop - below.start, len(logits_Chw) * len(self.horizontal)
        )

    def add_adjoint(self, grad_RCW: Tensor, rows: slice, into_hCW: Tensor, part: slice) -> None:
        """Add what the rows of a band leave on the rows they were interpolated from."""
        sources = self.source_rows(rows)
        weights = self.vertical[rows, sources]
        into_hCW[_shifted(sources, self.source_rows(part))].addmm_(weights.T, grad_RCW.flatten(1))

    def narrow(self, grad_hCW: Tensor) -> Tensor:
        """The adjoint's second half, along the columns: (h', C * W) to (C, h', w)."""
        h, (width, w) = len(grad_hCW), self.horizontal.shape
        wide = grad_hCW.view(-1, width)
        narrow = wide.new_zeros(len(wide), w)
        for columns, sources in _blocks(self.horizontal, slice(0, width), _COLUMNS_IN_BLOCK):
            narrow[:, sources].addmm_(wide[:, columns], self.horizontal[columns, sources])
        return narrow.view(h, -1, w).transpose(0, 1)

    def source_rows(self, rows: slice) -> slice:
        """Rows of the logits that the given rows of the label map are interpolated from."""
        return _sources(self.vertical, rows)


def _blocks(matrix: Tensor, outputs: slice, size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of an interpolation matrix that hold all that is not zero: (outputs, inputs)."""
    for start in range(outputs.start, outputs.stop, size):
        block = slice(start, min(start + size, outputs.stop))
        yield block, _sources(matrix, block)


def _sources(matrix: Tensor, outputs: slice) -> slice:
    """The inputs that the given outputs are interpolated from."""
    count, inputs = matrix.shape
    intervals = max(count - 1, 1)
    first = outputs.start * (inputs - 1) // intervals
    last = (outputs.stop - 1) * (inputs - 1) // intervals + 1
    return slice(first, min(last, inputs - 1) + 1)


def _shifted(rows: slice, origin: slice) -> slice:
    """The rows counted from the origin's first."""
    return slice(rows.start - origin.start, rows.stop - origin.start)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _interpolation(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Matrix (outputs, inputs) of linear interpolation with aligned corners."""
    # In whole numbers as long as possible: float32 positions are off by 1e-5 at 1024 columns.
    where = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    scaled = torch.arange(outputs, device=where) * (inputs - 1)
    intervals = max(outputs - 1, 1)
    lower = (scaled // intervals).clamp_(max=max(inputs - 2, 0))
    upper_weight = (scaled - lower * intervals).double() / intervals
    matrix = torch.zeros(outputs, inputs, dtype=torch.float64, device=where)
    matrix.scatter_(1, lower.unsqueeze(1), (1 - upper_weight).unsqueeze(1))
    if inputs > 1:
        matrix.scatter_(1, lower.unsqueeze(1) + 1, upper_weight.unsqueeze(1))
    return matrix.to(dtype).to(device)
