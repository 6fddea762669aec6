"""All pipelines: names, catalog, types; nothing is run."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path

import pytest
from kedro.config import OmegaConfigLoader
from kedro.framework.project import pipelines as registered
from kedro.framework.project import settings
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from pydantic import BaseModel

from rdd_pipeline.config import Params
from rdd_pipeline.distillation.methods import ABLATIONS, BASELINES, RDD_PLUS
from rdd_pipeline.lazy import Lazy
from rdd_pipeline.pipelines.node import Node
from tests.kedro_project import CONF, ENVIRONMENTS, ROOT, bootstrap

NAMES = {
    "data_ingestion",
    "train_teacher",
    "distill_tfe",
    "distill_tse",
    "distill_baselines",
    "distill_rdd_plus",
    "ablations",
    "evaluation",
    "predict",
    "export",
    "benchmark",
    "label_errors",
    "sweep",
}
USES = {"benchmark", "evaluation", "export", "label_errors", "predict"}
"""Those that work with what others have trained."""


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Pipeline]:
    bootstrap()
    return {name: registered[name] for name in registered}


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def configuration(request) -> OmegaConfigLoader:
    bootstrap()
    return settings.CONFIG_LOADER_CLASS(
        conf_source=str(CONF), env=request.param, **settings.CONFIG_LOADER_ARGS
    )


@pytest.fixture(scope="module")
def catalog(configuration) -> DataCatalog:
    return DataCatalog.from_config(dict(configuration["catalog"]))


def test_the_pipelines_that_others_call_are_there(pipelines):
    assert NAMES | {"__default__"} <= set(pipelines)


def test_every_package_is_a_pipeline_and_every_pipeline_a_package(pipelines):
    folder = ROOT / "src" / "rdd_pipeline" / "pipelines"
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert set(pipelines) == packages | {"__default__"}


def test_the_default_is_the_main_job(pipelines):
    assert set(pipelines["__default__"].nodes) == set(pipelines["distill_tse"].nodes)


def test_the_main_job_contains_all_that_comes_before_it(pipelines):
    for before, after in (
        ("data_ingestion", "train_teacher"),
        ("train_teacher", "distill_tfe"),
        ("distill_tfe", "distill_tse"),
        ("train_teacher", "distill_baselines"),
    ):
        # But for the table: only that of the command itself is shown.
        nodes = {node for node in pipelines[before].nodes if "summary" not in node.tags}
        assert nodes < set(pipelines[after].nodes)


@pytest.mark.parametrize("name", sorted(NAMES - USES - {"data_ingestion"}))
def test_every_pipeline_that_trains_ends_with_one_table(pipelines, name):
    nodes = pipelines[name].nodes
    (table,) = [node for node in nodes if "summary" in node.tags]
    assert nodes[-1] is table
    students = {n.namespace for n in nodes if "training" in n.tags} - {"teacher"}
    ending = {name.removeprefix("metrics_") for name in table.inputs} & students
    assert ending == students - ({"tfe"} if name == "distill_tse" else set())


def test_pipelines_can_be_run_together(pipelines):
    together = pipelines["distill_tse"] + pipelines["distill_baselines"] + pipelines["ablations"]
    names = [node.name for node in together.nodes]
    assert len(names) == len(set(names))
    assert names.count("baseline.train_baseline") == 1


def test_a_fresh_clone_has_all_that_the_main_job_starts_from(pipelines):
    folders = {"raw_images", "image_cache", "work_folder", "reporting_folder", "trained_metrics"}
    folders |= {"run_methods"}
    for name in NAMES - USES:
        inputs = {i for i in pipelines[name].inputs() if not i.startswith("params:")}
        assert inputs <= folders
    inputs = {i for i in pipelines["export"].inputs() if not i.startswith("params:")}
    assert inputs <= folders | {"models_folder", "export_folder"}
    assert pipelines["evaluation"].inputs() - {"params:evaluation", "params:trainer"} == {
        "trained_metrics",
        "work_folder",
        "reporting_folder",
        "models_folder",
        "ingested_images",  # it may be without
    }
    inputs = {i for i in pipelines["predict"].inputs() if not i.startswith("params:")}
    assert inputs == {"models_folder", "predictions_folder"}


@pytest.mark.parametrize(
    ("pipeline", "method"),
    [
        *[("distill_baselines", name) for name in BASELINES],
        *[("distill_rdd_plus", name) for name in RDD_PLUS],
        *[("ablations", name) for name in ("baseline", *ABLATIONS)],
    ],
)
def test_every_method_has_the_same_nodes_and_public_datasets(pipelines, pipeline, method):
    nodes = [node for node in pipelines[pipeline].nodes if node.namespace == method]
    reference = [node for node in pipelines["distill_tse"].nodes if node.namespace == "tse"]

    def without(text: str, name: str) -> str:
        return re.sub(rf"(?<![a-z0-9]){name}(?![a-z0-9])", "METHOD", text)

    assert {without(node.name, method) for node in nodes} == {
        without(node.name, "tse") for node in reference
    }
    outputs = {output for node in nodes for output in node.outputs}
    for kind in ("student", "metrics", "history", "confusion", "curves"):
        assert f"{kind}_{method}" in outputs


def test_node_names_are_unique_and_plain(pipelines):
    for pipeline in pipelines.values():
        names = [node.name for node in pipeline.nodes]
        assert len(set(names)) == len(names)
        assert not [name for name in names if name.endswith("_node")]


def test_every_dataset_of_every_pipeline_resolves(pipelines, configuration, catalog):
    parameters = dict(configuration["parameters"])
    for name, pipeline in pipelines.items():
        for dataset in pipeline.datasets():
            if dataset.startswith("params:"):
                assert dataset.removeprefix("params:") in parameters, (name, dataset)
            else:
                # In the file or by a pattern of it; not a MemoryDataset made up by Kedro.
                assert dataset in catalog, (name, dataset)


def test_only_hand_overs_inside_a_run_are_kept_in_memory(pipelines, catalog):
    # From hook or node to node: in a file another session could put its own there.
    handed_over = {"inspection", "indexed_images", "given_teacher", "measured_networks"}
    handed_over |= {"prediction_plan", "exported_network", "run_methods"}
    handed_over |= {"found_export", "imported_data", "comparison_examples"}
    for pipeline in pipelines.values():
        for dataset in pipeline.datasets():
            if not dataset.startswith(("params:", "plan_", "training_")):
                in_memory = type(catalog.get(dataset)).__name__ == "MemoryDataset"
                assert in_memory is (dataset in handed_over), dataset


def test_nothing_is_kept_in_memory_that_no_node_takes(pipelines, catalog):
    """Kedro holds such outputs until the run ends, and training states are large."""
    for pipeline in pipelines.values():
        for dataset in pipeline.outputs():
            assert type(catalog.get(dataset)).__name__ != "MemoryDataset", dataset


def test_results_of_one_environment_stay_in_its_own_folders(configuration):
    name = configuration["globals"]["dataset"]
    for entry, content in configuration["catalog"].items():
        path = content.get("filepath", "")
        if path and entry not in ("raw_images", "raw_folder", "environments_folder"):
            assert f"/{name}/" in f"{path}/", entry


def test_environments_do_not_share_a_folder_of_results():
    bootstrap()
    names = [
        settings.CONFIG_LOADER_CLASS(conf_source=str(CONF), env=env, **settings.CONFIG_LOADER_ARGS)[
            "globals"
        ]["dataset"]
        for env in ENVIRONMENTS
    ]
    assert len(set(names)) == len(names)
    assert "none" not in names


# ---- layers of Kedro-Viz


def _layers(catalog: DataCatalog, datasets: set[str]) -> dict[str, str]:
    return {
        name: (catalog.get(name).metadata or {})["kedro-viz"]["layer"]
        for name in datasets
        if not name.startswith("params:")
    }


def test_layers_have_no_cycle(pipelines, catalog):
    """A cycle removes all layers from the picture."""
    for pipeline in pipelines.values():
        layers = _layers(catalog, pipeline.datasets())
        edges: dict[str, set[str]] = {layer: set() for layer in layers.values()}
        for node in pipeline.nodes:
            for one in node.inputs:
                for other in node.outputs:
                    if one in layers and other in layers and layers[one] != layers[other]:
                        edges[layers[one]].add(layers[other])
        while edges:
            sources = [layer for layer in edges if not any(layer in e for e in edges.values())]
            assert sources, f"a cycle among {sorted(edges)}"
            for layer in sources:
                del edges[layer]


def test_every_layer_is_one_of_the_eight_folders(pipelines, catalog):
    known = {path.name[3:] for path in (ROOT / "data").iterdir() if path.is_dir()}
    for pipeline in pipelines.values():
        assert set(_layers(catalog, pipeline.datasets()).values()) <= known


# ---- functions, which are imported when they are looked at


def test_every_node_says_the_name_of_its_function_and_shows_it(pipelines):
    """Logs have the one, Kedro-Viz and notebooks the other; also of nodes in a namespace."""
    for pipeline in pipelines.values():
        for node in pipeline.nodes:
            assert inspect.isfunction(node.func), node.name
            assert node._func_name == node.func.__name__
            assert inspect.getsource(node.func).lstrip().startswith("def ")


def test_a_node_that_was_copied_still_imports_its_function_when_it_is_looked_at():
    node = Node(Lazy("tests.pipelines.examples").no_such, "a", "b", name="n").tag("t")
    assert isinstance(node, Node)
    assert str(node) == "n: no_such([a]) -> [b]"
    with pytest.raises(ModuleNotFoundError, match="no_such"):
        _ = node.func


def test_a_hook_may_put_another_function_into_a_node():
    node = Node(Lazy("math.sqrt"), ["a"], "b", name="n")
    assert node.inputs == ["a"]
    node.func = abs
    assert node.func is abs
    assert node.run({"a": -1}) == {"b": 1}


# ---- types


def test_annotations_of_all_nodes_resolve_so_that_kedro_checks_parameters(pipelines):
    for pipeline in pipelines.values():
        for node in pipeline.nodes:
            hints = typing.get_type_hints(node.func)
            for name in inspect.signature(node.func).parameters:
                assert name in hints, f"{node.name}: {name} has no type"
            assert "return" in hints, node.name


def test_every_parameter_has_one_type_and_that_is_checked(pipelines):
    types: dict[str, set[type]] = {}
    for pipeline in pipelines.values():
        for node in pipeline.nodes:
            hints = typing.get_type_hints(node.func)
            arguments = inspect.signature(node.func).bind(
                *([] if isinstance(node._inputs, dict) else node.inputs),
                **(node._inputs if isinstance(node._inputs, dict) else {}),
            )
            for argument, dataset in arguments.arguments.items():
                # A tuple: the data sets that go to *arguments, which are no parameters.
                if isinstance(dataset, tuple):
                    assert not any(name.startswith("params:") for name in dataset)
                elif dataset.startswith("params:"):
                    types.setdefault(dataset, set()).add(hints[argument])
    for dataset, found in types.items():
        assert len(found) == 1, f"{dataset} is {found}"
        (kind,) = found
        if dataset not in ("params:seed", "params:seeds"):
            assert issubclass(kind, BaseModel), dataset
            assert issubclass(kind, Params)


def test_parameters_of_every_environment_are_valid(pipelines, configuration):
    parameters = dict(configuration["parameters"])
    hints: dict[str, type] = {}
    for node in pipelines["distill_tse"].nodes + pipelines["distill_baselines"].nodes:
        if isinstance(node._inputs, dict):
            resolved = typing.get_type_hints(node.func)
            hints |= {d: resolved[a] for a, d in node._inputs.items() if d.startswith("params:")}
    assert {"params:recipe", "params:teacher", "params:data"} <= set(hints)
    for dataset, kind in hints.items():
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind.model_validate(parameters[dataset.removeprefix("params:")])
    assert isinstance(parameters["seed"], int)


def test_no_file_names_a_path_of_this_machine():
    for path in CONF.rglob("*.yml"):
        text = path.read_text()
        assert str(Path.home()) not in text or Path.home() == Path("/")
        assert str(ROOT) not in text
