"""Time and memory of the TSE task loss against plain PyTorch: ``python benchmarks/losses.py``.

Forward and backward of main and auxiliary heads at the size of a Cityscapes crop. The reference is
what the formulas say when written down directly: upsample, softmax, gather, sort all pixels,
cross-entropy of the chosen ones. Both are timed in turns in one process, so that a busy machine
slows both; medians of the rounds. Peak memory is measured in a process of its own for each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.losses.cross_entropy import cross_entropy_loss
from rdd_pipeline.losses.rdd import tfe_loss, tse_loss

Loss = Callable[["Batch"], Tensor]


class Batch(NamedTuple):
    student: Tensor
    student_aux: Tensor
    teacher: Tensor
    teacher_aux: Tensor
    labels: Tensor


def make_batch(small: tuple[int, int], full: tuple[int, int], images: int, classes: int) -> Batch:
    """Networks that are right on most pixels, a twentieth of the labels ignored."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, classes, (images, *small), generator=g)
    labels = F.interpolate(coarse[:, None].float(), size=full)[:, 0].long()

    def logits(confidence: float) -> Tensor:
        noise = 2 * torch.randn(images, classes, *small, generator=g)
        return noise + confidence * F.one_hot(coarse, classes).movedim(-1, 1)

    labels[torch.rand(labels.shape, generator=g) < 0.05] = 255
    student, student_aux = logits(6).requires_grad_(), logits(4).requires_grad_()
    return Batch(student, student_aux, logits(9), logits(6), labels)


def reference_hard(p: Tensor, valid: Tensor, threshold: float, min_kept: int) -> Tensor:
    order = p.flatten().argsort()
    tau = p.flatten()[order[min(min_kept, p.numel()) - 1]].clamp(min=threshold)
    return valid & (p <= tau)


def reference_tse(batch: Batch) -> Tensor:
    size, valid = batch.labels.shape[-2:], batch.labels != 255
    index = batch.labels.masked_fill(~valid, 0)[:, None]
    loss = torch.zeros(())
    for weight, student, teacher in (
        (1.0, batch.student, batch.teacher),
        (0.4, batch.student_aux, batch.teacher_aux),
    ):
        student, teacher = (
            F.interpolate(z, size=size, mode="bilinear", align_corners=True)
            for z in (student, teacher)
        )
        hard = []
        for z in (student.detach(), teacher):
            p = z.softmax(1).gather(1, index)[:, 0].masked_fill(~valid, 1)
            hard.append(reference_hard(p, valid, 0.7, 100_000))
        target = batch.labels.masked_fill(~(hard[0] ^ hard[1]), 255)
        loss = loss + weight * F.cross_entropy(student, target, ignore_index=255)
    return loss


def ours_tse(batch: Batch) -> Tensor:
    return tse_loss(
        batch.student,
        batch.labels,
        teacher_logits=batch.teacher,
        student_aux_logits=batch.student_aux,
        teacher_aux_logits=batch.teacher_aux,
    ).loss


def reference_tfe(batch: Batch) -> Tensor:
    size = batch.labels.shape[-2:]
    main, aux = batch.teacher.log_softmax(1), batch.teacher_aux.log_softmax(1)
    weight = torch.exp(-(aux.exp() * (aux - main)).sum(1, keepdim=True))
    weight = F.interpolate(weight, size=size, mode="bilinear", align_corners=True)[:, 0]
    ce = [
        F.cross_entropy(
            F.interpolate(z, size=size, mode="bilinear", align_corners=True),
            batch.labels,
            ignore_index=255,
            reduction="none",
        )
        for z in (batch.student, batch.student_aux)
    ]
    return (weight * (ce[0] + 0.4 * ce[1])).mean()


def ours_tfe(batch: Batch) -> Tensor:
    return tfe_loss(
        batch.student,
        batch.labels,
        teacher_logits=batch.teacher,
        teacher_aux_logits=batch.teacher_aux,
        student_aux_logits=batch.student_aux,
    ).loss


def reference_ce(batch: Batch) -> Tensor:
    size = batch.labels.shape[-2:]
    main, aux = (
        F.cross_entropy(
            F.interpolate(z, size=size, mode="bilinear", align_corners=True),
            batch.labels,
            ignore_index=255,
        )
        for z in (batch.student, batch.student_aux)
    )
    return main + 0.4 * aux


def ours_ce(batch: Batch) -> Tensor:
    return cross_entropy_loss(
        batch.student, batch.labels, student_aux_logits=batch.student_aux
    ).loss


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "tse": (reference_tse, ours_tse),
    "tfe": (reference_tfe, ours_tfe),
    "cross-entropy": (reference_ce, ours_ce),
}


def step(loss: Loss, batch: Batch) -> tuple[float, Tensor]:
    """Seconds of one forward and backward pass, and the loss."""
    batch.student.grad = batch.student_aux.grad = None
    start = time.perf_counter()
    value = loss(batch)
    value.backward()
    return time.perf_counter() - start, value.detach()


def peak_megabytes(name: str, which: int, threads: int) -> float:
    """Growth of this process's peak memory while the loss runs."""
    torch.set_num_threads(threads)
    batch = make_batch((65, 129), (512, 1024), 4, 19)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(LOSSES[name][which], batch)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) / (2**20 if sys.platform == "darwin" else 2**10)


def measured_peak(name: str, which: int, threads: int) -> float:
    """`peak_megabytes` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(peak_megabytes, name, which, threads).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # First, while this process is small: a new one starts with its parent's peak.
    peaks = {
        (name, which): measured_peak(name, which, options.threads)
        for name in LOSSES
        for which in (0, 1)
    }
    batch = make_batch((65, 129), (512, 1024), 4, 19)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads; logits "
        f"{tuple(batch.student.shape)}, labels {tuple(batch.labels.shape)}, two heads, forward + "
        f"backward, median of {options.rounds} rounds (spread: slowest - fastest)"
    )
    print(f"{'loss':<14}{'':<10}{'ms':>8}{'spread':>8}{'peak MB':>9}   ratio   value")
    for name, pair in LOSSES.items():
        times: tuple[list[float], list[float]] = ([], [])
        values = [step(loss, batch)[1] for loss in pair]  # also the warm-up
        for _ in range(options.rounds):
            for loss, seconds in zip(pair, times, strict=True):
                seconds.append(step(loss, batch)[0])
        plain = statistics.median(times[0])
        for which, label in enumerate(("plain", "ours")):
            seconds, median = times[which], statistics.median(times[which])
            print(
                f"{name:<14}{label:<10}{1e3 * median:8.0f}"
                f"{1e3 * (max(seconds) - min(seconds)):8.0f}"
                f"{peaks[name, which]:9.0f}{plain / median:7.1f}x"
                f"   {values[which]:.6f}"
            )


if __name__ == "__main__":
    main()
