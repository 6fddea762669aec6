"""Python processes that need not import torch and MLflow: ``python -m tests.warm``.

The imports take four seconds, longer than what most tests start a process for. So one process has
made them, and forks for each that a test wants: real processes with their own streams, environment
and exit status, in which nothing of this project was imported.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = (
    "torch",
    "torch.distributed",
    "torchvision",
    "timm",
    "kedro.config",
    "kedro.io",
    "kedro.pipeline",
    "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
    "pandas",
    "PIL.Image",
    "scipy.stats",
)


class Process:
    """One that was started."""

    def __init__(self, server: _Server, words: list[str], pid: int, streams: list[str]) -> None:
        self.args, self.pid = words, pid
        self._server, self._streams = server, streams

    def poll(self) -> int | None:
        """Its exit status if it has ended."""
        return self._server.ask("poll", self.pid)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """What it has written and ended with; negative: by this signal."""
        status = self._server.ask("wait", self.pid)
        out, err = (Path(stream).read_text() for stream in self._streams)
        return subprocess.CompletedProcess(self.args, status, out, err)


def start(words: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> Process:
    """Like ``subprocess.Popen([sys.executable, *words])``, for ``-m MODULE`` and ``-c CODE``."""
    server = _server(os.getpid())
    streams = [tempfile.mkstemp(dir=server.folder.name)[1] for _ in range(2)]
    pid = server.ask("start", [list(words), str(cwd), dict(env), streams])
    return Process(server, list(words), pid, streams)


def run(
    words: Sequence[str], *, cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Like ``subprocess.run([sys.executable, *words], capture_output=True, text=True, ...)``."""
    return start(words, cwd=cwd, env=env).wait()


class _Server:
    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )  # it ends with its standard input

    def ask(self, what: str, about: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, about]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@functools.cache
def _server(process: int) -> _Server:
    return _Server()


def _serve() -> None:
    for module in IMPORTS:
        importlib.import_module(module)
    # The package is what is tested; this part of Kedro sets logging up when it is imported.
    unwanted = [
        name for name in sys.modules if name.startswith(("rdd_pipeline", "kedro.framework"))
    ]
    assert not unwanted
    assert threading.active_count() == 1  # a fork has one
    answers = os.fdopen(os.dup(1), "w")
    ended: dict[int, int] = {}
    for line in sys.stdin:
        what, about = json.loads(line)
        if what == "start":
            pid = os.fork()
            if pid == 0:
                return _be(*about)
            answer: int | None = pid
        else:
            if about not in ended:
                pid, status = os.waitpid(about, os.WNOHANG if what == "poll" else 0)
                if pid:
                    ended[about] = os.waitstatus_to_exitcode(status)
            answer = ended.get(about)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return None


def _be(words: list[str], cwd: str, env: dict[str, str], streams: list[str]) -> None:
    """Become ``python *words``: what is left is the end of the interpreter."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_TRUNC), number)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    given = env.get("PYTHONPATH", "").split(os.pathsep)
    installed = [path for path in sys.path[1:] if path not in inherited]
    sys.path[:] = [cwd, *filter(None, given), *installed]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    if "MOMENT" in env:
        from tests.moments import arm

        arm()
    kind, what, *arguments = words
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    _serve()
