"""Thirty steps of a training, against a plain loop that is written down here from the formulas.

Everything in float64, so that what is left is rounding: networks, losses and optimizer are the
project's on one side, and on the other full-size logits, a sort of all pixels, an update by hand.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from rdd_pipeline.config import AugmentParams, NetworkParams, OptimizerParams, TrainerParams
from rdd_pipeline.networks import (
    NetworkCheckpoint,
    Preprocessing,
    network_from_params,
    probe,
)
from rdd_pipeline.training import build
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.training import Training

from .conftest import LABELS, TEACHER

STEPS, WARMUP, BATCH, CROP, LR, KEPT = 30, 8, 4, (32, 32), 0.01, 600
THRESHOLD, MOMENTUM, DECAY, AUX = 0.7, 0.9, 1e-4, 0.4
CPU = TrainerParams(device="cpu", workers=0, log_every=STEPS, threads=1)
WEIGHTS = torch.tensor(LABELS.class_weights, dtype=torch.float64)  # exact in float32, too


@pytest.fixture(scope="module")
def learned(blocks) -> NetworkCheckpoint:
    """A teacher that is sure of some pixels and not of others."""
    job = _job(blocks, "teacher", network=TEACHER.model_copy(update={"dropout": 0.0}))
    longer = {"iterations": 60, "validate_every": 60, "optimizer": OptimizerParams(lr=0.05)}
    job = job.model_copy(update={"recipe": job.recipe.model_copy(update=longer)})
    return train(Training(job, blocks.images), CPU).network


def _job(blocks, method, *, network, weighted=False, rdd=None, preset="reference_code"):
    from rdd_pipeline.training.job import TrainingJob

    return TrainingJob(
        method=method,
        network=network,
        recipe={
            "iterations": STEPS,
            "batch_size": BATCH,
            "optimizer": OptimizerParams(lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
            "augment": AugmentParams(crop=CROP, scale_min=0.8, scale_max=1.2),
            "validate_every": STEPS,
            "class_weights": weighted,
            "aux_weight": AUX,
            "keep": "last",
        },
        rdd={"tfe_length": WARMUP, "min_kept": KEPT, "threshold": THRESHOLD, **(rdd or {})},
        methods={"preset": preset},
    )


def _up(maps, size):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def _ce(logits, labels):
    return F.cross_entropy(
        _up(logits, labels.shape[1:]), labels, ignore_index=255, reduction="none"
    )


def _hard(logits, labels):
    """p of the label, 1 where ignored; hard up to the threshold or the k-th smallest of all."""
    p = _up(logits, labels.shape[1:]).softmax(1)
    valid = labels != 255
    p = p.gather(1, torch.where(valid, labels, 0).unsqueeze(1)).squeeze(1)
    p = torch.where(valid, p, 1.0)
    kth = p.flatten().sort().values[min(KEPT, p.numel()) - 1]
    return valid & (p <= torch.clamp(kth, min=THRESHOLD))


def _tse(student, teacher, labels, mode, weights):
    ours, theirs = _hard(student.detach(), labels), _hard(teacher, labels)
    chosen = {"xor": ours ^ theirs, "or": ours | theirs, "and": ours & theirs, "ohem": ours}[mode]
    c = weights[torch.where(labels == 255, 0, labels)] * chosen
    loss = (c * _ce(student, labels)).sum() / c.sum() if c.any() else 0 * student.sum()
    return loss, float(chosen.double().mean())


def _tfe(student, aux, teacher, labels, weights):
    kl = (teacher.aux_logits.softmax(1) * (
        teacher.aux_logits.log_softmax(1) - teacher.logits.log_softmax(1)
    )).sum(1, keepdim=True)  # fmt: skip
    w = _up((-kl).exp(), labels.shape[1:]).squeeze(1)
    valid = labels != 255
    c = weights[torch.where(valid, labels, 0)] * valid
    ce = _ce(student, labels) + (AUX * _ce(aux, labels) if aux is not None else 0.0)
    # All pixels count in the divisor, ignored ones with the valid ones' mean weight.
    return (w * c * ce).sum() / (c.sum() / valid.sum() * labels.numel())


def _normalized(preprocessing, images):
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (images.double() - mean) / std


def _plain(student, teacher, batches, *, mode, annealed, tse_weights, tfe_weights):
    student.train()
    teacher.eval()
    velocity = [torch.zeros_like(p) for p in student.parameters()]
    shares = []
    for iteration, (images, labels) in enumerate(batches, start=1):
        x = _normalized(Preprocessing.imagenet(), images)
        labels = labels.long()
        with torch.no_grad():
            seen = teacher(x)
        given = student(x)
        fade = 1.0 if iteration < WARMUP else 0.0
        if annealed and iteration >= WARMUP:
            fade = (iteration - STEPS) / (WARMUP - STEPS)
        task = torch.zeros((), dtype=torch.float64)
        if fade > 0:
            task = fade * _tfe(given.logits, given.aux_logits, seen, labels, tfe_weights)
        if fade < 1:
            main, share = _tse(given.logits, seen.logits, labels, mode, tse_weights)
            if given.aux_logits is not None:
                main = main + AUX * _tse(
                    given.aux_logits, seen.aux_logits, labels, mode, tse_weights
                )[0]  # fmt: skip
            task = task + (1 - fade) * main
            shares.append(share)
        p = seen.logits.softmax(1)
        kd = (p * (seen.logits.log_softmax(1) - given.logits.log_softmax(1))).sum(1).mean()
        for parameter in student.parameters():
            parameter.grad = None
        (task + kd).backward()
        lr = LR * (1 - (iteration - 1) / STEPS) ** 0.9
        with torch.no_grad():
            for parameter, v in zip(student.parameters(), velocity, strict=True):
                v.mul_(MOMENTUM).add_(parameter.grad + DECAY * parameter)
                parameter.sub_(lr * v)
    return shares


@pytest.mark.parametrize(
    ("mode", "auxiliary", "weighted", "annealed", "preset"),
    [
        # Without `slow`: each mode, head, weighting and preset once.
        pytest.param("xor", True, True, False, "reference_code", marks=pytest.mark.slow),
        pytest.param("xor", False, True, False, "reference_code", marks=pytest.mark.slow),
        pytest.param("xor", True, False, False, "reference_code", marks=pytest.mark.slow),
        pytest.param("xor", False, False, False, "reference_code", marks=pytest.mark.slow),
        pytest.param("or", True, True, False, "reference_code", marks=pytest.mark.slow),
        ("or", False, False, False, "reference_code"),
        ("and", True, False, False, "reference_code"),
        pytest.param("and", False, True, False, "reference_code", marks=pytest.mark.slow),
        ("ohem", True, True, False, "reference_code"),
        pytest.param("ohem", False, False, False, "reference_code", marks=pytest.mark.slow),
        ("xor", True, True, True, "reference_code"),
        pytest.param("xor", False, False, True, "reference_code", marks=pytest.mark.slow),
        ("xor", True, True, False, "paper"),
    ],
)
def test_thirty_steps_equal_a_plain_loop(
    mode, auxiliary, weighted, annealed, preset, blocks, learned, monkeypatch
):
    network = NetworkParams(
        name="fcn_test_efficientnet", width=8, output_stride=16, dropout=0.0, auxiliary=auxiliary
    )
    job = _job(
        blocks, "tse", network=network, weighted=weighted, preset=preset,
        rdd={"mode": mode, "annealed": annealed},
    )  # fmt: skip

    load, make = NetworkCheckpoint.build, network_from_params
    monkeypatch.setattr(NetworkCheckpoint, "build", lambda self: load(self).double())
    monkeypatch.setattr(build, "network_from_params", lambda *a, **k: make(*a, **k).double())
    monkeypatch.setattr(Preprocessing, "normalize", _normalized)
    monkeypatch.setattr(
        build,
        "output_shapes",
        lambda network, size: probe.output_shapes(copy.deepcopy(network).float(), size),
    )
    train_only = blocks.images.split("train")
    ours = train(Training(job, train_only, learned), CPU).state.student

    torch.manual_seed(job.seed)
    student = make(network, num_classes=3).double()
    start = copy.deepcopy(student.state_dict())
    batches = [
        (batch.images, batch.labels)
        for batch in blocks.images.split("train").training_batches(
            job.recipe.augment,
            seed=job.seed,
            batch_size=BATCH,
            iterations=range(1, STEPS + 1),
            pad_color=Preprocessing.imagenet().mean,
        )
    ]
    ones = torch.ones(3, dtype=torch.float64)
    shares = _plain(
        student,
        load(learned).double(),
        batches,
        mode=mode,
        annealed=annealed,
        tse_weights=WEIGHTS if weighted else ones,
        tfe_weights=WEIGHTS if weighted and preset == "paper" else ones,
    )
    assert 0.02 < sum(shares) / len(shares) < 0.98  # there was something to choose

    moved = difference = 0.0
    for name, tensor in student.state_dict().items():
        if tensor.is_floating_point():
            moved += float((tensor - start[name]).square().sum())
            difference += float((tensor - ours[name]).square().sum())
    assert moved > 1e-3
    assert (difference / moved) ** 0.5 < 1e-12
