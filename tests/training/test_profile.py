"""`trainer.profile`: where the time of a step goes."""

from __future__ import annotations

import csv
import gzip
import json
import logging

import pytest

from rdd_pipeline.training import profile
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.training import Training
from tests.equal import same_training

from .conftest import CPU

PROFILED = CPU.model_copy(update={"profile": True, "checkpoint_every": 1e6})


@pytest.fixture
def training(blocks, teacher, make_job, tmp_path):
    def training(iterations, method="kd", **recipe):
        job = make_job(method, recipe={"iterations": iterations, "validate_every": 100, **recipe})
        return Training(job, blocks.images, teacher).stored_in(tmp_path)

    return training


def test_a_table_by_phase_and_a_trace_are_left_and_weights_stay_the_same(
    training, caplog, monkeypatch
):
    monkeypatch.setattr(profile, "TIMED", 3)
    plain = training(9)
    expected = train(Training(plain.job, plain.images, plain.teacher), CPU)
    with caplog.at_level(logging.INFO):
        assert same_training(train(plain, PROFILED), expected)
    folder = plain.store.profile
    assert sorted(path.name for path in folder.iterdir()) == sorted(profile.FILES)
    with (folder / "phases.csv").open() as stream:
        rows = {row["phase"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["data", "teacher", "student", "losses", "backward", "optimizer"]
    assert all(float(row["ms"]) > 0 for row in rows.values())
    assert sum(float(row["share"]) for row in rows.values()) == pytest.approx(1, abs=1e-3)
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert any("convolution" in str(name) for name in names)
    assert "kd: time of a step: data " in caplog.text
    assert profile._clock is None


def test_parts_of_a_batch_have_a_phase_of_their_own(training, monkeypatch):
    monkeypatch.setattr(profile, "WARM_UP", 0)
    work = training(2, "baseline", gradient_accumulation_steps=2)
    train(work, PROFILED)
    table = (work.store.profile / "phases.csv").read_text()
    assert [row.split(",")[0] for row in table.splitlines()] == [
        *("phase", "data", "forward and backward in parts", "optimizer")
    ]


def test_a_training_that_ends_before_leaves_nothing(training):
    work = training(2, "baseline")
    train(work, PROFILED)
    assert not work.store.profile.exists()


def test_nothing_is_measured_unless_asked_for(training):
    work = training(5, "baseline")
    train(work, CPU)
    assert not work.store.profile.exists()
    assert profile.phase("teacher").__class__.__name__ == "nullcontext"
