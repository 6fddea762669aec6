"""What the machines of a training tell one another, apart from the training's own collectives.

All of it passes through one store (torch's `TCPStore`) in the process of the first machine's
command, and through this module: the rendezvous of the elastic agents, the published trainings (the
task as JSON, the teacher as safetensors, in pieces and with a digest), and the failures of worker
processes. No file system is shared but the images.

With one machine the store listens on the loopback interface. With several it listens on the address
of `trainer.rendezvous` and is open to whoever reaches it, and elastic pickles the state of its
rendezvous: that port belongs in the private network of a cluster.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Self

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from rdd_pipeline.config import Params
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import content_digest, write_atomically
from rdd_pipeline.training.job import TRAINING_FORMAT

logger = logging.getLogger(__name__)

FORMAT = str(TRAINING_FORMAT)
"""What both sides must agree in, to compute the same."""
LOOPBACK = "127.0.0.1"
_PIECE = 4 << 20
"""Bytes of one value; the store takes up to 8 MiB."""
_TIMEOUT = timedelta(seconds=60)


class Failure(Params):
    """The error a worker process ended with.

    Attributes:
        rank: Its rank.
        attempt: How often the processes had been started again before.
        kind: Name of the error's class.
        message: The error's message.
        traceback: Its traceback.
        final: Name of the class in `worker.FINAL` that it belongs to: a restart does not cure it.
        lost_peer: It failed because another process did.
    """

    rank: int
    attempt: int
    kind: str
    message: str
    traceback: str
    final: str | None
    lost_peer: bool


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


def serve(host: str, port: int, timeout: timedelta = _TIMEOUT) -> TCPStore:
    """A store that listens on the address of `host` only; torch's own listens on all.

    Args:
        host: Name or address of this machine.
        port: 0: any that is free.
        timeout: How long it waits for values.

    Raises:
        OSError: The address is not one of this machine, or the port is taken.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        port = listener.getsockname()[1]
        return TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=listener.detach(),
        )


class Exchange:
    """One connection to the store.

    Attributes:
        endpoint: HOST:PORT of the store.
        is_host: Whether the store is this process's own.
        on_loopback: Whether all processes are on one machine.
    """

    def __init__(self, store: TCPStore, endpoint: str, *, is_host: bool) -> None:
        self._store = store
        self.endpoint = endpoint
        self.is_host = is_host
        self.on_loopback = parse_endpoint(endpoint)[0] in (LOOPBACK, "localhost")

    @classmethod
    def connect(cls, endpoint: str, wait: float = 60.0) -> Self:
        """Connect to the first machine.

        Raises:
            OSError: Nobody listens there after `wait` seconds.
            UserError: `endpoint` is not HOST:PORT.
        """
        host, port = parse_endpoint(endpoint)
        until = time.monotonic() + wait
        while True:  # a store that is not there yet would be retried with exponential back-off
            try:
                socket.create_connection((host, port), timeout=5).close()
                break
            except OSError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.3)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
        return cls(store, endpoint, is_host=False)

    def rendezvous(
        self, training: int, nodes: int, address: str | None, timeout: float
    ) -> DynamicRendezvousHandler:
        """Where the elastic agents of a training meet.

        Args:
            training: Its number.
            nodes: Machines that take part.
            address: Name or address of this machine for the others; None: its own name.
            timeout: Seconds to wait until all are there.
        """
        name = f"training-{training}"
        handler: DynamicRendezvousHandler = DynamicRendezvousHandler.from_backend(
            name,
            self._store,
            C10dRendezvousBackend(self._store, name),
            min_nodes=nodes,
            max_nodes=nodes,
            local_addr=address,
            timeout=RendezvousTimeout(join=timedelta(seconds=timeout)),
        )
        return handler

    # ---- the first machine

    def publish(self, files: dict[str, bytes]) -> int:
        """Put a training into the store; returns its number."""
        number = int(self._store.add("rdd/trainings", 0)) + 1
        sizes = {}
        for name, data in files.items():
            pieces = range(0, len(data), _PIECE)
            for piece, start in enumerate(pieces):
                self._store.set(f"rdd/{number}/{name}/{piece}", data[start : start + _PIECE])  # type: ignore[arg-type]
            sizes[name] = [len(pieces), content_digest(data)]
        self._store.set(f"rdd/{number}/files", json.dumps(sizes))
        self._store.add("rdd/trainings", 1)
        return number

    def retract(self, training: int) -> None:
        """Say that a training is over, and forget its files."""
        self._store.set(f"rdd/{training}/over", "")
        for name, (pieces, _) in self._files(training).items():
            for piece in range(pieces):
                self._store.delete_key(f"rdd/{training}/{name}/{piece}")

    def shutdown(self) -> None:
        """Say that the command is over, and give those that have joined the time to hear it."""
        self._store.set("rdd/over", "")
        until = time.monotonic() + 15.0
        while time.monotonic() < until:
            if int(self._store.add("rdd/left", 0)) >= int(self._store.add("rdd/joined", 0)):
                return
            time.sleep(0.05)

    # ---- the others

    def register(self) -> None:
        """Let the first machine know that this one is there.

        Raises:
            UserError: It trains by another version.
        """
        there = self._store.get("rdd/format").decode()
        if there != FORMAT:
            raise UserError(
                f"The first machine trains by version {there} of rdd_pipeline's training, this one "
                f"by {FORMAT}. Install the same package on both."
            )
        self._store.add("rdd/joined", 1)

    def deregister(self) -> None:
        """Confirm that the end was heard."""
        self._store.add("rdd/left", 1)

    def poll(self, seen: int) -> int | None:
        """Number of the training that is to be joined, or of the one that was `seen` last.

        None: the command of the first machine is over.
        """
        if self._store.check(["rdd/over"]):
            return None
        number = int(self._store.add("rdd/trainings", 0))
        return seen if self._store.check([f"rdd/{number}/over"]) else number

    def fetch(self, training: int, folder: Path) -> None:
        """Write a training's files into a folder.

        Raises:
            UserError: They arrived damaged.
        """
        for name, (pieces, digest) in self._files(training).items():
            data = b"".join(
                self._store.get(f"rdd/{training}/{name}/{piece}") for piece in range(pieces)
            )
            if content_digest(data) != digest:
                raise UserError(f"{name} arrived damaged from the first machine. Join again.")
            write_atomically(folder / name, data)

    def _files(self, training: int) -> dict[str, tuple[int, str]]:
        """Pieces and digest of each file."""
        files: dict[str, tuple[int, str]] = json.loads(self._store.get(f"rdd/{training}/files"))
        return files

    # ---- the worker processes of all machines

    def report(self, training: int, failure: Failure) -> None:
        """Let all machines know what a process ended with."""
        self._store.append(f"rdd/{training}/failures", failure.model_dump_json() + "\n")  # type: ignore[attr-defined]

    def failures(self, training: int) -> list[Failure]:
        """What processes of all machines ended with, in the order in which they did."""
        key = f"rdd/{training}/failures"
        lines = self._store.get(key).splitlines() if self._store.check([key]) else []
        return [Failure.model_validate_json(line) for line in lines]


_hosted: dict[str, Exchange] = {}


def host(endpoint: str | None) -> Exchange:
    """The store at an address of this machine, which lives as long as this process.

    Args:
        endpoint: HOST:PORT; it listens on the address of HOST only. None: on the loopback
            interface, for one machine.

    Raises:
        UserError: The address is not one of this machine, or the port is taken.
    """
    key = endpoint or LOOPBACK
    if key in _hosted:
        return _hosted[key]
    name, port = (LOOPBACK, 0) if endpoint is None else parse_endpoint(endpoint)
    try:
        store = serve(name, port)
    except OSError as error:
        raise UserError(
            f"trainer.rendezvous is {endpoint!r}, but this machine cannot listen there "
            f"({error.strerror or error}). Give a name or address of this machine, the first one, "
            "that the others can reach, and a port that is free."
        ) from error
    store.set("rdd/format", FORMAT)
    exchange = _hosted[key] = Exchange(store, endpoint or f"{name}:{store.port}", is_host=True)
    atexit.register(close, key)
    if endpoint is not None:
        logger.info("Other machines join by: python -m rdd_pipeline.launching.join %s", endpoint)
    return exchange


def close(endpoint: str) -> None:
    """End what `host` began; at the latest when the process ends."""
    if endpoint in _hosted:
        with contextlib.suppress(dist.DistError):
            _hosted.pop(endpoint).shutdown()
