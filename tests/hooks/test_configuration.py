"""What is checked before a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from kedro.io import DataCatalog
from kedro.pipeline import Node, Pipeline
from kedro_datasets.json import JSONDataset

from rdd_pipeline.errors import UserError
from rdd_pipeline.hooks.configuration import check_upstream
from rdd_pipeline.hooks.environments import check_environment
from tests.hooks.project import Project


def test_a_wrong_mlflow_yml_is_an_error_at_the_start(project: Project) -> None:
    project.configure("mlflow", "server: {tracking_url: x}")
    with pytest.raises(UserError, match=r"mlflow.yml is not valid"):
        project.run("kd")


def test_a_wrong_environment_is_refused_with_those_that_exist(project: Project) -> None:
    with pytest.raises(UserError, match=r"no environment 'camvit'.*are: camvid, local\."):
        project.run("kd", env="camvit")


def test_the_default_environment_need_not_exist(project: Project) -> None:
    (project.path / "conf" / "local").rmdir()
    check_environment(_context(project, "local"))
    check_environment(_context(project, None))


def _context(project: Project, env: str | None) -> Any:
    loader = SimpleNamespace(
        conf_source=str(project.path / "conf"), base_env="base", default_run_env="local"
    )
    return SimpleNamespace(env=env, config_loader=loader)


def test_a_part_of_a_pipeline_that_lacks_what_it_reads_is_refused(tmp_path):
    made = JSONDataset(filepath=str(tmp_path / "made.json"))
    made.save({})
    catalog = DataCatalog(
        {
            "made": made,
            "teacher_weights": JSONDataset(filepath=str(tmp_path / "teacher.json")),
            "metrics_cwd": JSONDataset(filepath=str(tmp_path / "metrics.json")),
        }
    )
    part = Pipeline(
        [Node(lambda *x: x, ["made", "teacher_weights", "params:x"], "metrics_cwd", name="n")]
    )
    with pytest.raises(
        UserError,
        match=r"reads teacher_weights, which nothing .*--to-outputs=metrics_cwd: it makes",
    ):
        check_upstream(part, catalog)
    catalog["teacher_weights"].save({})
    check_upstream(part, catalog)
    check_upstream(part, None)
    # What its own nodes make, and what is not a file of the project, is none of its business.
    check_upstream(Pipeline([Node(lambda x: x, "params:x", "metrics_cwd", name="n")]), catalog)
    check_upstream(Pipeline([Node(lambda x: x, "elsewhere", "y", name="n")]), catalog)
