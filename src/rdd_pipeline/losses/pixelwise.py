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

# Elements of an upsampled band. CPU: a few of them fit in the cache (measured, 2**18 to 2**21 are
# within ten percent). Elsewhere: few large kernels, and still bounded memory.
_BAND_ELEMENTS_CPU = 2**19
_BAND_ELEMENTS_OTHER = 2**25


class PixelLabels(NamedTuple):
    """Labels in the form the losses compute with.

    Attributes:
        classes: Class of each pixel, (N, H, W) int64, 0 where the pixel is ignored.
        valid: (N, H, W) bool, False where the pixel is ignored.
    """

    classes: Tensor
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
    index = labels_NHW.masked_fill(~valid, 0).long()
    if index.device.type == "cpu" and index.numel() > 0:
        smallest, largest = (int(value) for value in index.aminmax())
        if smallest < 0 or largest >= num_classes:
            found = smallest if smallest < 0 else largest
            raise UserError(
                f"Found label {found}, expected 0 to {num_classes - 1} or {ignore_index} for "
                "ignored pixels. Check the label set, and that raw ids were mapped to classes."
            )
    return PixelLabels(index, valid)


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
    if logits_NChw.dim() != 4 or logits_NChw.shape[0] != labels.classes.shape[0]:
        raise UserError(
            f"Logits {tuple(logits_NChw.shape)} do not fit labels "
            f"{tuple(labels.classes.shape)}: expected (batch, classes, height, width) with the "
            "labels' batch size."
        )
    result: Tensor = _LogProbOfLabel.apply(as_float(logits_NChw), *labels)
    return result


class _LogProbOfLabel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NChw: Tensor, index_NHW: Tensor, valid_NHW: Tensor) -> Tensor:
        with no_autocast(logits_NChw):
            bilinear = _Bilinear.between(logits_NChw, index_NHW)
            logits_NChw = bilinear.drop_unseen(logits_NChw, valid_NHW)
            log_prob_NHW = logits_NChw.new_empty(index_NHW.shape)
            for n, logits_Chw in enumerate(logits_NChw):
                for rows, logits_RCW in bilinear.bands(logits_Chw):
                    log_probs_RCW = logits_RCW.log_softmax(1)
                    index_R1W = index_NHW[n, rows].unsqueeze(1)
                    log_prob_NHW[n, rows] = log_probs_RCW.gather(1, index_R1W).squeeze(1)
        ctx.save_for_backward(logits_NChw, index_NHW, valid_NHW)
        # Rounding may leave 1e-7 above 0, which would be a probability above 1.
        return log_prob_NHW.clamp_(max=0).masked_fill_(~valid_NHW, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHW: Tensor) -> tuple[Tensor | None, None, None]:
        logits_NChw, index_NHW, valid_NHW = ctx.saved_tensors
        with no_autocast(logits_NChw):
            bilinear = _Bilinear.between(logits_NChw, index_NHW)
            grad_NHW = grad_NHW.masked_fill(~valid_NHW, 0)
            grad_NChw = torch.empty_like(logits_NChw)
            # Chosen pixels are often few: bands without any cost nothing. Looking means waiting
            # for the device elsewhere.
            may_look = grad_NHW.device.type == "cpu"
            for n, logits_Chw in enumerate(logits_NChw):
                grad_hCW = bilinear.zero_rows(logits_Chw)
                for rows, logits_RCW in bilinear.bands(
                    logits_Chw, needed_HW=grad_NHW[n] if may_look else None
                ):
                    # d log p_y / dz_c = [c = y] - p_c
                    grad_R1W = grad_NHW[n, rows].unsqueeze(1)
                    grad_RCW = logits_RCW.softmax(1).mul_(-grad_R1W)
                    grad_RCW.scatter_add_(1, index_NHW[n, rows].unsqueeze(1), grad_R1W)
                    bilinear.add_adjoint(grad_RCW, rows, grad_hCW)
                grad_NChw[n] = bilinear.narrow(grad_hCW)
        return grad_NChw, None, None


class _Bilinear(NamedTuple):
    """Bilinear resize with aligned corners, as ``up = vertical @ map_hw @ horizontal.T``.

    The matrices have the shapes (H, h) and (W, w). Products with them follow
    ``torch.set_float32_matmul_precision``; leave that at its default
    ``"highest"`` where full float32 is wanted.
    """

    vertical: Tensor
    horizontal: Tensor

    @classmethod
    def between(cls, logits_NChw: Tensor, index_NHW: Tensor) -> _Bilinear:
        (h, w), (height, width) = logits_NChw.shape[-2:], index_NHW.shape[-2:]
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

        Bands in which `needed_HW` is zero throughout are left out.
        """
        classes, h, w = logits_Chw.shape
        height, width = len(self.vertical), len(self.horizontal)
        on_cpu = logits_Chw.device.type == "cpu"
        elements = _BAND_ELEMENTS_CPU if on_cpu else _BAND_ELEMENTS_OTHER
        rows_in_band = max(1, elements // max(1, classes * width))
        # Columns first: that is done on the h rows there are, not on the H rows to come.
        logits_hCW = (logits_Chw.transpose(0, 1).reshape(h * classes, w) @ self.horizontal.T).view(
            h, classes * width
        )
        for start in range(0, height, rows_in_band):
            rows = slice(start, min(start + rows_in_band, height))
            if needed_HW is None or bool(needed_HW[rows].any()):
                below = self._source_rows(rows)
                band = self.vertical[rows, below] @ logits_hCW[below]
                yield rows, band.view(-1, classes, width)

    def zero_rows(self, logits_Chw: Tensor) -> Tensor:
        """Zeros (h, C * W) for `add_adjoint` to add to."""
        classes, h, _ = logits_Chw.shape
        return logits_Chw.new_zeros(h, classes * len(self.horizontal))

    def add_adjoint(self, grad_RCW: Tensor, rows: slice, into_hCW: Tensor) -> None:
        """Add what the rows of a band leave on the h rows they were interpolated from."""
        below = self._source_rows(rows)
        into_hCW[below].addmm_(self.vertical[rows, below].T, grad_RCW.flatten(1))

    def narrow(self, grad_hCW: Tensor) -> Tensor:
        """The adjoint's second half, along the columns: (h, C * W) to (C, h, w)."""
        h, (width, w) = len(grad_hCW), self.horizontal.shape
        return (grad_hCW.view(-1, width) @ self.horizontal).view(h, -1, w).transpose(0, 1)

    def _source_rows(self, rows: slice) -> slice:
        """Rows of the small map that the given rows of the large one are interpolated from."""
        height, h = self.vertical.shape
        intervals = max(height - 1, 1)
        first = rows.start * (h - 1) // intervals
        last = (rows.stop - 1) * (h - 1) // intervals + 1
        return slice(first, min(last, h - 1) + 1)


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
