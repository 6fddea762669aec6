"""Event files of TensorBoard, where `trainer.tensorboard` asks for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rdd_pipeline import tracking
from rdd_pipeline.config import TrainerParams
from rdd_pipeline.hooks.tensorboard import FILE_NAME, TensorBoardHook
from tests.tracking.events import read_points

NODE: Any = SimpleNamespace(namespace="kd", tags=set())
WORK = "0123456789abcdef"


def _hook(folder: Path, *, on: bool = True) -> TensorBoardHook:
    """Of a session, before its first node."""
    entries = {"params:trainer": TrainerParams(tensorboard=on), "reporting_folder": folder}
    scores = SimpleNamespace(metadata={"mlflow": {"metrics": "by_seed"}})
    catalog: Any = SimpleNamespace(load=entries.get, get={"metrics": scores}.get)
    pipeline: Any = SimpleNamespace(inputs=lambda: {"params:trainer"})
    hook = TensorBoardHook()
    hook.after_catalog_created(catalog)
    hook.before_pipeline_run(pipeline)
    hook.before_node_run(NODE)
    return hook


@pytest.fixture(autouse=True)
def _no_sink_is_left() -> Iterator[None]:
    yield
    tracking.set_curve_sink(None)


def _train(*steps: int, loss: float = 2.0, training: str = WORK, **told: str) -> None:
    for step in steps:
        tracking.log_metrics(step, {"loss": loss, "lr": 0.5}, training=training, **told)


def _scores(miou: float, seed: str = "0", fingerprint: str = WORK) -> dict[str, Any]:
    about = {"fingerprint": fingerprint, "iteration": "6"}
    splits = {"test": {"miou": miou, "iou": {"road": 0.25, "sky": None}}}
    return {seed: {"about": about, "splits": splits, "cost": {"parameters": 8}}}


def test_nothing_is_written_unless_asked_for(tmp_path):
    hook = _hook(tmp_path, on=False)
    _train(1)
    hook.after_dataset_saved("metrics", _scores(0.5), NODE)
    hook.after_node_run()
    assert not list(tmp_path.iterdir())


def test_curves_and_scores_have_the_names_of_mlflow(tmp_path):
    hook = _hook(tmp_path)
    _train(1, 2)
    tracking.log_metrics(2, {"val.miou": 0.25}, training=WORK)
    tracking.log_metrics(3, {"best_score": 0.5})  # of no single training
    hook.after_dataset_saved("metrics", _scores(0.5), NODE)
    hook.after_dataset_saved("something else", {}, NODE)
    hook.after_node_run()
    assert read_points(tmp_path / "tensorboard/kd" / WORK / FILE_NAME) == {
        "loss": [(1, 2.0), (2, 2.0)],
        "train/lr": [(1, 0.5), (2, 0.5)],
        "miou": [(2, 0.25)],
        "miou_test": [(6, 0.5)],
        "test_classes/iou.road": [(6, 0.25)],
        "resources/parameters": [(6, 8.0)],
    }


def test_points_are_written_at_a_validation_and_at_the_end_of_a_node(tmp_path, monkeypatch):
    monkeypatch.setattr("rdd_pipeline.hooks.tensorboard.FLUSH_SECONDS", math.inf)
    hook = _hook(tmp_path)
    path = tmp_path / "tensorboard/kd" / WORK / FILE_NAME
    _train(1)
    assert read_points(path) == {}
    tracking.log_metrics(1, {"val.miou": 0.5}, training=WORK)
    assert set(read_points(path)) == {"loss", "train/lr", "miou"}
    _train(2)
    hook.on_node_error()
    assert [step for step, _ in read_points(path)["loss"]] == [1, 2]


def test_a_training_that_goes_on_in_another_session_goes_on_in_its_file(tmp_path):
    for steps in ((1, 2, 3), (1, 3, 4)):
        hook = _hook(tmp_path)
        _train(*steps)
        hook.after_dataset_saved("metrics", _scores(0.5), NODE)
        hook.after_node_run()
    points = read_points(tmp_path / "tensorboard/kd" / WORK / FILE_NAME)
    assert [step for step, _ in points["loss"]] == [1, 2, 3, 4]
    assert points["miou_test"] == [(6, 0.5)]


def test_every_training_is_a_run_of_its_own(tmp_path):
    hook = _hook(tmp_path)
    _train(1, seed="0")
    _train(1, seed="1")
    _train(1, training="f" * 16, method="trial 1")
    hook.after_dataset_saved("metrics", _scores(0.5, "0") | _scores(0.75, "1"), NODE)
    hook.after_node_run()
    files = {p.relative_to(tmp_path / "tensorboard") for p in tmp_path.rglob(FILE_NAME)}
    runs = [f"kd/seed_0/{WORK}", f"kd/seed_1/{WORK}", f"trial 1/{'f' * 16}"]
    assert files == {Path(run) / FILE_NAME for run in runs}
    own = read_points(tmp_path / "tensorboard" / runs[1] / FILE_NAME)
    assert own["miou_test"] == [(6, 0.75)]


@pytest.mark.parametrize("fingerprint", ["", "../../elsewhere", "/elsewhere"])
def test_scores_of_weights_that_were_not_trained_here_are_left_out(tmp_path, fingerprint):
    hook = _hook(tmp_path)
    hook.after_dataset_saved("metrics", _scores(0.5, fingerprint=fingerprint), NODE)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    hook = _hook(tmp_path)
    _train(1, 2)
    hook.after_dataset_saved("metrics", _scores(0.5), NODE)
    hook.after_node_run()
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "cannot be written" in message
    assert "The run goes on without them." in message


def test_of_several_processes_the_first_one_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    _hook(tmp_path)
    _train(1)
    assert not list(tmp_path.iterdir())
