"""What MLflow is told about a run."""

from __future__ import annotations

from pathlib import Path

from rdd_pipeline.config import RecipeParams
from rdd_pipeline.hooks.facts import (
    command,
    curve_name,
    flat_params,
    git_state,
    numeric_leaves,
    score_names,
)


def test_params_are_flat_and_typed_models_are_opened() -> None:
    params = flat_params("recipe", RecipeParams(iterations=5))
    assert params["recipe.iterations"] == "5"
    assert params["recipe.optimizer.lr"] == "0.02"
    assert params["recipe.augment.crop"] == "(512, 1024)"
    assert params["recipe.clip_norm"] == "None"
    assert flat_params("", {"a": {"b": [1, 2]}}) == {"a.b": "[1, 2]"}


def test_only_numbers_become_metrics() -> None:
    data = {"test": {"miou": 0.5, "n": 3, "none": None, "name": "x", "ok": True, "m": [[1]]}}
    assert numeric_leaves(data) == {"test.miou": 0.5, "test.n": 3.0}
    assert numeric_leaves("no dict") == {}
    assert numeric_leaves({}) == {}


def test_names_without_a_folder_are_those_that_come_first() -> None:
    names = ["loss", "val.miou", "kd", "lr", "val.pixel_accuracy", "chosen", "hard_teacher"]
    assert [curve_name(name) for name in [*names, "tfe_share"]] == [
        *("loss", "miou", "train/kd", "train/lr", "train/val_pixel_accuracy"),
        *("rdd/chosen", "rdd/hard_teacher", "rdd/tfe_share"),
    ]
    scores = {
        "miou": 0.5,
        "pixel_accuracy": 0.9,
        "iou": {"traffic.light": 0.25, "sky": None},
        "confusion": [[1]],
    }
    metrics = {"splits": {"test": scores, "val": {"miou": None}}, "cost": {"macs": 3}}
    assert score_names(metrics) == {
        "miou_test": 0.5,
        "test/pixel_accuracy": 0.9,
        "test_classes/iou.traffic.light": 0.25,
        "resources/macs": 3.0,
    }


def test_every_folder_comes_after_the_metrics_without_one() -> None:
    scores = {"miou": 0.5, "ece": 0.1, "iou": {"a": 0.25}}
    metrics = {"splits": {"test": scores, "val": scores}, "cost": {"macs": 3}}
    names = [*score_names(metrics), *map(curve_name, ["loss", "kd", "chosen"])]
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert min(folders) > "model metrics"


def test_the_command_can_be_typed_again() -> None:
    words = command(
        {
            "env": "camvid",
            "namespaces": ["kd"],
            "to_outputs": ["metrics_kd"],
            "node_names": ["a", "b"],
            "load_versions": {"student_tfe": "2026"},
            "runtime_params": {"recipe": {"iterations": 5}, "name": "two words"},
            "only_missing_outputs": True,
        },
        ["distill_tse"],
    )
    assert words == (
        "kedro run --pipelines=distill_tse --env=camvid --namespaces=kd --nodes=a,b "
        "--to-outputs=metrics_kd --load-versions=student_tfe:2026 "
        "'--params=recipe.iterations=5,name=two words' --only-missing-outputs"
    )
    assert command({}, ["__default__"]) == "kedro run"


def test_git_state_is_optional(tmp_path: Path) -> None:
    assert git_state(tmp_path / "nowhere") == (None, None)
