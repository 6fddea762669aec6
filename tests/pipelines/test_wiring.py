"""What the registry offers and how it is wired, for every environment under conf/."""

from pathlib import Path
from typing import Any, get_type_hints

import pytest
from kedro.config import OmegaConfigLoader
from kedro.framework.startup import bootstrap_project
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline

from rdd_pipeline.distillation.methods import METHODS

PROJECT = Path(__file__).resolve().parents[2]
NAMES = {
    "__default__",
    "data_ingestion",
    "train_teacher",
    "distill_tfe",
    "distill_tse",
    "distill_baselines",
    "evaluation",
}
ENVIRONMENTS = sorted(
    folder.name
    for folder in (PROJECT / "conf").iterdir()
    if folder.is_dir() and folder.name != "base"
)


@pytest.fixture(scope="module")
def registry() -> dict[str, Pipeline]:
    bootstrap_project(PROJECT)
    from rdd_pipeline.pipeline_registry import register_pipelines

    return register_pipelines()


def loader_of(environment: str) -> OmegaConfigLoader:
    from rdd_pipeline.settings import CONFIG_LOADER_ARGS

    return OmegaConfigLoader(
        conf_source=str(PROJECT / "conf"), env=environment, **CONFIG_LOADER_ARGS
    )


def test_the_registry_offers_every_promised_pipeline(registry: dict[str, Pipeline]) -> None:
    assert set(registry) >= NAMES
    assert {n.name for n in registry["__default__"].nodes} == {
        n.name for n in registry["distill_tse"].nodes
    }


def test_the_main_job_contains_everything_upstream(registry: dict[str, Pipeline]) -> None:
    free = {name for name in registry["distill_tse"].inputs() if not name.startswith("params:")}
    assert free == {"raw_images", "work_folder", "reporting_folder", "trained_metrics"}


def test_every_method_has_its_data_sets(registry: dict[str, Pipeline]) -> None:
    outputs = registry["distill_baselines"].all_outputs() | registry["distill_tse"].all_outputs()
    for method in METHODS:
        assert {f"student_{method}", f"metrics_{method}", f"history_{method}"} <= outputs


def test_the_stages_are_joined_by_the_whole_training_state(registry: dict[str, Pipeline]) -> None:
    (train_tse,) = registry["distill_tse"].filter(node_names=["tse.train_tse_node"]).nodes
    assert "state_tfe" in train_tse.inputs


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_data_set_and_parameter_of_every_pipeline_is_configured(
    registry: dict[str, Pipeline], environment: str
) -> None:
    loader = loader_of(environment)
    catalog = DataCatalog.from_config(loader["catalog"])
    parameters = loader["parameters"]
    for pipeline in registry.values():
        for name in pipeline.datasets():
            if name.startswith("params:"):
                value: Any = parameters
                for key in name.removeprefix("params:").split("."):
                    value = value[key]
            else:
                assert name in catalog, f"{name} is in no catalog of {environment}"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_parameters_of_every_environment_are_valid(
    registry: dict[str, Pipeline], environment: str
) -> None:
    parameters = loader_of(environment)["parameters"]
    for pipeline in registry.values():
        for node in pipeline.nodes:
            hints = get_type_hints(node.func)
            for argument, dataset in _bound(node).items():
                kind = hints[argument]
                if dataset.startswith("params:") and hasattr(kind, "model_validate"):
                    kind.model_validate(parameters[dataset.removeprefix("params:")])


def test_annotations_resolve_so_that_kedro_checks_parameters(
    registry: dict[str, Pipeline],
) -> None:
    for pipeline in registry.values():
        for node in pipeline.nodes:
            assert "return" in get_type_hints(node.func)


def test_layers_follow_the_data(registry: dict[str, Pipeline]) -> None:
    # A cycle among layers makes kedro-viz drop all of them.
    configured = loader_of("local")["catalog"]
    layers = {
        name: entry["metadata"]["kedro-viz"]["layer"]
        for name, entry in configured.items()
        if "metadata" in entry
    }
    order = ["raw", "intermediate", "models", "model_output", "reporting"]
    assert set(layers.values()) <= set(order)


def _bound(node: Any) -> dict[str, str]:
    inputs = node._inputs
    if isinstance(inputs, dict):
        return dict(inputs)
    names = [inputs] if isinstance(inputs, str) else list(inputs or [])
    return dict(zip(get_type_hints(node.func), names, strict=False))
