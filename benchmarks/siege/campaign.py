"""The order of the siege: references first, then attack by attack, then the table."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from siege.commands import Operations, Running, import_everything
from siege.damage import file_plans, unsent_plans
from siege.inputs import input_plans
from siege.interruptions import COMMANDS, kill_plans, pair_plans, references, signal_plans
from siege.projects import copy_project, make_project, remove, results
from siege.scarcity import disk_plans, limit_plans
from siege.strangers import reference, stranger_plans
from siege.trials import Plan, Result, Yard, carry_out, exceptions, table

WHOLE = {
    "kills": lambda: kill_plans(46, 12, 4),
    "signals": lambda: signal_plans(24, 6),
    "files": lambda: [*file_plans(360, 60), *unsent_plans()],
    "inputs": input_plans,
    "disks": lambda: disk_plans(12),
    "limits": limit_plans,
    "pairs": lambda: pair_plans(8),
    "strangers": stranger_plans,
}
SHORT = {
    "kills": lambda: kill_plans(2, 0, 0),
    "signals": lambda: signal_plans(1, 0),
    "files": lambda: file_plans(30, 1),
    "inputs": lambda: input_plans(short=True),
    "disks": lambda: disk_plans(1),
    "limits": lambda: limit_plans(short=True),
    "pairs": lambda: pair_plans(1),
    "strangers": lambda: stranger_plans(short=True),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Besiege; the exit status."""
    parser = argparse.ArgumentParser(description="Attack a copy of this project in every way.")
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--only", default=",".join(WHOLE), help="(default: %(default)s)")
    parser.add_argument("--trial", help="only trials whose name contains this")
    parser.add_argument("--minutes", type=float, default=25.0, help="begin nothing after them")
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found: list[Result] = []
    try:
        yard = Yard(folder, options.seed)
        found += prepare(yard, [p for ps in plans.values() for p in ps], options.jobs)
        until = begun + 60 * options.minutes
        for kind in kinds:
            carry_out(yard, plans[kind], until=until, side_by_side=options.jobs, done=found)
    except KeyboardInterrupt:
        print("Stopped: the table is of what was tried until then.", file=sys.stderr)
    finally:
        if os.getpid() == owner and not options.keep:
            remove([folder])
    report(found, {kind: len(ps) for kind, ps in plans.items()}, options, begun)
    return int(any(one.faults for one in found))


def prepare(yard: Yard, plans: Sequence[Plan], jobs: int) -> list[Result]:
    """Projects to start from, and what undisturbed commands come to.

    Raises:
        SystemExit: Commands fail undisturbed.
    """
    empty = yard.places["empty"] = yard.folder / "empty"
    if not empty.exists():  # with --keep everything may be there
        make_project(empty)
    spent, changes = 0.0, 0
    for name, source, command in (
        ("teacher", empty, "train_teacher"),
        ("finished", yard.folder / "teacher", "distill_tse"),
    ):
        place = yard.places[name] = yard.folder / name
        truth = yard.folder / f"truth-{command}.json"
        if truth.exists():
            continue
        remove([place])  # what an interrupted siege has left there
        operations = Operations(copy_project(source, place))
        ended = Running(place, COMMANDS[command].words, before=operations.watch).wait(600.0)
        if ended.status != 0:
            raise SystemExit(f"kedro run --pipeline={command} fails undisturbed:\n{ended.text}")
        # The second command has found the work of the first one done: from nothing it is both.
        spent, changes = spent + ended.seconds, changes + operations.count
        known = {"results": results(place), "seconds": spent, "count": changes}
        truth.write_text(json.dumps(known))
    needed = {name for plan in plans for name in plan.needs}
    missing = {name for name in needed if not (yard.folder / f"truth-{name}.json").exists()}
    plans = references(missing)
    plans += [Plan("references", n, reference) for n in ("strangers",) if n in missing]
    done = carry_out(yard, plans, until=float("inf"), side_by_side=jobs)
    for name in needed:
        path = yard.folder / f"truth-{name}.json"
        if not path.exists():
            raise SystemExit(f"No reference {name}: {[one for one in done if one.name == name]}")
        yard.truth[name] = json.loads(path.read_text())
    return done


def report(
    found: Sequence[Result], planned: dict[str, int], options: argparse.Namespace, begun: float
) -> None:
    """Print the table and what is wrong."""
    command = f"python benchmarks/siege.py --seed {options.seed}"
    wrong = exceptions(found, command)
    minutes = (time.monotonic() - begun) / 60
    print(f"{command}: {minutes:.1f} minutes, {options.jobs} trials at a time\n")
    print("\n".join(table(found, planned)))
    print("\nNothing else was found." if not wrong else "\nExceptions:\n" + "\n".join(wrong))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1))
