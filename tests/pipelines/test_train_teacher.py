"""The teacher whose weights are given."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from rdd_pipeline.config import (
    EvaluationParams,
    MethodsParams,
    RddParams,
    TeacherParams,
)
from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import NetworkCheckpoint, network_from_params, save_checkpoint
from rdd_pipeline.pipelines import method_nodes
from rdd_pipeline.pipelines.method_nodes import (
    check_networks,
    make_draw_node,
    make_evaluate_node,
    make_plan_node,
    make_train_node,
    measure_networks,
    the_only,
)
from rdd_pipeline.pipelines.train_teacher.nodes import import_weights
from tests.pipelines.examples import (
    CPU,
    RECIPE,
    STUDENT,
    TEACHER,
    checkpoint,
)


@pytest.fixture
def teacher_file(tmp_path) -> Path:
    path = tmp_path / "teacher.safetensors"
    save_checkpoint(checkpoint(), path)
    return path


def _other_classes(path: Path) -> None:
    network = network_from_params(TEACHER, num_classes=2)
    save_checkpoint(
        NetworkCheckpoint.from_network(network, params=TEACHER, label_names=("a", "b")), path
    )


def _other_labels(path: Path) -> None:
    network = network_from_params(TEACHER, num_classes=11)
    names = ("Air", *CAMVID.names[1:])
    save_checkpoint(
        NetworkCheckpoint.from_network(network, params=TEACHER, label_names=names), path
    )


def _text(path: Path) -> None:
    path.write_text("these are no weights")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_remove, "teacher.safetensors does not exist"),
        (_other_classes, "Teacher has 2 classes, the label set 11. Choose weights"),
        (_other_labels, "Class 0 is 'Air' for the teacher"),
        (_text, "teacher.safetensors"),
        (_cut, "teacher.safetensors"),
    ],
)
def test_a_teacher_file_that_does_not_fit_is_refused(ingested, teacher_file, fault, message):
    fault(teacher_file)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        import_weights(ingested, TeacherParams(network=TEACHER, weights=teacher_file))


def test_without_a_file_nothing_is_imported(ingested):
    assert import_weights(ingested, TeacherParams(network=TEACHER)) == {}


def test_a_teacher_file_is_imported_evaluated_and_drawn_without_any_training(
    ingested, teacher_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(method_nodes, "train", None)
    given = import_weights(ingested, TeacherParams(network=STUDENT, weights=teacher_file))
    run = tmp_path / "work"
    teacher = TeacherParams(network=STUDENT, weights=teacher_file)
    measured = measure_networks(ingested, given, teacher, STUDENT, RECIPE, RECIPE, run)
    settings = RddParams(tfe_length=1, min_kept=0.1), MethodsParams()
    networks = check_networks(ingested, measured, RECIPE, RECIPE, *settings)
    assert networks["teacher"]["network"]["name"] == TEACHER.name
    rest = (RECIPE, RddParams(), MethodsParams(), EvaluationParams(), 0)
    jobs = make_plan_node("teacher")(ingested, networks, *rest)
    weights, history, training = make_train_node("teacher")(ingested, jobs, CPU, run, given=given)
    metrics, figure = make_evaluate_node("teacher")(
        ingested, weights, training, jobs, EvaluationParams(), CPU, run
    )
    (metrics,) = metrics.values()
    assert isinstance(figure.draw(), Figure)
    assert metrics["about"]["method"] == "teacher"
    assert set(metrics["splits"]) == {"val", "test"}
    history.to_csv(tmp_path / "history.csv", index=False)
    history = pd.read_csv(tmp_path / "history.csv")
    for drawing in make_draw_node("teacher")(history, jobs, ingested, training):
        assert isinstance(drawing.draw(), Figure)


# ---- a teacher of other code

OUTSIDE = {"network": TEACHER, "module": "tests.networks.modules:plain"}


def _planned(ingested, work, **arguments):
    teacher = TeacherParams(**OUTSIDE, arguments={"num_classes": 11, **arguments})
    given = import_weights(ingested, teacher)
    settings = RddParams(tfe_length=1, min_kept=0.1), MethodsParams()
    measured = measure_networks(ingested, given, teacher, STUDENT, RECIPE, RECIPE, work)
    assert not work.exists() or len(list(work.iterdir())) == 1  # of the student alone
    networks = check_networks(ingested, measured, RECIPE, RECIPE, *settings)
    rest = (RECIPE, *settings, EvaluationParams(), 0)
    return given, lambda method: make_plan_node(method)(
        ingested, json.loads(json.dumps(networks)), *rest
    )


def test_a_teacher_of_other_code_is_planned_taken_up_scored_and_teaches(ingested, tmp_path):
    given, plan = _planned(ingested, tmp_path / "plan", gives="aux_logits feature stages")
    run = tmp_path / "work"
    assert plan("teacher") == {}
    weights, _, record = make_train_node("teacher")(ingested, {}, CPU, run, given=given)
    metrics, _ = make_evaluate_node("teacher")(
        ingested, weights, record, {}, EvaluationParams(), CPU, run
    )
    (metrics,) = metrics.values()
    assert metrics["about"]["network"] == OUTSIDE["module"]
    assert metrics["cost"]["parameters"] == sum(
        p.numel() for p in the_only(weights).build().parameters()
    )
    for method in ("cwd", "tse_mgd"):
        jobs = plan(method)
        assert jobs["0"].method == method
    _, history, _ = make_train_node("cwd")(ingested, plan("cwd"), CPU, run, weights)
    assert (history["cwd_feature"].dropna() > 0).all()


@pytest.mark.parametrize(
    ("gives", "method", "message"),
    [
        ("", "fitnet", "'fitnet' cannot be trained. It compares the networks' `feature`, and the "
         "teacher's module gives logits only"),
        ("feature", "mgd", "compares the networks' `stages`, and the .* logits and feature o"),
        ("", "dsd", r"do without: kd, (\w+, )*dist, bpkd"),
        ("feature", "af_dcd", r"do without: kd, fitnet, at, .*cirkd, dist, .*bpkd"),
    ],
)  # fmt: skip
def test_what_a_method_lacks_of_a_teacher_is_named_before_anything_starts(
    ingested, gives, method, message, tmp_path
):
    _, plan = _planned(ingested, tmp_path / "plan", gives=gives)
    assert plan("kd")
    with pytest.raises(UserError, match=message):
        plan(method)
