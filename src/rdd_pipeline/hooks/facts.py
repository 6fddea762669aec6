"""What MLflow is told about a run: parameters, metrics, command, commit."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rdd_pipeline.commands import params_option


def flat_params(key: str, value: Any) -> dict[str, str]:
    """Parameters as MLflow takes them: ``recipe.optimizer.lr`` -> ``0.02``.

    Args:
        key: Prefix of the names; may be empty.
        value: A pydantic model, a mapping or a single value.
    """
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if not isinstance(value, Mapping):
        return {key: str(value)}
    found: dict[str, str] = {}
    for name, item in value.items():
        found.update(flat_params(f"{key}.{name}" if key else str(name), item))
    return found


def numeric_leaves(data: Any, prefix: str = "") -> dict[str, float]:
    """Numbers of a nested dict by dotted name; lists, texts, None and flags are left out."""
    found: dict[str, float] = {}
    if isinstance(data, Mapping):
        for name, item in data.items():
            found.update(numeric_leaves(item, f"{prefix}.{name}" if prefix else str(name)))
    elif isinstance(data, int | float) and not isinstance(data, bool):
        found[prefix] = float(data)
    return found


# Names of Kedro's run parameters, and of the command's options for them.
_LISTS = {
    "namespaces": "namespaces",
    "tags": "tags",
    "node_names": "nodes",
    "from_nodes": "from-nodes",
    "to_nodes": "to-nodes",
    "from_inputs": "from-inputs",
    "to_outputs": "to-outputs",
}


def command(run_params: Mapping[str, Any], names: list[str]) -> str:
    """The `kedro run` command that repeats the run."""
    words = ["kedro", "run"]
    if names != ["__default__"]:
        words.append(f"--pipelines={','.join(names)}")
    if run_params.get("env"):
        words.append(f"--env={run_params['env']}")
    for name, option in _LISTS.items():
        if run_params.get(name):
            words.append(f"--{option}={','.join(run_params[name])}")
    versions = run_params.get("load_versions") or {}
    if versions:
        words.append(f"--load-versions={','.join(f'{k}:{v}' for k, v in versions.items())}")
    words += params_option(run_params.get("runtime_params") or {})
    if run_params.get("only_missing_outputs"):
        words.append("--only-missing-outputs")
    return shlex.join(words)


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Commit of the working tree and whether anything differs from it; None without git."""

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=folder, check=True, timeout=5, capture_output=True, text=True
        ).stdout.strip()

    try:
        return ask("rev-parse", "HEAD"), bool(ask("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None
