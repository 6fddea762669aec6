"""Two processes that train together, over gloo."""

from __future__ import annotations

import os
import signal
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.testing import assert_close

from rdd_pipeline.config import OptimizerParams
from rdd_pipeline.distillation.objective import Objective
from rdd_pipeline.distillation.terms import KnowledgeDistillation
from rdd_pipeline.errors import NonFiniteLossError
from rdd_pipeline.networks import Preprocessing, network_from_params
from rdd_pipeline.segmentation.loading import training_batches
from rdd_pipeline.training.checkpoints import WorkFolder
from rdd_pipeline.training.loop import TrainingInterruptedError, job_fingerprint, train
from rdd_pipeline.training.step import TrainingStep

from .conftest import CPU, LABELS, STUDENT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(290)]


SPREAD = {"batch_size": 4}


def _rank(rank: int, folder: Path, *arguments) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(_scenarios(rank, folder, *arguments), folder / f"result-{rank}.pt")
    except Exception:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def _scenarios(rank, folder, job, first_step, samples, teacher) -> dict:
    """Everything in one pair of processes: starting them takes longer than what they do."""

    def run(name: str, job, observe=None):
        work = WorkFolder(folder / name, job_fingerprint(job, samples, teacher, None))
        trainer = CPU.model_copy(update={"log_every": 1})
        try:
            result = train(
                job,
                samples,
                trainer=trainer,
                teacher=teacher,
                work=work,
                group=dist.group.WORLD,
                observe=observe,
            )
        except (NonFiniteLossError, TrainingInterruptedError) as error:
            return str(error)
        return result.state, result.network.tensors, result.trained

    found = {
        "whole": run("work", job),
        "again": run("work", job),
        "first step": run("first", first_step),
    }
    forward, calls = KnowledgeDistillation.forward, []

    def spoiled(self, *inputs):
        calls.append(1)
        return forward(self, *inputs) * (torch.nan if rank == 1 and len(calls) == 3 else 1)

    KnowledgeDistillation.forward = spoiled
    found["nan"] = run("nan", job)
    KnowledgeDistillation.forward = forward

    def signal_at_3(iteration, values):
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    found["signal"] = run("signal", job, signal_at_3)  # only rank 0 observes
    found["resumed"] = run("signal", job)
    return found


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
    context = multiprocessing.get_context("spawn")
    arguments = (make_job(recipe=SPREAD), first_step, blocks.samples, teacher)
    processes = [
        context.Process(target=_rank, args=(rank, folder, *arguments)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    errors = [path.read_text() for path in folder.glob("error-*")]
    assert not hung, "a rank waits for the other"
    assert not errors, errors[0]
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
