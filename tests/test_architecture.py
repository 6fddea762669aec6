"""Who imports whom, read from the source; and what runs without Kedro."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SOURCE / "rdd_pipeline"

BASE = {"config", "drawing", "errors", "files", "interruptions", "lazy", "__init__"}
LEAVES = {"collectives", "data", "losses", "networks"} | BASE
# What each part may import of this project; a part may always import itself.
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "__init__": {"inference", "interruptions"},
    "interruptions": {"errors"},
    "lazy": set(),
    "allocation": set(),
    "drawing": {"files"},
    "config": {"errors"},
    "collectives": set(),
    "commands": set(),
    "losses": BASE | {"collectives", "networks"},
    "data": BASE | {"scenes"},
    "scenes": BASE,
    "networks": BASE,
    "importing": BASE | {"data"},
    "distillation": LEAVES,
    "evaluation": LEAVES | {"allocation"},
    "training": LEAVES | {"allocation", "distillation", "evaluation"},
    "inference": LEAVES | {"evaluation", "training"},
    "launching": LEAVES | {"distillation", "evaluation", "training"},
    "export": LEAVES | {"evaluation"},
    "reporting": LEAVES | {"commands", "distillation", "evaluation"},
    "serving": BASE | {"inference"},
    "tracking": BASE | {"serving"},
    "datasets": LEAVES | {"training"},
    "hooks": LEAVES | {"commands", "distillation", "reporting", "tracking", "training"},
    "settings": {"config", "hooks", "interruptions"},
    "pipelines": LEAVES
    | {"commands", "distillation", "evaluation", "export", "inference", "launching"}
    | {"importing", "reporting", "tracking", "training"},
    "pipeline_registry": {"pipelines"},
    "__main__": set(),
}
RIM = {
    "pipelines", "datasets", "hooks", "serving", "tracking", "settings", "pipeline_registry",
    "__main__",
}  # fmt: skip
RIM_LIBRARIES = {"kedro", "kedro_datasets", "kedro_mlflow", "mlflow", "pandas", "fsspec", "jinja2"}
RIM_LIBRARIES |= {"click"}  # of Kedro's command line
EVERYWHERE = {"torch", "torchvision", "timm", "pydantic", "safetensors", "rich", "numpy", "PIL"}
EVERYWHERE |= {"huggingface_hub", "yaml"}  # timm cannot do without them
# Figures, statistics and reports; nothing that trains needs them. Triton comes with torch for CUDA.
LIBRARIES = {
    "evaluation": {"scipy"},  # regions of likely label errors only, imported where they are found
    "reporting": {"matplotlib", "scipy", "jinja2"},
    "datasets": {"matplotlib"},
    "drawing": {"matplotlib"},
    "pipelines": {"matplotlib"},
    # The extra `export`, imported where it is used.
    "export": {"onnx", "onnxruntime", "onnxscript"},
    "losses": {"triton"},
    "networks": {"segmentation_models_pytorch", "transformers"},  # extra `teachers`
    "importing": {"pyarrow"},  # Parquet
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    """Dotted name below the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _imports(path: Path) -> set[str]:
    """Full names of everything a file imports, at whatever depth of nesting, or names `Lazy`."""
    package = ["rdd_pipeline", *path.relative_to(PACKAGE).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "Lazy"
        ):
            found |= {name.value for name in node.args[:1] if isinstance(name, ast.Constant)}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            if module == "rdd_pipeline":
                found |= {f"{module}.{alias.name}" for alias in node.names}
            else:
                found.add(module)
    return found


def test_every_part_is_known_here():
    parts = {_name(path).split(".")[0] for path in MODULES}
    assert parts == set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_point_one_way(path):
    part = _name(path).split(".")[0]
    inner = {name.split(".")[1] for name in _imports(path) if name.startswith("rdd_pipeline.")}
    assert inner - {part} <= ALLOWED[part]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_only_the_rim_knows_kedro_mlflow_and_pandas(path):
    part = _name(path).split(".")[0]
    allowed = sys.stdlib_module_names | EVERYWHERE | {"rdd_pipeline"}
    if part in RIM:
        allowed |= RIM_LIBRARIES
    allowed |= LIBRARIES.get(part, set())
    assert {name.split(".")[0] for name in _imports(path)} <= allowed


# Inside a package, from the ground up: a module imports only from floors below its own.
FLOORS = {
    "data": """
        delivery division formats labels processes progress transforms
        download layouts.base reading
        layouts.ade20k layouts.camvid layouts.cityscapes layouts.coco_stuff layouts.folders \
            layouts.voc scan_cache
        layouts.scenes remarks
        layouts
        index
        coverage sources statistics
        loading packed
        images""",
    "scenes": """
        canvas
        objects
        annotation
        street
        write""",
    "losses": """
        class_counts kernels maps memory_bank
        base
        at dist dsd fused fused_relations kd layers pixelwise similarity skd
        bpkd cirkd cross_entropy cwd dkd fitnet ifvd mgd ohem region standardized
        af_dcd cirkdv2 rdd""",
    "importing": """
        export folder shapes splits work
        masks names
        pairs write
        coco cvat environment hugging_face label_studio labelme plain roboflow supervisely
        tools""",
    "networks": """
        files resizing
        adapters backbones heads
        decoders
        network
        foreign
        cirkd_names frozen preprocessing probe
        checkpoint
        networks""",
    "distillation": """
        stages
        methods
        objective""",
    "evaluation": """
        boundaries calibration cost
        confusion
        predict
        scoring suspects""",
    "training": """
        compiling device difficulty ema finite job profile progress reading schedule state \
            stopping synchronized trials
        coordinator curves early_stopping snapshots step store
        known
        preparation training
        build
        loop
        shared""",
    "inference": """
        files inputs results
        frames model sources
        folder""",
    "launching": """
        channel
        store
        exchange
        worker
        launch
        __main__ join""",
    "export": """
        latency module padding
        check onnx_file program
        quantize
        files speed""",
    "reporting": """
        caption comparison figures gallery page thumbnails
        comparison_figures curves examples palette pareto report sweep
        difficulty pixels preview progress""",
    "serving": """
        folder loader""",
    "tracking": """
        addresses event_files
        records
        database journal registry
        sender
        delivery
        __main__ writer
        tracking""",
}


@pytest.mark.parametrize("package", FLOORS)
def test_inside_a_package_imports_point_downwards(package):
    lines = FLOORS[package].replace("\\\n", " ").strip().splitlines()
    floors = {name: number for number, line in enumerate(lines) for name in line.split()}

    def place(module: str) -> str:
        """The module, or the package that something is imported from, by its name below."""
        while module and module not in floors:
            module = module.rpartition(".")[0]
        return module

    for path in sorted((PACKAGE / package).rglob("*.py")):
        name = _name(path).removeprefix(f"{package}.")
        if name == package and package not in floors:
            continue  # an __init__ without imports
        assert name in floors, f"{package}: on which floor is {name}?"
        start = f"rdd_pipeline.{package}."
        inner = {n.removeprefix(start) for n in _imports(path) if n.startswith(start)}
        for other in {place(module) for module in inner} - {"", name}:
            assert floors[other] < floors[name], f"{package}: {name} imports {other}"


def test_relative_imports_are_understood(tmp_path, monkeypatch):
    """The reader of imports itself: what it must not miss."""
    folder = tmp_path / "rdd_pipeline" / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "c.py").write_text(
        textwrap.dedent(
            """
            import one.two, three
            from . import sibling
            from .nodes import x
            from ..other import y
            from rdd_pipeline import hooks
            def f():
                from four import z
            later = Lazy("rdd_pipeline.losses")
            """
        )
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "rdd_pipeline")
    assert _imports(folder / "c.py") == {
        "one.two",
        "three",
        "four",
        "rdd_pipeline.a.b",
        "rdd_pipeline.a.b.nodes",
        "rdd_pipeline.a.other",
        "rdd_pipeline.hooks",
        "rdd_pipeline.losses",
    }


def test_pipelines_of_methods_do_not_import_each_others_nodes():
    """They share what lies beside them and each other's wiring."""
    pipelines = PACKAGE / "pipelines"
    for path in pipelines.rglob("*.py"):
        own = path.relative_to(pipelines).parts[0]
        for name in _imports(path):
            parts = name.split(".")
            if parts[:2] == ["rdd_pipeline", "pipelines"] and len(parts) > 3:
                assert parts[2] == own, f"{path} imports {name}"


def test_training_runs_where_there_is_no_kedro_mlflow_pandas_or_matplotlib():
    """`python -m rdd_pipeline.launching --help`, with those blocked."""
    blocked = sorted(RIM_LIBRARIES | {"matplotlib", "jinja2", "scipy", "pyarrow", "omegaconf"})
    program = f"""
import runpy, sys
for name in {blocked!r}:
    sys.modules[name] = None
sys.argv = ["training", "--help"]
runpy.run_module("rdd_pipeline.launching", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert "JOB.json" in done.stdout
