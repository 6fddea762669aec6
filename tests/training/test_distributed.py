"""Two processes that train together, over gloo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rdd_pipeline.config import OptimizerParams
from rdd_pipeline.distillation.objective import Objective
from rdd_pipeline.networks import Preprocessing, network_from_params
from rdd_pipeline.segmentation.loading import training_batches
from rdd_pipeline.training.step import TrainingStep

from .conftest import LABELS, STUDENT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(290)]


SPREAD = {"batch_size": 4}


@pytest.fixture(scope="module")
def first_step(make_job):
    return make_job(
        "baseline",
        network=STUDENT.model_copy(update={"dropout": 0.0}),
        recipe={
            "iterations": 1,
            "batch_size": 4,
            "keep": "last",
            "optimizer": OptimizerParams(lr=0.1, momentum=0.0, weight_decay=0.0),
        },
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, make_job, first_step, blocks, teacher):
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (make_job(recipe=SPREAD), first_step, blocks.samples, teacher)
    torch.save(arguments, folder / "arguments.pt")
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.two_ranks", str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(2)]


def test_both_ranks_end_equal(ranks):
    (one, network, trained), (other, other_network, _) = (rank["whole"] for rank in ranks)
    assert trained == 8
    assert_close(one["student"], other["student"], rtol=0, atol=0)
    assert_close(network, other_network, rtol=0, atol=0)
    assert one["best"]["miou"] == other["best"]["miou"]
    assert one["history"] == other["history"]
    assert one["cost"]["images"] == 32


def test_a_second_call_trains_nothing(ranks):
    for rank in ranks:
        assert rank["again"][2] == 0
        assert_close(rank["again"][1], rank["whole"][1], rtol=0, atol=0)


def test_the_first_step_is_that_of_the_mean_gradient_of_both_halves(ranks, first_step, blocks):
    job = first_step
    _, after, _ = ranks[0]["first step"]

    def gradient(rank: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(job.seed)
        student = network_from_params(job.network, num_classes=3)
        step = TrainingStep(
            student,
            Objective(
                job.definition,
                rdd=job.rdd,
                warmup=0,
                iterations=1,
                aux_weight=0.4,
                class_weights=None,
                ignore_index=255,
            ),
            teacher=None,
            student_preprocessing=Preprocessing.imagenet(),
            teacher_preprocessing=None,
            autocast=None,
        )
        (batch,) = training_batches(
            [sample for sample in blocks.samples if sample.split == "train"],
            blocks.root,
            augment=job.recipe.augment,
            seed=job.seed,
            batch_size=4,
            first_iteration=1,
            last_iteration=1,
            lookup=LABELS.lookup,
            pad_color=Preprocessing.imagenet().mean_rgb(),
            rank=rank,
            world_size=2,
        )
        step(batch.images, batch.labels, 1).total.backward()
        return {name: p.grad for name, p in student.named_parameters()}

    torch.manual_seed(job.seed)
    start: nn.Module = network_from_params(job.network, num_classes=3)
    halves = [gradient(rank) for rank in range(2)]
    for name, parameter in start.named_parameters():
        expected = parameter.detach() - 0.1 * (halves[0][name] + halves[1][name]) / 2
        assert_close(after[name], expected, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_on_one_rank_stops_both(ranks):
    for rank in ranks:
        assert "non-finite at iteration 3: loss = nan, kd = nan" in rank["nan"]


def test_a_signal_to_one_rank_stops_both_at_the_same_iteration(ranks):
    for rank in ranks:
        assert "after iteration 3 of 8. Its state is saved" in rank["signal"]


def test_a_run_that_was_stopped_ends_like_one_never_stopped(ranks):
    for rank in ranks:
        state, network, trained = rank["resumed"]
        assert trained == 5
        assert_close(network, rank["whole"][1], rtol=0, atol=0)
        assert_close(state["student"], rank["whole"][0]["student"], rtol=0, atol=0)
