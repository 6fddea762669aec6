"""Every kind of stored file, damaged in every way, read by what reads it or by whole commands."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from random import Random
from typing import Any, NamedTuple

from siege.commands import Running
from siege.interruptions import COMMANDS
from siege.projects import run
from siege.trials import Plan, Trial

PAGE = b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>\n"
SECONDS = 30
"""Longest time to read one small file."""


# ---- ways to damage a file


def _flip(draw: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _digit(draw: Random, data: bytes) -> bytes:
    places = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    changed = bytearray(data)
    at = draw.choice(places) if places else 0
    changed[at] = 48 + (changed[at] - 47) % 10
    return bytes(changed)


def _zero_block(draw: Random, data: bytes) -> bytes:
    start = draw.randrange(len(data))
    size = min(draw.choice((1, 16, 512, 4096)), len(data) - start)
    return data[:start] + bytes(size) + data[start + size :]


DAMAGES: dict[str, Callable[[Random, bytes], bytes]] = {
    "flip": _flip,
    "another flip": _flip,
    "flip near the start": lambda draw, data: _flip(draw, data[:64]) + data[64:],
    "flip near the end": lambda draw, data: data[:-64] + _flip(draw, data[-64:]),
    "digit": _digit,
    "zero block": _zero_block,
    "truncated": lambda draw, data: data[: draw.randrange(1, max(2, len(data)))],
    "last byte gone": lambda draw, data: data[:-1],
    "empty": lambda draw, data: b"",
    "zeros": lambda draw, data: bytes(len(data)),
    "noise": lambda draw, data: draw.randbytes(len(data)),
    "twice": lambda draw, data: data + data,
    "web page": lambda draw, data: PAGE,
    "null": lambda draw, data: b"null",
    "deeply nested": lambda draw, data: b"[" * 100_000,
}
REPLACED = ("other file", "folder", "fifo", "nothing")
"""Ways that are not about its bytes."""


def damage(path: Path, how: str, draw: Random, other: Path | None = None) -> None:
    """Damage a file; what was hard linked to it stays as it was.

    Raises:
        KeyError: There is no such way.
    """
    data = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "other file":
        path.write_bytes(PAGE if other is None else other.read_bytes())
    elif how != "nothing":
        path.write_bytes(DAMAGES[how](draw, data or b"\n"))


def restore(path: Path, data: bytes) -> None:
    """Undo `damage`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_bytes(data)


# ---- kinds of files

_VARIABLE = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d\.\d\d\.\d\d\.\d{3}Z"), "VERSION"),
    (re.compile(r"[0-9a-f]{12,32}"), "DIGEST"),
    (re.compile(r"\d{3,}"), "NUMBER"),
)


def kinds_of_files(place: Path) -> dict[str, list[Path]]:
    """All files that a project has stored, by their path without versions, digests, numbers."""
    kinds: dict[str, list[Path]] = {}
    for top in ("data", "mlartifacts", "mlflow.db"):
        root = place / top
        for path in sorted([root] if root.is_file() else root.rglob("*")):
            if path.is_file() and path.name != ".gitkeep":
                name = path.relative_to(place).as_posix()
                for pattern, word in _VARIABLE:
                    name = pattern.sub(word, name)
                kinds.setdefault(name, []).append(path)
    return kinds


class Reader(NamedTuple):
    """What reads one kind of file."""

    kind: str
    read: Callable[[Any, Path], Any]
    """Of the catalog and the file, in the folder of the project."""


def _entry(name: str) -> Callable[[Any, Path], Any]:
    return lambda catalog, path: catalog.load(name)


def _batches(catalog: Any, path: Path) -> list[Any]:
    from rdd_pipeline.data.loading import Loader

    images = catalog.load("images")
    return [
        list(images.split(split).evaluation_batches(2, Loader()))
        for split in ("train", "val", "test")
    ]


def _store(path: Path) -> Any:
    from rdd_pipeline.training.store import RunStore

    return RunStore(path.parents[1], path.parent.name)


def _cache(catalog: Any, path: Path) -> Any:
    from rdd_pipeline.data import scan_cache

    return scan_cache._load(path, _CACHE_KEY.get(str(path), "")) or None


_CACHE_KEY: dict[str, str] = {}
_D2, _D6, _D7 = "data/02_intermediate/test", "data/06_models/test", "data/07_model_output/test"
_METHODS = ("baseline", "tfe", "tse")
READERS = [
    Reader(f"{_D2}/images/images-DIGEST.json", _entry("images")),
    Reader(f"{_D2}/images/data-DIGEST.json", _entry("images")),
    Reader(f"{_D2}/cache/checked-DIGEST.json", _cache),
    *(Reader(f"{_D2}/cache/{s}_DIGEST.pack", _batches) for s in ("train", "val", "test")),
    *(Reader(f"data/01_raw/test/DIGEST/{s}/{s}_NUMBER.png", _batches) for s in ("train", "val")),
    Reader(f"{_D6}/teacher/VERSION/teacher/0.safetensors", _entry("teacher_weights")),
    *(
        Reader(f"{_D6}/student_{m}/VERSION/student_{m}/0.safetensors", _entry(f"student_{m}"))
        for m in _METHODS
    ),
    Reader(f"{_D6}/state_tfe/VERSION/state_tfe/0.ckpt", _entry("state_tfe")),
    Reader(f"{_D6}/network_plan.json/VERSION/network_plan.json", _entry("network_plan")),
    Reader(f"{_D6}/work/DIGEST/state-NUMBER.ckpt", lambda c, path: _store(path).latest()),
    Reader(f"{_D6}/work/DIGEST/done.json", lambda c, path: _store(path).finished_state()),
    Reader(f"{_D6}/work/DIGEST/job.json", lambda c, path: _store(path).description()),
    Reader(f"{_D6}/work/DIGEST/scores-DIGEST.json", lambda c, p: _store(p).recall(p.stem)),
    *(
        Reader(f"{_D7}/metrics/{m}/VERSION/{m}/0.json", _entry(f"metrics_{m}"))
        for m in ("teacher", *_METHODS)
    ),
    Reader(f"{_D7}/metrics/tse/VERSION/tse/0.json", _entry("trained_metrics")),
    *(
        Reader(f"{_D7}/history/{m}.csv/VERSION/{m}.csv", _entry(f"history_{m}"))
        for m in ("teacher", "tse")
    ),
]


def digest_of(value: Any) -> str:
    """A text that two values share only if they are equal."""
    return json.dumps(value, default=_plain, sort_keys=True)


def _plain(value: Any) -> Any:
    import numpy as np
    import pandas as pd
    import torch

    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), hash(value.numpy().tobytes())]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hash(value.tobytes())]
    if isinstance(value, pd.DataFrame):
        return value.to_csv()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterator | set | frozenset):
        return list(value)
    return str(value) if isinstance(value, PurePath) else repr(value)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def in_a_fork(function: Callable[[], list[Any]], seconds: float = SECONDS) -> list[Any]:
    """What a function returns in a process of its own; ``["hang", ...]`` if it does not."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(receive)
            try:
                answer = function()
            except BaseException as error:
                answer = ["traceback", f"{type(error).__name__}: {str(error)[:200]}"]
            with open(send, "w") as file:
                json.dump(answer, file)
        finally:
            os._exit(0)
    os.close(send)
    os.set_blocking(receive, False)
    until, parts = time.monotonic() + seconds, []
    try:
        while time.monotonic() < until:
            try:
                piece = os.read(receive, 1 << 20)
            except BlockingIOError:
                time.sleep(0.005)
                continue
            if not piece:
                break
            parts.append(piece)
        else:
            return ["hang", f"not read after {seconds:.0f} s"]
    finally:
        os.close(receive)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return json.loads(b"".join(parts)) if parts else ["traceback", "the process died"]


def _try(reader: Reader, catalog: Any, path: Path) -> list[Any]:
    """["value", digest, warnings], or ["refused", line], or ["traceback", line]."""
    from rdd_pipeline.hooks.messages import user_message

    warned = _Warnings()
    logging.getLogger().addHandler(warned)
    try:
        value = reader.read(catalog, path)
        return ["value", None if value is None else digest_of(value), warned.texts]
    except Exception as error:
        line = user_message(error)
        kind = "refused" if line is not None else "traceback"
        return [kind, line or f"{type(error).__name__}: {str(error)[:200]}"]


def _read_damaged(reader: Reader, ways: list[str]) -> Callable[[Trial], None]:
    def attack(trial: Trial) -> None:
        from kedro.framework.session import KedroSession
        from kedro.framework.startup import bootstrap_project

        place = trial.project("finished")
        os.chdir(place)
        paths = kinds_of_files(place).get(reader.kind, [])
        if not paths:
            trial.fault("other", f"no file {reader.kind} in a finished project")
            return
        logging.disable(logging.INFO)
        bootstrap_project(place)
        with KedroSession.create(project_path=place, env="test", save_on_close=False) as session:
            catalog = session.load_context().catalog
            path = paths[-1]
            if reader.read is _cache:
                body = path.read_bytes().partition(b"\n")[2]
                _CACHE_KEY[str(path)] = json.loads(body)["key"]
            truth = in_a_fork(lambda: _try(reader, catalog, path))
            if truth[0] != "value" or truth[1] is None:
                trial.fault("other", f"undamaged {reader.kind}: {truth}")
                return
            data, mode = path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
            for how in ways:
                with trial.case(how):
                    damage(path, how, trial.draw, paths[0] if paths[0] != path else None)
                    found = in_a_fork(lambda: _try(reader, catalog, path))
                    restore(path, data)
                    path.chmod(mode)
                    _judge(trial, how, reader, found, truth, path)

    return attack


def _judge(
    trial: Trial, how: str, reader: Reader, found: list[Any], truth: list[Any], path: Path
) -> None:
    what = f"{how} in {reader.kind}"
    kind, value, *warnings = found
    trial.note = kind if kind == "value" else str(value)[:200]
    if kind in ("hang", "traceback"):
        trial.fault(kind, f"{what}: {value}")
    elif kind == "value" and value not in (None, truth[1]):
        named = any(path.name in text or path.parent.name in text for text in warnings[0])
        if not named and how != "nothing":  # of a list of files the others are there
            trial.fault("silently wrong", f"{what}: another value was read without a word")


# ---- whole commands


def _run_damaged(kind: str, how: str) -> Callable[[Trial], None]:
    return lambda trial: _run_with(trial, kind, how)


def _run_damaged_rest(trial: Trial) -> None:
    """A kind of file that no list here names."""
    kinds = kinds_of_files(trial.yard.places["finished"])
    kind = trial.draw.choice(sorted({*kinds} - {*WHOLE, "mlflow.db"}))
    _run_with(trial, kind, trial.draw.choice([*DAMAGES, *REPLACED]))


def _run_with(trial: Trial, kind: str, how: str) -> None:
    place = trial.project("finished")
    paths = kinds_of_files(place).get(kind, [])
    if not paths:
        trial.fault("other", f"no file {kind} in a finished project")
        return
    path = trial.draw.choice(paths)
    others = [other for other in paths if other != path]
    damage(path, how, trial.draw, trial.draw.choice(others) if others else None)
    # The teacher is used by what is not done yet; all else is looked up by the same command.
    name = "distill_baselines" if "/teacher/" in kind else "distill_tse"
    truth = {**trial.yard.truth[name]["results"]}
    truth.pop("comparison", None)
    limit = trial.yard.limit(trial.yard.truth[name]["seconds"])
    ended = Running(place, COMMANDS[name].words).wait(limit)
    trial.refused_or(ended, f"{how} in {kind}", truth)
    if ended.status not in (0, None) and path.name not in ended.text.replace("\n", ""):
        trial.fault("other", f"{how} in {kind}: the file is not named: {ended.last}")


def file_plans(reads: int, runs: int) -> list[Plan]:
    """About `reads` damaged files that are read alone, and `runs` whole commands."""
    ways, plans = [*DAMAGES, *REPLACED], list[Plan]()
    readers = READERS if reads >= 2 * len(READERS) else READERS[:: len(READERS) // 5]
    each = min(len(ways), max(1, round(reads / len(readers))))
    for number, reader in enumerate(readers):
        chosen = [ways[(number * 5 + n) % len(ways)] for n in range(each)]
        name = f"{reader.kind.removeprefix('data/')} {number}"
        plans.append(Plan("files", name, _read_damaged(reader, chosen)))
    rest = runs // 6
    for number in range(rest):
        plans.append(Plan("files", f"run rest {number}", _run_damaged_rest, ("distill_tse",)))
    for number in range(runs - rest):
        kind = WHOLE[number % len(WHOLE)]
        how = ways[(number * 7 + number // len(WHOLE)) % len(ways)]
        how = "flip" if how == "fifo" and kind.endswith("mlflow.db") else how
        needs = ("distill_baselines" if "/teacher/" in kind else "distill_tse",)
        plans.append(Plan("files", f"run {how} {kind}", _run_damaged(kind, how), needs))
    return plans


WHOLE = [
    "mlflow.db",
    "data/01_raw/test/DIGEST/scenes.json",
    *(f"data/01_raw/test/DIGEST/{s}/{s}_NUMBER.png" for s in ("train", "val")),
    "data/01_raw/test/DIGEST/trainannot/train_NUMBER.png",
    f"{_D2}/image_problems.json",
    f"{_D2}/index.csv",
    f"{_D2}/data_tags.json",
    f"{_D2}/packed_images.json",
    *(
        reader.kind
        for reader in READERS
        if "history" not in reader.kind and "01_raw" not in reader.kind
    ),
    f"{_D7}/history/tse.csv/VERSION/tse.csv",
    "data/08_reporting/test/label_statistics.csv",
    "data/08_reporting/test/summary.md/VERSION/summary.md",
    "data/08_reporting/test/curves_tse.png/VERSION/curves_tse.png",
]


# ---- records for MLflow


def unsent_plans() -> list[Plan]:
    """Files of records that MLflow has not yet, damaged and then sent."""
    return [Plan("files", "records for MLflow", _records, ("distill_tse",))]


def _records(trial: Trial) -> None:
    place = trial.project("teacher")
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    Running(place, run("data_ingestion"), env=away).wait(300.0)
    found = list((place / "data").glob("*/untracked/*.jsonl"))
    if not found:
        trial.fault("other", "no records were kept with MLflow away")
        return
    file, data, database = found[0], found[0].read_bytes(), place / "mlflow.db"
    before = database.read_bytes()

    def send() -> set[tuple[Any, ...]] | None:
        database.write_bytes(before)
        words = [
            "-m",
            "rdd_pipeline.tracking",
            str(file),
            "--tracking-uri",
            f"sqlite:///{database}",
        ]
        ended = trial.look(Running(place, words).wait(SECONDS), "sending")
        trial.note = ended.last
        if ended.status not in (0, 1, None) and not ended.one_line:
            trial.fault("other", f"status {ended.status}: {ended.last}")
        with sqlite3.connect(database) as connection:
            rows = connection.execute("select key, value, step from metrics").fetchall()
            rows += connection.execute("select key, value, '' from params").fetchall()
            return {tuple(row) for row in rows}

    truth = send()
    assert truth is not None
    for how in [*DAMAGES, "folder", "fifo"]:
        restore(file, data)
        with trial.case(how):
            damage(file, how, trial.draw)
            rows = send()
            if rows is not None and (more := rows - truth):
                trial.fault(
                    "silently wrong", f"{how}: MLflow was sent {sorted(map(str, more))[:2]}"
                )
