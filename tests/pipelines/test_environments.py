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
    NetworkParams,
    RddParams,
    RecipeParams,
    TeacherParams,
)
from rdd_pipeline.segmentation.layouts import LAYOUTS, Layout
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
    assert (rdd.mode, rdd.threshold, rdd.min_kept) == ("xor", 0.7, 0.1)
    assert rdd.warmup_iterations(iterations) == iterations // 10
    assert TeacherParams(**found["teacher"]).network.name == "deeplabv3_resnet101"
    assert NetworkParams(**found["student"]).name.startswith("deeplabv3_resnet18")
    EvaluationParams(**found["evaluation"])


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_the_head_of_globals_says_the_command(env: str):
    if env in ("base", "test"):
        return
    text = (Path(CONF) / env / "globals.yml").read_text()
    assert text.startswith("# ")
    assert f"kedro run --pipeline=distill_tse --env={env}" in text
