"""What MLflow is told about a run: parameters, metrics, command, commit."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from rdd_pipeline.commands import params_option
from rdd_pipeline.tracking import UsedData

if TYPE_CHECKING:  # they import torch
    from rdd_pipeline.data.images import Images
    from rdd_pipeline.training.job import TrainingJob


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


_FIRST = {"loss": "loss", "val.miou": "miou"}
_OF_RDD = ("chosen", "hard_", "teacher_confidence", "aux_chosen", "aux_hard_")


def curve_name(name: str) -> str:
    """Name in MLflow of a training's curve: those without a folder are shown first.

    ``loss``, ``miou`` (on val, while it trains), ``rdd/...`` (what RDD chooses), ``train/...``,
    ``system/...`` (use of the machine).
    """
    if name in _FIRST:
        return _FIRST[name]
    if name.startswith("system/"):  # MLflow's own name: it has a page for them
        return name
    of_rdd = name.startswith(_OF_RDD) or name.endswith("_share")
    return f"{'rdd' if of_rdd else 'train'}/{name.replace('.', '_')}"


def score_names(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Scores and cost of a network as metrics: ``miou_SPLIT``, then the rest in folders.

    MLflow sorts its charts by folder, and calls that of names without one "Model metrics": the
    others are named to come after it.
    """
    found: dict[str, float] = {}
    for split, scores in metrics["splits"].items():
        for name, value in scores.items():
            if isinstance(value, Mapping):  # by class
                found |= numeric_leaves({f"{split}_classes/{name}": value})
            else:
                place = f"miou_{split}" if name == "miou" else f"{split}/{name}"
                found |= numeric_leaves({place: value})
    costs = numeric_leaves(metrics["cost"]).items()
    return found | {f"resources/{name}": value for name, value in costs}


def settings_of(job: TrainingJob) -> dict[str, str]:
    """What makes the method of a training: its losses, their weights and options, RDD's settings.

    ``method.NAME`` beside the run's parameters, which are those of all its methods: in a
    comparison of two trainings these are what differs.
    """
    method = job.definition
    found: dict[str, Any] = {"method": job.method, "method.title": method.title}
    for loss in method.losses:
        found |= {f"method.weight.{name}": weight for name, weight in loss.weights.items()}
        found |= {f"method.{loss.name}.{name}": value for name, value in loss.options.items()}
    if method.uses_rdd:
        found |= flat_params("method.rdd", job.rdd_settings)
    return {name: str(value) for name, value in found.items()}


def data_of(images: Images, dataset: str) -> list[UsedData]:
    """Each split of the images of a data set, for MLflow's column of data sets."""
    parts = {name: images.split(name) for name in dict.fromkeys(s.split for s in images.samples)}
    return [
        UsedData(
            name=f"{dataset} {name}",
            digest=part.index_digest[:36],
            source=str(images.root),
            context=name,
            profile={"images": len(part.samples), "classes": images.labels.num_classes},
        )
        for name, part in parts.items()
    ]


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
