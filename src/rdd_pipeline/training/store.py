"""The folder of a training: its newest two checkpoints and the results that belong to it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rdd_pipeline.errors import UserError
from rdd_pipeline.files import (
    from_checked_json,
    read_regular,
    remove_leftovers,
    to_checked_json,
    write_atomically,
)
from rdd_pipeline.training.state import DamagedStateError, TrainState

logger = logging.getLogger(__name__)

_NAME = re.compile(r"state-(\d{9})\.ckpt")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}|imported-[0-9a-f]{8}")
_OF = "of"
"""Field of a remembered result: the fingerprint and key it belongs to."""
KEPT = 2


def is_fingerprint(text: str) -> bool:
    """Whether it names work of this project: what a file says may be anything, a path too."""
    return _FINGERPRINT.fullmatch(text) is not None


class RunStore:
    """Everything on disk about one piece of training work, under its fingerprint.

    ``job.json`` says in words what the fingerprint stands for, ``state-ITERATION.ckpt`` are the
    checkpoints, ``done.json`` names the final one, ``KEY.json`` are remembered results. Several
    processes may train the same at once: each file is whole, and the state of a process that is
    behind replaces no later one.
    """

    def __init__(self, root: Path, fingerprint: str) -> None:
        """Name the folder; it is made when something is written.

        Raises:
            UserError: `fingerprint` is none: it would lead out of `root`, or to a wrong place.
        """
        if not is_fingerprint(fingerprint):
            raise UserError(
                f"{fingerprint!r} is no fingerprint of a training: expected 16 hexadecimal digits."
            )
        self.path = root / fingerprint
        self.profile = self.path / "profile"
        self.fingerprint = fingerprint
        self._unusable: set[Path] = set()

    def describe(self, job: Mapping[str, Any]) -> None:
        """Write ``job.json`` once, for people who look into the folder."""
        if not (self.path / "job.json").exists():
            plain = json.loads(json.dumps(job, sort_keys=True, default=str))
            mine = {**plain, _OF: self.fingerprint}
            write_atomically(self.path / "job.json", to_checked_json(mine))

    def description(self) -> dict[str, Any] | None:
        """What `describe` was told; None where it is not there, or not this work's."""
        path = self.path / "job.json"
        try:
            data = read_regular(path)
            value: dict[str, Any] = json.loads(data)
            if isinstance(value, dict) and "digest" not in value:
                return value  # of a version that wrote none
            value = from_checked_json(data, str(path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, UserError):
            value = {}
        if value.pop(_OF, None) != self.fingerprint:
            logger.warning("%s is damaged or of other work; what it says is left out.", path)
            return None
        return value

    def save(self, state: TrainState) -> Path:
        """Write the state of its iteration and drop all but it and the one before.

        States that `latest` has found damaged do not count: training goes on from before them, and
        what it writes there would be the first to go.
        """
        path = self.path / f"state-{state.iteration:09d}.ckpt"
        write_atomically(path, replace(state, fingerprint=self.fingerprint).to_bytes())
        self._unusable.discard(path)
        others = [p for p in self._states() if p != path and p not in self._unusable]
        for old in others[KEPT - 1 :]:
            old.unlink(missing_ok=True)
        return path

    def latest(self) -> TrainState | None:
        """Newest state that is whole, or None; damaged ones are named in the log and skipped.

        What killed processes left half-written in the folder is removed.
        """
        remove_leftovers(self.path)
        paths = self._states()
        for path in paths:
            try:
                state = TrainState.from_bytes(read_regular(path), source=str(path))
                if state.fingerprint != self.fingerprint:
                    raise DamagedStateError(f"{path} belongs to other work ({state.fingerprint}).")
            except FileNotFoundError:  # another process that trains the same has a newer one
                continue
            except (DamagedStateError, OSError) as error:
                logger.warning("%s Trying the one before it.", error)
                self._unusable.add(path)
                continue
            return state
        return None if self._states() == paths else self.latest()

    @property
    def is_finished(self) -> bool:
        """Whether the work was marked as complete; nothing is read."""
        return (self.path / "done.json").exists()

    def finish(self, iteration: int) -> None:
        """Mark the work as complete: its last state is the one of `iteration`.

        Older states go: they were kept to fall back on, and the work can be loaded now.
        """
        write_atomically(self.path / "done.json", json.dumps({"iteration": iteration}).encode())
        for path in self._states():
            if path.name != f"state-{iteration:09d}.ckpt":
                path.unlink(missing_ok=True)

    def finished_state(self) -> TrainState | None:
        """Final state of complete work; None when it is not complete or no longer readable."""
        try:
            final = json.loads(read_regular(self.path / "done.json"))["iteration"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        state = self.latest()
        return state if state is not None and state.iteration == final else None

    def remember(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep a JSON result that belongs to this work (an evaluation, say), with its digest."""
        mine = {**value, _OF: f"{self.fingerprint} {key}"}
        write_atomically(self.path / f"{key}.json", to_checked_json(mine))

    def recall(self, key: str) -> dict[str, Any] | None:
        """What was remembered under `key`; None: nothing, or not this work's."""
        path = self.path / f"{key}.json"
        try:
            value = from_checked_json(read_regular(path), str(path))
            mine = f"{self.fingerprint} {key}"
            if value.pop(_OF, mine) != mine:  # files of older versions do not say it
                raise UserError(f"{path} was copied from other work.")
        except FileNotFoundError:
            return None
        except (OSError, UserError):
            logger.warning("%s is damaged or has no digest; what it held is computed anew.", path)
            return None
        return value

    def _states(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted((p for p in self.path.iterdir() if _NAME.fullmatch(p.name)), reverse=True)
