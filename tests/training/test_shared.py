"""Several students under one teacher end with the bits that each has by itself."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time

import pytest
import torch
from torch import nn

from rdd_pipeline.config import MethodsParams, OptimizerParams, TrainerParams
from rdd_pipeline.errors import NonFiniteLossError, UserError
from rdd_pipeline.networks import network_from_params
from rdd_pipeline.training import loop, schedule, shared
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.shared import Student, train_together
from rdd_pipeline.training.step import Teacher
from rdd_pipeline.training.stopping import TrainingInterruptedError
from rdd_pipeline.training.training import Training
from tests.equal import same_training

from .conftest import CPU

TOGETHER = CPU.model_copy(update={"share_teacher": True, "log_every": 1})
RARELY = TOGETHER.model_copy(update={"checkpoint_every": 1e6})
MEMORY = {"pixel_slots": 40, "region_slots": 20, "pixel_contrast": 30, "region_contrast": 9}
OPTIONS = MethodsParams(options={"cirkd": {"cirkd_memory": MEMORY}})
# Without a teacher, plain, with an adapter, an adversary, a memory bank, masks that are drawn, RDD.
EIGHT = ("baseline", "kd", "fitnet", "cwd", "skd", "cirkd", "mgd", "tse")


@pytest.fixture
def make(blocks, teacher, make_job, tmp_path):
    """Function that makes the training of a method, kept in a folder."""

    def call(method, folder="together", *, state=None, **fields):
        job = make_job(method, methods=OPTIONS, **fields)
        needed = teacher if job.definition.needs_teacher else None
        return Training(job, blocks.images, needed, state).stored_in(tmp_path / folder)

    return call


@pytest.fixture
def alone(make_job, reference):
    """Function that says how the training of a method ends by itself."""
    return lambda method, **fields: reference(make_job(method, methods=OPTIONS, **fields))


@pytest.fixture
def asked(monkeypatch):
    """Sizes of the batches that the teacher has computed."""
    sizes, ask = [], Teacher._ask

    def counting(self, images):
        sizes.append(len(images))
        return ask(self, images)

    monkeypatch.setattr(Teacher, "_ask", counting)
    return sizes


def _loaded(training):
    """What `train` finds done."""
    result = train(training, TOGETHER)
    assert result.trained == 0
    return result


def test_eight_students_end_as_by_themselves_for_the_teachers_work_of_one(make, asked, alone):
    """They draw numbers in every step: dropout, masks, pixels of the memory."""
    recipe = {"iterations": 4, "validate_every": 2, "augment": {"crop": (128, 128)}}
    fields = {"recipe": recipe, "rdd": {"tfe_length": 2}}
    trainings = {method: make(method, **fields) for method in EIGHT}
    student = network_from_params(trainings["kd"].job.network, num_classes=3)
    assert any(isinstance(module, nn.Dropout | nn.Dropout2d) for module in student.modules())
    train_together([Student(training) for training in trainings.values()], TOGETHER)
    assert asked == [2] * 4
    for method, training in trainings.items():
        assert same_training(_loaded(training), alone(method, **fields)), method


@pytest.mark.parametrize(
    ("late", "parts"),
    [
        pytest.param(False, 1, id="at once"),
        pytest.param(True, 2, id="as on CUDA, in parts"),
        pytest.param(False, 2, id="at once, in parts", marks=pytest.mark.slow),
        pytest.param(True, 1, id="as on CUDA", marks=pytest.mark.slow),
    ],
)
def test_however_a_step_is_computed(make, asked, monkeypatch, late, parts):
    monkeypatch.setattr(loop, "reads_later", lambda device: late)
    monkeypatch.setattr(schedule, "fused", lambda parameters: True)
    recipe = {"iterations": 4, "gradient_accumulation_steps": parts, "batch_size": 4}
    trainings = [make(method, recipe=recipe) for method in ("kd", "at")]
    train_together(list(map(Student, trainings)), TOGETHER)
    assert asked == [4 // parts] * 4 * parts
    for training in trainings:
        alone = train(make(training.job.method, "alone", recipe=recipe), CPU)
        assert same_training(_loaded(training), alone)
        assert _curves(_loaded(training)) == _curves(alone)


def _curves(result):
    return [row for row in result.history if "val.miou" in row]


def test_those_that_are_behind_catch_up(make, asked, alone):
    """One has not begun, one stands at 3, one is done; nothing is computed for nobody."""

    class Stop(Exception):  # noqa: N818
        pass

    def stop_at_three(iteration, values):
        if iteration == 4:
            raise Stop

    often = CPU.model_copy(update={"log_every": 1})
    with pytest.raises(Stop):
        train(make("kd"), often, on_log=stop_at_three)
    train(make("at"), CPU)
    asked.clear()
    trainings = [make(method) for method in ("dist", "kd", "at")]
    train_together(list(map(Student, trainings)), TOGETHER)
    assert asked == [2] * 8
    for training in trainings:
        assert same_training(_loaded(training), alone(training.job.method))


@pytest.mark.parametrize("by_event", [False, True])
def test_a_stop_in_the_middle_keeps_all_and_they_go_on(make, alone, caplog, by_event):
    event = threading.Event() if by_event else None

    def stop(iteration, values):
        if iteration == 3:
            event.set() if event else os.kill(os.getpid(), signal.SIGTERM)

    recipe = {"iterations": 5}
    trainings = [make(method, recipe=recipe) for method in ("kd", "at", "baseline")]
    one, *others = trainings
    with pytest.raises(
        TrainingInterruptedError,
        match=r"^group of 3 students \(kd, at, baseline\) was asked to stop after iteration 3 of 5",
    ):
        train_together([Student(one, stop), *map(Student, others)], RARELY, stop=event)
    assert [training.store.latest().iteration for training in trainings] == [3, 3, 3]
    train_together(list(map(Student, trainings)), RARELY)
    for training in trainings:
        assert same_training(_loaded(training), alone(training.job.method, recipe=recipe))


def test_the_next_stage_joins_when_the_one_before_ends(make, asked):
    """RDD in two stages beside KD; TFE alone was done before, in the second turn."""

    def joined(folder):
        def then(state):
            return Student(make("tse", folder, stage="tse", state=state))

        return [Student(make("kd", folder)), Student(make("tfe", folder, stage="tfe"), then=then)]

    alone = {"kd": train(make("kd", "alone"), CPU)}
    alone["tfe"] = tfe = train(make("tfe", "alone", stage="tfe"), CPU)
    alone["tse"] = train(make("tse", "alone", stage="tse", state=tfe.state), CPU)
    for folder, iterations in (("both", 8), ("later", 8)):
        if folder == "later":
            train(make("tfe", folder, stage="tfe"), CPU)
        asked.clear()
        train_together(joined(folder), TOGETHER)
        assert asked == [2] * iterations
        assert same_training(_loaded(make("kd", folder)), alone["kd"])
        tfe = _loaded(make("tfe", folder, stage="tfe"))
        assert same_training(tfe, alone["tfe"])
        tse = _loaded(make("tse", folder, stage="tse", state=tfe.state))
        assert same_training(tse, alone["tse"])


def test_each_seed_has_a_group_of_its_own(make, asked, alone):
    trainings = [make(method, seed=seed) for seed in (0, 1) for method in ("kd", "at")]
    train_together(list(map(Student, trainings)), TOGETHER)
    assert asked == [2] * 16
    assert same_training(_loaded(trainings[3]), alone("at", seed=1))


def test_who_diverges_leaves_the_others_alone(make, alone, caplog):
    wild = make("kd", recipe={"optimizer": OptimizerParams(lr=1e38, momentum=0.0)})
    others = [make(method) for method in ("at", "dist")]
    train_together([Student(wild), *map(Student, others)], TOGETHER)
    assert "kd: non-finite at iteration" in caplog.text
    assert "The other students go on." in caplog.text
    for training in others:
        assert same_training(_loaded(training), alone(training.job.method))
    with pytest.raises(NonFiniteLossError, match="kd: non-finite"):
        train(wild, CPU)


def test_if_all_diverge_each_says_so_itself(make):
    wild = {"optimizer": OptimizerParams(lr=1e38, momentum=0.0)}
    trainings = [make(method, recipe=wild) for method in ("kd", "at")]
    train_together(list(map(Student, trainings)), TOGETHER)
    with pytest.raises(NonFiniteLossError):
        train(trainings[1], CPU)


def test_whoever_has_nobody_to_share_with_is_left_alone(make):
    train_together([], TOGETHER)
    train_together([Student(make("kd"))], TOGETHER)
    train_together([Student(make("at", seed=1)), Student(make("at"))], TOGETHER)
    few = TOGETHER.model_copy(update={"share_teacher": 1})
    train_together([Student(make("kd")), Student(make("at"))], few)
    assert all(make(m).store.latest() is None for m in ("kd", "at"))


@pytest.mark.parametrize(
    ("count", "at_once", "sizes"),
    [
        (8, True, [8]),
        (8, 8, [8]),
        (7, 3, [2, 2, 3]),
        (4, 3, [2, 2]),
        (3, False, [1] * 3),
        (0, 2, []),
    ],
)
def test_parts_are_few_and_even(count, at_once, sizes):
    parts = list(shared._parts(range(count), at_once))
    assert [len(part) for part in parts] == sizes
    assert [student for part in parts for student in part] == list(range(count))


def test_memory_that_runs_out_says_how_many_there_were(make, monkeypatch):
    def step(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(loop.Trainer, "step", step)
    students = [Student(make(method)) for method in ("kd", "at", "dist", "ifvd")]
    with pytest.raises(
        UserError,
        match=r"with 4 students at once under one teacher, .*Train fewer at once "
        r"\(trainer.share_teacher=2\), or lower",
    ):
        train_together(students, TOGETHER)


def test_clocks_add_up_and_one_line_is_shown(make, caplog, monkeypatch):
    monkeypatch.setattr("rdd_pipeline.training.progress.LINE_EVERY", 0.0)
    caplog.set_level(logging.INFO)
    trainings = [make(method) for method in ("kd", "at")]
    begin = time.monotonic()
    train_together(list(map(Student, trainings)), TOGETHER)
    wall = time.monotonic() - begin
    costs = [_loaded(training).state.cost for training in trainings]
    assert all(cost.images == 16 for cost in costs)
    assert 0 < sum(cost.seconds for cost in costs) < wall
    assert "Trained together, under one teacher: kd, at." in caplog.text
    lines = [r.getMessage() for r in caplog.records if "group of 2" in r.getMessage()]
    assert re.search(
        r"group of 2 students \(kd, at\) 8/8  2 x [\d.]+ img/s.* best mIoU [\d.]+ \(", lines[-1]
    )


@pytest.mark.parametrize(
    ("fields", "name"), [({"devices": 2}, "devices 2"), ({"profile": True}, "profile True")]
)
def test_what_does_not_go_together_is_refused(fields, name):
    with pytest.raises(ValueError, match=f"share_teacher is True and {name}"):
        TrainerParams(share_teacher=True, **fields)


@pytest.mark.parametrize("value", [0, -1, 1.5, "yes"])
def test_the_number_of_students_is_one(value):
    with pytest.raises(ValueError, match="share_teacher"):
        TrainerParams(share_teacher=value)
