"""The settings that a sweep tries: a grid, or draws that are equal wherever they are drawn."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import JsonValue

from rdd_pipeline.config import Choices, Params, Span, SweepParams
from rdd_pipeline.errors import UserError

MOST = 1000
"""Trials of one sweep."""
_TRIES = 100
"""Draws for each trial that is wanted: small spaces are soon exhausted."""

Settings = dict[str, JsonValue]
"""Values by dotted name of the parameter."""


def settings_of(sweep: SweepParams) -> list[Settings]:
    """What each trial sets, in order.

    A grid varies its last parameter fastest. The trials of a random search differ from one
    another, and the first N of them are those of a search with N trials.

    Raises:
        UserError: There is nothing to try, or more than `MOST`.
    """
    if not sweep.parameters:
        raise UserError(
            "sweep.parameters is empty. Say what to try, e.g. "
            "--params=sweep.parameters.rdd.threshold=0.3/0.5/0.7"
        )
    if sweep.sampler == "random":
        return list(_drawn(sweep, sweep.trials or 0))
    lists = {name: c for name, c in sweep.parameters.items() if not isinstance(c, Span)}
    count = math.prod(map(len, lists.values()))
    if count > MOST:
        raise UserError(
            f"sweep.parameters has {count} combinations, expected at most {MOST}. Give fewer "
            "values, or sweep.sampler=random with sweep.trials=N."
        )
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _drawn(sweep: SweepParams, count: int) -> Iterator[Settings]:
    generator, seen = random.Random(sweep.seed), []
    for _ in range(count * _TRIES):
        settings = {name: _draw(choices, generator) for name, choices in sweep.parameters.items()}
        if settings not in seen:
            seen.append(settings)
            yield settings
        if len(seen) == count:
            return


def _draw(choices: Choices, generator: random.Random) -> JsonValue:
    if not isinstance(choices, Span):
        return generator.choice(choices)
    low, high = choices.low, choices.high
    place = generator.random()
    value = low * (high / low) ** place if choices.log else low + (high - low) * place
    if isinstance(low, int) and isinstance(high, int):
        return round(value) if choices.log else min(low + int((high - low + 1) * place), high)
    # Four digits are enough, and can be typed.
    return min(max(float(f"{value:.4g}"), low), high)


def with_settings(values: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Nested parameters with those of a trial set; the given ones stay as they are.

    Args:
        values: Mappings or models by section.
        settings: Of the trial.

    Raises:
        UserError: A name leads into a value that is none of the two.
    """
    result = {
        name: value.model_dump(mode="json") if isinstance(value, Params) else copy.deepcopy(value)
        for name, value in values.items()
    }
    for name, value in settings.items():
        *path, last = name.split(".")
        place: Any = result
        for key in path:
            if place.get(key) is None:  # such as recipe.ema, which is off
                place[key] = {}
            place = place[key]
            if not isinstance(place, dict):
                raise UserError(f"sweep.parameters has {name}, but {key} is {place!r}.")
        place[last] = value
    return result
