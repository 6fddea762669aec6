"""Memory and time of the losses on relations: ``python benchmarks/relations.py``.

CIRKD's mini-batch term at the features of a Cityscapes crop (peak memory, and its value and
gradient against the plain formula pair by pair), and IFVD's class means by index_add against a
loop over 150 classes, timed in turns. Takes a few minutes: the mini-batch term is two tera
floating-point operations. `--quick` takes a quarter of the positions.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.losses.cirkd import cirkd_minibatch_loss
from rdd_pipeline.losses.ifvd import ifvd_loss

LIMIT_MEGABYTES = 1200


def make_features(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(shape, generator=g)
    return (teacher + torch.randn(shape, generator=g)).requires_grad_(), teacher


def plain_pair(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """The formula for one pair of images: two times (P, D) unit vectors of each network."""
    student_log_p, teacher_log_p = (
        (rows @ keys.T / 0.1).log_softmax(1) for rows, keys in (student, teacher)
    )
    kl = F.kl_div(student_log_p, teacher_log_p, reduction="sum", log_target=True)
    return kl / len(student_log_p)


def plain_minibatch(student: Tensor, teacher: Tensor) -> Tensor:
    student_unit, teacher_unit = (
        F.normalize(f, dim=1).flatten(2).transpose(1, 2) for f in (student, teacher)
    )
    pairs = [
        plain_pair((student_unit[i], student_unit[j]), (teacher_unit[i], teacher_unit[j]))
        for i in range(len(student))
        for j in range(len(student))
    ]
    return torch.stack(pairs).mean()


def measure_minibatch(
    which: str, shape: tuple[int, int, int, int], threads: int
) -> tuple[float, float, float, float]:
    """Loss, norm of the gradient, peak memory above the features in MB, seconds."""
    torch.set_num_threads(threads)
    student, teacher = make_features(shape)
    loss_of = cirkd_minibatch_loss if which == "ours" else plain_minibatch
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if which == "value":
        student.grad = torch.full_like(student, torch.nan)
        with torch.no_grad():
            loss = loss_of(student, teacher)
    else:
        loss = loss_of(student, teacher)
        loss.backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    megabytes = peak / (2**20 if sys.platform == "darwin" else 2**10)
    return float(loss.detach()), float(student.grad.norm()), megabytes, seconds


def plain_ifvd(student: Tensor, teacher: Tensor, labels: Tensor, classes: int) -> Tensor:
    """As published: for each class a mask over all maps."""
    small = F.interpolate(labels[:, None].float(), size=student.shape[2:])
    cosines = []
    for feature in (student, teacher):
        center = feature.clone()
        for c in range(classes):
            mask = (small == c).float()
            mean = (mask * feature).sum((2, 3), keepdim=True)
            mean = mean / (mask.sum((2, 3), keepdim=True) + 1e-6)
            center = (1 - mask) * center + mask * mean
        cosines.append(F.cosine_similarity(feature, center, dim=1))
    return F.mse_loss(*cosines)


def compare_ifvd(rounds: int) -> None:
    classes, shape = 150, (4, 128, 64, 64)
    student, teacher = make_features(shape)
    labels = torch.randint(0, classes, (4, 512, 512), generator=torch.Generator().manual_seed(1))
    losses = {
        "loop": lambda: plain_ifvd(student, teacher, labels, classes),
        "index_add": lambda: ifvd_loss(student, teacher, labels, num_classes=classes),
    }
    times: dict[str, list[float]] = {name: [] for name in losses}
    values = {}
    for _ in range(rounds):
        for name, loss in losses.items():
            student.grad = None
            start = time.perf_counter()
            value = loss()
            value.backward()
            times[name].append(time.perf_counter() - start)
            values[name] = float(value.detach()), float(student.grad.norm())
    print(f"IFVD, features {shape}, {classes} classes, forward + backward, median of {rounds}")
    loop = statistics.median(times["loop"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(
            f"  {name:<10}{1e3 * median:8.0f} ms (spread {1e3 * (max(seconds) - min(seconds)):.0f})"
            f"{loop / median:8.1f}x   loss {values[name][0]:.6f}  gradient {values[name][1]:.6e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a quarter of the positions")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads")
    # The plain formula keeps every similarity for its gradient, at full size more than 20 GB: there
    # it is computed without ("value").
    full, small = (4, 256, 64, 128), (4, 256, 32, 64)
    runs = [("ours", small), ("plain", small)]
    if not options.quick:
        runs += [("ours", full), ("value", full)]
    print("CIRKD mini-batch, forward + backward; peak memory above that of the features")
    for which, shape in runs:
        # A process of its own, so that its peak memory is that of the loss.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
            run = process.submit(measure_minibatch, which, shape, options.threads)
            loss, norm, megabytes, seconds = run.result()
        print(
            f"  {shape!s:<20}{which:<6}{megabytes:7.0f} MB{seconds:8.1f} s"
            f"   loss {loss:.6f}" + (f"  gradient {norm:.6e}" if which != "value" else "")
        )
        if which == "ours" and megabytes > LIMIT_MEGABYTES:
            sys.exit(f"more than {LIMIT_MEGABYTES} MB")
    compare_ifvd(options.rounds)


if __name__ == "__main__":
    main()
