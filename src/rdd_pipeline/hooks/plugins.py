"""What Kedro's plugins do beside a run: start programs, ask the network, show what is there."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from kedro.framework.cli.utils import LazyGroup


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


def say_what_notebooks_need() -> None:
    """Let ``kedro jupyter`` and ``kedro ipython`` say what to install, in one line.

    Kedro names a file that is not there, and its error hides even that.
    """
    from kedro.framework.cli import utils

    utils._check_module_importable = _require
    for name in ("jupyter", "project"):  # where it was imported from there before
        module = sys.modules.get(f"kedro.framework.cli.{name}")
        if module is not None and hasattr(module, "_check_module_importable"):
            module._check_module_importable = _require  # type: ignore[attr-defined]


def _require(module_name: str) -> None:
    try:
        import_module(module_name)
    except ImportError as error:
        # Kedro shows its own errors without their words here, and others with a traceback.
        raise SystemExit(
            f"Error: The package {module_name} is missing. In the project's folder: "
            "pip install -e '.[notebooks]'"
        ) from error


class _MlflowCommands(ModuleType):
    """Stands for kedro-mlflow's module of commands until one of them is asked for."""

    def __init__(self) -> None:
        super().__init__("kedro_mlflow.framework.cli.cli")
        # What the plugin's entry point names, under its name and with its one subcommand.
        self.commands = LazyGroup(
            name="Mlflow",
            help="Kedro plugin for interactions with mlflow.",
            lazy_subcommands={"mlflow": f"{self.__name__}.mlflow_commands"},
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def load_mlflow_commands_when_used() -> None:
    """Let ``kedro`` commands that have nothing to do with MLflow do without it.

    Kedro imports every plugin's commands before it knows which one is wanted, and those of
    kedro-mlflow import all of MLflow, web server included: 1.8 of 2.6 seconds of CPU.
    """
    sys.modules.setdefault("kedro_mlflow.framework.cli.cli", _MlflowCommands())


def only_shows_runs() -> bool:
    """Whether this is ``kedro mlflow ui``, which reads no parameters; its --env is ``local``."""
    return sys.argv[1:3] == ["mlflow", "ui"]
