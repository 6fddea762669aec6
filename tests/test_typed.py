"""Whole commands that end early, in one line: typed by a process that has imported everything.

How a run ends otherwise is in test_run, how a command ends while it imports in test_interruptions.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rdd_pipeline.config import NetworkParams
from rdd_pipeline.networks import NetworkCheckpoint, network_from_params, save_checkpoint
from tests.data.files import make_camvid
from tests.kedro_project import CONF, ROOT
from tests.mlflow_store import new_store
from tests.test_interruptions import check_one_line, statuses
from tests.typist import Typist

TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The configuration and an empty store: a project as it was cloned."""
    clone = tmp_path / "clone"
    (clone / "src").mkdir(parents=True)
    shutil.copytree(CONF, clone / "conf")
    shutil.copy(ROOT / "pyproject.toml", clone)
    new_store(clone / "mlflow.db")
    return clone


@pytest.fixture(scope="module")
def typist(tmp_path_factory) -> Iterator[Typist]:
    typist = Typist(tmp_path_factory.mktemp("typist"))
    yield typist
    typist.leave()


@pytest.fixture
def kedro_run(clone: Path, typist: Typist):
    """Function that types `kedro run` in the clone; its words after that, its environment."""

    def call(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return typist.type(
            *("run", "--env=test", *words),
            cwd=clone,
            MLFLOW_TRACKING_URI="sqlite:///mlflow.db",
            COLUMNS="200",
            **env,
        )

    return call


def test_a_teacher_of_other_classes_ends_the_command_with_one_clear_line(
    clone, kedro_run, tmp_path
):
    params = NetworkParams(name="fcn_test_efficientnet", width=8, output_stride=16)
    two = NetworkCheckpoint.from_network(
        network_from_params(params, num_classes=2), params=params, label_names=("a", "b")
    )
    weights = tmp_path / "two.safetensors"
    save_checkpoint(two, weights)

    done = kedro_run("--pipeline=distill_tse", f"--params=teacher.weights={weights}")

    assert done.returncode != 0
    assert "Error: Teacher has 2 classes, the label set 11. Choose weights" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not list((clone / "data/06_models").rglob("*.safetensors"))
    assert not list((clone / "data/06_models").rglob("state-*"))


def test_a_variant_of_a_data_set_is_one_folder_with_its_difference(clone, kedro_run):
    """Of CamVid here: the layout, the networks and the recipe are those of `--env=camvid`."""
    variant = clone / "conf/camvid/tiny"
    variant.mkdir()
    (variant / "globals.yml").write_text("dataset: camvid_tiny\n")
    (variant / "parameters.yml").write_text("data: {image_size: [60, 80]}\n")
    make_camvid(clone / "data/01_raw/camvid")
    done = kedro_run("--pipeline=data_ingestion", "--env=camvid/tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (clone / "data/08_reporting/camvid_tiny/data_preview.png").exists()
    assert not (clone / "data/08_reporting/camvid").exists()


def test_a_missing_folder_ends_the_command_with_one_clear_line(clone, kedro_run):
    done = kedro_run("--params=data.layout=camvid,data.path=nowhere")
    assert done.returncode != 0
    assert "Error: The folder with the images, " in done.stderr
    assert "nowhere, does not exist. Expected: train/NAME.png" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (clone / "data/06_models").exists()


# ---- signals

MOMENTS = [
    ("open:parameters.yml", []),
    ("sqlite3.connect:mlflow.db", []),
    ("open:label_statistics", ["KILLED"]),
    ("os.rename:data_tags", ["KILLED"]),
]


@pytest.mark.parametrize(
    ("numbers", "moment", "ends"),
    [
        *(pytest.param([TERM], *moment, id=f"once-{moment[0]}") for moment in MOMENTS),
        *(
            pytest.param([INT, TERM], *moment, id=f"twice-{moment[0]}", marks=pytest.mark.slow)
            for moment in MOMENTS
        ),
    ],
)
def test_in_the_middle_of_a_run(clone: Path, kedro_run, numbers, moment, ends) -> None:
    signals = ",".join(str(int(number)) for number in numbers)
    done = kedro_run("--pipeline=data_ingestion", MOMENT=moment, SIGNALS=signals)
    check_one_line(done)
    assert statuses(clone) == ends
