"""What every environment of conf/ says fits together; nothing is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kedro.framework.project import settings
from omegaconf import OmegaConf

from rdd_pipeline.config import (
    DataParams,
    EvaluationParams,
    MethodsParams,
    NetworkParams,
    Parameters,
    RddParams,
    RecipeParams,
    TeacherParams,
)
from rdd_pipeline.data.layouts import LAYOUTS, Layout
from rdd_pipeline.distillation.methods import check_changes, find_method
from rdd_pipeline.errors import UserError
from rdd_pipeline.hooks.environments import check_environment, environments
from tests.kedro_project import CONF, ENVIRONMENTS, bootstrap

# What the parameters are worth, by dotted name: what all say, then each environment.
PARAMETERS = json.loads((Path(__file__).parents[1] / "vectors/parameters.json").read_text())
# Layout -> (crop, batch size, iterations) of the field's recipe.
PUBLISHED = {
    "cityscapes": ((512, 1024), 16, 40_000),
    "camvid/published": ((360, 360), 16, 40_000),
    "voc": ((512, 512), 16, 40_000),
    "ade20k": ((512, 512), 16, 40_000),
    "coco_stuff": ((512, 512), 16, 80_000),
}


def loader_of(env: str | None, source: Path = CONF, **runtime: Any) -> Any:
    bootstrap()
    return settings.CONFIG_LOADER_CLASS(
        conf_source=str(source), env=env, runtime_params=runtime, **settings.CONFIG_LOADER_ARGS
    )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def parameters(env: str) -> dict[str, Any]:
    return dict(loader_of(env)["parameters"])


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_an_environment_says_what_it_said(env: str):
    """If this fails on purpose: every fingerprint of the environment's trainings may be new.

    Parameters that came in later are not listed: they have to mean by default what was done before.
    """
    values = flat(Parameters.model_validate(parameters(env)).model_dump(mode="json"))
    expected = PARAMETERS["all"] | PARAMETERS[env]
    missing = "not there any more"
    assert {name: values.get(name, missing) for name in expected} == expected


def test_the_demonstration_is_the_default():
    assert dict(loader_of(None)["parameters"]) == parameters("scenes")
    assert dict(loader_of(None)["globals"])["dataset"] == "scenes"


def test_base_says_nothing_of_its_own():
    """What base said, each environment would have to undo."""
    said = {name: {} for name in Parameters.model_fields} | {"seed": 0, "seeds": 1}
    assert dict(loader_of("base")["parameters"]) == said


@pytest.mark.parametrize("env", [env for env in ENVIRONMENTS if "/" not in env])
def test_no_environment_repeats_a_default(env: str):
    """Where the field's recipe changes in config.py, it does so for all that follow it."""
    said = OmegaConf.to_container(OmegaConf.load(CONF / env / "parameters.yml"))
    required = {
        "data": {"layout": ""},
        "teacher": {"network": {"name": ""}},
        "student": {"name": ""},
    }
    given = {name: {} for name in Parameters.model_fields} | {"seed": 0, "seeds": 1} | required
    defaults = Parameters.model_validate(given).model_dump(mode="json")
    assert isinstance(said, dict)
    assert _repeated(said, defaults) == []


def _repeated(said: dict[Any, Any], defaults: Any, place: str = "") -> list[str]:
    found = []
    for key, value in said.items():
        default = defaults.get(key) if isinstance(defaults, dict) else None
        if isinstance(value, dict):
            found += _repeated(value, default, f"{place}{key}.")
        elif default is not None and value == default:
            found.append(f"{place}{key}")
    return found


def _write(conf: Path, **files: str) -> None:
    for name, text in files.items():
        place = conf / name.replace("__", "/") / "parameters.yml"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)


def test_a_variant_is_read_on_top_of_its_data_set_and_local_settings_on_all(tmp_path):
    _write(
        tmp_path,
        base="a: {x: 0, y: 0, z: 0, p: 0}",
        sheep="a: {x: 1, y: 1, z: 1}",
        sheep__short="a: {x: 2, y: 2}",
        sheep__short__night="a: {x: 3}",
        goats="a: {y: 9}",
        local="a: {p: 5}",
    )
    for env, x, y, z in (
        ("sheep", 1, 1, 1), ("sheep/short", 2, 2, 1), ("sheep/short/night", 3, 2, 1),
        ("goats", 0, 9, 0), ("local", 0, 0, 0),
    ):  # fmt: skip
        loader = loader_of(env, tmp_path)
        assert loader["parameters"]["a"] == {"x": x, "y": y, "z": z, "p": 5}, env
        given = loader_of(env, tmp_path, a={"z": 7})
        assert given["parameters"]["a"] == {"x": x, "y": y, "z": 7, "p": 5}, env
    shutil.rmtree(tmp_path / "local")
    assert loader_of("sheep/short", tmp_path)["parameters"]["a"]["p"] == 0
    assert environments(tmp_path) == ["goats", "sheep", "sheep/short", "sheep/short/night"]


def test_this_machine_s_tracking_server_is_used_with_every_environment(tmp_path):
    for name in ("base", "scenes", "local"):
        (tmp_path / name).mkdir()
    shutil.copy(CONF / "base" / "mlflow.yml", tmp_path / "base")
    (tmp_path / "scenes" / "globals.yml").write_text("dataset: scenes")
    (tmp_path / "local" / "mlflow.yml").write_text("server: {mlflow_tracking_uri: 'http://mine'}")
    for env in (None, "scenes"):
        content = loader_of(env, tmp_path)["mlflow"]
        assert content["server"]["mlflow_tracking_uri"] == "http://mine"
        assert content["tracking"]["experiment"]["name"] == "rdd_scenes"


@pytest.mark.parametrize(
    ("former", "now"),
    [("quick", "scenes/quick"), ("long", "scenes/long"), ("camvid_small", "camvid/small")],
)
def test_a_former_environment_is_answered_with_its_new_name(former: str, now: str):
    context = SimpleNamespace(env=former, config_loader=loader_of(former))
    with pytest.raises(UserError, match=rf"no environment '{former}' .*; did you mean {now}\?"):
        check_environment(context)


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "scenes"])
def test_every_layout_has_an_environment_of_its_name(name: str):
    assert parameters(name)["data"]["layout"] == name


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_class_weights_are_on_only_where_the_label_set_has_some(env: str):
    found = parameters(env)
    layout = LAYOUTS[DataParams(**found["data"]).layout]
    weights = layout.labels.class_weights if isinstance(layout, Layout) else None
    for key in ("recipe", "teacher_recipe"):
        recipe = RecipeParams(**found[key])
        assert not recipe.class_weights or weights, key


@pytest.mark.parametrize("env", PUBLISHED)
def test_published_recipes_are_those_of_the_field(env: str):
    found = parameters(env)
    crop, batch, iterations = PUBLISHED[env]
    for key in ("recipe", "teacher_recipe"):
        recipe = RecipeParams(**found[key])
        assert (recipe.augment.crop, recipe.batch_size, recipe.iterations) == (
            crop, batch, iterations,
        )  # fmt: skip
        augment, optimizer = recipe.augment, recipe.optimizer
        assert (augment.scale_min, augment.scale_max, augment.scale_step) == (0.5, 2.0, 0.1)
        assert (augment.flip, augment.photometric) == (0.5, 0.0)
        assert (optimizer.name, optimizer.lr, optimizer.momentum) == ("sgd", 0.02, 0.9)
        assert (optimizer.weight_decay, optimizer.power, optimizer.warmup) == (1e-4, 0.9, 0)
        assert recipe.iterations % recipe.validate_every == 0
    rdd = RddParams(**found["rdd"])
    assert (rdd.mode, rdd.threshold, rdd.class_floor) == ("xor", 0.7, 0.0)
    # 100000 pixels of what each of four devices held: 4 images.
    assert rdd.min_kept * 4 * crop[0] * crop[1] == pytest.approx(100_000, rel=0.005)
    assert rdd.warmup_iterations(iterations) == iterations // 10
    assert TeacherParams(**found["teacher"]).network.name == "deeplabv3_resnet101"
    assert NetworkParams(**found["student"]).name.startswith("deeplabv3_resnet18")
    EvaluationParams(**found["evaluation"])


# Published for the data set, by the size of the map that the weight of a sum over positions is for.
AF_DCD = {
    "voc": (1.0, 1e-6, 0.005, 64 * 64),
    "ade20k": (0.5, 1e-6, 0.04, 64 * 64),
    "coco_stuff": (0.5, 5e-6, 0.005, 64 * 64),
    "camvid/published": (1.0, 8e-6, 0.01, 45 * 45),
}


@pytest.mark.parametrize("env", AF_DCD)
def test_weights_published_by_data_set(env: str):
    changes = MethodsParams(**parameters(env)["methods"])
    kd, feature, contrast, positions = AF_DCD[env]
    for name in ("af_dcd", "tse_af_dcd"):
        weights = find_method(name, changes).weights
        assert (weights["kd"], weights["af_dcd_contrast"]) == (kd, contrast)
        scaled = weights["af_dcd_feature"] * 8192 / positions  # what the objective multiplies with
        assert scaled == pytest.approx(feature, rel=0.01)
    memory = find_method("cirkd", changes).weights["cirkd_pixel"]
    assert memory == (0.01 if env == "voc" else 0.1)


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_changes_of_methods_are_of_methods_that_there_are(env: str):
    check_changes(MethodsParams(**parameters(env)["methods"]))


@pytest.mark.parametrize("env", [env for env in ENVIRONMENTS if env != "folders"])
def test_what_is_called_rdd_is_the_papers_method(env: str):
    rdd = RddParams(**parameters(env)["rdd"])
    assert (rdd.mode, rdd.class_floor) == ("xor", 0.0)


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_the_head_of_globals_says_the_command(env: str):
    if env == "test":
        return
    text = (Path(CONF) / env / "globals.yml").read_text()
    assert text.startswith("# ")
    command = "kedro run --pipeline=distill_tse"
    assert (command if env == "scenes" else f"{command} --env={env}") in text
