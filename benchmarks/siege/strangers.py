"""Strangers on every port that a training listens on, and a first machine that is none.

Each port of the process tree is found in /proc and tried with noise, lengths that promise more than
the memory holds, HTTP, hundreds of connections that say nothing, and torch's own client of a
`TCPStore`, which lists all keys and replaces their values by pickles that would write a marker.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import os
import pickle
import re
import shlex
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from siege.commands import Ended, Running, below
from siege.damage import in_a_fork
from siege.inputs import Harm, make_job
from siege.trials import Plan, Trial

ITERATIONS = 300
LIMIT = 240.0


class Port(NamedTuple):
    """An address that a process listens on."""

    host: str
    number: int
    pid: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def reach(self) -> tuple[str, int]:
        """Where to connect to."""
        wild = ipaddress.ip_address(self.host).is_unspecified
        return ("127.0.0.1" if wild else self.host, self.number)


def listening(pids: list[int]) -> list[Port]:
    """All TCP ports that some processes listen on."""
    owners: dict[str, int] = {}
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry)):
                    owners[found[1]] = pid
    ports = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == "0A" and words[9] in owners:
                    host, _, port = words[1].partition(":")
                    ports.append(Port(_address(host), int(port, 16), owners[words[9]]))
    return sorted(set(ports))


def _address(text: str) -> str:
    """Of /proc/net/tcp: words of four bytes in this machine's order."""
    raw = bytes.fromhex(text)
    words = [raw[start : start + 4] for start in range(0, len(raw), 4)]
    if sys.byteorder == "little":
        words = [word[::-1] for word in words]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


# ---- what strangers do


def _send(port: Port, data: bytes, *, wait: float = 0.3) -> bytes:
    with contextlib.suppress(OSError), socket.create_connection(port.reach, timeout=3) as stranger:
        stranger.sendall(data)
        stranger.settimeout(wait)
        return stranger.recv(4096)
    return b""


def _noise(trial: Trial, port: Port) -> None:
    for _ in range(30):
        _send(port, trial.draw.randbytes(trial.draw.choice((1, 7, 64, 4096))), wait=0.02)


def _lengths(trial: Trial, port: Port) -> None:
    for size in (1 << 31, 1 << 40, 1 << 62, (1 << 64) - 1):
        for start in (b"", b"\x00", b"\x01", b"\x05", b"\x0b"):
            _send(port, start + struct.pack("<Q", size) + b"x" * 64, wait=0.02)
            _send(port, start + struct.pack(">I", size & 0xFFFFFFFF) + b"x" * 64, wait=0.02)


def _http(trial: Trial, port: Port) -> None:
    for words in (
        "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "POST /x HTTP/1.1\r\nContent-Length: 9\r\n\r\n",
    ):
        _send(port, words.encode())


def _half(trial: Trial, port: Port) -> None:
    """Begins and leaves."""
    for data in (b"\x00", b"\x3c\x85\xf7\xce", b"{", b"\x80\x04"):
        _send(port, data, wait=0.05)


def store_client(port: Port, marker: Path) -> list[Any]:
    """As torch's client: list all keys and replace what they hold by pickles."""
    from torch.distributed import TCPStore

    host, number = port.reach
    try:
        store = TCPStore(
            host, number, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=4)
        )
        keys = store.list_keys() if hasattr(store, "list_keys") else []
        harm = pickle.dumps(Harm(marker))
        for key in [*keys, "torch.rendezvous.x"]:
            for value in (harm, base64.b64encode(harm)):
                store.set(key.removeprefix("/"), value)
        return ["in", [key[:40] for key in keys][:8]]
    except Exception as error:
        return ["refused", f"{type(error).__name__}: {str(error)[:100]}"]


QUIET: dict[str, Callable[[Trial, Port], None]] = {
    "noise": _noise,
    "lengths": _lengths,
    "http": _http,
    "half a message": _half,
}


# ---- trainings that are besieged


def _digest(place: Path) -> str:
    from rdd_pipeline.networks import load_checkpoint

    return load_checkpoint(place / "out" / "network.safetensors").digest()[:16]


def _write_job(place: Path, **trainer: Any) -> None:
    job = make_job(place, place, **trainer)
    job["job"]["recipe"].update(iterations=ITERATIONS, validate_every=ITERATIONS)
    (place / "job.json").write_text(json.dumps(job))


TRAIN = ["-m", "rdd_pipeline.launching", "job.json"]


def reference(trial: Trial) -> None:
    """The same training undisturbed."""
    place = trial.project("teacher")
    _write_job(place, devices=2)
    ended = trial.look(Running(place, TRAIN).wait(600.0), "undisturbed")
    truth = {"seconds": ended.seconds, "digest": _digest(place)}
    (trial.yard.folder / f"truth-{trial.name}.json").write_text(json.dumps(truth))


def _ports_of(running: Running, wanted: int, seconds: float) -> list[Port]:
    """Its ports, once there are `wanted` and no more come."""
    until, before = time.monotonic() + seconds, list[Port]()
    while time.monotonic() < until and running.poll() is None:
        ports = listening([running.pid, *below(running.pid)])
        if len(ports) >= wanted and ports == before:
            return ports
        before = ports
        time.sleep(2.0)
    return before


def _one_machine(trial: Trial) -> None:
    """Two processes on one machine: nothing may be reached from elsewhere, and nobody disturbs."""
    _besieged(trial, store=False)


def _one_machine_store(trial: Trial) -> None:
    _besieged(trial, store=True)


def _besieged(trial: Trial, *, store: bool) -> None:
    truth = trial.yard.truth["strangers"]
    place = trial.project("teacher")
    _write_job(place, devices=2, max_restarts=0)
    running = Running(place, TRAIN)
    ports = _ports_of(running, 3, 60.0)  # of the store, and of gloo in each process
    with trial.case("interfaces"):
        trial.note = ", ".join(f"{port.host}:{port.number}" for port in ports)
        for port in ports:
            if not port.is_loopback:
                trial.fault("other", f"one machine: a port listens on {port.host}")
    held = _attack_all(trial, ports, store=store, open_to_strangers=True)
    ended = running.wait(trial.yard.limit(truth["seconds"]))
    for connection in held:
        connection.close()
    with trial.case("the training"):
        _judge_training(trial, ended, truth["digest"], strict=not store)


def _attack_all(
    trial: Trial, ports: list[Port], *, store: bool, open_to_strangers: bool
) -> list[socket.socket]:
    held: list[socket.socket] = []
    for number, port in enumerate(ports):
        where = f"port {number} of {len(ports)}, on {port.host}"
        for name, attack in ({} if store else QUIET).items():
            with trial.case(f"{name} on {where}"):
                attack(trial, port)
        if store:
            with trial.case(f"store client on {where}"):
                answer, detail = in_a_fork(lambda p=port: store_client(p, trial.yard.marker), 60.0)
                trial.note = f"{answer}: {detail}"
                if answer == "in" and not open_to_strangers:
                    trial.fault("other", f"a stranger reads and writes the store of {where}")
            continue
        with trial.case(f"200 connections held on {where}"):
            for _ in range(200):
                with contextlib.suppress(OSError):
                    held.append(socket.create_connection(port.reach, timeout=2))
    with trial.case("code"):
        time.sleep(5.0)
        trial.check_marker("a pickle from a stranger")
    return held


def _judge_training(trial: Trial, ended: Ended, digest: str, *, strict: bool) -> None:
    trial.look(ended, "the training")
    trial.note = ended.last
    if ended.status == 0 and (found := _digest(trial.place)) != digest:
        trial.fault("silently wrong", f"the training: weights {found}, should be {digest}")
    elif ended.status and strict:
        trial.fault("lost", f"the training ended: status {ended.status}: {ended.last}")
    elif ended.status and not ended.one_line:
        trial.fault("other", f"the training: status {ended.status}: {ended.last}")
    for line in set(ended.text.splitlines()):
        if (count := ended.text.splitlines().count(line)) > 50 and line.strip():
            trial.fault("other", f"{count} lines: {line[:100]}")


def _two_machines(trial: Trial) -> None:
    """A first machine that waits, strangers, and then the second one, which must be let in."""
    truth = trial.yard.truth["strangers"]
    place = trial.project("teacher")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    _write_job(place, devices=1, nodes=2, rendezvous=endpoint, timeout=200.0)
    running = Running(place, TRAIN)
    ports = _ports_of(running, 1, 60.0)
    held = _attack_all(trial, ports, store=False, open_to_strangers=False)
    held += _attack_all(trial, ports, store=True, open_to_strangers=False)
    shown = re.search(
        r"(?:RDD_TOKEN=(\S+) )?python -m (rdd_pipeline\.launching\.join .*)",
        running.log.read_text(),
    )
    words = shlex.split(shown[2]) if shown else ["rdd_pipeline.launching.join", endpoint]
    join, token = ["-m", *words, "--timeout", "60"], shown[1] if shown else None
    with trial.case("a machine with another token"):
        other = Running(place, join, env={"RDD_TOKEN": "0" * 43}).wait(90.0)
        trial.refused_or(other, "a machine with another token", orphans=False)
        if other.status == 0:
            trial.fault("other", "a machine with another token took part")
    second = Running(place, join, env={"RDD_TOKEN": token} if token else None)
    limit = trial.yard.limit(truth["seconds"])
    with trial.case("the second machine"):
        joined = trial.look(second.wait(limit), "the second machine", orphans=False)
        if joined.status != 0:
            trial.fault("lost", f"the second machine: status {joined.status}: {joined.last}")
    ended = running.wait(limit)
    for connection in held:
        connection.close()
    with trial.case("the training"):
        _judge_training(trial, ended, truth["digest"], strict=True)
        trial.check_marker("a pickle from a stranger")


# ---- a first machine that is none


def _false_store(port: int, escaped: Path) -> None:
    """As the former protocol's first machine: files with names of its own choice."""
    import hashlib

    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    data = b"* * * * * root id\n"
    for version in range(9):
        store.set("rdd/format", str(version))
    from rdd_pipeline.training.job import TRAINING_FORMAT

    store.set("rdd/format", str(TRAINING_FORMAT))
    for name in (str(escaped), f"../../../../../../../..{escaped}"):
        store.set(f"rdd/1/{name}/0", data)
        files = {name: [1, hashlib.sha256(data).hexdigest()]}
        store.set("rdd/1/files", json.dumps(files))
        store.set("rdd/1/about", json.dumps({"run": "x", "processes": 1, "files": files}))
    store.add("rdd/trainings", 1)
    time.sleep(25)


def _false_first(answer: bytes | None) -> Callable[[Trial], None]:
    def attack(trial: Trial) -> None:
        place = trial.project("teacher")
        escaped = trial.yard.folder / "escaped-join"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["-m", "rdd_pipeline.launching.join", f"127.0.0.1:{port}", "--timeout", "8"]
        if answer is None:
            child = os.fork()
            if child == 0:
                try:
                    _false_store(port, escaped)
                finally:
                    os._exit(0)
        second = Running(place, words, env={"RDD_TOKEN": "0" * 43})
        if answer is not None:
            listener = socket.create_server(("127.0.0.1", port))
            # After the fork: a process with threads is not forked.
            accepting = threading.Thread(target=_answer_all, args=(listener, answer), daemon=True)
            accepting.start()
        ended = second.wait(90.0)
        if answer is None:
            os.kill(child, 9)
            os.waitpid(child, 0)
        else:
            listener.close()
        trial.refused_or(ended, "a false first machine")
        if ended.status == 0:
            trial.fault("other", f"joined a false first machine: {ended.last}")
        if escaped.exists():
            trial.fault("code executed", f"a false first machine wrote {escaped}")
            escaped.unlink()

    return attack


def _answer_all(listener: socket.socket, answer: bytes) -> None:
    open_ones = []
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            open_ones.append(connection)
            with contextlib.suppress(OSError):
                if answer:
                    connection.sendall(answer)


def stranger_plans(*, short: bool = False) -> list[Plan]:
    """All of them."""
    needs = ("strangers",)
    plans = [
        Plan("strangers", "a false first machine", _false_first(None)),
        Plan("strangers", "a silent first machine", _false_first(b"")),
        Plan("strangers", "a noisy first machine", _false_first(os.urandom(1 << 16))),
        Plan("strangers", "a first machine of HTTP", _false_first(b"HTTP/1.1 400 Bad\r\n\r\n")),
        Plan("strangers", "one machine", _one_machine, needs),
        Plan("strangers", "one machine, store client", _one_machine_store, needs),
        Plan("strangers", "two machines", _two_machines, needs),
    ]
    return plans[:1] if short else plans
