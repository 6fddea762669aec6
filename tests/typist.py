"""Types `kedro` commands: ``python -m tests.typist``, one JSON line on stdin for each.

A real process and its real streams for each command, forked from one that has imported Kedro,
MLflow and torch already, which takes longer than all of the command.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path


class Typist:
    """The process that types."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.typist"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def type(self, *words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `kedro` with these words in a folder."""
        streams = [str(self._folder / name) for name in ("stdout", "stderr")]
        self._process.stdin.write(json.dumps([words, str(cwd), env, streams]) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        out, err = (Path(stream).read_text() for stream in streams)
        return subprocess.CompletedProcess(words, status, out, err)

    def leave(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(60)


def _command(words: list[str], cwd: str, env: dict[str, str], streams: list[str]) -> int:
    from kedro.framework.cli.cli import main

    from rdd_pipeline import interruptions
    from rdd_pipeline.hooks import messages
    from tests import moments

    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    sys.path[0] = cwd
    os.environ.update(env)
    sys.argv = ["kedro", *words]
    # What the first imports of a command do.
    interruptions.leave_at_signals()
    messages.show_user_errors_as_one_line()
    moments.arm()
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _type() -> None:
    package = importlib.import_module("rdd_pipeline")
    for module in (
        "kedro.framework.cli.cli",
        "kedro.framework.session",
        "kedro_mlflow.framework.hooks",
        "mlflow.tracking",
        "mlflow.store.tracking.sqlalchemy_store",
        "rdd_pipeline.settings",
        "alembic",
        "matplotlib.figure",
        "scipy.stats",
        "timm",
        "torchvision",
        # Nodes import their code when they are called.
        *(module.name for module in pkgutil.walk_packages(package.__path__, "rdd_pipeline.")),
    ):
        if not module.endswith("__main__"):
            importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = _command(*json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()


if __name__ == "__main__":
    _type()
