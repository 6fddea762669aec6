"""Full disks, and too little of everything else: descriptors, memory, /dev/shm, rights to write."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from siege.commands import KEDRO, Running, below
from siege.interruptions import COMMANDS
from siege.projects import run
from siege.trials import Plan, Trial

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWUSER = 0x20000, 0x10000000
_PRIVATE, _REMOUNT, _BIND, _READ_ONLY = (1 << 18) | (1 << 14), 1 << 5, 1 << 12, 1


def own_mounts() -> bool:
    """Give this process and its children mounts of their own; False: the system does not let us."""
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEWNS) != 0:
        if _LIBC.unshare(_NEWNS | _NEWUSER) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return bool(_LIBC.mount(b"none", b"/", None, _PRIVATE, None) == 0)


def small_disk(place: Path, size: int, *, again: bool = False) -> bool:
    """Mount a tmpfs of `size` bytes there, or change the size of the one that is there."""
    options = f"size={size // 1024}k".encode()
    flags = _REMOUNT if again else 0
    return bool(_LIBC.mount(b"tmpfs", bytes(place), b"tmpfs", flags, options) == 0)


def read_only(place: Path) -> bool:
    """Nothing can be written below a folder any more."""
    name = bytes(place)
    return bool(
        _LIBC.mount(name, name, None, _BIND, None) == 0
        and _LIBC.mount(name, name, None, _REMOUNT | _BIND | _READ_ONLY, None) == 0
    )


def _size(place: Path) -> int:
    # A file takes whole pages, and so does a folder.
    return sum(4096 * (1 + path.lstat().st_size // 4096) for path in place.rglob("*"))


def _full_disk(share: float, whole: bool, trial: Trial) -> None:
    """The disk is full after a share of what the command writes."""
    command, truth = COMMANDS["distill_tse"], trial.yard.truth["distill_tse"]
    limit = trial.yard.limit(truth["seconds"])
    part = "." if whole else "data"
    finished = _size(trial.yard.places["finished"] / part)
    begun = _size(trial.yard.places["empty"] / part)
    size = int(begun + share * (finished - begun))
    real = own_mounts()
    if real:
        place = trial.place
        if whole:
            place.mkdir()
            real = small_disk(place, size)
            subprocess.run(["cp", "-a", f"{trial.yard.places['empty']}/.", str(place)], check=True)
        else:
            trial.project("empty")
            real = small_disk(place / "data", size)
    if not real:
        place = trial.project("empty")
    trial.note = f"{size >> 10} kB" if real else "no right to mount: a limit on the size of files"
    before = None if real else partial(_limit, resource.RLIMIT_FSIZE, int(share * 1_300_000))
    # Its log is not on the full disk.
    log = trial.yard.folder / f"{trial.name.replace(' ', '-')}-log"
    log.mkdir()
    ended = Running(place, command.words, before=before, logs=log).wait(limit)
    trial.refused_or(ended, trial.note)
    if real:
        small_disk(place if whole else place / "data", 1 << 30, again=True)
    trial.must_recover(Running(place, command.words).wait(limit), truth["results"])


def _limit(what: int, value: int) -> None:
    resource.setrlimit(what, (value, value))


def _more_memory(more: int) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + more,) * 2)


def _limited(
    before: Callable[[Path], object], params: str, trial: Trial, *, pipeline: str = "distill_tse"
) -> None:
    truth = trial.yard.truth["distill_tse"]
    limit = trial.yard.limit(truth["seconds"])
    place = trial.project("empty")
    words = run(pipeline, params=params)
    changes = "scenes" in params  # other images have other results
    results = None if changes else truth["results"]
    ended = Running(place, words, before=lambda: before(place)).wait(limit + 60 * changes)
    trial.refused_or(ended, trial.name, results if pipeline == "distill_tse" else None)
    if not changes:
        again = Running(place, COMMANDS["distill_tse"].words).wait(limit)
        trial.must_recover(again, truth["results"])


def _small_shm(size: int, place: Path) -> None:
    if not (own_mounts() and small_disk(Path("/dev/shm"), size)):
        print("siege: no right to mount /dev/shm")
        os._exit(77)


def _shm(size: int, params: str, trial: Trial) -> None:
    if not own_mounts():
        trial.note = "skipped: no right to mount"
        return
    _limited(partial(_small_shm, size), params, trial, pipeline="train_teacher")


def _read_only(part: str, trial: Trial) -> None:
    if not own_mounts():
        trial.note = "skipped: no right to mount"
        return

    def before(place: Path) -> None:
        (place / part).mkdir(parents=True, exist_ok=True)
        own_mounts()
        read_only(place / part)

    _limited(before, "", trial)


def _loader_killed(trial: Trial) -> None:
    """One of the processes that read images dies."""
    place = trial.project("teacher")
    params = "trainer.workers=2,teacher_recipe.iterations=1500,teacher_recipe.validate_every=1500"
    running = Running(place, run("train_teacher", params=params))
    until, victims = time.monotonic() + 90, list[int]()
    while not victims and time.monotonic() < until and running.poll() is None:
        time.sleep(0.5)
        victims = [pid for pid in below(running.pid) if _resident(pid) > 100 << 20]
    if not victims:
        trial.fault("other", "no loader process was found")
        return
    time.sleep(1.0)
    os.kill(trial.draw.choice(victims), signal.SIGKILL)
    ended = running.wait(trial.yard.limit(30.0))
    trial.refused_or(ended, "a loader process was killed")


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _no_reader(trial: Trial) -> None:
    """What reads its output goes away."""
    place = trial.project("empty")
    words = COMMANDS["data_ingestion"].words
    program = f"'{KEDRO}' {' '.join(words)} | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}"
    environ = {**os.environ, "PYTHONPATH": str(place / "src")}
    log = place / "siege-pipe.log"
    with log.open("wb") as file:
        subprocess.run(["bash", "-c", program], cwd=place, env=environ, stderr=file, timeout=300)
    truth = trial.yard.truth["distill_tse"]
    again = Running(place, COMMANDS["distill_tse"].words)
    trial.must_recover(again.wait(trial.yard.limit(truth["seconds"])), truth["results"])


def disk_plans(count: int) -> list[Plan]:
    """Full disks: of data/ alone, and every fourth time of the whole project."""
    plans = []
    for number in range(count):
        share, whole = (number + 0.5) / count, number % 4 == 3
        title = f"{'project' if whole else 'data'} {number} full after {share:.0%}"
        plans.append(Plan("disks", title, partial(_full_disk, share, whole), ("distill_tse",)))
    return plans


def limit_plans(*, short: bool = False) -> list[Plan]:
    """Everything else that may be scarce."""
    large = "data.scenes.height=512,data.scenes.width=768,teacher_recipe.augment.crop=[512,512]"
    plans: dict[str, Callable[[Trial], None]] = {}
    for count, workers in ((24, 0), (40, 0), (64, 0), (64, 2)):
        limited = partial(_limit, resource.RLIMIT_NOFILE, count)
        plans[f"{count} descriptors, {workers} workers"] = partial(
            _limited, lambda place, limited=limited: limited(), f"trainer.workers={workers}"
        )
    for more in (100, 300, 800):
        plans[f"{more} MB more memory"] = partial(
            _limited, lambda place, more=more: _more_memory(more << 20), ""
        )
    for size in (200_000, 1_000_000):
        plans[f"files of {size} bytes"] = partial(
            _limited, lambda place, size=size: _limit(resource.RLIMIT_FSIZE, size), ""
        )
    plans["shm of 1 MB"] = partial(_shm, 1 << 20, "trainer.workers=2")
    plans["shm of 1 MB, large crops"] = partial(_shm, 1 << 20, f"trainer.workers=2,{large}")
    plans["shm of 64 kB, large crops"] = partial(_shm, 64 << 10, f"trainer.workers=2,{large}")
    for part in (".", "data", "data/06_models/test/work", "data/08_reporting"):
        plans[f"read-only {part}"] = partial(_read_only, part)
    plans["loader process killed"] = _loader_killed
    plans["nobody reads the output"] = _no_reader
    names = ["24 descriptors, 0 workers"] if short else [*plans]
    return [Plan("limits", name, plans[name], ("distill_tse",)) for name in names]
