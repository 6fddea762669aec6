"""Names, types and ranges of all parameters, checked before anything is read or recorded.

Kedro checks the models of the pipelines that run, and names at the top not at all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from kedro.framework.context import KedroContext
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rdd_pipeline.config import Params
from rdd_pipeline.errors import UserError
from rdd_pipeline.hooks.configuration import section

SUGGESTIONS = 5
"""Names offered for one that does not exist."""


def check_parameters(context: KedroContext, known: type[Params]) -> None:
    """Refuse parameters that do not exist or do not fit, all of them in one message.

    Args:
        context: Its parameters are those of conf/ and ``--params`` together.
        known: A field for every parameter. Sections that conf/ leaves out are not missed here.

    Raises:
        UserError: There is such a parameter.
    """
    given = context._runtime_params or {}
    used = used_by_files(context)
    values = {
        name: value
        for name, value in section(context, "parameters").items()
        # What begins with _ is a template of a YAML file, to Kedro and here.
        if not (str(name).startswith("_") or (name in given and name in used))
    }
    found = faults(values, known, given)
    if found:
        raise UserError(f"{' '.join(found)} Nothing was read or trained.")


def faults(values: Mapping[str, Any], known: type[Params], given: Mapping[str, Any]) -> list[str]:
    """A sentence for each fault.

    Args:
        values: All parameters, nested.
        known: A field for every parameter.
        given: Those of ``--params`` among them, nested.
    """
    try:
        known.model_validate(dict(values))
    except ValidationError as error:
        found: dict[str, tuple[dict[str, None], Any]] = {}
        fields = dict(fields_of(known))
        unknown = []
        for fault in error.errors(include_url=False):
            place = [str(part) for part in fault["loc"]]
            if fault["type"] == "missing" and len(place) == 1:
                continue
            if fault["type"] == "extra_forbidden":
                unknown.append(place)
                continue
            # pydantic adds the branch of a union to the place.
            while place and ".".join(place) not in fields and fault["type"] != "missing":
                place.pop()
            reason = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "missing":
                reason = "not set. An environment (--env) or --params says it."
            found.setdefault(".".join(place), ({}, fault["input"]))[0].setdefault(reason)
        return [
            *(_unknown(name, list(fields), given) for name in _as_given(unknown, values)),
            *(
                _unfit(name, list(reasons), value, fields)
                for name, (reasons, value) in found.items()
            ),
        ]
    return []


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and description of every parameter and section, from the models alone."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from fields_of(kind, f"{prefix}{name}.")


def suggest(name: str, known: Sequence[str]) -> list[str]:
    """Parameters that may be meant by a dotted name that does not exist, the likeliest first.

    The same last part in another section (`on_problem`: `data.on_problem`), else the most alike
    name, else the most alike last part.
    """
    last = name.rpartition(".")[2]

    def alike(other: str) -> float:
        return difflib.SequenceMatcher(None, name, other).ratio()

    same = sorted((n for n in known if n.rpartition(".")[2] == last), key=alike, reverse=True)
    if same:
        best = alike(same[0]) if "." in name else 0.0  # a bare name says nothing of its section
        return [other for other in same if alike(other) > best - 0.1][:SUGGESTIONS]
    whole = difflib.get_close_matches(name, known, SUGGESTIONS, 0.7)
    if whole:
        return whole[:1]
    parts = difflib.get_close_matches(last, {n.rpartition(".")[2] for n in known}, 1, 0.7)
    found = (n for n in known if n.rpartition(".")[2] in parts)
    return sorted(found, key=alike, reverse=True)[:SUGGESTIONS]


def used_by_files(context: KedroContext) -> set[str]:
    """Names that files of conf/ take from ``--params`` by `${runtime_params:NAME}`."""
    source = Path(str(context.config_loader.conf_source))
    loader: Any = context.config_loader
    names = getattr(loader, "layers", (loader.base_env, context.env or loader.default_run_env))
    return {
        found.split(".")[0]
        for name in names
        for path in (source / str(name)).rglob("*.y*ml")
        for found in re.findall(r"\$\{runtime_params:\s*([\w.]+)", path.read_text("utf-8"))
    }


def _as_given(unknown: Sequence[Sequence[str]], values: Mapping[str, Any]) -> list[str]:
    """Names as they are typed: down to the value, as in `recipes.iterations`."""

    def leaves(place: str, value: Any) -> list[str]:
        if not isinstance(value, Mapping) or not value:
            return [place]
        return [leaf for key, item in value.items() for leaf in leaves(f"{place}.{key}", item)]

    names = []
    for place in unknown:
        value: Any = values
        for part in place:
            value = value.get(part) if isinstance(value, Mapping) else None
        names += leaves(".".join(place), value)
    return names


def _unknown(name: str, known: Sequence[str], given: Mapping[str, Any]) -> str:
    value: Any = given
    for part in name.split("."):
        value = value.get(part, _NOWHERE) if isinstance(value, Mapping) else _NOWHERE
    where = "A parameters*.yml of conf/" if value is _NOWHERE else "--params"
    meant = suggest(name, known)
    question = f" (did you mean {' or '.join(meant)}?)" if meant else ""
    return f"{where} sets {name}, which is no parameter{question}."


_NOWHERE = object()


def _unfit(name: str, reasons: Sequence[str], value: Any, fields: Mapping[str, FieldInfo]) -> str:
    described = fields[name].description if name in fields else None
    if isinstance(value, Mapping):  # a rule between fields, which names them
        return f"{name}: {' '.join(reasons)}"
    text = f"{value!r}"
    text = f"{text[:80]}..." if len(text) > 83 else text
    faults = "; or: ".join(reason.rstrip(".") for reason in reasons)
    return f"{name} is {text}: {faults}." + (f" ({described.rstrip('.')}.)" if described else "")
