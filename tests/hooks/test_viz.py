"""What kedro-viz draws of this project's pipelines before anything is unfolded."""

from __future__ import annotations

import pytest
from kedro.framework.project import pipelines as registered
from kedro.framework.project import settings
from kedro.io import DataCatalog

from rdd_pipeline.distillation.methods import BASELINES
from rdd_pipeline.hooks.viz import heed_inside
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
    assert drawn["distill_tse"] == {
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
