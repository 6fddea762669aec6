"""KL of soft similarities, without ever holding all of them.

Relations of all positions with all others are large: those of one pair of images at 64 x 128 are 67
million, and CIRKD wants those of every pair. Here they exist a few rows at a time.
`benchmarks/relations.py` measures what it brings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rdd_pipeline.losses.kernels import fused_kernels
from rdd_pipeline.losses.maps import full_precision

# Similarities held at once, in four matrices. CPU: 16 MB each, products that are still large.
# Elsewhere: few large kernels.
_SIMILARITIES_CPU = 2**22
_SIMILARITIES_OTHER = 2**25


def soft_similarity_kl(
    student_rows: Tensor,
    student_keys: Tensor,
    teacher_rows: Tensor,
    teacher_keys: Tensor,
    *,
    temperature: float,
    counted: Tensor | None = None,
    half: bool = False,
) -> Tensor:
    """Sum of KL(teacher || student), in nats, of the rows' softmaxes over their similarities.

    ``sum over groups g and rows m of KL(p_t || p_s)`` with p = softmax over the keys of g of
    ``row_m . key / T``, computed in chunks of rows. Where a gradient is needed it is computed in
    the same go, while the similarities are there: storing them would take gigabytes, and computing
    them again in the backward pass two matrix products more than the four it takes. Differentiable
    once in the student's rows and keys. On CUDA by the kernels of `losses.fused_relations`, for
    vectors of up to 256 values.

    Args:
        student_rows: (M, Ds), unit vectors or zeros, as all four are.
        student_keys: (G, K, Ds), G groups with a softmax of their own.
        teacher_rows: (M, Dt).
        teacher_keys: (G, K, Dt).
        temperature: T.
        counted: (M,) bool, which rows belong to the sum; None: all. (To pick them out beforehand
            would mean to wait for the device, for their number.)
        half: The vectors come from features in half precision: the kernels may multiply in it.
    """
    if counted is not None:
        # Zeros are equally similar to every key for both networks: no divergence, no gradient.
        student_rows, teacher_rows = (
            rows.masked_fill(~counted.unsqueeze(1), 0) for rows in (student_rows, teacher_rows)
        )
    result: Tensor = _SoftSimilarityKL.apply(
        student_rows,
        student_keys,
        teacher_rows.detach(),
        teacher_keys.detach(),
        temperature,
        half,
        torch.is_grad_enabled() and student_rows.requires_grad,
        torch.is_grad_enabled() and student_keys.requires_grad,
    )
    return result


class _SoftSimilarityKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_rows: Tensor,
        student_keys: Tensor,
        teacher_rows: Tensor,
        teacher_keys: Tensor,
        temperature: float,
        half: bool,
        rows_need_grad: bool,
        keys_need_grad: bool,
    ) -> Tensor:
        vectors = (student_rows, student_keys, teacher_rows, teacher_keys)
        needed = (rows_need_grad, keys_need_grad)
        found = _by_kernels(*vectors, temperature, half, *needed)
        if found is None:
            found = _in_chunks(*vectors, temperature, *needed)
        total, grad_rows, grad_keys = found
        ctx.save_for_backward(grad_rows, grad_keys)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_keys = ctx.saved_tensors
        return (
            None if grad_rows is None else grad_rows * grad,
            None if grad_keys is None else grad_keys * grad,
            *(None,) * 6,
        )


Found = tuple[Tensor, Tensor | None, Tensor | None]
"""The sum and its gradients for the rows and keys."""


def _by_kernels(
    student_rows: Tensor,
    student_keys: Tensor,
    teacher_rows: Tensor,
    teacher_keys: Tensor,
    temperature: float,
    half: bool,
    rows_need_grad: bool,
    keys_need_grad: bool,
) -> Found | None:
    """None where the kernels are not there or the vectors are too long for them."""
    fused = fused_kernels(student_rows, "fused_relations")
    if fused is None or not fused.takes(student_rows, teacher_rows, temperature):
        return None
    try:
        found: Found = fused.similarity_kl(
            student_rows,
            student_keys,
            teacher_rows,
            teacher_keys,
            temperature=temperature,
            half=half,
            rows_need_grad=rows_need_grad,
            keys_need_grad=keys_need_grad,
        )
    except fused.OutOfResources:
        return None
    return found


def _in_chunks(
    student_rows: Tensor,
    student_keys: Tensor,
    teacher_rows: Tensor,
    teacher_keys: Tensor,
    temperature: float,
    rows_need_grad: bool,
    keys_need_grad: bool,
) -> Found:
    grad_rows = torch.zeros_like(student_rows) if rows_need_grad else None
    grad_keys = torch.zeros_like(student_keys) if keys_need_grad else None
    total = student_rows.new_zeros(())
    on_cpu = student_rows.device.type == "cpu"
    similarities = _SIMILARITIES_CPU if on_cpu else _SIMILARITIES_OTHER
    rows_in_chunk = max(1, similarities // max(1, student_keys.shape[1]))
    with full_precision(student_rows):
        for start in range(0, len(student_rows), rows_in_chunk):
            rows = slice(start, start + rows_in_chunk)
            for group in range(len(student_keys)):
                student_log_p, teacher_log_p = (
                    (some_rows[rows] @ keys[group].T).div_(temperature).log_softmax(1)
                    for some_rows, keys in (
                        (student_rows, student_keys),
                        (teacher_rows, teacher_keys),
                    )
                )
                teacher_p = teacher_log_p.exp()
                total += teacher_log_p.sub_(student_log_p).mul_(teacher_p).sum()
                if grad_rows is None and grad_keys is None:
                    continue
                # d KL / d similarity = (p_student - p_teacher) / T
                grad = student_log_p.exp_().sub_(teacher_p).div_(temperature)
                if grad_rows is not None:
                    grad_rows[rows].addmm_(grad, student_keys[group])
                if grad_keys is not None:
                    grad_keys[group].addmm_(grad.T, student_rows[rows])
    return total, grad_rows, grad_keys
