"""Nodes of the pipeline `sweep`, and what is refused before any of them runs."""

from __future__ import annotations

import logging

import pandas as pd
import pytest

from rdd_pipeline import commands as rdd_commands
from rdd_pipeline import tracking
from rdd_pipeline.commands import Session
from rdd_pipeline.config import MethodsParams, Parameters, RddParams, SweepParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.hooks.sweep import check_sweep
from rdd_pipeline.pipelines.method_nodes import make_train_node
from rdd_pipeline.pipelines.sweep import nodes
from rdd_pipeline.pipelines.sweep.nodes import (
    draw_sweep,
    plan_trials,
    summarize_sweep,
    train_trials,
)
from tests.pipelines.examples import CPU, RECIPE, STUDENT, TEACHER, change, plan

RDD = RddParams(tfe_length=2, min_kept=0.1)
PARAMETERS = {
    "student": STUDENT, "recipe": RECIPE, "rdd": RDD, "methods": MethodsParams(),
    "evaluation": {}, "seed": 0, "seeds": 1,
}  # fmt: skip
NETWORKS = {
    role: {"network": params.model_dump(mode="json"), "given": False}
    for role, params in (("teacher", TEACHER), ("student", STUDENT))
}
SWEEP = SweepParams(
    parameters={"rdd.threshold": [0.3, 0.9], "recipe.optimizer.lr": [RECIPE.optimizer.lr, 1e30]}
)


def planned(images, sweep, seeds=1):
    return plan_trials(images, NETWORKS, sweep, plan("baseline", images, rdd=RDD, seeds=seeds))


@pytest.fixture
def run(ingested, teacher, tmp_path):
    def run(sweep=SWEEP, trainer=CPU, folder="work", seeds=1):
        trials = planned(ingested, sweep, seeds)
        folder = tmp_path / folder
        return trials, train_trials(ingested, trials, {"0": teacher}, sweep, trainer, folder)

    return run


def test_trials_are_ordinary_trainings_ranked_by_val_and_trained_once(
    run, ingested, teacher, tmp_path, monkeypatch, caplog
):
    trained, real, told, failed = [], nodes.train, [], []

    def train(training, *rest):
        result = real(training, *rest)
        trained.append((training.job.method, result.trained))
        return result

    monkeypatch.setattr(nodes, "train", train)
    tracking.set_param_sink(lambda values, method: told.append((method, dict(values))))
    tracking.set_failure_sink(lambda problem, method: failed.append((method, problem)))
    try:
        _, table = run()
    finally:
        tracking.set_param_sink(None)
        tracking.set_failure_sink(None)
    # The TFE stage does not look at the threshold: the second trial finds the first one's.
    assert trained == [("tfe", 1), ("tse", RECIPE.iterations - 1), ("tfe", 0), trained[1]]
    assert list(table.trial[2:]) == [2, 4]
    assert all("non-finite at iteration 1" in reason for reason in table.failed[2:])
    assert (table.failed[:2] == "").all()
    assert told[0] == ("trial 1", {"rdd.threshold": "0.3", "recipe.optimizer.lr": "0.05"})
    assert failed == [("trial 2", table.failed[2]), ("trial 4", table.failed[3])]

    # The same settings by the ordinary nodes: the same work, and the score of its best weights.
    jobs = plan("tfe", ingested, rdd=change(RDD, threshold=0.3))
    *_, states = make_train_node("tfe")(ingested, jobs, CPU, tmp_path / "work", {"0": teacher})
    jobs = plan("tse", ingested, rdd=change(RDD, threshold=0.3))
    caplog.set_level(logging.INFO)
    networks, history, _ = make_train_node("tse")(
        ingested, jobs, CPU, tmp_path / "work", {"0": teacher}, initial_states=states
    )
    assert "already trained" in caplog.text
    (row,) = table[table.trial == 1].to_dict("records")
    header = networks["0"].header.provenance
    assert row["fingerprints"] == header["fingerprint"]
    assert row["iteration"] == int(header["iteration"])
    assert row["val.miou"] == history["val.miou"].max()

    trained.clear()
    _, again = run()
    assert all(steps == 0 for _, steps in trained)
    pd.testing.assert_frame_equal(again, table)


def test_several_seeds_and_a_shared_teacher_give_the_same_numbers(run):
    sweep = SweepParams(method="kd", parameters={"methods.kd": [0.5, 2.0]}, budget=2)
    alone, shared = (
        run(sweep, change(CPU, share_teacher=share), str(share), seeds=2)[1]
        for share in (False, True)
    )
    columns = [name for name in alone if name != "seconds"]
    pd.testing.assert_frame_equal(alone[columns], shared[columns])
    assert (alone["iteration"] == 2).all()
    assert all(len(text.split()) == 2 for text in alone.fingerprints)
    assert alone.deviation.notna().all()


def test_the_table_ends_with_the_command_for_the_best(ingested, monkeypatch, tmp_path, capsys):
    given = {"sweep": {"parameters": {"rdd": {"mode": "xor/or"}}}, "trainer": {"threads": 1}}
    monkeypatch.setattr(rdd_commands, "_session", Session(env="test", params=given))
    rows = [
        {"trial": 2, "rdd.mode": "or", "failed": "", "val.miou": 0.5},
        {"trial": 1, "rdd.mode": "xor", "failed": "lost", "val.miou": float("nan")},
    ]
    table = pd.DataFrame(rows)
    sweep = SweepParams(parameters={"rdd.mode": ["xor", "or"]})
    trials = [nodes.Trial(n, {"rdd.mode": m}, ({"0": None},)) for n, m in ((1, "xor"), (2, "or"))]
    text = summarize_sweep(table, trials, sweep, tmp_path)
    assert "| 2 | or | 50.0 |\n| 1 | xor | failed |" in text
    last = (
        "scored on test: kedro run --pipeline=distill_tse --env=test "
        "--params=trainer.threads=1,rdd.mode=or"
    )
    assert text.endswith(last + "\n")
    assert last in capsys.readouterr().out
    # As Kedro loads it: what did not fail is an empty cell.
    figure = draw_sweep(ingested, table.replace("", None), sweep).draw()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["or", "xor"]


def test_what_cannot_be_trained_stops_the_sweep_before_it_begins(ingested, run):
    sweep = SweepParams(parameters={"rdd.tfe_length": [1, 99]})
    with pytest.raises(UserError, match=r"Trial 2 .*rdd.tfe_length=99.*the run has"):
        run(sweep)
    with pytest.raises(UserError, match=r"All 1 trials failed. The first: .*non-finite"):
        run(SweepParams(method="baseline", parameters={"recipe.optimizer.lr": [1e30]}))
    images = ingested.__class__(
        ingested.root, [s for s in ingested.samples if s.split != "val"], ingested.labels
    )
    with pytest.raises(UserError, match="split `val`, which has no images"):
        planned(images, SWEEP)


class _Catalog:
    def __init__(self, sweep):
        self._values = {name: {} for name in Parameters.model_fields} | PARAMETERS
        self._values |= {"data": {"layout": "scenes"}, "teacher": {"network": TEACHER}}
        self._sweep = sweep

    def inputs(self):
        return {"params:sweep"}

    def load(self, name):
        return self._values if name == "parameters" else self._sweep


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameters": {"rdd.treshold": [1]}}, r"no parameter \(did you mean rdd.threshold\?\)"),
        ({"parameters": {"rdd.threshold": [0.1, 1.5]}}, "Trial 2 .*rdd.threshold is 1.5: Input"),
        ({"parameters": {"recipe.ema.decay": [1]}}, "recipe.ema.decay is 1: Input should be less"),
        ({"parameters": {"methods.weights.cwd.cwd": [1]}}, "cwd"),
        ({"parameters": {"rdd.threshold": [1]}, "method": "tfe"}, "ends with a student"),
        ({"parameters": {"rdd.threshold": [1]}, "method": "tes"}, "There is no method 'tes'"),
    ],
)
def test_names_and_values_are_checked_before_anything_is_read(fields, message):
    catalog = _Catalog(SweepParams(**fields))
    with pytest.raises(UserError, match=message):
        check_sweep(catalog, catalog)


def test_what_fits_passes():
    parameters = {"methods.weights.cwd.cwd_logits": [1, 3], "recipe.ema.decay": [0.9]}
    catalog = _Catalog(SweepParams(method="cwd", parameters=parameters))
    check_sweep(catalog, catalog)
