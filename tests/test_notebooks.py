"""The notebooks run from top to bottom on a small finished project, stored without output."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kedro_project import CONF, ROOT, Project, bootstrap
from tests.mlflow_store import new_store

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(notebook):
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_output(notebook):
    assert not [c for c in cells(notebook) if c["outputs"] or c["execution_count"]]
    text = notebook.read_text()
    assert "data/0" not in text  # what lies where is the catalog's business
    # Without it a server's kernel shows the words of a figure in its place.
    assert "%matplotlib inline\n" in cells(notebook)[0]["source"]


def test_outputs_are_taken_out(tmp_path):
    content = json.loads(NOTEBOOKS[0].read_text())
    content["cells"][1] |= {"outputs": [{"output_type": "stream", "text": "x"}]}
    copy = tmp_path / "copy.ipynb"
    copy.write_text(json.dumps(content))
    statuses = [
        subprocess.run([sys.executable, ROOT / "notebooks/strip.py", copy], check=False).returncode
        for _ in range(2)
    ]
    assert statuses == [1, 0]
    assert copy.read_text() == NOTEBOOKS[0].read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A clone whose `distill_tse` and `evaluation` are done, at the size of tests."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "src").mkdir()
    shutil.copytree(CONF, folder / "conf")
    shutil.copy(ROOT / "pyproject.toml", folder)
    bootstrap()
    project = Project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", new_store(folder / "mlflow.db"))
        patch.setenv("MPLBACKEND", "agg")
        project.run("distill_tse")
        project.run("evaluation")
    return folder


@pytest.mark.shows
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, finished):
    script = finished / f"{notebook.stem}.ipy"
    source = ["".join(cell["source"]) for cell in cells(notebook)]
    script.write_text("\n\n".join([*source, "print('that was all')"]) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--colors=NoColor", "--no-banner", script.name],
        cwd=finished,
        env=os.environ | {"KEDRO_ENV": "test", "MPLBACKEND": "agg", "PYTHONPATH": f"{ROOT}/src"},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "that was all" in done.stdout, (done.stdout + done.stderr)[-3000:]
    assert not list(Path(finished).glob("*.png"))
