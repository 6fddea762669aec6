"""Trials: one attack each, in a process of its own, two at a time; and the table of them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siege.commands import Ended, adopt_orphans, end_all_below
from siege.projects import (
    copy_project,
    differing,
    empty_versions,
    leftovers,
    mlflow_runs,
    remove,
    results,
    unsent,
)

FAULTS = ("lost", "silently wrong", "hang", "orphan", "traceback", "code executed", "other")
PATIENCE = 15.0
"""Seconds until a process without its parent has to be gone."""
SHOWN = 6
"""Exceptions of one cause that are listed."""


@dataclass
class Yard:
    """Where the siege takes place, and what undisturbed commands come to.

    Attributes:
        folder: A temporary one.
        seed: Decides every draw.
        places: Projects to start from, by name.
        truth: By name of a command: results, seconds, operations on files.
    """

    folder: Path
    seed: int
    places: dict[str, Path] = field(default_factory=dict)
    truth: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def marker(self) -> Path:
        """What code that an attack brings along would write."""
        return self.folder / "EXECUTED"

    def limit(self, seconds: float) -> float:
        """After how many seconds a command that takes `seconds` undisturbed has hung."""
        return 60.0 + 10.0 * seconds


class Trial:
    """One attack and what came of it; made in the process of the trial.

    Attributes:
        draw: Random numbers of this trial alone.
        place: The project that is attacked, if the trial asked for one.
    """

    def __init__(self, yard: Yard, kind: str, name: str) -> None:
        self.yard, self.kind, self.name = yard, kind, name
        self.draw = random.Random(f"{yard.seed}/{kind}/{name}")
        self.faults: list[tuple[str, str]] = []
        self.note = ""
        self.cases: list[tuple[str, list[tuple[str, str]], str]] = []
        self.place = yard.folder / f"{kind}-{name}".replace("/", "_").replace(" ", "_")[:100]

    def fault(self, kind: str, reason: str) -> None:
        """Something that must not be."""
        assert kind in FAULTS
        self.faults.append((kind, reason[:400]))

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """One of many attempts of this trial, which is counted on its own."""
        before, self.faults, self.note = self.faults, [], ""
        try:
            yield
        except Exception:
            self.fault("other", f"the siege itself: {traceback.format_exc()[-700:]}")
        self.cases.append((name, self.faults, self.note))
        self.faults = before

    def project(self, name: str) -> Path:
        """A copy of one of the yard's projects."""
        return copy_project(self.yard.places[name], self.place)

    def look(self, ended: Ended, what: str, *, orphans: bool = True) -> Ended:
        """Note what is wrong whatever the attack: hangs, tracebacks, orphans."""
        if ended.status is None:
            self.fault("hang", f"{what}: ended by force after {ended.seconds:.0f} s")
        if ended.traceback:
            self.fault("traceback", f"{what}: {ended.last}")
        if orphans and (left := end_all_below(os.getpid(), patience=PATIENCE)):
            self.fault("orphan", f"{what}: {', '.join(left)}")
        return ended

    def refused_or(
        self, ended: Ended, what: str, truth: dict[str, str] | None = None, *, orphans: bool = True
    ) -> None:
        """It must have ended in one line, or well and with the undisturbed results."""
        self.look(ended, what, orphans=orphans)
        if ended.status not in (0, None) and not ended.traceback and not ended.one_line:
            self.fault("other", f"{what}: status {ended.status}, last line: {ended.last}")
        if ended.one_line and ended.advice:
            self.fault("other", f"{what}: Kedro's advice stands above the error: {ended.last}")
        if ended.status == 0 and truth is not None:
            for line in differing(results(self.place), truth):
                self.fault("silently wrong", f"{what}: {line}")
        self.note = self.note or (ended.last if ended.status else "went on")

    def must_recover(self, ended: Ended, truth: dict[str, str], *, tracked: bool = True) -> None:
        """The same command again: status 0, the undisturbed results, nothing left behind."""
        self.look(ended, "the same command again")
        if ended.status != 0:
            if ended.status is not None:
                self.fault("lost", f"again: status {ended.status}: {ended.last}")
            return
        for line in differing(results(self.place), truth):
            lost = "missing" in line
            self.fault("lost" if lost else "silently wrong", f"again, with status 0: {line}")
        if left := [*leftovers(self.place), *empty_versions(self.place)]:
            self.fault("other", f"left behind: {', '.join(left[:4])}")
        if tracked:
            runs = mlflow_runs(self.place)
            if isinstance(runs, str):
                self.fault("lost", runs)
            elif runs.get("RUNNING"):
                self.fault("lost", f"{runs['RUNNING']} runs are RUNNING for ever in MLflow")
            if files := unsent(self.place):
                self.fault("lost", f"records not sent: {', '.join(files)}")

    def check_marker(self, what: str) -> None:
        """Nothing that the attack brought along may have been executed."""
        for path in self.yard.folder.glob(f"{self.yard.marker.name}*"):
            self.fault("code executed", f"{what}: {path.read_text()[:100]}")
            path.unlink()


@dataclass(frozen=True)
class Plan:
    """A trial that is to take place."""

    kind: str
    name: str
    attack: Callable[[Trial], None]
    needs: tuple[str, ...] = ()
    """References, by name."""


@dataclass
class Result:
    """A trial that has taken place."""

    kind: str
    name: str
    case: str
    faults: list[tuple[str, str]]
    note: str
    seconds: float


def carry_out(
    yard: Yard,
    plans: Sequence[Plan],
    *,
    until: float,
    patience: float = 600.0,
    side_by_side: int = 2,
    done: list[Result] | None = None,
) -> list[Result]:
    """Carry trials out, two at a time, until the clock says `until`; results go to `done`."""
    waiting = list(plans)
    running: dict[int, tuple[Plan, Path, float]] = {}
    done = [] if done is None else done
    try:
        while waiting or running:
            while waiting and len(running) < side_by_side and time.monotonic() < until:
                plan = waiting.pop(0)
                answer = yard.folder / f"answer-{time.monotonic_ns()}.json"
                running[_fork(yard, plan, answer)] = (plan, answer, time.monotonic())
            if not running:
                break
            for pid, (plan, answer, begun) in list(running.items()):
                seconds = time.monotonic() - begun
                before = len(done)
                if os.waitpid(pid, os.WNOHANG)[0]:
                    done += _answer(plan, answer, seconds)
                elif seconds > patience:
                    _kill(pid)
                    fault = [("hang", f"the trial took more than {patience:.0f} s")]
                    done.append(Result(plan.kind, plan.name, "", fault, "", seconds))
                else:
                    continue
                del running[pid]
                _progress(len(plans) - len(waiting) - len(running), len(plans), done[before:])
            time.sleep(0.02)
    finally:
        for pid in running:
            _kill(pid)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return done


def _fork(yard: Yard, plan: Plan, answer: Path) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGTERM, lambda *_: _leave())
        signal.signal(signal.SIGINT, lambda *_: None)  # of a program started it would be ignored
        adopt_orphans()
        output = os.open(yard.folder / "trials.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        trial = Trial(yard, plan.kind, plan.name)
        try:
            plan.attack(trial)
        except Exception:
            trial.fault("other", f"the siege itself: {traceback.format_exc()[-700:]}")
        end_all_below(os.getpid(), patience=0.0)
        remove([trial.place])
        if trial.faults or not trial.cases:
            trial.cases.append(("", trial.faults, trial.note))
        answer.write_text(json.dumps(trial.cases))
    finally:
        os._exit(0)


def _leave() -> None:
    end_all_below(os.getpid(), patience=0.0)
    os._exit(1)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _answer(plan: Plan, answer: Path, seconds: float) -> list[Result]:
    try:
        cases = json.loads(answer.read_text())
    except (OSError, ValueError):
        cases = [("", [("other", "the process of the trial died")], "")]
    answer.unlink(missing_ok=True)
    return [
        Result(plan.kind, plan.name, case, [(f, reason) for f, reason in faults], note, seconds)
        for case, faults, note in cases
    ]


def _progress(done: int, of: int, cases: list[Result]) -> None:
    one, wrong = cases[0], [case for case in cases if case.faults]
    word = f"{len(wrong)} of {len(cases)} not well" if wrong else f"{len(cases)} well"
    line = f"{one.kind} {done}/{of}: {one.name}: {word} ({one.seconds:.1f} s)"
    if sys.stderr.isatty():
        print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr)
        return
    print(line, file=sys.stderr)
    for case in wrong:
        for fault, reason in case.faults:
            print(f"    {case.case} {fault}: {reason}", file=sys.stderr, flush=True)


def table(results: Iterable[Result], planned: dict[str, int]) -> list[str]:
    """Markdown: a row for each kind of attack."""
    head = ["attack", "planned", "tried", "recovered or refused in one line", *FAULTS]
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    found = [one for one in results if one.kind in planned]
    for kind in [*planned, "together"]:
        own = [one for one in found if kind == one.kind or kind == "together"]
        total = sum(planned.values()) if kind == "together" else planned[kind]
        counts = [sum(any(f == name for f, _ in one.faults) for one in own) for name in FAULTS]
        good = sum(not one.faults for one in own)
        rows.append(f"| {' | '.join(map(str, [kind, total, len(own), good, *counts]))} |")
    return rows


def exceptions(results: Iterable[Result], command: str) -> list[str]:
    """Everything that is not as it should be, with the command that repeats it."""
    groups: dict[tuple[str, str, str], list[tuple[Result, str]]] = {}
    for one in results:
        for fault, reason in one.faults:
            cause = one.name if one.case else re.sub(r"[\d.]+", "#", reason)[:60]
            groups.setdefault((one.kind, fault, cause), []).append((one, reason))
    lines = []
    for (kind, fault, _), found in sorted(groups.items()):
        lines.append(f"- {kind}, {fault}, {len(found)} times: {found[0][1]}")
        if cases := [one.case for one, _ in found if one.case]:
            lines.append(f"  - all of them: {', '.join(cases)}")
        names = dict.fromkeys(one.name for one, _ in found)
        lines += [f"  - `{command} --only {kind} --trial '{name}'`" for name in [*names][:SHOWN]]
    return lines
