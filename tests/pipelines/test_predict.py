from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.config import DataParams, PredictParams, TrainerParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import save_checkpoint
from rdd_pipeline.pipelines.predict.nodes import plan_predictions, predict_images
from tests.inference.conftest import checkpoint

DATA, CPU = DataParams(layout="scenes", bits=12), TrainerParams(device="cpu", threads=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("project") / "models"
    for method, seeds in (("student_tse", (3, 4)), ("student_cwd", (5,)), ("teacher", (6,))):
        for seed in seeds:
            folder = root / method / "2026-01-01T00.00.00.000Z" / method
            save_checkpoint(checkpoint(seed, image_size=(20, 24)), folder / f"{seed}.safetensors")
    return root


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(values).save(folder / "a.png")
    return folder


def plan(models: Path, photos: Path | None, out: Path = Path("/nowhere"), **params):
    given = PredictParams(images=None if photos is None else str(photos), **params)
    return plan_predictions(given, DATA, CPU, models, out)


def seed_of(models: Path, photos: Path, **params) -> str:
    return plan(models, photos, **params).model.provenance["seed"]


def test_the_network_is_that_of_the_method_and_seed_or_a_file(models, photos):
    assert seed_of(models, photos) == "3"
    assert seed_of(models, photos, seed=4) == "4"
    assert seed_of(models, photos, method="cwd") == "5"
    assert seed_of(models, photos, method="teacher") == "6"
    file = next((models / "student_cwd").rglob("*.safetensors"))
    assert seed_of(models, photos, weights=file) == "5"


def test_images_are_read_and_resized_as_in_training(models, photos):
    model = plan(models, photos).model
    assert (model.bits, model.image_size) == (12, (20, 24))
    assert plan(models, photos, image_size=None).model.image_size is None
    assert plan(models, photos, image_size=(8, 9)).model.image_size == (8, 9)


def test_the_table_has_every_image_also_when_all_is_finished(models, photos, tmp_path):
    params = PredictParams(images=str(photos))
    for _ in range(2):
        found = plan_predictions(params, DATA, CPU, models, tmp_path / "out")
        table, problems = predict_images(found, params)
        assert table["mask"].tolist() == ["masks/a.png"]
        assert problems == []
    assert (tmp_path / "out" / "predictions.csv").read_text() == table.to_csv(index=False)


def test_results_go_where_they_are_wanted(models, photos, tmp_path):
    params = {"output": tmp_path / "there", "overlays": False}
    given = PredictParams(images=str(photos), **params)
    predict_images(plan(models, photos, **params), given)
    assert (tmp_path / "there" / "masks" / "a.png").exists()
    assert not (tmp_path / "there" / "overlays").exists()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"method": "dist"}, r"no network .*student_dist\. There are student_cwd, student_tse"),
        ({"seed": 9}, "seeds 3, 4, none of 9"),
        ({"format": "cityscapes"}, r"files are not named CITY_SEQUENCE_FRAME_leftImg8bit"),
        ({"format": "raw"}, "of an earlier version"),
        ({"weights": Path("/none.safetensors")}, "Network /none.safetensors does not exist"),
        ({"output": Path("/etc/hostname")}, "/etc/hostname is a file"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    models, photos, tmp_path, params, message
):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        plan(models, photos, out, **params)
    with pytest.raises(UserError, match=r"predict\.images is not set"):
        plan(models, None, out, **params)
    assert not out.exists()
