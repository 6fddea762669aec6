"""Kedro hooks of this project.

`ExperimentHook` makes every run an MLflow run; a failing MLflow never costs a training.
"""

from rdd_pipeline.hooks.experiment import ExperimentHook

__all__ = ["ExperimentHook"]
