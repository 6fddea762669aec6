"""Pipelines by the name of their package."""

from kedro.framework.project import find_pipelines
from kedro.pipeline import Pipeline


def register_pipelines() -> dict[str, Pipeline]:
    """Every package under ``pipelines/``; ``__default__`` is the main job, `distill_tse`."""
    pipelines: dict[str, Pipeline] = find_pipelines(raise_errors=True)
    # Kedro loads only the packages a run names, so the main job may not be among them.
    pipelines["__default__"] = pipelines.get("distill_tse") or sum(
        pipelines.values(), start=Pipeline([])
    )
    return pipelines
