"""Projects of their own to be attacked, and the truth: what undisturbed commands end with."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdd_pipeline.files import json_digest
from rdd_pipeline.networks.checkpoint import NetworkCheckpoint

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = "trainer.threads=1"
LEFTOVER = re.compile(r"(^\..*\.\w+\.tmp$)|\.tmp$|^\.[\w.-]+\.[0-9a-f]{6,}$|^launch-")
"""Names of files that were being written."""


def run(pipeline: str, *words: str, params: str = "") -> list[str]:
    """The words of a `kedro run`."""
    given = ",".join(filter(None, (ONE_THREAD, params)))
    return ["run", f"--pipeline={pipeline}", "--env=test", f"--params={given}", *words]


def make_project(place: Path) -> Path:
    """Code and configuration of this checkout, and nothing that is anybody's own."""
    ignore = shutil.ignore_patterns("__pycache__", "local")
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, place / name, ignore=ignore)
    (place / "conf" / "local").mkdir()
    (place / "data").mkdir()
    shutil.copy2(ROOT / "pyproject.toml", place)
    return place


def copy_project(source: Path, place: Path) -> Path:
    """A project as another one is now."""
    shutil.copytree(source, place, symlinks=True, ignore=shutil.ignore_patterns("siege-*.log"))
    return place


def results(place: Path) -> dict[str, str]:
    """Digest of each newest result: the tensors of networks, the scores of metrics.

    A file that cannot be read has its error in the place of a digest.
    """
    found: dict[str, str] = {}
    models, metrics = place / "data/06_models/test", place / "data/07_model_output/test/metrics"
    for path in [*newest(models, "*.safetensors"), *newest(metrics, "*.json")]:
        try:
            if path.suffix == ".json":
                digest = json_digest(json.loads(path.read_text())["splits"])
            else:
                digest = NetworkCheckpoint.from_bytes(path.read_bytes()).digest()
        except Exception as error:
            digest = f"{type(error).__name__}: {str(error)[:100]}"
        found[f"{path.suffix[1:]} {path.parent.name} {path.stem}"] = digest[:16]
    table = place / "data/08_reporting/test/comparison.csv"
    if versions := sorted(table.glob("*/*.csv")):
        found["comparison"] = json_digest(_without_times(versions[-1]))[:16]
    return found


def _without_times(path: Path) -> list[Any]:
    """The numbers of a comparison that repeat: not clocks, versions and names of runs."""
    import pandas as pd

    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    moving = re.compile("version|second|speed|time|memory|run|command|images_per", re.IGNORECASE)
    kept = [name for name in table.columns if not moving.search(name)]
    return [kept, *table[kept].sort_values(kept).to_numpy().tolist()]


def newest(folder: Path, pattern: str) -> list[Path]:
    """Files of the newest versions of all entries below a folder."""
    entries: dict[Path, list[Path]] = {}
    for path in folder.glob(f"*/*/*/{pattern}"):
        if path.parents[2].name == path.parent.name:
            entries.setdefault(path.parents[2], []).append(path)
    found = []
    for paths in entries.values():
        last = max(path.parents[1].name for path in paths)
        found += [path for path in sorted(paths) if path.parents[1].name == last]
    return found


def leftovers(place: Path) -> list[str]:
    """Files that a killed writer has left."""
    return [
        str(path.relative_to(place))
        for folder in ("data", "mlartifacts")
        for path in (place / folder).rglob("*")
        if LEFTOVER.search(path.name)
    ] + [path.name for path in place.glob(".*mlflow*")]


def empty_versions(place: Path) -> list[str]:
    """Versions with nothing or an empty file in them."""
    found = []
    for folder in ("06_models", "07_model_output", "08_reporting"):
        for path in (place / "data" / folder).rglob("*"):
            if re.fullmatch(r"\d{4}-\d\d-\d\dT.*Z", path.name) and not any(
                one.is_file() and one.stat().st_size for one in path.rglob("*")
            ):
                found.append(str(path.relative_to(place)))
    return found


def mlflow_runs(place: Path) -> dict[str, int] | str:
    """How many runs have which status in the database; a text: it cannot be used."""
    path = place / "mlflow.db"
    if not path.exists():
        return "there is no mlflow.db"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            rows = database.execute("select status, count(*) from runs group by status")
            return dict(rows.fetchall())
    except sqlite3.Error as error:
        return f"mlflow.db: {error}"


def unsent(place: Path) -> list[str]:
    """Files of records that MLflow has not."""
    return sorted(path.name for path in (place / "data").glob("*/untracked/*.jsonl"))


def differing(found: dict[str, str], truth: dict[str, str]) -> list[str]:
    """What is missing or another than in the undisturbed run, in words."""
    return [
        f"{name} is {found.get(name, 'missing')}, should be {digest}"
        for name, digest in truth.items()
        if found.get(name) != digest
    ]


def remove(places: Sequence[Path]) -> None:
    """Remove projects, whatever rights their folders have."""
    for place in places:
        for path in place.rglob("*"):
            if path.is_dir() and not path.is_symlink() and not os.access(path, os.W_OK):
                path.chmod(0o700)
        shutil.rmtree(place, ignore_errors=True)
