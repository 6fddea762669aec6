"""`recipe.ema`: the average of the weights, beside a training that knows nothing of it."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from rdd_pipeline.config import EmaParams, OptimizerParams
from rdd_pipeline.errors import NonFiniteLossError
from rdd_pipeline.evaluation.scoring import score_splits
from rdd_pipeline.networks import network_from_params
from rdd_pipeline.training import loop, schedule
from rdd_pipeline.training.ema import AveragedNetwork, decay_at
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.shared import Student, train_together
from rdd_pipeline.training.training import Training
from tests.equal import equal, same_training

from .conftest import CPU, STUDENT

EVERY = CPU.model_copy(update={"log_every": 1})
EMA = {"ema": {"decay": 0.7}}


class Stop(Exception):  # noqa: N818
    pass


def stop_at(number):
    def on_log(iteration, values):
        if iteration >= number and "loss" in values:
            raise Stop

    return on_log


@pytest.fixture
def make(blocks, teacher, make_job, tmp_path):
    def call(method="tse", folder="", *, recipe=EMA, state=None, **fields):
        training = Training(
            make_job(method, recipe=recipe, **fields), blocks.images, teacher, state
        )
        return training.stored_in(tmp_path / folder) if folder else training

    return call


def test_the_decay_warms_up_and_ends_at_its_value():
    assert decay_at(EmaParams(), 1) == 2 / 11
    assert decay_at(EmaParams(), 8990) == decay_at(EmaParams(), 10**6) == 0.999
    assert decay_at(EmaParams(decay=0.5), 8) == 0.5


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValidationError, match=r"ema\.decay|decay"):
        EmaParams(decay=decay)


def test_the_average_is_that_of_a_loop_and_of_torch(make, monkeypatch):
    """Both see the weights after every step of a real training, the loop in float64."""
    weights, make_average, update = [], AveragedNetwork.__init__, AveragedNetwork.update

    def record(self):
        pairs = {id(mine): theirs for mine, theirs in self._averaged + self._copied}
        names = self.network.state_dict(keep_vars=True)
        weights.append({name: pairs[id(own)].detach().clone() for name, own in names.items()})

    def made(self, network, params):
        make_average(self, network, params)
        record(self)

    def updated(self, iteration):
        update(self, iteration)
        record(self)

    monkeypatch.setattr(AveragedNetwork, "__init__", made)
    monkeypatch.setattr(AveragedNetwork, "update", updated)
    result = train(make(recipe={**EMA, "keep": "last"}), CPU)
    assert len(weights) == 9

    expected = {name: value.double() for name, value in weights[0].items()}
    for t, values in enumerate(weights[1:], start=1):
        decay = min(0.7, (1 + t) / (10 + t))
        for name, value in values.items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()

    def average(mean, new, n):
        decay = min(0.7, (1 + n) / (10 + n))
        return decay * mean + (1 - decay) * new

    network = network_from_params(STUDENT, num_classes=3)
    oracle = AveragedModel(network, avg_fn=average, use_buffers=True)
    for values in weights:
        network.load_state_dict(values)
        oracle.update_parameters(network)
    torchs = oracle.module.state_dict()
    averaged = result.state.ema
    assert averaged.keys() == result.state.student.keys()
    for name, value in averaged.items():
        if value.is_floating_point():
            assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
            assert_close(value, torchs[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, result.state.student[name])
    statistics = [name for name in averaged if name.endswith("running_var")]
    assert statistics
    assert not torch.equal(averaged[statistics[0]], result.state.student[statistics[0]])


@pytest.mark.parametrize("method", ["teacher", "tse"])
def test_training_goes_on_with_the_plain_weights(make, method):
    """The student that RDD looks at included: losses, weights and optimizer are the same bits."""
    plain, averaging = train(make(method, recipe={}), CPU), train(make(method), CPU)
    for name in ("student", "objective", "optimizer"):
        assert equal(getattr(plain.state, name), getattr(averaging.state, name)), name
    losses = [[row["loss"] for row in r.history if "loss" in row] for r in (plain, averaging)]
    assert losses[0] == losses[1]
    assert "ema" not in plain.state.to_dict()
    assert plain.fingerprint != averaging.fingerprint
    assert not equal(plain.network.tensors, averaging.network.tensors)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_average_is_validated_and_handed_on(make, keep):
    result = train(make("baseline", recipe={**EMA, "keep": keep, "validate_every": 8}), CPU)
    assert equal(result.network.tensors, result.state.ema)
    assert not equal(result.network.tensors, result.state.student)
    scores = score_splits(
        result.network, make().images, make().job.evaluation, device=torch.device("cpu")
    )
    assert scores["val"]["miou"] == result.history[-1]["val.miou"]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "as on CUDA"])
def test_a_run_stopped_after_every_iteration_ends_like_one_never_stopped(make, monkeypatch, late):
    monkeypatch.setattr(loop, "reads_later", lambda device: late)
    monkeypatch.setattr(schedule, "fused", lambda parameters: True)
    fields = {"recipe": {**EMA, "iterations": 4, "validate_every": 2}, "rdd": {"tfe_length": 2}}
    whole = train(make(**fields), EVERY)
    for number in range(2, 5):
        with pytest.raises(Stop):
            train(make(folder="work", **fields), EVERY, on_log=stop_at(number))
    pieces = train(make(folder="work", **fields), EVERY)
    assert pieces.trained == 1
    assert same_training(pieces, whole)
    assert pieces.state.digest() == whole.state.digest()
    assert train(make(folder="work", **fields), EVERY).trained == 0


def test_the_second_stage_takes_the_average_over(make):
    tfe = train(make("tfe", stage="tfe"), CPU)
    assert equal(tfe.network.tensors, tfe.state.ema)
    tse = train(make(stage="tse", state=tfe.state), CPU)
    assert same_training(tse, train(make(), CPU))


def test_students_that_share_a_teacher_average_as_by_themselves(make):
    trainer = CPU.model_copy(update={"share_teacher": True})
    recipe = {**EMA, "iterations": 3}
    trainings = [make(method, "together", recipe=recipe) for method in ("kd", "at")]
    train_together(list(map(Student, trainings)), trainer)
    for training in trainings:
        found = train(training, CPU)
        assert found.trained == 0
        assert same_training(found, train(make(training.job.method, recipe=recipe), CPU))


def test_nothing_that_is_no_number_reaches_a_file(make):
    training = make("baseline", "work", recipe={**EMA, "optimizer": OptimizerParams(lr=1e30)})
    with pytest.raises(NonFiniteLossError):
        train(training, EVERY)
    state = training.store.latest()
    assert state is None or all(bool(t.isfinite().all()) for t in state.ema.values())
