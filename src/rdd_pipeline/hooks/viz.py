"""What kedro-viz shows of a run, and which data sets it draws inside of namespaces only.

Its own hooks warn at every run that is not the whole default pipeline, or that names it. Here they
are asked for whole runs of the main job, without a word for others.

A folder that every node is given, or a figure that nothing reads, is an input or output of its
namespace for kedro-viz and so stands in the picture even where the namespace is folded: of forty
boxes half would be these. An entry of the catalog that says

    metadata: {kedro-viz: {inside: true}}

is drawn when a namespace that uses it is unfolded. Nodes, edges and runs stay as they are.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

logger = logging.getLogger(__name__)

MAIN_JOB = "distill_tse"
_PARTS = (
    "tags", "from_nodes", "to_nodes", "node_names", "from_inputs", "to_outputs", "namespaces",
)  # fmt: skip


class RunStatusHook:
    """Writes what Kedro-Viz's page "Workflow" shows: state, time and size, node by node."""

    def __init__(self) -> None:
        self._catalog: Any = None
        self._hooks: list[Any] = []

    @hook_impl
    def after_catalog_created(self, catalog: CatalogProtocol[Any, Any]) -> None:
        """Remember the catalog, which knows the files."""
        self._catalog = catalog

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline) -> None:
        """Begin, if this is the whole main job and kedro-viz is there."""
        self._hooks = []
        if not _is_main_job(run_params) or find_spec("kedro_viz") is None:
            return
        place = "kedro_viz.integrations.kedro"
        for module, name in (
            ("run_hooks", "PipelineRunStatusHook"),
            ("hooks", "DatasetStatsHook"),
        ):
            self._hooks.append(getattr(import_module(f"{place}.{module}"), name)())
            import_module(f"{place}.hooks_utils").logger.setLevel(logging.WARNING)
        self._tell("after_catalog_created", catalog=self._catalog)
        # What it asks of these is settled.
        self._tell("before_pipeline_run", run_params={}, pipeline=pipeline)

    @hook_impl
    def before_dataset_loaded(self, dataset_name: str, node: Node) -> None:
        """Pass it on, as the following."""
        self._tell("before_dataset_loaded", dataset_name=dataset_name, node=node)

    @hook_impl
    def after_dataset_loaded(self, dataset_name: str, data: Any) -> None:
        """A data set was read."""
        self._tell("after_dataset_loaded", dataset_name=dataset_name, data=data)

    @hook_impl
    def before_dataset_saved(self, dataset_name: str, node: Node) -> None:
        """A data set is about to be written."""
        self._tell("before_dataset_saved", dataset_name=dataset_name, node=node)

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:
        """A data set was written."""
        self._tell("after_dataset_saved", dataset_name=dataset_name, data=data)

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """A node begins."""
        self._tell("before_node_run", node=node)

    @hook_impl
    def after_node_run(self, node: Node) -> None:
        """A node has ended."""
        self._tell("after_node_run", node=node)

    @hook_impl
    def on_node_error(self, error: Exception, node: Node) -> None:
        """A node has failed."""
        self._tell("on_node_error", error=error, node=node)

    @hook_impl
    def after_pipeline_run(self) -> None:
        """The run has ended."""
        self._tell("after_pipeline_run")

    @hook_impl
    def on_pipeline_error(self, error: Exception) -> None:
        """The run has failed."""
        self._tell("on_pipeline_error", error=error)

    def _tell(self, event: str, **what: Any) -> None:
        try:
            for hook in self._hooks:
                if hasattr(hook, event):
                    getattr(hook, event)(**what)
        except Exception as error:  # a picture of the run must not end it
            self._hooks = []
            logger.debug("Kedro-Viz is told nothing more of this run: %s", error)


def _is_main_job(run_params: Mapping[str, Any]) -> bool:
    names = set(run_params.get("pipeline_names") or ["__default__"])
    sequential = "SequentialRunner" in str(run_params.get("runner") or "SequentialRunner")
    whole = not any(run_params.get(part) for part in _PARTS)
    return names <= {MAIN_JOB, "__default__"} and whole and sequential


def keep_plumbing_inside() -> None:
    """Have kedro-viz heed ``inside``, where this is one of its commands: the import takes time."""
    if sys.argv[1:2] == ["viz"]:
        heed_inside()


def heed_inside() -> None:
    """Let no data set with ``inside`` be an input or output of a namespace in the picture."""
    manager: Any = import_module("kedro_viz.data_access.managers").DataAccessManager
    tree: Any = import_module(
        "kedro_viz.data_access.repositories.modular_pipelines"
    ).ModularPipelinesRepository
    if hasattr(tree, "inside"):
        return
    add_pipeline, add_inputs, add_outputs = (
        manager.add_pipeline,
        tree._add_inputs,
        tree._add_outputs,
    )

    def add_with_inside(self: Any, name: str, pipeline: Pipeline) -> None:
        self.modular_pipelines[name].inside = {
            dataset for dataset in pipeline.datasets() if _is_inside(self.catalog, dataset)
        }
        add_pipeline(self, name, pipeline)

    tree.inside = frozenset()
    manager.add_pipeline = add_with_inside
    tree._add_inputs = lambda self, name, inputs: add_inputs(self, name, inputs - self.inside)
    tree._add_outputs = lambda self, name, outputs: add_outputs(self, name, outputs - self.inside)


def _is_inside(catalog: Any, dataset: str) -> bool:
    metadata = getattr(catalog.get_dataset(dataset), "metadata", None) or {}
    return bool(metadata.get("kedro-viz", {}).get("inside"))
