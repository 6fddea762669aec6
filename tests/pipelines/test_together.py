"""One node trains the students of a run, the others find theirs done."""

from __future__ import annotations

import pytest
import torch
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Node, Pipeline

from rdd_pipeline import tracking
from rdd_pipeline.config import AugmentParams, RddParams, TrainerParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.hooks.configuration import tell_methods
from rdd_pipeline.pipelines import method_nodes, together
from rdd_pipeline.pipelines.method_nodes import make_train_node
from rdd_pipeline.pipelines.method_pipeline import method_pipeline, methods_pipeline
from rdd_pipeline.training.preparation import check_trainer
from rdd_pipeline.training.training import Training
from tests.equal import equal
from tests.pipelines.examples import CPU, RECIPE, change, plan

SHARED = change(CPU, share_teacher=True)


def test_another_method_s_job_is_that_of_its_own_plan(ingested):
    recipe = change(RECIPE, augment=AugmentParams(crop=(128, 128)))
    own = plan("kd", ingested, recipe=recipe)["0"]
    for name in ("at", "mgd", "tfe", "tse", "tse_cwd", "rdd_or"):
        assert own.by(name) == plan(name, ingested, recipe=recipe)["0"]


def test_the_first_node_trains_all_and_the_others_find_theirs_done(
    ingested, teacher, tmp_path, monkeypatch
):
    """RDD's stages go hand in hand; the student alone has a node that knows no teacher."""
    run_methods = ["baseline", "kd", "at", "tfe", "tse"]
    trained, told = [], []
    real = method_nodes.train

    def train(training, *rest):
        result = real(training, *rest)
        trained.append((training.job.method, result.trained))
        return result

    monkeypatch.setattr(method_nodes, "train", train)

    def run(method, trainer, folder, **more):
        node = make_train_node(method)
        jobs = plan(method, ingested, rdd=RddParams(tfe_length=2, min_kept=0.1))
        return node(ingested, jobs, trainer, tmp_path / folder, {"0": teacher}, **more)

    def results(trainer, folder, **more):
        found = {name: run(name, trainer, folder, **more) for name in ("at", "kd", "tfe")}
        states = found["tfe"][3]
        return found | {"tse": run("tse", trainer, folder, initial_states=states)}

    tracking.set_metric_sink(lambda step, values, seed, method: told.append((method, seed)))
    try:
        shared = results(SHARED, "shared", run_methods=run_methods)
    finally:
        tracking.set_metric_sink(None)
    assert trained == [(method, 0) for method in ("at", "kd", "tfe", "tse")]
    # Each node then tells its own run the same again, where a step counts once.
    assert set(told) == {(method, None) for method in ("at", "kd", "tfe", "tse", None)}
    alone = results(CPU, "alone")
    for name, (weights, *_) in alone.items():
        for seed, network in weights.items():
            assert equal(shared[name][0][seed].tensors, network.tensors), (name, seed)


@pytest.mark.parametrize("methods", [[], ["kd"], ["baseline", "kd"], ["kd", "tse"]])
def test_a_node_that_is_alone_in_its_run_has_nobody_to_share_with(
    ingested, teacher, tmp_path, monkeypatch, methods
):
    monkeypatch.setattr(together, "train_together", None)
    training = Training(plan("kd", ingested)["0"], ingested, teacher).stored_in(tmp_path / "work")
    together.train_students(training, methods, SHARED, seed=None)
    assert not (tmp_path / "work").exists()


def test_the_hook_names_what_the_run_trains():
    pipeline = methods_pipeline(("baseline", "kd", "cwd", "tfe", "tse"))
    catalog = DataCatalog(
        {"run_methods": MemoryDataset([]), "params:trainer": MemoryDataset(TrainerParams())}
    )
    tell_methods(pipeline, catalog, "None")
    assert sorted(catalog.load("run_methods")) == ["baseline", "cwd", "kd", "tfe", "tse"]
    tell_methods(pipeline.filter(node_namespaces=["kd", "cwd"]), catalog, "SequentialRunner")
    assert sorted(catalog.load("run_methods")) == ["cwd", "kd"]
    tell_methods(method_pipeline("teacher"), catalog, "None")
    tell_methods(Pipeline([Node(lambda x: x, "a", "b", name="n")]), None, "None")


@pytest.mark.parametrize("runner", ["ThreadRunner", "<kedro.runner.ParallelRunner object>"])
def test_nodes_at_once_cannot_share(runner):
    params = {"params:trainer": MemoryDataset(SHARED), "run_methods": MemoryDataset([])}
    with pytest.raises(UserError, match=r"trainer.share_teacher is True, but .* at once"):
        tell_methods(method_pipeline("kd"), DataCatalog(params), runner)


def test_processes_that_train_one_network_cannot_share(monkeypatch):
    check_trainer(SHARED, [RECIPE])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="or processes of torchrun, train each network together"):
        check_trainer(SHARED, [RECIPE])
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    several = TrainerParams(device="cuda", devices="auto", precision="float32", share_teacher=4)
    with pytest.raises(UserError, match=r"trainer.share_teacher is 4, but 2 devices"):
        check_trainer(several, [RECIPE])
