"""KL of soft similarities as Triton kernels, for CUDA.

What `similarity.soft_similarity_kl` computes from matrices of similarities, a few rows at a time,
is computed here without ever writing a similarity: as in attention kernels, but with two softmaxes
over the same keys, the student's and the teacher's. One kernel goes over the keys once and finds
the divergence and the gradient of the rows, a second one finds that of the keys.

The vectors are unit vectors (or zeros), so that the largest similarity is known beforehand and no
running maximum is needed. Features in half precision are multiplied in float16, whose 11 bits suit
values up to 1, and summed in float32; float32 features by three TF32 products each, close to
float32. Repeats bit for bit: each sum has one place that gathers it in a fixed order.

Suffixes: M rows, G groups of K keys with a softmax of their own, D width of the vectors.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor
from triton.runtime.errors import OutOfResources  # type: ignore[import-untyped,unused-ignore]

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,misc,unused-ignore"

__all__ = ["COLDEST", "WIDEST", "OutOfResources", "similarity_kl", "takes"]

WIDEST = 256
"""Of vectors that a program can hold."""
COLDEST = 0.025
"""Temperature below which the exponentials, taken from the largest possible one, may all be 0."""
_OPTIONS = {"enable_fp_fusion": True}
_HEADROOM = tl.constexpr(8.0)
"""Exponentials reach e**8: float16 has 17 nats below it without losing bits."""
_LARGEST_SCALE = 32768.0


def similarity_kl(
    student_rows: Tensor,
    student_keys: Tensor,
    teacher_rows: Tensor,
    teacher_keys: Tensor,
    *,
    temperature: float,
    half: bool,
    rows_need_grad: bool,
    keys_need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum of the rows' divergences and its gradients, or None where they are not needed.

    Args:
        student_rows: (M, Ds) float32, unit vectors or zeros as all four are; D at most `WIDEST`.
        student_keys: (G, K, Ds).
        teacher_rows: (M, Dt).
        teacher_keys: (G, K, Dt).
        temperature: T, at least `COLDEST`.
        half: Multiply in float16 instead of three times in TF32.
        rows_need_grad: Whether the gradient (M, Ds) is asked for.
        keys_need_grad: The same of (G, K, Ds).

    Raises:
        OutOfResources: The GPU has less shared memory than such vectors take.
    """
    dtype = torch.float16 if half else torch.float32
    vectors = [v.to(dtype).contiguous() for v in (student_rows, student_keys, teacher_rows)]
    vectors.append(teacher_keys.to(dtype).contiguous())
    (rows, student_width), (groups, keys, _) = student_rows.shape, student_keys.shape
    grad_rows = torch.zeros_like(student_rows) if rows_need_grad else None
    grad_keys = torch.zeros_like(student_keys) if keys_need_grad else None
    kl_M = student_rows.new_zeros(rows)
    if not (rows and groups and keys):
        return kl_M.sum(), grad_rows, grad_keys
    normalizers_2GM = student_rows.new_empty(2, groups, rows)
    sizes = (rows, keys, groups, student_width, teacher_rows.shape[1], 1 / temperature)
    tiles = _tiles(student_width, teacher_rows.shape[1], half)
    _relate[(triton.cdiv(rows, tiles["ROWS"]),)](
        *vectors,
        kl_M if grad_rows is None else grad_rows,
        kl_M,
        *normalizers_2GM,
        *sizes,
        WITH_GRADIENT=rows_need_grad,
        **tiles,
        **_OPTIONS,
    )
    if grad_keys is not None:
        _gradient_of_keys[(triton.cdiv(keys, tiles["KEYS"]), groups)](
            *vectors,
            grad_keys,
            *normalizers_2GM,
            *sizes,
            min(float(keys), _LARGEST_SCALE),
            **tiles,
            **_OPTIONS,
        )
    return kl_M.sum(), grad_rows, grad_keys


def takes(student_rows: Tensor, teacher_rows: Tensor, temperature: float) -> bool:
    """Whether `similarity_kl` computes these."""
    return max(student_rows.shape[1], teacher_rows.shape[1]) <= WIDEST and temperature >= COLDEST


def _tiles(student_width: int, teacher_width: int, half: bool) -> dict[str, int | bool]:
    """A program's part: the largest that a streaming multiprocessor's registers hold."""
    widths = [max(16, triton.next_power_of_2(width)) for width in (student_width, teacher_width)]
    rows, keys = ((64, 64) if sum(widths) < 512 else (64, 32)) if half else (32, 16)
    return {
        "ROWS": rows,
        "KEYS": keys,
        "DS": widths[0],
        "DT": widths[1],
        "HALF": half,
        "num_warps": 8 if half else 4,
        "num_stages": 2,
    }


@triton.jit
def _load(vectors, first, count, width, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """(SIZE, WIDTH) of vectors (count, width) from the first on, zeros beyond."""
    index = first + tl.arange(0, SIZE)
    column = tl.arange(0, WIDTH)
    inside = (index[:, None] < count) & (column[None, :] < width)
    offset = index[:, None].to(tl.int64) * width + column[None, :]
    return tl.load(vectors + offset, mask=inside, other=0.0)


@triton.jit
def _product(a, b, HALF: tl.constexpr):
    if HALF:
        return tl.dot(a, b)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _relate(
    student_rows,
    student_keys,
    teacher_rows,
    teacher_keys,
    grad_rows,
    kl_M,
    student_normalizers_GM,
    teacher_normalizers_GM,
    rows,
    keys,
    groups,
    student_width,
    teacher_width,
    inverse_temperature,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DS: tl.constexpr,
    DT: tl.constexpr,
    HALF: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """Divergence, normalizers and gradient of a block of rows, group after group."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    student = _load(student_rows, first, rows, student_width, ROWS, DS)
    teacher = _load(teacher_rows, first, rows, teacher_width, ROWS, DT)
    # Of unit vectors the largest similarity is 1 / T.
    bound = inverse_temperature - _HEADROOM
    kl = tl.zeros((ROWS,), tl.float32)
    column = tl.arange(0, DS)
    gradient_at = row[:, None].to(tl.int64) * student_width + column[None, :]
    gradient_is = (row[:, None] < rows) & (column[None, :] < student_width)
    key_of_group = tl.zeros((), tl.int64)
    row_of_group = tl.zeros((), tl.int64)
    for _ in range(groups):
        student_sum = tl.zeros((ROWS,), tl.float32)
        teacher_sum = tl.zeros((ROWS,), tl.float32)
        difference = tl.zeros((ROWS,), tl.float32)
        by_student = tl.zeros((ROWS, DS), tl.float32)
        by_teacher = tl.zeros((ROWS, DS), tl.float32)
        for start in range(0, keys, KEYS):
            is_key = (start + tl.arange(0, KEYS))[None, :] < keys
            student_key = _load(
                student_keys + key_of_group * student_width, start, keys, student_width, KEYS, DS
            )
            teacher_key = _load(
                teacher_keys + key_of_group * teacher_width, start, keys, teacher_width, KEYS, DT
            )
            ours = _product(student, tl.trans(student_key), HALF) * inverse_temperature - bound
            theirs = _product(teacher, tl.trans(teacher_key), HALF) * inverse_temperature - bound
            our_e = tl.where(is_key, tl.exp(ours), 0.0)
            their_e = tl.where(is_key, tl.exp(theirs), 0.0)
            student_sum += tl.sum(our_e, 1)
            teacher_sum += tl.sum(their_e, 1)
            difference += tl.sum(their_e * (theirs - ours), 1)
            if WITH_GRADIENT:
                by_student += _product(our_e.to(student_key.dtype), student_key, HALF)
                by_teacher += _product(their_e.to(student_key.dtype), student_key, HALF)
        kl += difference / teacher_sum - tl.log(teacher_sum) + tl.log(student_sum)
        at = row_of_group + row
        tl.store(student_normalizers_GM + at, bound + tl.log(student_sum), mask=row < rows)
        tl.store(teacher_normalizers_GM + at, bound + tl.log(teacher_sum), mask=row < rows)
        key_of_group += keys
        row_of_group += rows
        if WITH_GRADIENT:
            # d KL / d similarity = (p_student - p_teacher) / T
            slope = by_student / student_sum[:, None] - by_teacher / teacher_sum[:, None]
            before = tl.load(grad_rows + gradient_at, mask=gradient_is, other=0.0)
            tl.store(
                grad_rows + gradient_at, before + slope * inverse_temperature, mask=gradient_is
            )
    tl.store(kl_M + row, kl, mask=row < rows)


@triton.jit
def _gradient_of_keys(
    student_rows,
    student_keys,
    teacher_rows,
    teacher_keys,
    grad_keys,
    student_normalizers_GM,
    teacher_normalizers_GM,
    rows,
    keys,
    groups,
    student_width,
    teacher_width,
    inverse_temperature,
    scale,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DS: tl.constexpr,
    DT: tl.constexpr,
    HALF: tl.constexpr,
):
    """Gradient of a block of keys of one group: from all rows. Probabilities times `scale`."""
    first = tl.program_id(0) * KEYS
    group = tl.program_id(1).to(tl.int64)
    key = first + tl.arange(0, KEYS)
    student_key = _load(
        student_keys + group * keys * student_width, first, keys, student_width, KEYS, DS
    )
    teacher_key = _load(
        teacher_keys + group * keys * teacher_width, first, keys, teacher_width, KEYS, DT
    )
    gradient = tl.zeros((KEYS, DS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        student = _load(student_rows, start, rows, student_width, ROWS, DS)
        teacher = _load(teacher_rows, start, rows, teacher_width, ROWS, DT)
        at = group * rows + row
        ours = _product(student_key, tl.trans(student), HALF) * inverse_temperature
        theirs = _product(teacher_key, tl.trans(teacher), HALF) * inverse_temperature
        ours -= tl.load(student_normalizers_GM + at, mask=row < rows, other=0.0)[None, :]
        theirs -= tl.load(teacher_normalizers_GM + at, mask=row < rows, other=0.0)[None, :]
        # Rows beyond the last are zeros: whatever their weight, they add nothing.
        weight = (tl.exp(ours) - tl.exp(theirs)) * scale
        gradient += _product(weight.to(student.dtype), student, HALF)
    column = tl.arange(0, DS)
    offset = (group * keys + key[:, None]) * student_width + column[None, :]
    inside = (key[:, None] < keys) & (column[None, :] < student_width)
    tl.store(grad_keys + offset, gradient * (inverse_temperature / scale), mask=inside)
