"""What kedro-viz draws of this project's pipelines before anything is unfolded."""

from __future__ import annotations

import json
import logging

import pytest
from kedro.framework.project import pipelines as registered
from kedro.framework.project import settings
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Node, Pipeline

from rdd_pipeline.distillation.methods import BASELINES
from rdd_pipeline.hooks.viz import RunStatusHook, heed_inside
from tests.kedro_project import CONF, bootstrap

managers = pytest.importorskip("kedro_viz.data_access.managers")


@pytest.fixture(scope="module")
def drawn() -> dict[str, set[str]]:
    """Names of what is visible with all namespaces folded, by pipeline."""
    bootstrap()
    loader = settings.CONFIG_LOADER_CLASS(
        conf_source=str(CONF), env="test", **settings.CONFIG_LOADER_ARGS
    )
    heed_inside()
    heed_inside()  # once is enough
    manager = managers.DataAccessManager()
    pipelines = {name: registered[name] for name in ("distill_tse", "distill_baselines")}
    manager.add_catalog(DataCatalog.from_config(dict(loader["catalog"])), pipelines)
    manager.add_pipelines(pipelines)
    visible = {}
    for name in pipelines:
        tree = manager.create_modular_pipelines_tree_for_registered_pipeline(name)
        nodes = manager.nodes.as_dict()
        visible[name] = {
            nodes[child.id].name
            for child in tree["__root__"].children
            if nodes[child.id].belongs_to_pipeline(name) and nodes[child.id].type != "parameters"
        }
        own = [n for n in nodes.values() if n.type == "task" and n.belongs_to_pipeline(name)]
        assert len(own) == len(pipelines[name].nodes)  # nothing is lost, only folded
    return visible


def test_the_main_job_is_seen_at_a_glance(drawn):
    seen = drawn["distill_tse"]
    assert len(seen) <= 22, "Which of them is to be seen inside only (`inside: true`)?"
    assert seen >= {
        "data", "teacher", "tfe", "tse", "baseline", "results",
        "raw_images", "images", "ingestion_report",
        "teacher_weights", "state_tfe", "student_tse",
        "metrics_teacher", "metrics_tfe", "metrics_tse", "metrics_baseline",
        "pixels_tse", "summary",
    }  # fmt: skip


def test_baselines_are_one_box_each_with_its_scores(drawn):
    shared = {"data", "teacher", "results", "raw_images", "images", "ingestion_report"}
    shared |= {"teacher_weights", "metrics_teacher", "summary_distill_baselines"}
    methods = {*BASELINES, *(f"metrics_{name}" for name in BASELINES)}
    assert drawn["distill_baselines"] == shared | methods


# ---- the status of a run


def _run(hook: RunStatusHook, **run_params: object) -> None:
    """As a runner calls the hooks, of one node."""
    node = Node(abs, "a", "b", name="n")
    hook.after_catalog_created(catalog=DataCatalog({"a": MemoryDataset(), "b": MemoryDataset()}))
    hook.before_pipeline_run(run_params=run_params, pipeline=Pipeline([node]))
    hook.before_node_run(node=node)
    hook.before_dataset_loaded(dataset_name="a", node=node)
    hook.after_dataset_loaded(dataset_name="a", data=1)
    hook.after_node_run(node=node)
    hook.after_pipeline_run()


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("[tool.kedro]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("names", [None, ["distill_tse"]])
def test_a_run_of_the_main_job_is_told_to_kedro_viz_however_it_is_called(project, names, caplog):
    with caplog.at_level(logging.INFO):
        _run(RunStatusHook(), pipeline_names=names)
    events = json.loads((project / ".viz/kedro_pipeline_events.json").read_text())
    assert [event["event"] for event in events] == [
        "before_pipeline_run", "after_dataset_loaded", "after_node_run", "after_pipeline_run"
    ]  # fmt: skip
    assert (project / ".viz/stats.json").is_file()
    assert caplog.text == ""


@pytest.mark.parametrize(
    "part",
    [{"pipeline_names": ["predict"]}, {"namespaces": ["tse"]}, {"runner": "<ThreadRunner object>"}],
)
def test_other_runs_say_nothing_and_leave_the_status_of_before(project, part, caplog):
    _run(RunStatusHook(), **part)
    assert not (project / ".viz").exists()
    assert caplog.text == ""


def test_a_run_goes_on_where_kedro_viz_fails(project, monkeypatch):
    (project / ".viz").write_text("no folder")
    _run(RunStatusHook())
