"""What commands that run nothing import: in modules, since seconds depend on the machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.kedro_project import ROOT

HEAVY = {
    "alembic", "fastapi", "huggingface_hub", "kedro_datasets", "matplotlib", "mlflow", "numpy",
    "PIL", "pandas", "pyarrow", "safetensors", "scipy", "sklearn", "sqlalchemy", "timm", "torch",
    "torchvision", "transformers", "triton",
}  # fmt: skip
COMPUTING = {
    "data", "datasets", "evaluation", "launching", "losses", "networks", "reporting", "scenes",
    "training",
}  # fmt: skip
DONE = """
from rdd_pipeline.datasets import *
from rdd_pipeline.pipelines import example_nodes, method_nodes, summary_nodes
from rdd_pipeline.pipelines.data_ingestion import nodes
from rdd_pipeline.pipelines.distill_tse import nodes
from rdd_pipeline.pipelines.train_teacher import nodes
"""
"""All that `distill_tse` takes but Kedro, the hooks and MLflow."""
MODULES = 1150
"""976 with kedro 1.7 and dynaconf, requests, rich and flask, which it brings; torch alone has 1000
more."""


def _modules(program: str) -> set[str]:
    """Names of the modules that a fresh interpreter has when the program ends."""
    tell = "import atexit, json, sys\n"
    tell += "atexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules))))\n"
    done = subprocess.run(
        [sys.executable, "-c", tell + program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def listing() -> set[str]:
    return _modules(
        "sys.argv = ['kedro', 'registry', 'list']\nfrom kedro.framework.cli import main\nmain()\n"
    )


def test_listing_pipelines_imports_nothing_that_computes_draws_or_serves(listing):
    assert {name.split(".")[0] for name in listing} & HEAVY == set(), (
        "A module that is read to list pipelines imports one that computes: name it with "
        "rdd_pipeline.lazy.Lazy instead (CONTRIBUTING.md, A pipeline)."
    )
    parts = {name.split(".")[1] for name in listing if name.startswith("rdd_pipeline.")}
    assert {"pipeline_registry", "hooks", "settings"} <= parts
    assert parts & COMPUTING == set()
    assert not any(name.startswith("rdd_pipeline.") and "nodes" in name for name in listing)


def test_listing_pipelines_imports_no_more_than_it_did(listing):
    assert len(listing) < MODULES, f"{len(listing)} modules"


def test_a_run_of_finished_work_imports_nothing_that_builds_networks_or_draws():
    """That it does not build or draw either, test_run says."""
    modules = _modules(DONE)
    assert "torch" in modules
    assert not modules & {"torch._dynamo", "torch._inductor.config", "torch.onnx"}
    heavy = {"matplotlib", "mlflow", "scipy", "sympy", "timm", "torchvision", "triton"}
    heavy |= {"transformers"}
    assert {name.partition(".")[0] for name in modules} & heavy == set(), (
        "A node imports at its top what only builds or draws: name it with "
        "rdd_pipeline.lazy.Lazy, or import it where it is used."
    )


def test_the_package_itself_is_cheap_to_import():
    before = _modules("")
    new = {name.split(".")[0] for name in _modules("import rdd_pipeline") - before}
    assert new <= sys.stdlib_module_names | {"rdd_pipeline"}


def test_commands_of_kedro_mlflow_are_found_when_they_are_asked_for():
    done = subprocess.run(
        [sys.executable, "-m", "kedro", "mlflow", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert {"init", "modelify", "ui"} <= set(done.stdout.split())
