"""The order of the siege: references first, then attack by attack, then the table."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from siege.commands import Running, import_everything
from siege.damage import file_plans, unsent_plans
from siege.interruptions import COMMANDS, kill_plans, pair_plans, references, signal_plans
from siege.projects import copy_project, make_project, remove
from siege.trials import Plan, Result, Yard, carry_out, exceptions, table

WHOLE = {
    "kills": lambda: kill_plans(46, 12, 4),
    "signals": lambda: signal_plans(24, 8),
    "files": lambda: [*file_plans(360, 60), *unsent_plans()],
    "pairs": lambda: pair_plans(8),
}
SHORT = {
    "kills": lambda: kill_plans(4, 1, 0),
    "signals": lambda: signal_plans(2, 1),
    "files": lambda: file_plans(30, 3),
    "pairs": lambda: pair_plans(1),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Besiege; the exit status."""
    parser = argparse.ArgumentParser(description="Attack a copy of this project in every way.")
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--only", default=",".join(WHOLE), help="(default: %(default)s)")
    parser.add_argument("--trial", help="only trials whose name contains this")
    parser.add_argument("--minutes", type=float, default=20.0, help="begin nothing after them")
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--keep", type=Path, help="a folder to work in; what is there is used")
    options = parser.parse_args(argv)
    kinds = options.only.split(",")
    if unknown := set(kinds) - set(WHOLE):
        parser.error(f"--only: {', '.join(sorted(unknown))}; there are {', '.join(WHOLE)}")
    begun = time.monotonic()
    chosen = SHORT if options.short else WHOLE
    plans = {kind: chosen[kind]() for kind in kinds}
    if options.trial:
        every = {kind: [*WHOLE[kind](), *plans[kind]] for kind in kinds}
        plans = {kind: [p for p in ps if options.trial in p.name][:1] for kind, ps in every.items()}
    import_everything()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="siege-"))
    folder.mkdir(exist_ok=True)
    owner = os.getpid()
    try:
        yard = Yard(folder, options.seed)
        results = prepare(yard, [p for ps in plans.values() for p in ps], options.jobs)
        until = begun + 60 * options.minutes
        for kind in kinds:
            results += carry_out(yard, plans[kind], until=until, side_by_side=options.jobs)
    finally:
        if os.getpid() == owner and not options.keep:
            remove([folder])
    report(results, {kind: len(ps) for kind, ps in plans.items()}, options, begun)
    return int(any(one.faults for one in results))


def prepare(yard: Yard, plans: Sequence[Plan], jobs: int) -> list[Result]:
    """Projects to start from, and what undisturbed commands come to.

    Raises:
        SystemExit: Commands fail undisturbed.
    """
    empty = yard.places["empty"] = yard.folder / "empty"
    if not empty.exists():  # with --keep everything may be there
        make_project(empty)
    for name, source, command in (
        ("teacher", empty, "train_teacher"),
        ("finished", yard.folder / "teacher", "distill_tse"),
    ):
        if (yard.folder / name).exists():
            yard.places[name] = yard.folder / name
            continue
        place = yard.places[name] = copy_project(source, yard.folder / name)
        ended = Running(place, COMMANDS[command].words).wait(600.0)
        if ended.status != 0:
            raise SystemExit(f"kedro run --pipeline={command} fails undisturbed:\n{ended.text}")
    needed = {name for plan in plans for name in plan.needs}
    missing = {name for name in needed if not (yard.folder / f"truth-{name}.json").exists()}
    done = carry_out(yard, references(missing), until=float("inf"), side_by_side=jobs)
    for name in needed:
        path = yard.folder / f"truth-{name}.json"
        if not path.exists():
            raise SystemExit(f"No reference {name}: {[one for one in done if one.name == name]}")
        yard.truth[name] = json.loads(path.read_text())
    return done


def report(
    results: Sequence[Result], planned: dict[str, int], options: argparse.Namespace, begun: float
) -> None:
    """Print the table and what is wrong."""
    command = f"python benchmarks/siege.py --seed {options.seed}"
    wrong = exceptions(results, command)
    minutes = (time.monotonic() - begun) / 60
    print(f"{command}: {minutes:.1f} minutes, {options.jobs} trials at a time\n")
    print("\n".join(table(results, planned)))
    print("\nNothing else was found." if not wrong else "\nExceptions:\n" + "\n".join(wrong))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=1))
