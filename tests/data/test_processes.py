from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rdd_pipeline.data.processes import end_with_parent, hidden_main

PARENT = """
import multiprocessing, sys, time
from rdd_pipeline.data.processes import hidden_main
from tests.data.test_processes import child

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    with hidden_main():
        context.Process(target=child, args=(sys.argv[1],)).start()
    time.sleep(200)
"""


def child(path: str) -> None:
    end_with_parent()
    aside = Path(path).with_suffix(".tmp")
    aside.write_text(str(os.getpid()))
    aside.rename(path)
    time.sleep(200)


def _wait_until(condition) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_process_ends_with_its_parent_however_that_ends(tmp_path):
    pid = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(pid)], cwd=Path(__file__).parents[2]
    )
    try:
        _wait_until(pid.exists)
        number = int(pid.read_text())
        os.kill(number, 0)  # it is there
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()

    def gone() -> bool:
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        return False

    _wait_until(gone)


def test_without_a_parent_nothing_is_watched():
    end_with_parent()


def test_the_main_module_is_as_before_afterwards():
    main = sys.modules["__main__"]
    before = dict(vars(main))
    with hidden_main():
        assert main.__spec__ is None
        assert not hasattr(main, "__file__")
    assert vars(main) == before
