"""Runs of the project through a Kedro session that write only below one folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlflow
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

from tests.mlflow_store import new_store

PROJECT = Path(__file__).resolve().parents[1]


class Workspace:
    """A project folder of its own: the project's conf/, empty data/, an own MLflow database."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(PROJECT / "conf", folder / "conf")
        shutil.copy(PROJECT / "pyproject.toml", folder)
        self.store = new_store(folder / "mlflow.db")

    def run(self, pipeline: str, **parameters: Any) -> dict[str, Any]:
        """`kedro run --pipeline=PIPELINE --env=test --params=...`; keys use `__` for dots."""
        bootstrap_project(PROJECT)
        nested: dict[str, Any] = {}
        for key, value in parameters.items():
            *parents, last = key.split("__")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        try:
            with KedroSession.create(
                project_path=self.folder,
                conf_source=str(self.folder / "conf"),
                env="test",
                runtime_params=nested,
                save_on_close=False,
            ) as session:
                return dict(session.run(pipeline_names=[pipeline]))
        finally:
            while mlflow.active_run():
                mlflow.end_run()

    def versions(self, pattern: str) -> list[Path]:
        """Files below data/, oldest version first."""
        return sorted((self.folder / "data").glob(pattern))
