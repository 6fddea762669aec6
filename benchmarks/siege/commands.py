"""Commands of the project as processes that can be killed at any moment.

Most are forked from this process, which has imported everything: `kedro run` as it is, without the
ten seconds that torch and MLflow take to be imported. `real` ones are the plain command.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import mmap
import os
import pkgutil
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rdd_pipeline import interruptions

KEDRO = str(Path(sys.executable).with_name("kedro"))
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_LIBC = ctypes.CDLL(None, use_errno=True)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate"}


def import_everything() -> None:
    """What a run imports, once; no thread is started and no autograd used, so forks are sound."""
    import alembic  # noqa: F401
    import kedro_mlflow.framework.cli.cli  # noqa: F401
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    import pandas  # noqa: F401
    import scipy.stats  # noqa: F401
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    import rdd_pipeline

    # All of it: a checkout that somebody works in may change before the end.
    for module in pkgutil.walk_packages(rdd_pipeline.__path__, "rdd_pipeline."):
        if not module.name.endswith((".settings", "__main__")):
            importlib.import_module(module.name)
    torch.set_num_threads(1)


def adopt_orphans() -> None:
    """Become the parent of every process below this one that loses its own."""
    _LIBC.prctl(_SUBREAPER, 1, 0, 0, 0)


def below(pid: int) -> list[int]:
    """All descendants of a process that are alive; zombies are not."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents.setdefault(int(parent), []).append(int(path.parent.name))
    found, left = [], [pid]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


def described(pid: int) -> str:
    """The command line of a process, short."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()[:100]
    return "gone"


def end_all_below(pid: int, *, patience: float) -> list[str]:
    """Wait until a process has no descendants; kill and name those that stay."""
    until = time.monotonic() + patience
    while (left := below(pid)) and time.monotonic() < until:
        _reap()
        time.sleep(0.1)
    names = [described(one) for one in left]
    for one in left:
        with contextlib.suppress(OSError):
            os.kill(one, signal.SIGKILL)
    _reap()
    return names


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@dataclass
class Ended:
    """How a command ended.

    Attributes:
        status: Exit status, negative for a signal; None: it hung and was killed.
        seconds: How long it took.
        text: All it printed.
    """

    status: int | None
    seconds: float
    text: str

    @property
    def traceback(self) -> bool:
        """Whether it showed a traceback."""
        return "Traceback (most recent call last)" in self.text

    @property
    def last(self) -> str:
        """The last line with something in it, short."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return re.sub(r"\s+", " ", lines[-1])[:300] if lines else "(nothing printed)"

    @property
    def one_line(self) -> bool:
        """Whether it ended as a user's error has to: named, and nothing after it.

        A list of several faults has a line for each.
        """
        starts = [*re.finditer(r"^([\w. ]+: )?error: ", self.text, re.IGNORECASE | re.MULTILINE)]
        end = self.text[starts[-1].start() :] if starts else ""
        logged = re.search(r"^\d\d:\d\d:\d\d ", end, re.MULTILINE)
        return bool(starts) and not logged and not self.traceback

    @property
    def advice(self) -> bool:
        """Whether Kedro's own pages stand above a user's error."""
        return "--from-nodes" in self.text


class Running:
    """A command that runs in the folder of a project."""

    def __init__(
        self,
        place: Path,
        words: Sequence[str],
        *,
        real: bool = False,
        before: Callable[[], None] | None = None,
        env: dict[str, str] | None = None,
        logs: Path | None = None,
    ) -> None:
        """Start it.

        Args:
            place: The project.
            words: ``run ...`` is `kedro run ...`, ``-m MODULE ...`` a Python module.
            real: Start a new interpreter.
            before: Called in the process before anything else (not with `real`).
            env: Further environment variables.
            logs: Where its output goes; None: into the project.
        """
        self.log = (logs or place) / f"siege-{time.monotonic_ns()}.log"
        self._begun = time.monotonic()
        environ = {"PYTHONPATH": str(place / "src"), "COLUMNS": "200", **(env or {})}
        if real:
            command = [sys.executable, *words] if words[0] == "-m" else [KEDRO, *words]
            with self.log.open("ab") as log:
                self.pid = subprocess.Popen(
                    command,
                    cwd=place,
                    env={**os.environ, **environ},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                ).pid
            return
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.environ.update(environ)
                _be(place, words, self.log, before)
            finally:
                os._exit(99)

    def poll(self) -> int | None:
        """Exit status, if it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self, limit: float) -> Ended:
        """Wait for its end; after `limit` seconds since its start it is killed, and has hung."""
        while (status := self.poll()) is None:
            if time.monotonic() - self._begun > limit:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.02)
        text = self.log.read_text(errors="replace")
        return Ended(status, time.monotonic() - self._begun, text)

    def signal(self, number: int) -> bool:
        """Send it a signal; False: it had ended."""
        try:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return False
            os.kill(self.pid, number)
        except (ChildProcessError, ProcessLookupError):
            return False
        return True


def _be(place: Path, words: Sequence[str], log: Path, before: Callable[[], None] | None) -> None:
    """Be the command until its end; never returns."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(place)
    if before is not None:
        before()
    # What the first import of the package does; here it has been imported.
    interruptions.leave_at_signals()
    try:
        code = _status(lambda: _call(words))
        code = code if _status(threading._shutdown) == 0 else 1  # type: ignore[attr-defined]
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:
        code = 130
    os._exit(code)


def _call(words: Sequence[str]) -> None:
    if words[0] == "-m":
        sys.argv = [words[1], *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        from kedro.framework.cli.cli import main

        sys.argv = ["kedro", *words]
        main()


def _status(function: Callable[[], object]) -> int:
    """What the interpreter would end with."""
    try:
        try:
            function()
            return 0
        except SystemExit:
            raise
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            return 1
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1


class Operations:
    """Counts the changes of files below a folder, and does something at the N-th.

    Args:
        place: The folder.
        at: Which one; 0: only count.
        do: What to do then.
    """

    def __init__(self, place: Path, at: int = 0, do: Callable[[], object] = lambda: None) -> None:
        self._place = os.path.realpath(place)
        self._at, self._do = at, do
        self._count = mmap.mmap(-1, 8)  # shared with the process that asks for the count

    @property
    def count(self) -> int:
        """Changes so far, in all processes."""
        return int.from_bytes(self._count[:8], "little")

    def watch(self) -> None:
        """Begin, in the process of the command; there is no end."""
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(flags, int) and flags & _WRITES):
                return
        elif event in _CHANGES or event == "sqlite3.connect":
            path = arguments[-2] if event in ("os.rename", "os.link") else arguments[0]
            path = arguments[1] if event in ("os.rename", "os.link") else path
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.path.join(os.getcwd(), os.fsdecode(path).removeprefix("file:"))
        if not name.startswith(self._place) or "__pycache__" in name or "/siege-" in name:
            return
        count = self.count + 1
        self._count[:8] = count.to_bytes(8, "little")
        if count == self._at:
            self._do()
