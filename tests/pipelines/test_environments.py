"""What every environment of conf/ says fits together; nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kedro.config import OmegaConfigLoader
from kedro.framework.project import settings

from rdd_pipeline.config import (
    DataParams,
    EvaluationParams,
    MethodsParams,
    NetworkParams,
    RddParams,
    RecipeParams,
    TeacherParams,
)
from rdd_pipeline.data.layouts import LAYOUTS, Layout
from rdd_pipeline.distillation.methods import check_changes, find_method
from tests.kedro_project import CONF, bootstrap

ENVIRONMENTS = sorted(path.parent.name for path in CONF.glob("*/globals.yml"))
# Layout -> (crop, batch size, iterations) of the field's recipe.
PUBLISHED = {
    "cityscapes": ((512, 1024), 16, 40_000),
    "camvid_published": ((360, 360), 16, 40_000),
    "voc": ((512, 512), 16, 40_000),
    "ade20k": ((512, 512), 16, 40_000),
    "coco_stuff": ((512, 512), 16, 80_000),
}


def parameters(env: str) -> dict[str, Any]:
    bootstrap()
    # conf/base alone has no environment of its own: local is empty.
    name = "local" if env == "base" else env
    loader = OmegaConfigLoader(conf_source=str(CONF), env=name, **settings.CONFIG_LOADER_ARGS)
    return dict(loader["parameters"])


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "scenes"])
def test_every_layout_has_an_environment_of_its_name(name: str):
    assert parameters(name)["data"]["layout"] == name


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_class_weights_are_on_only_where_the_label_set_has_some(env: str):
    """Environments are merged into conf/base, which has them on."""
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
    "camvid_published": (1.0, 8e-6, 0.01, 45 * 45),
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


@pytest.mark.parametrize("env", [env for env in ENVIRONMENTS if env not in ("folders", "local")])
def test_what_is_called_rdd_is_the_papers_method(env: str):
    rdd = RddParams(**parameters(env)["rdd"])
    assert (rdd.mode, rdd.class_floor) == ("xor", 0.0)


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_the_head_of_globals_says_the_command(env: str):
    if env in ("base", "test"):
        return
    text = (Path(CONF) / env / "globals.yml").read_text()
    assert text.startswith("# ")
    assert f"kedro run --pipeline=distill_tse --env={env}" in text
