"""What the losses share: maps checked, in one precision and of one size, and measures of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rdd_pipeline.errors import UserError
from rdd_pipeline.networks.resizing import bilinear


def as_float(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is when it is float64. Gradients pass through."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def full_precision(tensor: Tensor) -> Iterator[None]:
    """Context in which matrix products on the tensor's device have the precision of their operands.

    Casting to float32 alone is not enough. Autocast would turn the products (and on CUDA some more)
    back to half precision, and the process-wide switches that let networks compute in TF32 on CUDA
    or in bfloat16 on CPU (``torch.set_float32_matmul_precision``,
    ``torch.backends.cuda.matmul.allow_tf32``) hold for losses, too. They are as before afterwards.

    A gradient that autograd computes later is outside: see `matrix_product`.
    """
    mkldnn: Any = torch.backends.mkldnn  # torch's stubs do not know its `matmul`
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(tensor.device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in `full_precision`, its gradient too. Differentiable once.

    Args:
        a: (..., M, K), float32 or float64.
        b: (..., K, N) of the same type and leading axes.
    """
    result: Tensor = _MatrixProduct.apply(a, b)
    return result


class _MatrixProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with full_precision(a):
            return a @ b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        with full_precision(grad):
            return (
                grad @ b.mT if ctx.needs_input_grad[0] else None,
                a.mT @ grad if ctx.needs_input_grad[1] else None,
            )


def resize(maps_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize with ``align_corners=True``; the same tensor when it has that size."""
    if tuple(maps_NCHW.shape[-2:]) == tuple(size):
        return maps_NCHW
    if maps_NCHW.shape[1] == 0:  # which a teacher of other code does not give
        return maps_NCHW.new_empty((len(maps_NCHW), 0, *size))
    return bilinear(maps_NCHW, size)


def size_of(maps_NCHW: Tensor) -> tuple[int, int]:
    """Height and width."""
    return maps_NCHW.shape[-2], maps_NCHW.shape[-1]


def resize_labels(labels_NHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (N, h, w), int64, by nearest neighbor: what a feature map's positions belong to."""
    if tuple(labels_NHW.shape[-2:]) == tuple(size):
        return labels_NHW.long()
    # Whole numbers this small are exact in float32.
    return F.interpolate(labels_NHW.unsqueeze(1).float(), size=size).squeeze(1).long()


def rows_of(maps_NDhw: Tensor) -> Tensor:
    """Positions as rows: (N, D, h, w) to (N, h * w, D)."""
    return maps_NDhw.flatten(2).transpose(1, 2)


def paired_maps(student: Tensor, teacher: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Both networks' maps ready for a comparison.

    Args:
        student: (N, Cs, h, w), any floating type.
        teacher: (N, Ct, h', w'), any floating type.
        what: Name of the maps in an error message, e.g. ``"logits"``.

    Returns:
        The student's maps (N, Cs, h', w') with gradient and the teacher's (N, Ct, h', w') without,
        both in float32 (float64 if the student's are). A student of another stride than the
        teacher is resized to the teacher's size.

    Raises:
        UserError: The maps are not 4-D or their batches differ.
    """
    if student.dim() != 4 or teacher.dim() != 4:
        raise UserError(
            f"Student {what} {tuple(student.shape)} and teacher {what} {tuple(teacher.shape)} "
            "must both have four axes (batch, channels, height, width)."
        )
    if student.shape[0] != teacher.shape[0]:
        raise UserError(
            f"Student {what} hold {student.shape[0]} images, teacher {what} {teacher.shape[0]}. "
            "Feed both networks the same batch."
        )
    student = as_float(student)
    teacher = teacher.detach().to(student.dtype)
    return resize(student, (teacher.shape[-2], teacher.shape[-1])), teacher


def paired_features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """`paired_maps` for features that are compared channel by channel.

    Raises:
        UserError: As `paired_maps`, or the widths differ.
    """
    if student.dim() == teacher.dim() == 4 and student.shape[1] != teacher.shape[1]:
        raise UserError(
            f"The student's feature has {student.shape[1]} channels, the teacher's "
            f"{teacher.shape[1]}. Bring the student's to the teacher's width first, e.g. with "
            f"ChannelAdapter({student.shape[1]}, {teacher.shape[1]})."
        )
    return paired_maps(student, teacher, "features")


def paired_logits(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """`paired_maps` for logits: the class counts must agree.

    Raises:
        UserError: As `paired_maps`, or the networks know different numbers of classes.
    """
    if student.dim() == teacher.dim() == 4 and student.shape[1] != teacher.shape[1]:
        raise UserError(
            f"The student has {student.shape[1]} classes, the teacher {teacher.shape[1]}. "
            "Distillation of logits needs both networks on the same label set."
        )
    return paired_maps(student, teacher, "logits")


def attention(maps_NDhw: Tensor) -> Tensor:
    """Mean of the squared channels, (N, h * w), of unit length for each image."""
    return F.normalize(maps_NDhw.square().mean(1).flatten(1), dim=1)


def mean_square(difference: Tensor) -> Tensor:
    """Mean of the squares, 0 of nothing."""
    return difference.square().sum() / max(1, difference.numel())


def spatial_kl(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """``T^2 / N * sum over images and channels of KL(teacher || student) over positions``, in nats.

    Args:
        student: (N, D, h, w), of one precision with the teacher's.
        teacher: (N, D, h, w).
        temperature: T of the softmax over the h * w positions.
    """
    total = kl_sum(student.flatten(2) / temperature, teacher.flatten(2) / temperature, dim=2)
    return temperature**2 * total / max(1, teacher.shape[0])


def kl_sum(student: Tensor, teacher: Tensor, *, dim: int) -> Tensor:
    """Sum of KL(teacher || student) of the softmaxes along a dimension."""
    return F.kl_div(
        student.log_softmax(dim), teacher.log_softmax(dim), reduction="sum", log_target=True
    )
