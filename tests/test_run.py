"""Whole runs through Kedro: what a user types, in a folder of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from torch.testing import assert_close

import rdd_pipeline
from rdd_pipeline.errors import DataProblem, NonFiniteLossError, RunInterrupted, UserError
from rdd_pipeline.networks import (
    load_checkpoint,
)
from rdd_pipeline.pipelines import method_nodes
from rdd_pipeline.training.state import loads
from tests.kedro_project import ROOT, Project, bootstrap
from tests.mlflow_store import new_store

STUDENT = "06_models/test/student_tse/0.safetensors"
METRICS = "07_model_output/test/metrics"


class Trained(NamedTuple):
    """One call of `train` in a run."""

    method: str
    stage: str
    iterations: int


class Session(NamedTuple):
    """What one Kedro run did."""

    trained: list[Trained]
    runs: list[Run]


class Recorder:
    """Runs pipelines, counts the iterations they train and looks their MLflow runs up."""

    def __init__(self, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.client = MlflowClient(tracking_uri=uri)
        self.trained: list[Trained] = []
        self._seen: set[str] = set()
        train = method_nodes.train

        def counted(training, trainer, on_log):
            job, result = training.job, train(training, trainer, on_log)
            self.trained.append(Trained(job.method, job.stage, result.trained))
            return result

        monkeypatch.setattr(method_nodes, "train", counted)

    def run(self, project: Project, *pipelines: str, **options) -> Session:
        self.trained.clear()
        project.run(*pipelines, **options)
        return Session(list(self.trained), self.new_runs())

    def new_runs(self) -> list[Run]:
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        runs = [r for r in self.client.search_runs(experiments) if r.info.run_id not in self._seen]
        self._seen |= {run.info.run_id for run in runs}
        return runs


@pytest.fixture(scope="module")
def recorder(tmp_path_factory) -> Iterator[Recorder]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        uri = new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        bootstrap()
        yield Recorder(uri, monkeypatch)


class Story(NamedTuple):
    """The sessions of one project, one after the other."""

    project: Project
    first: Session
    second: Session
    baselines: Session
    evaluation: Session


@pytest.fixture(scope="module")
def story(tmp_path_factory, recorder) -> Story:
    project = Project(tmp_path_factory.mktemp("project"))
    first = recorder.run(project, "distill_tse", rendered=True)
    with pytest.MonkeyPatch.context() as patch:
        # Nothing is built where nothing is to do, and so timm is not imported (test_startup).
        patch.setattr("rdd_pipeline.networks.network.make_backbone", None)
        second = recorder.run(project, "distill_tse")
    return Story(
        project,
        first,
        second,
        baselines=recorder.run(
            project, "distill_baselines", to_outputs=["metrics_baseline", "metrics_kd"]
        ),
        evaluation=recorder.run(project, "evaluation", rendered=True),
    )


def _by_method(runs: list[Run]) -> tuple[Run, dict[str, Run]]:
    """The run of the session and its children by method."""
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    children = {r.data.tags["method"]: r for r in runs if r is not parents[0]}
    for child in children.values():
        assert child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
    return parents[0], children


# ---- the main job


def test_the_main_job_trains_teacher_and_both_stages(story):
    assert [one for one in story.first.trained if one.method != "baseline"] == [
        Trained("teacher", "whole", 4),
        Trained("tfe", "tfe", 3),
        Trained("tse", "tse", 3),
    ]
    assert Trained("baseline", "whole", 6) in story.first.trained


def test_the_main_job_leaves_weights_metrics_figures_and_a_summary(story):
    expected = {
        "06_models/test": [
            "teacher/0.safetensors",
            "student_tfe/0.safetensors",
            "state_tfe/0.ckpt",
        ],
        METRICS: ["teacher/0.json", "tfe/0.json", "tse/0.json", "baseline/0.json"],
        "07_model_output/test/history": ["teacher.csv", "tse.csv"],
        "08_reporting/test": [
            "confusion_teacher.png",
            "confusion_tse.png",
            "curves_tse.png",
            "pixels_tse.png",
            "summary.md",
        ],
    }
    for folder, names in expected.items():
        for name in names:
            path = story.project.versions(f"{folder}/{name}")[0]
            assert path.stat().st_size > 0
    for name in ("data_preview.png", "label_statistics.csv"):
        assert (story.project.folder / "data/08_reporting/test" / name).stat().st_size > 0


def test_the_student_can_be_used_without_this_project_s_configuration(story):
    checkpoint = load_checkpoint(story.project.newest(STUDENT))
    assert checkpoint.header.provenance["method"] == "tse"
    logits = checkpoint.build()(torch.zeros(1, 3, 48, 64)).logits
    assert logits.shape[:2] == (1, 11)


def test_the_student_predicts_what_it_predicted_when_it_was_scored(story, recorder):
    images = next((story.project.folder / "data/01_raw/test").rglob("test"))
    session = recorder.run(story.project, "predict", params={"predict": {"images": str(images)}})
    assert session.trained == []
    table = pd.read_csv(story.project.newest("07_model_output/test/prediction_table.csv"))
    assert len(table) == 2
    model = rdd_pipeline.load(
        story.project.folder / "data/06_models/test/student_tse", device="cpu"
    )
    folder = story.project.folder / "data/07_model_output/test/predictions"
    labels, confusion = model.label_names, np.zeros((11, 11), int)
    for row in table.itertuples():
        stored = np.asarray(Image.open(folder / row.mask))
        assert np.array_equal(stored, model(images / row.image))
        assert row.share_Sky == pytest.approx((stored == labels.index("Sky")).mean(), abs=1e-5)
        truth = np.asarray(Image.open(images.parent / "testannot" / row.image))
        np.add.at(confusion, (truth[truth < 11], stored[truth < 11]), 1)
    scored = story.project.json(f"{METRICS}/tse/0.json")["splits"]["test"]["confusion"]
    assert confusion.tolist() == scored


def test_metrics_hold_scores_of_every_split_cost_and_origin(story):
    metrics = story.project.json(f"{METRICS}/tse/0.json")
    assert set(metrics) == {"digest", "about", "cost", "splits"}
    assert set(metrics["splits"]) == {"val", "test"}
    for scores in metrics["splits"].values():
        assert 0 <= scores["miou"] <= 1
        assert sum(map(sum, scores["confusion"])) <= 2 * 48 * 64
    assert metrics["cost"]["images_per_second"] > 0
    assert metrics["about"]["seed"] == "0"
    checkpoint = load_checkpoint(story.project.newest(STUDENT))
    network = checkpoint.build()
    trained = sum(p.numel() for p in network.parameters())
    head = sum(p.numel() for p in network.auxiliary.parameters())
    assert metrics["cost"]["trained_parameters"] == trained
    assert metrics["cost"]["parameters"] == trained - head


def test_the_summary_names_teacher_and_student(story):
    lines = story.project.newest("08_reporting/test/summary.md").read_text().splitlines()
    assert lines[0] == "| network |  | parameters | val | test | vs. alone (test) |"
    names = [line.split(" | ")[0] for line in lines[2:] if line.startswith("|")]
    assert names == ["| teacher", "| student alone", "| student by RDD"]


def test_figures_are_png(story):
    for path in (story.project.folder / "data/08_reporting").rglob("*.png"):
        if path.is_file():
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---- the same again


def test_the_second_run_trains_nothing(story):
    assert [one.iterations for one in story.second.trained] == [0, 0, 0, 0]


def test_nothing_that_is_as_it_was_has_a_second_version(story):
    """Networks, states, scores, tables and figures, of four commands."""
    links = list((story.project.folder / "data").rglob("latest"))
    assert len(links) > 20
    for link in links:
        (version,) = (path.name for path in link.parent.iterdir() if path != link)
        assert os.readlink(link) == version


# ---- baselines and evaluation


def test_the_baselines_reuse_the_teacher(story):
    assert sorted(story.baselines.trained) == [
        Trained("baseline", "whole", 0),
        Trained("kd", "whole", 6),
        Trained("teacher", "whole", 0),
    ]


def test_the_comparison_has_a_row_for_everything_trained(story):
    table = pd.read_csv(story.project.newest("08_reporting/test/comparison.csv"))
    assert set(table["method"]) == {"teacher", "baseline", "kd", "tfe", "tse"}
    assert table["method"].iloc[0] == "teacher"
    by_method = table.set_index("method")
    for split in ("val", "test"):
        for method in ("baseline", "kd", "tse"):
            metrics = story.project.json(f"{METRICS}/{method}/0.json")
            assert by_method.loc[method, f"{split}_score"] == pytest.approx(
                100 * metrics["splits"][split]["miou"]
            )
        gain = by_method[f"{split}_score"] - by_method.loc["baseline", f"{split}_score"]
        for method in ("kd", "tse"):
            assert by_method.loc[method, f"{split}_gain"] == pytest.approx(gain[method])
        assert by_method[f"{split}_gain"].isna()[["teacher", "baseline"]].all()
    # Students are compared with each other only when everything but the method is equal.
    assert by_method.loc[["baseline", "kd", "tfe", "tse"], "protocol_digest"].nunique() == 1


# ---- tracking


@pytest.mark.parametrize("name", ["first", "second", "baselines", "evaluation"])
def test_every_session_is_one_finished_run(story, name):
    session: Session = getattr(story, name)
    parent, children = _by_method(session.runs)
    assert all(run.info.status == "FINISHED" for run in session.runs)
    assert (
        set(children)
        == {
            "first": {"teacher", "baseline", "tfe", "tse"},
            "second": {"teacher", "baseline", "tfe", "tse"},
            "baselines": {"teacher", "baseline", "kd"},
            "evaluation": set(),
        }[name]
    )
    tags = parent.data.tags
    assert tags["dataset"] == tags["env"] == "test"
    assert tags["kedro_command"].startswith("kedro run --pipelines=")


def test_runs_are_tagged_with_the_data_they_saw(story):
    digest = json.loads(
        (story.project.folder / "data/02_intermediate/test/data_tags.json").read_text()
    )["data_digest"]
    for session in (story.first, story.second, story.baselines):
        for run in session.runs:
            assert run.data.tags["data_digest"] == digest
            assert run.data.tags["layout"] == "scenes"


def test_runs_are_tagged_with_the_commit(story):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    # The project of this test is no clone: a run there has no commit to name.
    parent, _ = _by_method(story.first.runs)
    assert "git_commit" not in parent.data.tags


def test_methods_have_the_same_metrics_and_parameters(story):
    runs = {**_by_method(story.first.runs)[1], **_by_method(story.baselines.runs)[1]}
    reference = runs["baseline"]

    def scores(run: Run) -> set[str]:
        # A class that neither the labels nor the predictions of one method have is not logged.
        assert any(name.startswith("test_classes/iou.") for name in run.data.metrics)
        folders = ("val", "test", "resources", "miou_val", "miou_test")
        return {name for name in run.data.metrics if name.split("/")[0] in folders}

    def params(run: Run) -> set[str]:
        return {name for name in run.data.params if not name.startswith("method.")}

    assert {"miou_val", "miou_test", "resources/parameters"} <= scores(reference)
    for method in ("kd", "tfe", "tse"):
        assert scores(runs[method]) == scores(reference)
        assert params(runs[method]) == params(reference)
    assert reference.data.params["recipe.optimizer.lr"] == "0.05"
    assert reference.data.params["recipe.iterations"] == "6"


def test_the_method_and_what_makes_it_are_what_differs_between_two_trainings(story):
    runs = _by_method(story.first.runs)[1] | _by_method(story.baselines.runs)[1]
    params = {method: run.data.params for method, run in runs.items()}

    def differing(one: str, other: str) -> dict[str, tuple[str | None, str | None]]:
        names = {*params[one], *params[other]}
        pairs = {name: (params[one].get(name), params[other].get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    found = differing("baseline", "kd")
    assert {name: pair for name, pair in found.items() if not name.startswith("method.kd.")} == {
        "method": ("baseline", "kd"),
        "method.title": ("student alone", "KD"),
        "method.weight.kd": (None, "1.0"),
    }
    assert params["tse"]["method.rdd.mode"] == "xor"


@pytest.mark.parametrize("session", ["first", "second"])
def test_whole_curves_are_in_the_run_each_point_once(story, recorder, session):
    """The second session trains nothing; TSE goes on from TFE's curve."""
    _, children = _by_method(getattr(story, session).runs)
    of_classes = ("rdd/chosen_R", "rdd/hard_both_R", "rdd/hard_student_R")  # Road
    assert not any(name.startswith(of_classes) for name in children["tse"].data.metrics)
    table = pd.read_csv(story.project.versions("07_model_output/test/history/tse.csv")[0])
    for name, column in {"loss": "loss", "miou": "val.miou"}.items():
        history = recorder.client.get_metric_history(children["tse"].info.run_id, name)
        rows = table[table[column].notna()]
        assert [point.step for point in history] == list(rows["iteration"])
        assert [point.value for point in history] == pytest.approx(list(rows[column]))


def test_the_run_of_a_session_has_the_numbers_of_its_table(story):
    parent, children = _by_method(story.first.runs)
    metrics = parent.data.metrics
    for method in ("teacher", "baseline", "tse"):
        for split in ("val", "test"):
            name = f"miou_{split}"
            assert metrics[f"{name}.{method}"] == pytest.approx(children[method].data.metrics[name])
    gain = metrics["miou_test.tse"] - metrics["miou_test.baseline"]
    assert metrics["gain_test.tse"] == pytest.approx(gain)
    assert children["tse"].data.metrics["gain_test"] == metrics["gain_test.tse"]
    (evaluation,) = story.evaluation.runs
    shown = {name: value for name, value in metrics.items() if not name.endswith(".tfe")}
    assert shown.items() <= evaluation.data.metrics.items()
    assert evaluation.data.params["evaluation.metric"] == "miou"


def test_a_teacher_that_is_only_used_shows_what_it_is_worth(story):
    _, first = _by_method(story.first.runs)
    _, later = _by_method(story.baselines.runs)
    missing = {"train/images_per_second", "train/waiting_for_images"}
    costs = {"resources/images_per_second", "resources/training_seconds"}
    costs.add("resources/peak_memory_bytes")
    assert set(first["teacher"].data.metrics) - set(later["teacher"].data.metrics) <= missing
    for name in set(later["teacher"].data.metrics) - costs:
        assert later["teacher"].data.metrics[name] == first["teacher"].data.metrics[name]


def test_runs_name_the_images_they_read(story):
    parent, children = _by_method(story.first.runs)
    for run in (parent, *children.values()):
        inputs = {i.dataset.name: i for i in run.inputs.dataset_inputs}
        assert set(inputs) == {"test train", "test val", "test test"}
        train = inputs["test train"]
        assert train.tags[0].value == "train"
        assert json.loads(train.dataset.profile) == {"images": 8, "classes": 11}
        assert len({used.dataset.digest for used in inputs.values()}) == 3


def test_what_rdd_looked_at_is_at_its_run(story, recorder):
    parent, children = _by_method(story.first.runs)

    def figures(run: Run) -> set[str]:
        found = recorder.client.list_artifacts(run.info.run_id, "figures")
        return {Path(file.path).name for file in found}

    assert figures(children["tse"]) >= {"confusion_tse.png", "curves_tse.png", "pixels_tse.png"}
    assert not any("tse" in name for name in figures(parent))


def test_several_seeds_have_files_and_runs_of_equal_names(story, recorder, tmp_path):
    shutil.copytree(story.project.folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    project = Project(tmp_path)
    done = recorder.run(
        project, "distill_baselines", to_outputs=["metrics_baseline"], params={"seeds": 2}
    )
    students = [one for one in done.trained if one.method == "baseline"]
    assert [one.iterations for one in students] == [0, 6]  # seed 0 is there already
    weights = [f"06_models/test/student_baseline/{seed}.safetensors" for seed in (0, 1)]
    digests = {load_checkpoint(project.newest(path)).digest() for path in weights}
    assert len(digests) == 2
    assert project.versions(weights[0])[-2].samefile(project.newest(weights[0]))
    seeds = {run.data.tags["seed"]: run for run in done.runs if "seed" in run.data.tags}
    (method,) = (
        run
        for run in done.runs
        if run.data.tags.get("method") == "baseline" and "seed" not in run.data.tags
    )
    for seed, run in seeds.items():
        assert run.data.tags["method"] == "baseline"
        assert run.data.tags["mlflow.parentRunId"] == method.info.run_id
        assert run.info.status == "FINISHED"
        metrics = project.json(f"{METRICS}/baseline/{seed}.json")
        assert run.data.metrics["miou_test"] == metrics["splits"]["test"]["miou"]
        assert run.data.params["seed"] == seed
        assert run.data.params["recipe.iterations"] == "6"
    assert set(seeds) == {"0", "1"}
    for split in ("val", "test"):
        values = [run.data.metrics[f"miou_{split}"] for run in seeds.values()]
        found = method.data.metrics
        assert found[f"miou_{split}"] == pytest.approx(statistics.fmean(values))
        assert found[f"miou_{split}_sd"] == pytest.approx(statistics.stdev(values))
    assert "loss" not in method.data.metrics
    # Of seed 0 nothing was trained: its curves are told again.
    timed = {"train/images_per_second", "train/waiting_for_images"}
    names = [{n for n in run.data.metrics if "_classes/" not in n} for run in seeds.values()]
    assert names[0] ^ names[1] <= timed


# ---- one run or two


def test_two_commands_for_the_two_stages_give_the_same_student(story, recorder, tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("stages"))
    stages = recorder.run(project, "distill_tfe")
    assert stages.trained == [Trained("teacher", "whole", 4), Trained("tfe", "tfe", 3)]
    assert not project.versions(STUDENT)
    again = recorder.run(project, "distill_tse")
    iterations = {one.method: one.iterations for one in again.trained}
    assert iterations == {"teacher": 0, "tfe": 0, "tse": 3, "baseline": 6}
    mine, other = (load_checkpoint(where.newest(STUDENT)) for where in (project, story.project))
    assert_close(mine.tensors, other.tensors, rtol=0, atol=0)
    assert mine.header.provenance == other.header.provenance


def test_the_state_between_the_stages_is_whole(story):
    path = story.project.newest("06_models/test/state_tfe/0.ckpt")
    state = loads(path.read_bytes())
    assert state["iteration"] == 3
    assert state["optimizer"]["state"]


# ---- runs that fail


@pytest.fixture
def empty(tmp_path) -> Project:
    return Project(tmp_path)


def _models(project: Project) -> list[Path]:
    return [path for path in (project.folder / "data/06_models").rglob("*") if path.is_file()]


def test_a_wrong_layout_is_named_without_a_run(recorder, empty):
    with pytest.raises(UserError, match=r"Unknown layout 'scene'. Set `data.layout` to one of"):
        recorder.run(empty, "distill_tse", params={"data": {"layout": "scene"}})
    assert recorder.new_runs() == []
    assert not _models(empty)


def test_a_folder_that_is_not_there_is_named_without_a_run(recorder, empty):
    data = {"layout": "camvid", "path": str(empty.folder / "photos")}
    with pytest.raises(DataProblem, match=r"images, .*photos, does not exist. Expected: "):
        recorder.run(empty, "distill_tse", params={"data": data})
    assert recorder.new_runs() == []


def test_a_training_that_fails_is_a_failed_child_of_a_failed_run(recorder, story, tmp_path):
    shutil.copytree(story.project.folder / "data/01_raw", tmp_path / "data/01_raw")
    project = Project(tmp_path)
    params = {"teacher_recipe": {"optimizer": {"lr": 1e30}, "validate_every": 100}}
    with pytest.raises(NonFiniteLossError, match=r"teacher: non-finite at iteration 1: norm"):
        recorder.run(project, "distill_tfe", params=params)
    parent, children = _by_method(recorder.new_runs())
    assert parent.info.status == children["teacher"].info.status == "FAILED"
    assert parent.data.tags["failed_node"].startswith("teacher.train")
    assert "tfe" not in children
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("state-*"))


@pytest.mark.parametrize("seed", ["one", -1, 0.5])
def test_a_wrong_seed_is_named_before_anything_is_trained(recorder, empty, seed):
    with pytest.raises(UserError, match=rf"seed is {seed!r}: .* Nothing was read or trained"):
        recorder.run(empty, "train_teacher", params={"seed": seed})
    assert _models(empty) == []
    assert recorder.new_runs() == []


def test_a_signal_during_the_training_is_a_killed_run_and_the_next_one_goes_on(
    recorder, story, tmp_path, monkeypatch
):
    shutil.copytree(story.project.folder / "data/01_raw", tmp_path / "data/01_raw")
    project = Project(tmp_path)

    def log_metrics(iteration, values, **seed):
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(method_nodes.tracking, "log_metrics", log_metrics)
        with pytest.raises(RunInterrupted, match="teacher was asked to stop after iteration 3"):
            recorder.run(project, "train_teacher")
    assert {run.info.status for run in recorder.new_runs()} == {"KILLED"}
    assert not list(tmp_path.rglob("*.safetensors"))
    assert recorder.run(project, "train_teacher").trained == [Trained("teacher", "whole", 1)]
    weights = "06_models/test/teacher/0.safetensors"
    mine, other = (load_checkpoint(p.newest(weights)) for p in (project, story.project))
    assert_close(mine.tensors, other.tensors, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"recipe": {"iteratons": 5}}, "iteratons"),
        ({"recipe": {"iterations": "many"}}, "iterations"),
        ({"rdd": {"mode": "nor"}}, "mode"),
        ({"trainer": {"device": 3}}, "device"),
        ({"trainer": {"device": "xpu"}}, "trainer.device is 'xpu'"),
        ({"recipes": {"iterations": 5}}, "did you mean recipe.iterations"),
        ({"sead": 5}, "did you mean seed"),
    ],
)
def test_a_wrong_parameter_is_named_before_anything_is_read(recorder, empty, params, message):
    with pytest.raises(UserError, match=message) as info:
        recorder.run(empty, "distill_tse", params=params)
    assert len(str(info.value).splitlines()) == 1
    assert not (empty.folder / "data").exists()
    assert not recorder.new_runs()
