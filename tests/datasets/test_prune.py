from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rdd_pipeline.datasets.prune import main, prune, versions_named_by_runs
from rdd_pipeline.errors import UserError
from tests.mlflow_store import new_store

VERSIONS = [f"2026-01-0{day}T00.00.00.000Z" for day in range(1, 6)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two versioned datasets with five versions each, and things that are none."""
    (tmp_path / "pyproject.toml").touch()
    for name in ("06_models/net.safetensors", "07_model_output/metrics/kd.json"):
        for version in VERSIONS:
            file = tmp_path / "data" / name / version / Path(name).name
            file.parent.mkdir(parents=True)
            file.write_bytes(b"0123456789")
    mine = tmp_path / "data" / "01_raw" / "photos" / VERSIONS[0]
    mine.mkdir(parents=True)
    (mine / "photo.png").touch()
    return tmp_path


def _left(project: Path, name: str) -> list[str]:
    return sorted(path.name for path in (project / "data" / name).iterdir())


def test_only_lists_unless_told_to_delete(project: Path) -> None:
    found = prune(project, keep=2)
    assert [(old.dataset.name, old.version) for old in found] == [
        (name, version) for name in ("net.safetensors", "kd.json") for version in VERSIONS[:3]
    ]
    assert _left(project, "06_models/net.safetensors") == VERSIONS


def test_deletes_all_but_the_newest(project: Path) -> None:
    prune(project, keep=2, delete=True)
    assert _left(project, "06_models/net.safetensors") == VERSIONS[3:]
    assert _left(project, "07_model_output/metrics/kd.json") == VERSIONS[3:]
    assert prune(project, keep=2) == []


def test_keeps_what_a_run_names(project: Path) -> None:
    prune(project, keep=1, named={VERSIONS[1]}, delete=True)
    assert _left(project, "06_models/net.safetensors") == [VERSIONS[1], VERSIONS[4]]


def test_leaves_everything_else_alone(project: Path) -> None:
    prune(project, keep=1, delete=True)
    assert (project / "data" / "01_raw" / "photos" / VERSIONS[0] / "photo.png").exists()


def test_a_hard_link_frees_only_when_its_last_link_goes(project: Path) -> None:
    folder = project / "data" / "06_models" / "net.safetensors"
    for version in VERSIONS[1:3]:
        file = folder / version / "net.safetensors"
        file.unlink()
        os.link(folder / VERSIONS[0] / "net.safetensors", file)
    models = [old for old in prune(project, keep=1) if old.dataset == folder]
    assert [old.frees for old in models] == [0, 0, 10, 10]
    models = [old for old in prune(project, keep=3) if old.dataset == folder]
    assert [old.frees for old in models] == [0, 0]


WORK = {name: name * 16 for name in "abcdef"}


def _work(project: Path, name: str, *, done: bool = True, days: int = 2, job: str = "") -> Path:
    folder = project / "data/06_models/scenes/work" / WORK[name]
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(f'{{"of": "{WORK[name]}", "initial_state": "{job}"}}')
    if done:
        (folder / "done.json").touch()
        then = time.time() - days * 86_400
        os.utime(folder / "done.json", (then, then))
    return folder


def test_work_goes_that_nothing_names_and_that_was_finished_before_today(project: Path) -> None:
    folders = {
        "a": _work(project, "a", job=WORK["b"]),  # named by a version that stays
        "b": _work(project, "b"),  # by that work, which goes on from it
        "c": _work(project, "c"),  # by a version that goes
        "d": _work(project, "d", done=False, job=WORK["e"]),
        "e": _work(project, "e"),  # by work that is not done
        "f": _work(project, "f", days=0),
    }
    entry = project / "data/07_model_output/metrics/kd.json"
    (entry / VERSIONS[4] / "kd.json").write_text(f'{{"fingerprint": "{WORK["a"]}"}}')
    (entry / VERSIONS[0] / "kd.json").write_text(f'{{"fingerprint": "{WORK["c"]}"}}')
    listed = {old.folder.name for old in prune(project, keep=1)}
    assert listed & set(WORK.values()) == {WORK["c"]}
    prune(project, keep=1, delete=True)
    assert {name for name, folder in folders.items() if folder.exists()} == set("abdef")


def test_a_project_without_data_has_nothing_to_prune(tmp_path: Path) -> None:
    assert prune(tmp_path) == []


def test_at_least_one_version_must_stay(project: Path) -> None:
    with pytest.raises(UserError, match="keep is 0; at least the newest"):
        prune(project, keep=0)


def test_the_command_lists_and_deletes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--project", str(project), "--keep", "4", "--ignore-runs"]
    assert main(arguments) == 0
    assert (
        "2 old versions and finished trainings, 0.00 MB, would be deleted (nothing was"
        in capsys.readouterr().out
    )
    assert main([*arguments, "--delete"]) == 0
    assert "data/06_models/net.safetensors/2026-01-01" in capsys.readouterr().out
    assert _left(project, "06_models/net.safetensors") == VERSIONS[1:]


@pytest.fixture
def kedro_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with this project's settings and an own MLflow database."""
    (project / "src").mkdir()
    (project / "conf" / "base").mkdir(parents=True)
    (project / "conf" / "local").mkdir()
    (project / "pyproject.toml").write_text(
        '[tool.kedro]\npackage_name = "rdd_pipeline"\nproject_name = "x"\n'
        'kedro_init_version = "1.7.0"\nsource_dir = "src"\n'
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(project / "mlflow.db"))
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    return project


def test_versions_are_named_by_runs_until_these_are_deleted(kedro_project: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{kedro_project}/mlflow.db")
    tags = {"version": VERSIONS[0], "input.student_kd": VERSIONS[1], "method": "kd"}
    run_id = client.create_run("0", tags=tags).info.run_id
    assert versions_named_by_runs(kedro_project) == {VERSIONS[0], VERSIONS[1]}
    client.delete_run(run_id)
    assert versions_named_by_runs(kedro_project) == set()


def test_nothing_is_pruned_when_mlflow_cannot_be_asked(
    kedro_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://somewhere")
    with pytest.raises(SystemExit):
        main(["--project", str(kedro_project), "--keep", "1", "--delete"])
    assert "give --ignore-runs" in capsys.readouterr().err
    assert _left(kedro_project, "06_models/net.safetensors") == VERSIONS


def test_the_command_wants_a_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--project", str(tmp_path)])
    assert exit_.value.code == 1
    assert "is not a Kedro project" in capsys.readouterr().err
