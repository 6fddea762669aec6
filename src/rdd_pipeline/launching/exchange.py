"""What the machines of a training tell one another, apart from the training's own collectives.

All of it passes through one store in the process of the first machine's command, and through this
module: the rendezvous of the elastic agents, where worker processes find one another, the published
trainings (the task as JSON, the teacher as safetensors, in pieces and with a digest), and the
failures of worker processes. No file system is shared but the images. The store answers only to
whoever knows the token (see `channel`, `store`).

With one machine the store listens on the loopback interface. With several it listens on the address
of `trainer.rendezvous`.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import ipaddress
import json
import logging
import math
import pickle
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.rendezvous.api import RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

import rdd_pipeline
from rdd_pipeline.config import Params, TrainerParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import content_digest, written_whole
from rdd_pipeline.launching.channel import TOKEN_VARIABLE, find_token, new_token
from rdd_pipeline.launching.store import ClientStore, StoreServer
from rdd_pipeline.training.job import TRAINING_FORMAT

logger = logging.getLogger(__name__)

VERSIONS = {
    "rdd_pipeline": rdd_pipeline.__version__,
    "torch": torch.__version__,
    "timm": version("timm"),
    "training format": str(TRAINING_FORMAT),
}
"""What both sides must agree in, to compute the same."""
LOOPBACK = "127.0.0.1"
FILES = {"task.json": 1 << 30, "teacher.safetensors": 16 << 30}
"""What another machine gets, and how many bytes of it at most."""
_ELASTIC = DynamicRendezvousHandler.__module__
_STATE = {
    (_ELASTIC, "_RendezvousState"),
    (_ELASTIC, "_NodeDesc"),
    ("datetime", "datetime"),
    ("datetime", "timezone"),
    ("datetime", "timedelta"),
}
"""Classes of which the pickled state of elastic's rendezvous consists."""
_PIECE = 4 << 20
"""Bytes of one value in the store."""


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


class _Unpickler(pickle.Unpickler):
    """Makes objects of the classes in elastic's state only, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STATE:
            raise UserError(
                f"Another machine put {module}.{name} into the rendezvous, which is no part of its "
                "state. Nothing of it was run. Look at who has the token, and make another one."
            )
        return super().find_class(module, name)


_Found = TypeVar("_Found", bound=tuple[Any, ...] | None)


def _checked(found: _Found) -> _Found:
    if found is not None:
        _Unpickler(io.BytesIO(found[0])).load()
    return found


class _Backend(C10dRendezvousBackend):
    """Torch's, which hands pickles on only if they hold nothing but a state."""

    def get_state(self) -> tuple[bytes, Any] | None:
        return _checked(super().get_state())

    def set_state(self, state: bytes, token: Any = None) -> tuple[bytes, Any, bool] | None:
        return _checked(super().set_state(state, token))


class _Rendezvous(DynamicRendezvousHandler):
    """Torch's, whose MASTER_ADDR is a word: where in the store the processes of a round meet.

    Each round has its own: what dead processes have left there is not read by those of the next.
    """

    def next_rendezvous(self) -> RendezvousInfo:
        info = super().next_rendezvous()
        if info.rank == 0:
            info.store.set("rdd/group", secrets.token_hex(8))
        group = info.store.get("rdd/group").decode()
        return RendezvousInfo(
            info.store, info.rank, info.world_size, RendezvousStoreInfo(f"rdd/group/{group}", 0)
        )


class Exchange:
    """One connection to the store.

    Attributes:
        store: The store itself, for torch.
        endpoint: HOST:PORT of the store.
        token: Opens the store.
        is_host: Whether the store is this process's own.
    """

    def __init__(self, endpoint: str, token: str) -> None:
        self.store = ClientStore(*parse_endpoint(endpoint), token)
        self.endpoint, self.token, self.is_host = endpoint, token, False

    @property
    def on_loopback(self) -> bool:
        """Whether all processes are on one machine."""
        return ipaddress.ip_address(self.store.local_address).is_loopback

    @classmethod
    def connect(cls, endpoint: str, token: str, wait: float = 60.0) -> Self:
        """Connect to the first machine.

        Raises:
            OSError: Nobody answers there after `wait` seconds.
            UserError: `endpoint` is not HOST:PORT, the token is another one, or what listens there
                is something else.
        """
        parse_endpoint(endpoint)
        until = time.monotonic() + wait
        while True:
            try:
                return cls(endpoint, token)
            except OSError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.3)

    def rendezvous(
        self, training: int, nodes: int, address: str | None, timeout: float
    ) -> DynamicRendezvousHandler:
        """Where the elastic agents of a training meet.

        Args:
            training: Its number.
            nodes: Machines that take part.
            address: Name or address of this machine; None: its own name.
            timeout: Seconds to wait until all are there.
        """
        name = f"training-{training}"
        handler: DynamicRendezvousHandler = _Rendezvous.from_backend(
            name,
            self.store,
            _Backend(self.store, name),
            min_nodes=nodes,
            max_nodes=nodes,
            local_addr=address,
            timeout=RendezvousTimeout(join=timedelta(seconds=timeout)),
        )
        return handler

    # ---- the first machine

    def publish(self, files: Mapping[str, bytes]) -> int:
        """Put a training into the store; returns its number."""
        number = self.store.add("rdd/trainings", 0) + 1
        facts = {}
        for name, data in files.items():
            for piece, start in enumerate(range(0, len(data), _PIECE)):
                self.store.set(f"rdd/{number}/{name}/{piece}", data[start : start + _PIECE])
            facts[name] = [len(data), content_digest(data)]
        self.store.set(f"rdd/{number}/files", json.dumps(facts))
        self.store.add("rdd/trainings", 1)
        return number

    def retract(self, training: int) -> None:
        """Say that a training is over, and forget its files."""
        self.store.set(f"rdd/{training}/over", "")
        for name, (size, _) in self._files(training).items():
            for piece in range(_pieces(size)):
                self.store.delete_key(f"rdd/{training}/{name}/{piece}")

    def shutdown(self) -> None:
        """Say that the command is over, and give those that have joined the time to hear it."""
        self.store.set("rdd/over", "")
        until = time.monotonic() + 15.0
        while time.monotonic() < until:
            if self.store.add("rdd/left", 0) >= self.store.add("rdd/joined", 0):
                return
            time.sleep(0.05)

    # ---- the others

    def register(self) -> None:
        """Let the first machine know that this one is there.

        Raises:
            UserError: It runs another version of something, or does not say so.
        """
        try:
            there = json.loads(self.store.get("rdd/versions"))
        except dist.DistStoreError as error:
            raise UserError(f"{self.endpoint} does not say which versions it runs.") from error
        others = [name for name, here in VERSIONS.items() if there.get(name) != here]
        if others:
            raise UserError(
                f"The first machine runs {_named(there, others)}, this one "
                f"{_named(VERSIONS, others)}. Install the same on both."
            )
        self.store.add("rdd/joined", 1)

    def deregister(self) -> None:
        """Confirm that the end was heard."""
        self.store.add("rdd/left", 1)

    def poll(self, seen: int) -> int | None:
        """Number of the training that is to be joined, or of the one that was `seen` last.

        None: the command of the first machine is over.
        """
        if self.store.check(["rdd/over"]):
            return None
        number = self.store.add("rdd/trainings", 0)
        return seen if self.store.check([f"rdd/{number}/over"]) else number

    def fetch(self, training: int, folder: Path) -> bool:
        """Write a training's files into a folder; returns whether it is not over meanwhile.

        Raises:
            UserError: They are not those of a training, too large, arrived damaged or not at all.
        """
        files = self._files(training)
        size = sum(size for size, _ in files.values())
        free = shutil.disk_usage(folder).free
        if size > free:
            raise UserError(
                f"The training's files are {size / 1e6:.0f} MB, but {folder} has only "
                f"{free / 1e6:.0f} MB left. Free some space, or set TMPDIR to another folder."
            )
        try:
            for name, (size, digest) in files.items():
                self._fetch(f"rdd/{training}/{name}", size, digest, folder / name)
        except dist.DistStoreError as error:
            if self.store.check([f"rdd/{training}/over"]):
                return False
            raise UserError(
                f"A file of the training did not arrive: {error}. Join again."
            ) from error
        return True

    def _fetch(self, key: str, size: int, digest: str, path: Path) -> None:
        found = hashlib.blake2b(digest_size=16)
        with written_whole(path, durable=False) as file:
            for piece in range(_pieces(size)):
                data = self.store.get(f"{key}/{piece}")
                found.update(data)
                size -= len(data)
                if size < 0:
                    break
                file.write(data)
            if size or found.hexdigest() != digest:
                raise UserError(f"{path.name} arrived damaged from the first machine. Join again.")

    def _files(self, training: int) -> dict[str, tuple[int, str]]:
        """Size in bytes and digest of each file."""
        files: dict[str, tuple[int, str]] = json.loads(self.store.get(f"rdd/{training}/files"))
        for name, (size, _) in files.items():
            if name not in FILES or not 0 <= int(size) <= FILES[name]:
                raise UserError(
                    f"The first machine offers {name!r} of {size} bytes; expected are "
                    f"{' and '.join(FILES)}, of {FILES['task.json'] >> 30} and "
                    f"{FILES['teacher.safetensors'] >> 30} GiB at most. Nothing was written."
                )
        return files

    # ---- the worker processes of all machines

    def report(self, training: int, failure: Failure) -> None:
        """Let all machines know what a process ended with."""
        self.store.append(f"rdd/{training}/failures", failure.model_dump_json() + "\n")

    def failures(self, training: int) -> list[Failure]:
        """What processes of all machines ended with, in the order in which they did."""
        key = f"rdd/{training}/failures"
        lines = self.store.get(key).splitlines() if self.store.check([key]) else []
        return [Failure.model_validate_json(line) for line in lines]


def _pieces(size: int) -> int:
    return math.ceil(size / _PIECE)


def _named(versions: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{name} {versions.get(name, 'unknown')}" for name in names)


_hosted: dict[str, tuple[Exchange, StoreServer]] = {}


def host(trainer: TrainerParams) -> Exchange:
    """The store at an address of this machine, which lives as long as this process.

    With several machines it listens on the address of `trainer.rendezvous` only, else on the
    loopback interface. The token is that of `trainer.token_file` or of the environment; without
    any there is a new one, which the command shows that the other machines are to run.

    Raises:
        UserError: The address is not one of this machine, or is open to everybody, or the port is
            taken, or the token is none.
    """
    several = trainer.nodes > 1
    key = trainer.rendezvous if several and trainer.rendezvous else LOOPBACK
    if key in _hosted:
        return _hosted[key][0]
    name, port = parse_endpoint(key) if several else (LOOPBACK, 0)
    given = find_token(trainer.token_file, make=True) if several else None
    token = given or new_token()
    try:
        if several:
            _check_reach(key, name, trainer)
        server = StoreServer(name, port, token)
    except OSError as error:
        raise UserError(
            f"trainer.rendezvous is {key!r}, but this machine cannot listen there "
            f"({error.strerror or error}). Give a name or address of this machine, the first one, "
            "that the others can reach, and a port that is free."
        ) from error
    exchange = Exchange.connect(key if several else f"{name}:{server.port}", token)
    exchange.is_host = True
    exchange.store.set("rdd/versions", json.dumps(VERSIONS))
    _hosted[key] = exchange, server
    atexit.register(close, key)
    if several:
        _show_command(key, trainer.token_file, None if given else token)
    return exchange


def _check_reach(endpoint: str, name: str, trainer: TrainerParams) -> None:
    """Refuse an address that is open to more than a private network."""
    for *_, address in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
        ip = ipaddress.ip_address(str(address[0]).split("%")[0])
        if ip.is_unspecified:
            raise UserError(
                f"trainer.rendezvous is {endpoint!r}, which is all networks of this machine. Give "
                "its name or address in the network of the others."
            )
        if ip.is_global and not trainer.public_address:
            raise UserError(
                f"trainer.rendezvous is {endpoint!r}: {ip} is a public address. Give one of a "
                "private network; or, where a firewall keeps others away, set "
                "trainer.public_address=true."
            )


def _show_command(endpoint: str, file: str | None, token: str | None) -> None:
    command = f"python -m rdd_pipeline.launching.join {endpoint}"
    if token is not None:
        # Not by the log, which may be kept and read by others.
        print(f"Other machines join by: {TOKEN_VARIABLE}={token} {command}", file=sys.stderr)
        return
    command += f" --token-file {file}" if file else f" (with this {TOKEN_VARIABLE})"
    logger.info("Other machines join by: %s", command)


def close(endpoint: str) -> None:
    """End what `host` began; at the latest when the process ends."""
    if endpoint in _hosted:
        exchange, server = _hosted.pop(endpoint)
        with contextlib.suppress(dist.DistError):
            exchange.shutdown()
        server.close()
