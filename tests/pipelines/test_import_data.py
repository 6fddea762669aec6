"""`kedro run --pipeline=import_data`: one command to a data set and an environment that runs."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kedro.framework.project import settings
from kedro.framework.session import KedroSession
from PIL import Image

from rdd_pipeline.commands import Session, remember_session
from rdd_pipeline.config import ImportParams, Parameters
from rdd_pipeline.errors import DataProblem, UserError
from rdd_pipeline.importing.environment import Machine, parameters_text
from rdd_pipeline.importing.write import Written
from rdd_pipeline.pipelines.import_data import duration, nodes
from tests.importing.exports import EXPORTS, NAMES, plain, roboflow, save
from tests.kedro_project import CONF, bootstrap
from tests.mlflow_store import new_store


@pytest.fixture(autouse=True)
def own_session(monkeypatch, tmp_path):
    """Hints are those of a plain `kedro run`, and the project is the test's folder."""
    remember_session(Session())
    monkeypatch.setattr("rdd_pipeline.pipelines.paths.find_kedro_project", lambda _: tmp_path)
    monkeypatch.setattr(nodes, "distillation_minutes", lambda *_: 7.4)  # seconds for each export


def run(tmp_path: Path, source: Path, **params: Any) -> str:
    """The three nodes, as the pipeline wires them; offline."""
    given = ImportParams.model_validate({"source": source, "pretrained": False, **params})
    conf = tmp_path / "conf"
    found = nodes.recognize_export(tmp_path / "data" / "01_raw", given)
    return nodes.write_environment(nodes.write_images(found, conf, given), conf, given)


def parameters_of(conf: Path, env: str) -> Parameters:
    bootstrap()
    shutil.copytree(CONF / "base", conf / "base", dirs_exist_ok=True)
    loader = settings.CONFIG_LOADER_CLASS(
        conf_source=str(conf), env=env, **settings.CONFIG_LOADER_ARGS
    )
    assert loader["globals"]["dataset"] == env
    return Parameters.model_validate(dict(loader["parameters"]))


def tree(*roots: Path) -> dict[str, int]:
    return {
        str(path): path.lstat().st_mtime_ns for root in roots for path in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize("tool", EXPORTS)
def test_every_export_becomes_an_environment_with_valid_parameters(tool, tmp_path):
    make, name = EXPORTS[tool]
    make(tmp_path / "My Export 1")
    text = run(tmp_path, tmp_path / "My Export 1")
    lines = text.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith(f"Found: {name}, 6 images of 64 x 48")
    assert all(kind in lines[1] for kind in NAMES)
    assert lines[4] == "Next: kedro run --pipeline=distill_tse --env=my_export_1"
    found = parameters_of(tmp_path / "conf", "my_export_1")
    assert found.data.layout == "folders"
    assert found.student.pretrained is False


def test_a_second_run_changes_nothing_and_says_so(tmp_path):
    plain(tmp_path / "s")
    first = run(tmp_path, tmp_path / "s")
    before = tree(tmp_path / "data", tmp_path / "conf")
    second = run(tmp_path, tmp_path / "s")
    assert second.startswith("Already imported, nothing changed: images and masks, 6 images")
    assert second.splitlines()[1:3] == first.splitlines()[1:3]
    assert tree(tmp_path / "data", tmp_path / "conf") == before


def test_a_changed_source_replaces_nothing_unless_told(tmp_path):
    roboflow(tmp_path / "s")
    run(tmp_path, tmp_path / "s")
    before = tree(tmp_path / "data")
    mask = next((tmp_path / "s" / "train").glob("*_mask.png"))
    with Image.open(mask) as picture:
        save(mask, np.full_like(np.asarray(picture), 2))
    with pytest.raises(UserError, match=r"import_data\.overwrite=true replaces it"):
        run(tmp_path, tmp_path / "s")
    assert tree(tmp_path / "data") == before
    edited = tmp_path / "conf" / "s" / "parameters.yml"
    edited.write_text(edited.read_text() + "seed: 3\n")
    text = run(tmp_path, tmp_path / "s", overwrite=True)
    assert text.startswith("Found: Roboflow")
    assert "conf/s is kept as it is" in text
    assert edited.read_text().endswith("seed: 3\n")


def test_nothing_is_left_of_an_import_that_fails(tmp_path):
    roboflow(tmp_path / "s")
    image = next((tmp_path / "s" / "train").glob("*.jpg"))
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(DataProblem, match=r"1 of 6 pictures cannot be used; nothing was written"):
        run(tmp_path, tmp_path / "s")
    assert not list((tmp_path / "data" / "01_raw").iterdir())
    assert not (tmp_path / "conf").exists()
    text = run(tmp_path, tmp_path / "s", skip_bad=True)
    assert "1 pictures are left out" in text
    assert "Splits: train 2, val 2, test 1" in text


def test_an_environment_and_a_folder_of_others_are_not_touched(tmp_path):
    plain(tmp_path / "s")
    theirs = tmp_path / "conf" / "camvid"
    theirs.mkdir(parents=True)
    (theirs / "globals.yml").write_text("dataset: camvid")
    with pytest.raises(UserError, match=r"is an environment already"):
        run(tmp_path, tmp_path / "s", name="camvid")
    assert not (tmp_path / "data" / "01_raw" / "camvid").exists()
    place = tmp_path / "data" / "01_raw" / "mine"
    place.mkdir(parents=True)
    (place / "x.txt").write_text("x")
    with pytest.raises(UserError, match=r"was not made by import_data"):
        run(tmp_path, tmp_path / "s", name="mine", overwrite=True)
    with pytest.raises(UserError, match=r"is in the source"):
        run(tmp_path, tmp_path / "s", output=tmp_path / "s" / "out")
    with pytest.raises(UserError, match=r"import_data\.source is not set"):
        nodes.recognize_export(tmp_path, ImportParams())


def test_the_time_is_that_of_the_steps_and_is_said(tmp_path, monkeypatch):
    """A step takes 4 s of CPU on one core for 2 of 8 images: 16 s, on two cores 9.2 s."""
    written = Written(
        "x", {"a": 0.5, "b": 0.5}, 0.0, {"train": 9}, "", [((64, 64), 9)], False, "", []
    )
    text = parameters_text(written, Machine(gpu=False, weights=False))
    clock = itertools.count(0, 4)
    monkeypatch.setattr(duration.time, "process_time", lambda: next(clock))
    monkeypatch.setattr(duration.torch, "get_num_threads", lambda: 2)
    seconds = 16 / 2**0.8 * (320 * (2 + 1 / 3) + 480)
    assert duration.distillation_minutes(text, 2) == pytest.approx(1.3 * seconds / 60 + 0.5)
    plain(tmp_path / "s")
    first = run(tmp_path, tmp_path / "s").splitlines()[3]
    assert first.endswith(
        "without ImageNet weights; about 7 min if nothing else runs on these 2 cores."
    )
    assert " min " not in run(tmp_path, tmp_path / "s")


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("size", [(48, 64), (480, 640), (3000, 4000)])
def test_networks_fit_machine_and_images(gpu, weights, size, tmp_path):
    classes = {f"class {n}": 0.02 for n in range(40 if gpu else 3)}
    written = Written("x", classes, 0.0, {"train": 9}, "", [(size, 9)], gpu, "", [])
    env = tmp_path / "conf" / "mine"
    env.mkdir(parents=True)
    (env / "globals.yml").write_text("dataset: mine\nraw_folder: x")
    (env / "parameters.yml").write_text(parameters_text(written, Machine(gpu, weights)))
    found = parameters_of(tmp_path / "conf", "mine")
    crop = found.recipe.augment.crop
    height, width = found.data.image_size or size
    assert crop[0] <= height
    assert crop[1] <= width
    assert max(height, width) <= (2048 if gpu else 320)
    assert found.teacher.network.pretrained is weights
    assert found.recipe.class_weights is gpu
    assert found.student.width == (128 if gpu and weights else 64 if gpu or weights else 32)


@pytest.mark.slow
def test_what_was_imported_is_distilled(tmp_path, monkeypatch):
    """Both commands, as Kedro runs them, in a project of the test's own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow.db"))
    bootstrap()
    project = tmp_path  # as the fixture says
    shutil.copytree(CONF, project / "conf")
    plain(tmp_path / "source")
    short = {"iterations": 2, "batch_size": 2, "validate_every": 2}
    tiny = {
        "recipe": short, "teacher_recipe": short, "rdd": {"tfe_length": 1},
        "trainer": {"device": "cpu", "threads": 1, "workers": 0},
        "student": {"name": "fcn_test_efficientnet", "width": 8},
        "teacher": {"network": {"name": "fcn_test_efficientnet", "width": 8}},
    }  # fmt: skip
    steps: list[tuple[str, str | None, dict[str, Any]]] = [
        ("import_data", None, {"import_data": {"source": str(tmp_path / "source")}}),
        ("distill_tse", "source", tiny),
    ]
    for pipeline, env, params in steps:
        with KedroSession.create(
            project_path=project, env=env, runtime_params=params, save_on_close=False
        ) as session:
            session.run(pipeline_names=[pipeline])
    assert list((project / "data" / "06_models" / "source").rglob("student_tse*"))
