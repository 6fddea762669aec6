"""What a data set and an environment touch: both are made in a copy, run and counted.

CONTRIBUTING.md says the same in words; tests/test_additions.py has losses, networks and stages,
tests/test_run.py a variant.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests import warm
from tests.changes import changed_places
from tests.data.files import make_camvid
from tests.kedro_project import CONF, ROOT
from tests.mlflow_store import new_store

LAYOUT = '''
"""Fields from above, in two classes."""

from pathlib import Path

from rdd_pipeline.data.labels import LabelSet, make_lookup
from rdd_pipeline.data.layouts.base import Layout, Listing, list_split_folders

FIELDS = LabelSet(
    name="fields",
    names=("soil", "crop"),
    colors=((120, 80, 40), (40, 160, 40)),
    lookup=make_lookup({0: 0, 1: 1}, ignored=(*range(2, 12), 255)),
)


def _list(root: Path) -> Listing:
    folders = {split: (split, f"{split}annot") for split in ("train", "val")}
    return list_split_folders(root, folders, "train/NAME.png with its mask trainannot/NAME.png")


FIELDS_LAYOUT = Layout(FIELDS, _list, "The farmer has them.")
'''
PARAMETERS = """
data: {layout: fields}
teacher: {network: {name: fcn_test_resnet}}
student: {name: fcn_test_resnet}
"""


class Project:
    """A copy of the project that can be changed and run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "pyproject.toml", folder)
        ignored = shutil.ignore_patterns("*.egg-info")
        shutil.copytree(ROOT / "src", folder / "src", ignore=ignored)
        shutil.copytree(CONF, folder / "conf")
        new_store(folder / "mlflow.db")

    def add(self, file: str, text: str) -> None:
        path = self.folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.lstrip())

    def insert(self, file: str, after: str, text: str) -> None:
        path = self.folder / file
        before, found, rest = path.read_text().partition(after)
        assert found
        path.write_text(before + found + text + rest)

    def touched(self) -> list[str]:
        """Changed files, new files and new folders of code and configuration."""
        code = changed_places(ROOT / "src", self.folder / "src", "src/")
        return sorted([*code, *changed_places(CONF, self.folder / "conf", "conf/")])

    def kedro(self, *words: str) -> str:
        done = warm.run(
            ["-m", "kedro", *words],
            env=os.environ | {"PYTHONPATH": str(self.folder / "src")},
            cwd=self.folder,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


def test_a_data_set_is_a_layout_an_entry_and_an_environment(project):
    layouts = "src/rdd_pipeline/data/layouts"
    project.add(f"{layouts}/fields.py", LAYOUT)
    init = f"{layouts}/__init__.py"
    project.insert(
        init,
        "from rdd_pipeline.data.layouts.coco_stuff import COCO_STUFF_LAYOUT\n",
        "from rdd_pipeline.data.layouts.fields import FIELDS_LAYOUT\n",
    )
    project.insert(
        init,
        "LAYOUTS: dict[str, Layout | Callable[[Path], Layout]] = {\n",
        '    "fields": FIELDS_LAYOUT,\n',
    )
    project.add("conf/fields/globals.yml", "dataset: fields\nraw_folder: data/01_raw/fields\n")
    project.add("conf/fields/parameters.yml", PARAMETERS)
    assert project.touched() == ["conf/fields", init, f"{layouts}/fields.py"]

    make_camvid(project.folder / "data/01_raw/fields", splits=("train", "val"))
    project.kedro("run", "--pipeline=data_ingestion", "--env=fields")
    report = project.folder / "data/08_reporting/fields/ingestion_report.html"
    assert "crop" in report.read_text()
    assert (project.folder / "data/08_reporting/fields/label_statistics.csv").exists()
