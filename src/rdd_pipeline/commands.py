"""Commands to be pasted: `kedro run` with the environment and the parameters of this session.

A hint without them would train something else. `ExperimentHook` says what the session was started
with; nodes ask for a command. Nothing here needs Kedro.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

OF_ONE_RUN = frozenset({"run_name", "sweep"})
"""Parameters, and sections of them, that belong to a single run: no other command has them."""


@dataclass(frozen=True)
class Session:
    """What ``kedro run`` was started with.

    Attributes:
        env: Of ``--env`` or KEDRO_ENV; None: neither was given.
        params: Of ``--params``, nested.
        conf_source: Of ``--conf-source``; None: the project's own folder.
    """

    env: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    conf_source: str | None = None


# No context variable: ThreadRunner's threads would not see it.
_session = Session()
_environment = ""


def remember_session(session: Session, environment: str | None = None) -> None:
    """Make it the session that commands are written for, until the next one starts.

    Args:
        session: What it was started with.
        environment: What it reads; None: what it was started with.
    """
    global _session, _environment
    _session, _environment = session, environment or session.env or ""


def environment() -> str:
    """The environment the running session reads, given or not; empty where there is no session."""
    return _environment


def configuration_source() -> str | None:
    """The running session's ``--conf-source``; None: the project's own folder."""
    return _session.conf_source


def kedro_command(
    pipeline: str | None = None,
    *,
    to_outputs: Sequence[str] = (),
    namespaces: Sequence[str] = (),
    params: Mapping[str, Any] | None = None,
    session: str | None = None,
) -> str:
    """A ``kedro run`` for a shell, with the --env and --params of the session that is running.

    Args:
        pipeline: Name of the pipeline; None: the default one.
        to_outputs: Data sets to make; empty: all.
        namespaces: Methods to train; empty: all.
        params: Further or other parameters, nested or with dotted names: they win over the
            session's.
        session: Text of an earlier one, from `session_text`, to be used in its place.
    """
    words = ["kedro", "run"]
    if pipeline is not None:
        words.append(f"--pipeline={pipeline}")
    of = _session if session is None else Session(**json.loads(session))
    words += session_options(params, of)
    if to_outputs:
        words.append(f"--to-outputs={','.join(to_outputs)}")
    if namespaces:
        words.append(f"--namespaces={','.join(namespaces)}")
    return shlex.join(words)


def session_text() -> str:
    """The running session as text, to be kept with a result; without the seeds, which it names."""
    left_out = {*OF_ONE_RUN, "seed", "seeds"}
    params = {
        name: value
        for name, value in _flat(_session.params).items()
        if name.partition(".")[0] not in left_out
    }
    return json.dumps({**asdict(_session), "params": params}, default=str)


def session_options(
    params: Mapping[str, Any] | None = None, session: Session | None = None
) -> list[str]:
    """The session's ``--env``, ``--conf-source`` and ``--params``, with `params` in addition.

    Returns:
        Words of a command line, not quoted for a shell.
    """
    session = session or _session
    words = [] if session.env is None else [f"--env={session.env}"]
    if session.conf_source is not None:
        words.append(f"--conf-source={session.conf_source}")
    return words + params_option({**_flat(session.params), **_flat(params or {})}, OF_ONE_RUN)


def params_option(params: Mapping[str, Any], without: frozenset[str] = frozenset()) -> list[str]:
    """``--params=...`` as Kedro reads it back, as a list of one word; of none without parameters.

    Args:
        params: Nested or with dotted names.
        without: Names that are left out.
    """
    items = [
        f"{name}={_value(value)}"
        for name, value in _flat(params).items()
        if name.partition(".")[0] not in without
    ]
    return [f"--params={','.join(items)}"] if items else []


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in params.items():
        key = f"{prefix}{name}"
        # Nothing follows the dot of an empty mapping: it is a value.
        found |= _flat(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return found


def _value(value: Any) -> str:
    """A value as YAML without a comma, at which Kedro cuts: lists take a line for each item."""
    if isinstance(value, list | tuple):
        return "\n".join("-" + _below(item) for item in value) or "[]"
    if isinstance(value, Mapping):
        lines = [f"{_value(key)}:{_below(item)}" for key, item in value.items()]
        return "\n".join(lines) or "{}"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return re.sub("(?=inf|nan)", ".", repr(value))
    text = str(value)
    return text if _is_plain(text) else json.dumps(text, ensure_ascii=False).replace(",", r"\x2C")


def _below(value: Any) -> str:
    """A value behind a dash or colon, on lines of its own if it is a list or mapping."""
    nested = isinstance(value, list | tuple | Mapping) and len(value) > 0
    text = _value(value)
    return "\n  " + text.replace("\n", "\n  ") if nested else f" {text}"


def _is_plain(text: str) -> bool:
    """Whether YAML reads these characters as they stand, and nothing strips or cuts them."""
    if "," in text or text != text.strip() or not text.isprintable():
        return False
    with contextlib.suppress(ValueError):
        float(text)  # OmegaConf reads more numbers than YAML
        return False
    try:
        return bool(yaml.safe_load(text) == text)
    except yaml.YAMLError:
        return False
