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

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.maps import as_float, no_autocast

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
    if _on_cpu(labels_NHW):
        wrong = ((labels_NHW < 0) | (labels_NHW >= num_classes)).logical_and_(valid)
        if bool(wrong.any()):
            raise UserError(
                f"Found label {int(labels_NHW[wrong][0])}, expected 0 to {num_classes - 1} or "
                f"{ignore_index} for ignored pixels. Check the label set, and that raw ids were "
                "mapped to classes."
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
    result: Tensor = _LogProbOfLabel.apply(as_float(logits_NChw), *labels)
    return result


class _LogProbOfLabel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NChw: Tensor, labels_NHW: Tensor, valid_NHW: Tensor) -> Tensor:
        with no_autocast(logits_NChw):
            bilinear = _Bilinear.between(logits_NChw, labels_NHW)
            # Elsewhere, looking first would mean waiting for the device.
            if not _on_cpu(logits_NChw) or not bool(logits_NChw.isfinite().all()):
                logits_NChw = bilinear.drop_unseen(logits_NChw, valid_NHW)
            log_prob_NHW = logits_NChw.new_empty(labels_NHW.shape)
            for n, logits_Chw in enumerate(logits_NChw):
                for rows, logits_RCW in bilinear.bands(logits_Chw):
                    valid_R1W = valid_NHW[n, rows].unsqueeze(1)
                    index_R1W = torch.where(valid_R1W, labels_NHW[n, rows].unsqueeze(1), 0).long()
                    log_prob_R1W = logits_RCW.log_softmax(1).gather(1, index_R1W)
                    # Rounding may leave 1e-7 above 0, which would be a probability above 1.
                    log_prob_R1W.clamp_(max=0).masked_fill_(~valid_R1W, 0)
                    log_prob_NHW[n, rows] = log_prob_R1W.squeeze(1)
        ctx.save_for_backward(logits_NChw, labels_NHW, valid_NHW)
        return log_prob_NHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHW: Tensor) -> tuple[Tensor | None, None, None]:
        logits_NChw, labels_NHW, valid_NHW = ctx.saved_tensors
        with no_autocast(logits_NChw):
            bilinear = _Bilinear.between(logits_NChw, labels_NHW)
            grad_NChw = torch.empty_like(logits_NChw)
            for n, logits_Chw in enumerate(logits_NChw):
                grad_hCW = bilinear.zero_rows(logits_Chw)
                for rows, logits_RCW in bilinear.bands(logits_Chw, needed_HW=grad_NHW[n]):
                    valid_R1W = valid_NHW[n, rows].unsqueeze(1)
                    index_R1W = torch.where(valid_R1W, labels_NHW[n, rows].unsqueeze(1), 0).long()
                    grad_R1W = torch.where(valid_R1W, grad_NHW[n, rows].unsqueeze(1), 0)
                    # d log p_y / dz_c = [c = y] - p_c
                    grad_RCW = logits_RCW.softmax(1).mul_(-grad_R1W)
                    grad_RCW.scatter_add_(1, index_R1W, grad_R1W)
                    bilinear.add_adjoint(grad_RCW, rows, grad_hCW)
                grad_NChw[n] = bilinear.narrow(grad_hCW)
        return grad_NChw, None, None


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


class _Bilinear(NamedTuple):
    """Bilinear resize with aligned corners, as ``up = vertical @ map_hw @ horizontal.T``.

    The matrices have the shapes (H, h) and (W, w). Products with them follow
    ``torch.set_float32_matmul_precision``; leave that at its default
    ``"highest"`` where full float32 is wanted.
    """

    vertical: Tensor
    horizontal: Tensor

    @classmethod
    def between(cls, logits_NChw: Tensor, labels_NHW: Tensor) -> _Bilinear:
        (h, w), (height, width) = logits_NChw.shape[-2:], labels_NHW.shape[-2:]
        return cls(_interpolation(logits_NChw, height, h), _interpolation(logits_NChw, width, w))

    def drop_unseen(self, logits_NChw: Tensor, valid_NHW: Tensor) -> Tensor:
        """Zero the logits that reach no valid pixel, so that a NaN there stays without effect."""
        weight_NHW = valid_NHW.to(logits_NChw.dtype)
        seen_Nhw = self.vertical.T @ weight_NHW @ self.horizontal
        return logits_NChw.masked_fill((seen_Nhw == 0).unsqueeze(1), 0)

    def bands(
        self, logits_Chw: Tensor, needed_HW: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Upsampled bands of rows: (rows of the label map, logits (R, C, W)).

        On the CPU, bands in which `needed_HW` is zero throughout are left out: chosen pixels are
        often few. Elsewhere, looking would mean waiting for the device.
        """
        classes, h, w = logits_Chw.shape
        width = len(self.horizontal)
        on_cpu = _on_cpu(logits_Chw)
        elements = _BAND_ELEMENTS_CPU if on_cpu else _BAND_ELEMENTS_OTHER
        rows_in_band = max(1, elements // max(1, classes * width))
        # Columns first: that is done on the h rows there are, not on the H rows to come.
        narrow = logits_Chw.transpose(0, 1).reshape(h * classes, w)
        wide = narrow.new_empty(h * classes, width)
        for columns, sources in _blocks(self.horizontal, _COLUMNS_IN_BLOCK):
            weights = self.horizontal[columns, sources]
            torch.mm(narrow[:, sources], weights.T, out=wide[:, columns])
        wide = wide.view(h, classes * width)
        for rows, sources in _blocks(self.vertical, rows_in_band):
            if needed_HW is None or not on_cpu or bool(needed_HW[rows].any()):
                band = self.vertical[rows, sources] @ wide[sources]
                yield rows, band.view(-1, classes, width)

    def zero_rows(self, logits_Chw: Tensor) -> Tensor:
        """Zeros (h, C * W) for `add_adjoint` to add to."""
        classes, h, _ = logits_Chw.shape
        return logits_Chw.new_zeros(h, classes * len(self.horizontal))

    def add_adjoint(self, grad_RCW: Tensor, rows: slice, into_hCW: Tensor) -> None:
        """Add what the rows of a band leave on the h rows they were interpolated from."""
        sources = _sources(self.vertical, rows)
        into_hCW[sources].addmm_(self.vertical[rows, sources].T, grad_RCW.flatten(1))

    def narrow(self, grad_hCW: Tensor) -> Tensor:
        """The adjoint's second half, along the columns: (h, C * W) to (C, h, w)."""
        h, (width, w) = len(grad_hCW), self.horizontal.shape
        wide = grad_hCW.view(-1, width)
        narrow = wide.new_zeros(len(wide), w)
        for columns, sources in _blocks(self.horizontal, _COLUMNS_IN_BLOCK):
            narrow[:, sources].addmm_(wide[:, columns], self.horizontal[columns, sources])
        return narrow.view(h, -1, w).transpose(0, 1)


def _blocks(matrix: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of an interpolation matrix that hold all that is not zero: (outputs, inputs)."""
    for start in range(0, len(matrix), size):
        outputs = slice(start, min(start + size, len(matrix)))
        yield outputs, _sources(matrix, outputs)


def _sources(matrix: Tensor, outputs: slice) -> slice:
    """The inputs that the given outputs are interpolated from."""
    count, inputs = matrix.shape
    intervals = max(count - 1, 1)
    first = outputs.start * (inputs - 1) // intervals
    last = (outputs.stop - 1) * (inputs - 1) // intervals + 1
    return slice(first, min(last, inputs - 1) + 1)


def _interpolation(like: Tensor, outputs: int, inputs: int) -> Tensor:
    """Matrix (outputs, inputs) of linear interpolation with aligned corners."""
    device = like.device
    # In whole numbers as long as possible: float32 positions are off by 1e-5 at 1024 columns.
    scaled = torch.arange(outputs, device=device) * (inputs - 1)
    intervals = max(outputs - 1, 1)
    lower = (scaled // intervals).clamp_(max=max(inputs - 2, 0))
    upper_weight = (scaled - lower * intervals).double() / intervals
    matrix = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
    matrix.scatter_(1, lower.unsqueeze(1), (1 - upper_weight).unsqueeze(1))
    if inputs > 1:
        matrix.scatter_(1, lower.unsqueeze(1) + 1, upper_weight.unsqueeze(1))
    return matrix.to(like.dtype)
