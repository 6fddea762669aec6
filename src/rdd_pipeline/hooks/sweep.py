"""What a sweep would set, checked before anything is read."""

from __future__ import annotations

from typing import Any

from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline

from rdd_pipeline.config import MethodsParams, Parameters, SweepParams
from rdd_pipeline.distillation.methods import METHODS, check_changes, find_method
from rdd_pipeline.errors import UserError
from rdd_pipeline.hooks.parameters import faults, fields_of, suggest

FREE = ("methods.weights.", "methods.options.")
"""What stands below is named by the methods; `check_changes` knows it."""


def check_sweep(pipeline: Pipeline, catalog: CatalogProtocol[Any, Any] | None) -> None:
    """Refuse a sweep over parameters that do not exist, or with values that do not fit.

    Raises:
        UserError: There is such a parameter or value, or no such method.
    """
    if catalog is None or "params:sweep" not in pipeline.inputs():
        return
    # A command that runs something else does without all about trainings.
    from rdd_pipeline.training.trials import settings_of, with_settings

    sweep: SweepParams = catalog.load("params:sweep")
    if sweep.method == "teacher" or not find_method(sweep.method).finishes:
        raise UserError(
            f"sweep.method is {sweep.method}, expected a method that ends with a student, such as "
            f"{', '.join(name for name in METHODS if METHODS[name].finishes)}."
        )
    trials = settings_of(sweep)
    known = [name for name, _ in fields_of(Parameters)]
    unknown = [name for name in sweep.parameters if name not in known and not name.startswith(FREE)]
    if unknown:
        found = []
        for name in unknown:
            meant = suggest(name, known)
            question = f" (did you mean {' or '.join(meant)}?)" if meant else ""
            found.append(f"sweep.parameters has {name}, which is no parameter{question}.")
        raise UserError(f"{' '.join(found)} Nothing was read or trained.")
    values = {
        name: value
        for name, value in dict(catalog.load("parameters")).items()
        if name in Parameters.model_fields and name != "sweep"
    }
    for number, settings in enumerate(trials, start=1):
        tried = with_settings(values, settings)
        if wrong := faults(tried, Parameters, {}):
            raise UserError(f"Trial {number} of the sweep: {' '.join(wrong)} Nothing was trained.")
        if any(name.startswith(FREE) for name in settings):
            check_changes(MethodsParams.model_validate(tried["methods"]))
