"""An empty MLflow database for tests.

Making its tables takes ten seconds, so one is kept in the system's temporary folder for each
version of MLflow and copied for each test.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path


@cache
def _template() -> Path:
    import mlflow

    kept = Path(tempfile.gettempdir(), f"rdd-pipeline-tests-mlflow-{mlflow.__version__}.db")
    if kept.is_file() and kept.stat().st_uid == os.getuid():
        return kept
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        mlflow.MlflowClient(tracking_uri=uri).search_experiments()
        # Several test processes may get here at once; each copy is whole.
        shutil.copy(f"{folder}/mlflow.db", kept.with_suffix(f".{os.getpid()}"))
    kept.with_suffix(f".{os.getpid()}").replace(kept)
    return kept


def new_store(path: Path) -> str:
    """Copy an empty database to `path`; returns its tracking URI."""
    shutil.copy(_template(), path)
    return f"sqlite:///{path}"
