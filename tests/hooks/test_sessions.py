"""The experiment hook inside of real Kedro sessions: what a run records."""

from __future__ import annotations

import os
import time

import pytest
from mlflow import MlflowClient

from rdd_pipeline.commands import kedro_command
from rdd_pipeline.errors import RunInterrupted, UserError
from tests.hooks.project import Project


def test_every_namespace_has_a_child_run_with_equal_keys(project: Project) -> None:
    project.run("kd", "cwd")
    runs = project.runs()
    assert set(runs) == {"small", "kd", "cwd"}
    for method, epochs in (("kd", 2), ("cwd", 3)):
        run = runs[method]
        assert run.info.status == "FINISHED"
        assert run.data.tags["method"] == method
        assert run.data.tags["mlflow.parentRunId"] == runs["small"].info.run_id
        assert run.data.params == {
            "train.epochs": str(epochs),
            "train.fault": "",
            "train.size": "(1, 2)",
            "seed": "3",
        }
        assert project.curve(run) == [1.0 / step for step in range(1, epochs + 1)]
        assert run.data.metrics["test.miou"] == 0.5
        assert run.data.metrics["test.iou.road"] == 0.25
    assert set(runs["kd"].data.metrics) == set(runs["cwd"].data.metrics)
    assert runs["small"].data.params == {}


def test_one_namespace_needs_no_child(project: Project) -> None:
    project.run("kd")
    runs = project.runs()
    assert set(runs) == {"small"}
    assert runs["small"].data.tags["method"] == "kd"
    assert project.curve(runs["small"]) == [1.0, 0.5]


def test_runs_say_where_they_come_from(project: Project) -> None:
    project.run("kd", "cwd", env="camvid")
    runs = project.runs()
    (version,) = [path.name for path in (project.path / "data" / "facts.json").iterdir()]
    for run in runs.values():
        tags = run.data.tags
        assert tags["dataset"] == "scenes"
        assert tags["env"] == "camvid"
        assert tags["version"] == version
        assert tags["data_digest"] == "abc"
    assert runs["kd"].data.tags["input.facts"] == version
    assert runs["small"].data.tags["kedro_command"] == ("kedro run --pipelines=small --env=camvid")


def test_nodes_learn_what_the_session_was_started_with(project: Project) -> None:
    project.run("kd", env="camvid", params={"seed": 4, "kd": {"train": {"epochs": 1}}})
    assert kedro_command("small") == (
        "kedro run --pipeline=small --env=camvid --params=seed=4,kd.train.epochs=1"
    )
    project.run("kd")
    assert kedro_command("small") == "kedro run --pipeline=small"


def test_files_are_mirrored_beside_the_database_of_the_project(project: Project) -> None:
    project.run("kd")
    (run,) = project.runs().values()
    client = MlflowClient(tracking_uri=project.uri)
    assert [a.path for a in client.list_artifacts(run.info.run_id, "texts")] == ["texts/kd.txt"]
    assert str(run.info.artifact_uri).startswith((project.path / "mlartifacts").as_uri())


def test_threads_do_not_mix_their_runs(project: Project) -> None:
    from kedro.runner import ThreadRunner

    project.run("kd", "cwd", runner=ThreadRunner())
    runs = project.runs()
    assert project.curve(runs["kd"]) == [1.0, 0.5]
    assert project.curve(runs["cwd"]) == [1.0, 0.5, 1.0 / 3]
    assert runs["kd"].data.params["train.epochs"] == "2"


def test_two_sessions_in_one_process_are_two_runs(project: Project) -> None:
    project.run("kd")
    project.run("kd")
    client = MlflowClient(tracking_uri=project.uri)
    experiment = client.get_experiment_by_name("rdd_scenes")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    assert all(project.curve(run) == [1.0, 0.5] for run in runs)
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.parametrize(("fault", "kind"), [("user", UserError), ("crash", RuntimeError)])
def test_a_failed_node_fails_its_run_and_keeps_the_others(
    project: Project, fault: str, kind: type[Exception]
) -> None:
    params = {"kd": {"train": {"epochs": 1, "fault": fault}}}
    with pytest.raises(kind):
        project.run("cwd", "kd", params=params)
    runs = project.runs()
    assert runs["cwd"].info.status == "FINISHED"
    assert runs["kd"].info.status == runs["small"].info.status == "FAILED"
    for name in ("kd", "small"):
        assert runs[name].data.tags["error"].startswith(kind.__name__)
        assert runs[name].data.tags["failed_node"] == "kd.train_node"
    assert project.curve(runs["kd"]) == [1.0]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_is_marked_killed(project: Project, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(RunInterrupted, match=f"stopped by {name}"):
        project.run("kd", params={"kd": {"train": {"epochs": 1, "fault": name}}})
    assert time.monotonic() - start < 15
    (run,) = project.runs().values()
    assert run.info.status == "KILLED"
    assert project.curve(run) == [1.0]


def test_only_the_first_of_several_processes_tells_mlflow(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    project.run("kd")
    assert project.runs() == {}


def test_a_given_run_is_used_and_left_open(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri=project.uri)
    run_id = client.create_run("0", run_name="outer").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    project.run("kd")
    run = project.runs()["outer"]
    assert run.info.status == "RUNNING"
    assert project.curve(run) == [1.0, 0.5]
    assert run.data.tags["method"] == "kd"
