"""Which data sets kedro-viz draws between namespaces, and which inside of them only.

A folder that every node is given, or a figure that nothing reads, is an input or output of its
namespace for kedro-viz and so stands in the picture even where the namespace is folded: of forty
boxes half would be these. An entry of the catalog that says

    metadata: {kedro-viz: {inside: true}}

is drawn when a namespace that uses it is unfolded. Nodes, edges and runs stay as they are.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from kedro.pipeline import Pipeline


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
