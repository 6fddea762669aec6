"""What a GPU says of a step is read while it computes the next one: here the CPU does so, too."""

from __future__ import annotations

import pytest
import torch

from rdd_pipeline.config import OptimizerParams
from rdd_pipeline.errors import NonFiniteLossError
from rdd_pipeline.losses.base import FunctionalLoss
from rdd_pipeline.losses.class_counts import PixelsOfClass
from rdd_pipeline.training import loop, schedule
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.reading import Reading
from rdd_pipeline.training.store import RunStore
from rdd_pipeline.training.training import Training
from tests.equal import same_training

from .conftest import CPU

SELDOM = CPU.model_copy(update={"log_every": 3, "checkpoint_every": 1e6})


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    """Optimizers as they are on CUDA."""
    monkeypatch.setattr(schedule, "fused", lambda parameters: True)


@pytest.fixture
def later(monkeypatch):
    """Function that makes trainings read later."""
    return lambda: monkeypatch.setattr(loop, "reads_later", lambda device: True)


@pytest.fixture
def run(blocks, teacher):
    def run(job, folder=None, trainer=SELDOM):
        training = Training(job, blocks.images, teacher)
        return train(training if folder is None else training.stored_in(folder), trainer)

    return run


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["tse", "ifvd"])
def test_weights_and_curves_are_those_of_reading_at_once(run, make_job, later, method, optimizer):
    job = make_job(method, recipe={"optimizer": OptimizerParams(name=optimizer, lr=0.01)})
    at_once = run(job)
    later()
    result = run(job)
    assert same_training(result, at_once)
    assert result.history == at_once.history
    assert result.state.cost.images == at_once.state.cost.images == 16


@pytest.mark.parametrize("iteration", [3, 5, 6, 7, 8])
def test_a_lost_step_is_named_and_nothing_is_kept_of_it(
    run, make_job, later, tmp_path, monkeypatch, iteration
):
    job = make_job("kd")
    whole = run(job)
    later()
    forward, calls = FunctionalLoss.forward, []

    def spoiled(self, *args):
        calls.append(1)
        value = forward(self, *args)
        return value * torch.nan if len(calls) == iteration else value

    with monkeypatch.context() as patch:
        patch.setattr(FunctionalLoss, "forward", spoiled)
        with pytest.raises(
            NonFiniteLossError, match=f"kd: non-finite at iteration {iteration}: .*kd = nan"
        ):
            run(job, tmp_path)
    assert len(calls) <= min(8, iteration + 1)
    state = RunStore(tmp_path, whole.fingerprint).latest()
    assert (0 if state is None else state.iteration) == 4 * ((iteration - 1) // 4)
    assert same_training(run(job, tmp_path), whole)


def test_weights_stay_as_they_are_in_a_lost_step(run, make_job, later, monkeypatch):
    later()
    made, forward = [], FunctionalLoss.forward
    make = loop.build

    def spoiled(self, *args):
        seen.append([p.detach().clone() for p in made[0].parameters])
        return forward(self, *args) * (torch.nan if len(seen) == 2 else 1)

    seen: list[list[torch.Tensor]] = []
    monkeypatch.setattr(loop, "build", lambda *a, **k: made.append(make(*a, **k)) or made[0])
    monkeypatch.setattr(FunctionalLoss, "forward", spoiled)
    with pytest.raises(NonFiniteLossError, match="non-finite at iteration 2"):
        run(make_job("kd"))
    first, second, third = seen
    assert not all(map(torch.equal, first, second))
    assert all(map(torch.equal, second, third))


def test_a_reading_gives_back_what_was_put_in():
    counts = torch.arange(16.0).view(len(PixelsOfClass._fields), 2)
    numbers = torch.cat([torch.tensor([1.5, 2.5, 3.5]), counts.flatten()])
    reading = Reading.of(numbers, 7, ("loss", "kd"), ("norm",))
    assert reading.iteration == 7
    assert reading.values == {"loss": 1.5, "kd": 2.5}
    assert reading.norms == {"norm": 3.5}
    assert torch.equal(reading.counts, counts)
    assert Reading.of(numbers[:3], 7, ("loss", "kd"), ("norm",)).counts is None
