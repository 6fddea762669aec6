"""Imports point one way, and only the rim knows Kedro, MLflow and pandas."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "rdd_pipeline"

MAY_IMPORT = {
    "config": set(),
    "errors": set(),
    "segmentation": {"config", "errors"},
    "networks": {"config", "errors"},
    "losses": {"config", "errors"},
    "distillation": {"losses", "networks", "segmentation", "config", "errors"},
    "evaluation": {"distillation", "losses", "networks", "segmentation", "config", "errors"},
    "training": {
        "evaluation",
        "distillation",
        "losses",
        "networks",
        "segmentation",
        "config",
        "errors",
    },
}
RIM = {
    "pipelines",
    "datasets",
    "hooks",
    "tracking",
    "settings",
    "pipeline_registry",
    "__main__",
    "__init__",
}
FOR_THE_RIM_ONLY = {"kedro", "kedro_mlflow", "kedro_datasets", "mlflow", "pandas"}
MODULES = sorted(SRC.rglob("*.py"))


def part_of(path: Path) -> str:
    first = path.relative_to(SRC).parts[0]
    return first.removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = path.parent.relative_to(SRC.parent).parts
                base = ".".join(package[: len(package) - node.level + 1])
                names.add(f"{base}.{node.module}" if node.module else base)
            elif node.module:
                names.add(node.module)
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part in RIM:
        return
    parts = {
        name.split(".")[1]
        for name in imported_modules(path)
        if name.startswith("rdd_pipeline.") and name.split(".")[1] != part
    }
    allowed = MAY_IMPORT[part]
    assert {p for p in parts if (SRC / p).exists() or (SRC / f"{p}.py").exists()} <= allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_only_the_rim_knows_kedro_mlflow_and_pandas(path: Path) -> None:
    if part_of(path) in RIM:
        return
    roots = {name.split(".")[0] for name in imported_modules(path)}
    assert not roots & FOR_THE_RIM_ONLY


def test_a_training_job_runs_where_kedro_mlflow_pandas_and_matplotlib_are_missing() -> None:
    missing = sorted(FOR_THE_RIM_ONLY | {"matplotlib", "jinja2", "pyarrow"})
    program = (
        f"import sys\nfor name in {missing!r}: sys.modules[name] = None\n"
        "sys.argv = ['x', '--help']\nimport runpy\n"
        "runpy.run_module('rdd_pipeline.training', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "JOB.json" in done.stdout
