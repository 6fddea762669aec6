"""`kedro run` of every pipeline with the default `precision: auto` where that is bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from rdd_pipeline.distillation.methods import ABLATIONS, BASELINES, RDD_PLUS
from rdd_pipeline.networks import load_checkpoint
from rdd_pipeline.pipelines import method_nodes
from rdd_pipeline.training import device
from tests.kedro_project import Project, bootstrap
from tests.mlflow_store import new_store

# Every method suits this crop, and no loss explodes.
PARAMS: dict[str, Any] = {
    "trainer": {"precision": "auto"},
    "recipe": {
        "iterations": 2,
        "validate_every": 2,
        "optimizer": {"lr": 0.001},
        "augment": {"crop": [128, 128]},
    },
    "rdd": {"tfe_length": 2},
    "methods": {
        "options": {
            f"{prefix}{name}": {module: dict(options)}
            for prefix in ("", "tse_")
            for name, module, options in (
                ("cirkd", "cirkd_memory", {"pixel_slots": 100, "region_slots": 20}),
                ("cirkdv2", "cirkdv2", {"pixel_slots": 100, "region_slots": 20}),
                ("af_dcd", "af_dcd", {"patch": 2}),
            )
        }
    },
}
Run = Callable[..., list[str]]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def run(project, tmp_path_factory):
    """Function that runs pipelines and returns what they trained, all of it in bfloat16."""
    trained: list[str] = []
    train = method_nodes.train

    def watched(training, trainer, on_log):
        assert training.job.precision == "bfloat16"
        result = train(training, trainer, on_log)
        if result.trained:
            trained.append(training.job.method)
            assert all(math.isfinite(v) for row in result.history for v in row.values())
        return result

    def run(*pipelines: str, **options: Any) -> list[str]:
        trained.clear()
        project.run(*pipelines, params=PARAMS, **options)
        return list(trained)

    with pytest.MonkeyPatch.context() as patch:
        store = new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")
        patch.setenv("MLFLOW_TRACKING_URI", store)
        patch.setattr(device, "_cpu_has_bfloat16", lambda: True)
        patch.setattr(method_nodes, "train", watched)
        bootstrap()
        yield run


@pytest.fixture(scope="module")
def main_job(run: Run) -> list[str]:
    """Up to the evaluated RDD student."""
    return run("distill_tse")


def _assert_evaluated(project: Project, method: str) -> None:
    """Weights in float32, as in any precision, and scores."""
    network = load_checkpoint(project.newest(f"06_models/test/student_{method}/0.safetensors"))
    assert {str(t.dtype) for t in network.tensors.values()} <= {"torch.float32", "torch.int64"}
    metrics = project.json(f"07_model_output/test/metrics/{method}/0.json")
    for split in ("val", "test"):
        assert 0 <= metrics["splits"][split]["miou"] <= 1


def test_the_main_job(main_job, project):
    assert sorted(main_job) == ["baseline", "teacher", "tfe", "tse"]
    _assert_evaluated(project, "tse")


@pytest.mark.usefixtures("main_job")
def test_a_baseline_a_method_beside_rdd_and_an_ablation(run, project):
    some = ["cirkd", "rdd_or", "tse_cwd"]
    outputs = [f"metrics_{name}" for name in some]
    trained = run("distill_baselines", "distill_rdd_plus", "ablations", to_outputs=outputs)
    assert sorted(trained) == some
    for method in some:
        _assert_evaluated(project, method)


@pytest.mark.slow  # each method in bfloat16 without Kedro: tests/training/test_methods.py
@pytest.mark.usefixtures("main_job")
def test_all_baselines_and_their_comparison(run, project):
    # The main job has trained the student alone, the test above CIRKD.
    assert {"baseline", "cirkd", *run("distill_baselines")} == set(BASELINES)
    for method in BASELINES:
        _assert_evaluated(project, method)
    assert run("evaluation") == []
    page = project.newest("08_reporting/test/comparison.html").read_text()
    assert "CIRKDv2" in page


@pytest.mark.slow
@pytest.mark.usefixtures("main_job")
def test_all_methods_beside_rdd(run, project):
    run("distill_rdd_plus")
    for method in RDD_PLUS:
        _assert_evaluated(project, method)


@pytest.mark.slow
@pytest.mark.usefixtures("main_job")
def test_all_ablations(run, project):
    run("ablations")
    for method in ABLATIONS:
        _assert_evaluated(project, method)
