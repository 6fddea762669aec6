"""SIGKILL, SIGTERM and SIGINT at any moment of any command, and two commands at once."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from siege.commands import Ended, Operations, Running, below
from siege.projects import differing, mlflow_runs, results, run
from siege.trials import Plan, Trial


class Command(NamedTuple):
    """A command, and the project it is given in."""

    project: str
    words: list[str]


COMMANDS = {
    "data_ingestion": Command("empty", run("data_ingestion")),
    "train_teacher": Command("empty", run("train_teacher")),
    "distill_tse": Command("empty", run("distill_tse")),
    "distill_tfe": Command("teacher", run("distill_tfe")),
    "distill_baselines": Command("teacher", run("distill_baselines", "--namespaces=cirkd")),
    "distill_rdd_plus": Command("teacher", run("distill_rdd_plus", "--namespaces=tse_cwd")),
    "ablations": Command("teacher", run("ablations", "--namespaces=rdd_annealed")),
    "evaluation": Command("finished", run("evaluation")),
}
"""Every pipeline. Those with many methods are given one."""
TWO = Command("teacher", run("distill_tse", params="trainer.devices=2"))
"""A training in two processes."""
REAL = ("data_ingestion", "distill_tse", "train_teacher", "evaluation")


def undisturbed(command: Command) -> Callable[[Trial], None]:
    """A trial that finds the truth about a command."""

    def attack(trial: Trial) -> None:
        place = trial.project(command.project)
        operations = Operations(place)
        ended = Running(place, command.words, before=operations.watch).wait(600.0)
        if trial.look(ended, "undisturbed").status != 0:
            trial.fault("other", f"undisturbed: status {ended.status}: {ended.last}")
        found = {"results": results(place), "seconds": ended.seconds, "count": operations.count}
        _write(trial, found)

    return attack


def kill_plans(count: int, real: int, two: int) -> list[Plan]:
    """`count` kills of forked commands, `real` of plain ones, `two` of two training processes."""
    names, plans = list(COMMANDS), []
    for number in range(count):
        name = names[number % len(names)]
        how = ("operation", "moment", "database")[number // len(names) % 3]
        how = "operation" if how == "database" and COMMANDS[name].project != "empty" else how
        plans.append(
            Plan("kills", f"{name} {how} {number}", _stopped(name, how, signal.SIGKILL), (name,))
        )
    for number in range(real):
        name = REAL[number % len(REAL)] if number % 3 else "data_ingestion"
        attack = _stopped(name, "real", signal.SIGKILL)
        plans.append(Plan("kills", f"{name} real {number}", attack, (name, "imports")))
    for number in range(two):
        plans.append(Plan("kills", f"two processes {number}", _worker_killed, ("two",)))
    return plans


def signal_plans(count: int, real: int) -> list[Plan]:
    """`count` signals to forked commands and `real` to plain ones."""
    names, plans = list(COMMANDS), []
    for number in range(count + real):
        sent = (signal.SIGTERM, signal.SIGINT)[number % 2]
        how = "real" if number >= count else ("operation", "moment", "database")[number // 2 % 3]
        name = names[number // 2 % len(names)] if how != "real" else REAL[number // 2 % len(REAL)]
        how = "moment" if how == "database" and COMMANDS[name].project != "empty" else how
        title = f"{name} {sent.name} {how} {number}"
        needs = (name, "imports") if how == "real" else (name,)
        plans.append(Plan("signals", title, _stopped(name, how, sent), needs))
    return plans


def _stopped(name: str, how: str, number: signal.Signals) -> Callable[[Trial], None]:
    def attack(trial: Trial) -> None:
        command, truth = COMMANDS[name], trial.yard.truth[name]
        place = trial.project(command.project)
        limit = trial.yard.limit(truth["seconds"])
        running, sent = _stop(trial, place, command, how, number, truth)
        ended = running.wait(limit)
        if sent is None and ended.status in (0, None):  # it was over before
            trial.note = "had ended"
        what = f"{number.name} {trial.note}"
        trial.look(ended, what)
        if number != signal.SIGKILL and ended.status not in (0, None, 143):
            trial.fault("other", f"{what}: status {ended.status}, expected 143: {ended.last}")
        before = mlflow_runs(place)
        again = Running(place, command.words).wait(limit)
        trial.must_recover(again, truth["results"])
        if ended.status == 143 and isinstance(before, dict) and before.get("FAILED"):
            trial.fault("other", f"{what}: the run is FAILED in MLflow, should be KILLED")

    return attack


def _stop(
    trial: Trial,
    place: Path,
    command: Command,
    how: str,
    number: signal.Signals,
    truth: dict[str, Any],
) -> tuple[Running, float | None]:
    """Start a command and stop it at a moment that is drawn; the second is None if it had ended."""
    if how == "operation":
        at = trial.draw.randint(1, max(1, truth["count"]))
        trial.note = f"at file operation {at} of {truth['count']}"
        counted = Operations(place, at, lambda: os.kill(os.getpid(), number))
        return Running(place, command.words, before=counted.watch), 0.0
    seconds = truth["seconds"]
    if how == "real":
        seconds += trial.yard.truth["imports"]["seconds"]
    running = Running(place, command.words, real=how == "real")
    after, begun = trial.draw.uniform(0.02, seconds), time.monotonic()
    if how == "database":
        until = time.monotonic() + 60
        while not list(place.glob("*mlflow*.db*")) + list(place.glob(".*mlflow*")):
            if time.monotonic() > until:
                break
            time.sleep(0.005)
        after, begun = trial.draw.uniform(0.0, 1.5), time.monotonic()
        trial.note = f"{after:.2f} s after mlflow.db was begun"
    else:
        trial.note = f"after {after:.2f} of about {seconds:.1f} s"
    time.sleep(max(0.0, begun + after - time.monotonic()))
    return running, after if running.signal(number) else None


def _worker_killed(trial: Trial) -> None:
    """Any process of a training in two, the one that was started by hand included."""
    truth = trial.yard.truth["two"]
    place = trial.project(TWO.project)
    limit = trial.yard.limit(truth["seconds"])
    running = Running(place, TWO.words)
    time.sleep(trial.draw.uniform(0.3, 1.0) * truth["seconds"])
    tree = [running.pid, *below(running.pid)]
    victim = trial.draw.choice(tree)
    trial.note = f"process {tree.index(victim)} of {len(tree)}"
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        trial.note += ", which had ended"
    ended = trial.look(running.wait(limit), f"SIGKILL to {trial.note}")
    if ended.status not in (0, None, -9) and not ended.one_line:
        trial.fault("other", f"{trial.note}: status {ended.status}: {ended.last}")
    trial.must_recover(Running(place, TWO.words).wait(limit), truth["results"])


# ---- two commands at once

OTHER_DATA = "data.scenes.seed=7"


def pair_plans(count: int) -> list[Plan]:
    """Pairs of commands in one folder at the same time."""
    kinds: list[tuple[str, Callable[[Trial], None]]] = [
        ("other data", _other_data),
        ("first runs", lambda trial: _pair(trial, "empty", "distill_tse", "distill_tse")),
        ("same", lambda trial: _pair(trial, "teacher", "distill_tfe", "distill_tfe")),
        ("one is killed", lambda trial: _pair(trial, "empty", "distill_tse", "distill_tse", True)),
        ("others", lambda trial: _pair(trial, "empty", "train_teacher", "distill_tse")),
        ("evaluation", lambda trial: _pair(trial, "teacher", "distill_tfe", "evaluation")),
    ]
    plans = []
    for number in range(count):
        name, attack = kinds[number % len(kinds)]
        needs = "other data" if name == "other data" else "distill_tfe"
        plans.append(Plan("pairs", f"{name} {number}", attack, ("distill_tse", needs)))
    return plans


def _other_data(trial: Trial) -> None:
    """Neither may train on the other's images: the results of both, each once."""
    truth = [trial.yard.truth[name] for name in ("distill_tse", "other data")]
    place = trial.project("empty")
    limit = trial.yard.limit(2 * truth[0]["seconds"])
    first = Running(place, COMMANDS["distill_tse"].words)
    delay = trial.draw.choice((0.0, 0.3, 0.8, 1.5, 3.0))
    time.sleep(delay)
    second = Running(place, run("distill_tse", params=OTHER_DATA))
    trial.note = f"the second {delay:g} s after the first"
    for running in (first, second):
        ended = trial.look(running.wait(limit), trial.note, orphans=running is second)
        if ended.status != 0:
            trial.fault("lost", f"{trial.note}: status {ended.status}: {ended.last}")
    expected = sorted(one["results"]["safetensors student_tse 0"] for one in truth)
    from rdd_pipeline.networks.checkpoint import NetworkCheckpoint

    paths = place.glob("data/06_models/test/student_tse/*/*/0.safetensors")
    found = sorted(NetworkCheckpoint.from_bytes(p.read_bytes()).digest()[:16] for p in paths)
    if found != expected:
        trial.fault("silently wrong", f"{trial.note}: students {found}, should be {expected}")


def _pair(trial: Trial, project: str, first: str, second: str, kill: bool = False) -> None:
    truth = trial.yard.truth[second if second != "evaluation" else first]
    place = trial.project(project)
    limit = trial.yard.limit(3 * truth["seconds"])
    one = Running(place, COMMANDS[first].words)
    delay = trial.draw.choice((0.0, 0.0, 0.5, 2.0))
    time.sleep(delay)
    other = Running(place, COMMANDS[second].words)
    if kill:
        time.sleep(trial.draw.uniform(0.1, 0.8) * truth["seconds"])
        one.signal(signal.SIGKILL)
    trial.note = f"the second {delay:g} s after the first"
    ends: list[Ended] = [one.wait(limit), other.wait(limit)]
    for ended in ends[kill:]:
        trial.refused_or(ended, trial.note)
        if ended.status and second != "evaluation":
            trial.fault("lost", f"{trial.note}: status {ended.status}: {ended.last}")
    if kill:
        again = Running(place, COMMANDS[second].words).wait(limit)
        trial.must_recover(again, truth["results"])
    elif second != "evaluation":
        for line in differing(results(place), truth["results"]):
            trial.fault("silently wrong", f"{trial.note}: {line}")


def references(needed: set[str]) -> list[Plan]:
    """What has to be known before anything is attacked."""
    other = Command("empty", run("distill_tse", params=OTHER_DATA))
    commands = {**COMMANDS, "two": TWO, "other data": other}
    plans = [Plan("references", n, undisturbed(commands[n])) for n in commands if n in needed]
    return plans + [Plan("references", n, _imports) for n in ("imports",) if n in needed]


def _imports(trial: Trial) -> None:
    """Seconds that the plain command takes to be there."""
    place = trial.project("empty")
    ended = trial.look(Running(place, ["registry", "list"], real=True).wait(600.0), "imports")
    _write(trial, {"seconds": ended.seconds})


def _write(trial: Trial, truth: dict[str, Any]) -> None:
    (trial.yard.folder / f"truth-{trial.name}.json").write_text(json.dumps(truth))
