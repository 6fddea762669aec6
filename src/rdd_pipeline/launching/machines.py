"""Several machines: how the first one hands out a training, and the others take part in it.

The first machine hosts a store (torch's `TCPStore`) at `trainer.rendezvous`, for as long as its
process lives. In it lie the trainings, one after the other: the task as JSON, the teacher as
safetensors, in pieces and with a digest; torch's elastic launchers of all machines meet there, too.
What the processes of another machine end with comes back the same way, to be raised where the user
is. No file system is shared but the images.

The port is open to whoever reaches the address, and elastic's own entries in the store are pickled:
it belongs into the private network of a cluster, and 127.0.0.1 is what keeps it on one machine.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rdd_pipeline.errors import UserError
from rdd_pipeline.files import write_atomically
from rdd_pipeline.launching.worker import abort
from rdd_pipeline.training.job import TRAINING_FORMAT

logger = logging.getLogger(__name__)

FORMAT = str(TRAINING_FORMAT)
"""What both sides must agree in, to compute the same."""
_PIECE = 4 << 20
"""Bytes of one value; the store takes up to 8 MiB."""
_TIMEOUT = timedelta(seconds=60)
_POLL = 0.5


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``.

    Raises:
        UserError: It is something else.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"The address of the first machine is {endpoint!r}; expected HOST:PORT, as in "
            "node1:29400."
        )
    return host.strip("[]"), int(port)


class Exchange:
    """One connection to the store. Every thread has its own."""

    def __init__(self, store: TCPStore) -> None:
        self._store = store

    @classmethod
    def connect(cls, endpoint: str, timeout: timedelta = _TIMEOUT) -> Self:
        """Connect to the first machine.

        Raises:
            torch.distributed.DistError: There is nobody within the time.
        """
        host, port = parse_endpoint(endpoint)
        return cls(TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout))

    # ---- what is there

    def number_of_trainings(self) -> int:
        """How many the first machine has handed out; 0: it will do so."""
        return int(self._store.add("rdd/trainings", 0))

    def is_over(self, training: int | None = None) -> bool:
        """Whether a training (None: the command of the first machine) has come to its end."""
        key = "rdd/over" if training is None else f"rdd/{training}/over"
        return bool(self._store.check([key]))

    def format(self) -> str:
        """`FORMAT` of the first machine."""
        return str(self._store.get("rdd/format").decode())

    # ---- the first machine

    def hand_out(self, files: dict[str, bytes], about: dict[str, Any]) -> int:
        """Put a training into the store; returns its number."""
        number = self.number_of_trainings() + 1
        sizes = {}
        for name, data in files.items():
            pieces = range(0, len(data), _PIECE)
            for piece, start in enumerate(pieces):
                self._store.set(f"rdd/{number}/{name}/{piece}", data[start : start + _PIECE])  # type: ignore[arg-type]
            sizes[name] = [len(pieces), hashlib.sha256(data).hexdigest()]
        self._store.set(f"rdd/{number}/about", json.dumps({**about, "files": sizes}))
        self._store.add("rdd/trainings", 1)
        return number

    def call_off(self, training: int) -> None:
        """Say that a training is over, and forget its files."""
        self._store.set(f"rdd/{training}/over", "")
        about = json.loads(self._store.get(f"rdd/{training}/about"))
        for name, (pieces, _) in about["files"].items():
            for piece in range(pieces):
                self._store.delete_key(f"rdd/{training}/{name}/{piece}")

    def say_goodbye(self) -> None:
        """Say that the command is over, and give those that have joined the time to hear it."""
        self._store.set("rdd/over", "")
        until = time.monotonic() + 15.0
        while time.monotonic() < until:
            if int(self._store.add("rdd/left", 0)) >= int(self._store.add("rdd/joined", 0)):
                return
            time.sleep(0.05)

    def fetch_faults(self, training: int, folder: Path, known: int) -> int:
        """Write what other machines' processes ended with beside one's own; returns how many."""
        number = int(self._store.add(f"rdd/{training}/faults", 0))
        for fault in range(known + 1, number + 1):
            data = self._store.get(f"rdd/{training}/fault/{fault}")
            write_atomically(folder / f"fault-elsewhere-{fault}.json", data)
        return number

    # ---- the others

    def arrive(self) -> None:
        """Let the first machine know that this one is there."""
        self._store.add("rdd/joined", 1)

    def about(self, training: int) -> dict[str, Any]:
        """What `hand_out` was given."""
        about: dict[str, Any] = json.loads(self._store.get(f"rdd/{training}/about"))
        return about

    def fetch(self, training: int, folder: Path) -> None:
        """Write a training's files into a folder.

        Raises:
            UserError: They arrived damaged.
        """
        for name, (pieces, digest) in self.about(training)["files"].items():
            data = b"".join(
                self._store.get(f"rdd/{training}/{name}/{piece}") for piece in range(pieces)
            )
            if hashlib.sha256(data).hexdigest() != digest:
                raise UserError(f"{name} arrived damaged from the first machine. Join again.")
            write_atomically(folder / name, data)

    def send_fault(self, training: int, fault: dict[str, Any]) -> None:
        """Let the first machine know what a process ended with."""
        number = int(self._store.add(f"rdd/{training}/sent", 1))
        self._store.set(f"rdd/{training}/fault/{number}", json.dumps(fault)[: _PIECE // 2])
        self._store.add(f"rdd/{training}/faults", 1)

    def leave(self) -> None:
        """Confirm that the end was heard."""
        self._store.add("rdd/left", 1)


_hosted: dict[str, Exchange] = {}


def host(endpoint: str) -> Exchange:
    """The store at an address of this machine, which lives as long as this process.

    Args:
        endpoint: HOST:PORT; it listens on the address of HOST only.

    Raises:
        UserError: The address is not one of this machine, or the port is taken.
    """
    if endpoint in _hosted:
        return _hosted[endpoint]
    name, port = parse_endpoint(endpoint)
    try:
        family, _, _, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        raise UserError(
            f"trainer.rendezvous is {endpoint!r}, but this machine cannot listen there "
            f"({error.strerror or error}). Give a name or address of this machine, the first one, "
            "that the others can reach, and a port that is free."
        ) from error
    store = TCPStore(
        name,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=_TIMEOUT,
        master_listen_fd=listener.detach(),
    )
    store.set("rdd/format", FORMAT)
    exchange = _hosted[endpoint] = Exchange(store)
    atexit.register(close, endpoint)
    logger.info("Other machines join by: python -m rdd_pipeline.launching.join %s", endpoint)
    return exchange


def close(endpoint: str) -> None:
    """End what `host` began; at the latest when the process ends."""
    if endpoint in _hosted:
        _hosted.pop(endpoint).say_goodbye()


class Watch:
    """Ends this machine's part in a training when the training cannot go on.

    An elastic launcher would start its processes again and wait for the other machines, which have
    left. A thread looks, and then ends the processes and interrupts the launcher by SIGTERM, to
    which it listens.

    Args:
        folder: Where this machine's processes find their task.
        look: Called twice a second in the thread; True: it is over. An error of the network is
            the same.
    """

    def __init__(self, folder: Path, look: Callable[[], bool]) -> None:
        self.fired = False
        self._folder, self._look = folder, look
        self._over, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch of machines", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_POLL):
            if self._is_over():
                break
        else:
            return
        # Time for what the other processes of this machine have to say, and for a launcher that
        # comes to its end by itself.
        if self._over.wait(1.0):
            return
        with self._lock:
            if self._over.is_set():
                return
            self.fired = True
            abort(self._folder)
            os.kill(os.getpid(), signal.SIGTERM)

    def _is_over(self) -> bool:
        try:
            return self._look()
        except dist.DistError:
            return True
