"""What Kedro's plugins do beside a run: start programs, ask the network, show what is there."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def find_own_programs() -> None:
    """Let programs that plugins start by name be those of this environment, activated or not.

    ``kedro mlflow ui`` starts ``mlflow``, which another installation on the path may have, too.
    """
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != own and Path(own, "mlflow").exists():
        os.environ["PATH"] = f"{own}{os.pathsep}{path}"


def keep_viz_offline() -> None:
    """Let kedro-viz take the installed version for the newest: it would ask PyPI at each start."""
    with contextlib.suppress(ImportError):  # it is optional
        pypi: Any = import_module("kedro_viz.integrations.pypi")
        answer = SimpleNamespace(json=lambda: {"info": {"version": pypi.__version__}})
        pypi.requests = SimpleNamespace(
            get=lambda *_, **__: answer, exceptions=pypi.requests.exceptions
        )


def only_shows_runs() -> bool:
    """Whether this is ``kedro mlflow ui``, which reads no parameters; its --env is ``local``."""
    return sys.argv[1:3] == ["mlflow", "ui"]
