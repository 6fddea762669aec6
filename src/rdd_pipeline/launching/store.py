"""A store of bytes by key, in one process, for all that know the token; see `channel`.

It stands in the place of torch's `TCPStore`, which answers to whoever reaches its port: elastic
pickles the state of its rendezvous into the store and unpickles what it finds there.
`ProcessGroup`s meet through it as well, so no second port is needed. What they then send one
another, gradients for example, does not pass through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from rdd_pipeline.errors import UserError
from rdd_pipeline.launching import channel
from rdd_pipeline.launching.channel import BadMessageError, Sealer

logger = logging.getLogger(__name__)

HANDSHAKE = 5.0
"""Seconds a stranger has to prove that it is none."""
STRANGERS = 128
"""How many may be at it at a time; one more, and the first one's connection is closed."""
_ANSWER = 60.0
"""Seconds to wait for the answer to a request; it takes less than one."""
_NAMED = 100
"""Strangers that get a line in the log; a line for each would fill the disk."""


class StoreServer:
    """Listens on the address of a host only, in a thread, until `close`.

    Args:
        host: Name or address of this machine.
        port: 0: any that is free.
        token: Who does not know it is not answered, and named in the log once.

    Attributes:
        port: The one it listens on.

    Raises:
        OSError: The address is not one of this machine, or the port is taken.
    """

    def __init__(self, host: str, port: int, token: str) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(address)
            self._listener.listen(128)
        except OSError:
            self._listener.close()
            raise
        self.port: int = self._listener.getsockname()[1]
        self._token, self._name = token, secrets.token_bytes(channel.DIGEST)
        self._values: dict[str, bytes] = {}
        self._strangers: list[asyncio.StreamWriter] = []
        self._named: set[tuple[str, str]] = set()
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="rendezvous", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close all connections."""
        with contextlib.suppress(RuntimeError):  # closed before
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(5.0)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._listen())

    async def _listen(self) -> None:
        server = await asyncio.start_server(self._serve, sock=self._listener)
        await self._over.wait()
        server.close()  # the runner cancels what still serves

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")[0]
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            try:
                received, sent = await self._admit(reader, writer)
                with contextlib.suppress(asyncio.IncompleteReadError):
                    while True:
                        head = await reader.readexactly(channel.HEAD)
                        message = await reader.readexactly(channel.length_of(head))
                        writer.write(sent.seal(self._answer(received.check(head, message))))
                        await writer.drain()
            except (ValueError, TypeError) as error:
                self._warn(peer, str(error))
        writer.transport.abort()

    async def _admit(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[Sealer, Sealer]:
        """What this side receives and sends by, once the other one has proved itself."""
        if len(self._strangers) >= STRANGERS:
            self._strangers.pop(0).transport.abort()
        self._strangers.append(writer)
        try:
            greeting = channel.MAGIC + self._name + secrets.token_bytes(channel.DIGEST)
            writer.write(greeting)
            async with asyncio.timeout(HANDSHAKE):
                magic = await reader.readexactly(len(channel.MAGIC))
                if magic != channel.MAGIC:
                    raise BadMessageError("it is no rdd_pipeline, or of another version")
                nonce = await reader.readexactly(channel.DIGEST)
                said = await reader.readexactly(channel.DIGEST)
        except TimeoutError as error:
            raise BadMessageError(f"it said nothing for {HANDSHAKE:g} seconds") from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            many = f"there were more than {STRANGERS} without a token at a time"
            gone = "it was gone before it had shown a token"
            raise BadMessageError(gone if writer in self._strangers else many) from error
        finally:
            with contextlib.suppress(ValueError):  # it was one too many
                self._strangers.remove(writer)
        facts = (greeting, nonce)
        if not secrets.compare_digest(said, channel.proof(self._token, b"client", *facts)):
            writer.write(channel.REFUSED)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HANDSHAKE):
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
            raise BadMessageError("its token is another one")
        writer.write(channel.proof(self._token, b"server", *facts))
        _keep_alive(writer.get_extra_info("socket"))
        received = channel.sealer(self._token, b"client", *facts)
        return received, channel.sealer(self._token, b"server", *facts)

    def _warn(self, peer: str, reason: str) -> None:
        if (peer, reason) not in self._named and len(self._named) < _NAMED:
            self._named.add((peer, reason))
            logger.warning(
                "A connection from %s to the rendezvous was closed: %s. (Said once.)", peer, reason
            )

    def _answer(self, request: bytes) -> bytes:
        """A JSON line, then what value there is."""
        head, _, value = request.partition(b"\n")
        operation, key, argument = json.loads(head)
        values = self._values
        if operation == "get":
            found = values.get(key)
            return b"false\n" if found is None else b"true\n" + found
        if operation == "check":
            return json.dumps(all(name in values for name in argument)).encode()
        if operation == "set":
            values[key] = value
            return b"true\n"
        if operation == "append":
            values[key] = values.get(key, b"") + value
            return b"true\n"
        if operation == "delete":
            return json.dumps(values.pop(key, None) is not None).encode()
        if operation == "add":
            values[key] = str(int(values.get(key, b"0")) + argument).encode()
            return b"true\n" + values[key]
        if operation == "compare":  # as TCPStore does it
            expected, desired = value[:argument], value[argument:]
            found = values.get(key, b"" if not expected else None)
            if found == expected:
                found = values[key] = desired
            return b"true\n" + (expected if found is None else found)
        raise BadMessageError(f"it asked for {operation!r}")


class ClientStore(Store):
    """One process's connection to a `StoreServer`, for torch and for `Exchange`.

    Args:
        host: Name or address of the server.
        port: Its port.
        token: That of the server.
        timeout: Seconds to wait for a value that is not there yet.

    Raises:
        OSError: Nobody answers there.
        UserError: The token is another one, or it is no such server.
    """

    timeout: timedelta  # of torch's class, which `set_timeout` sets

    def __init__(self, host: str, port: int, token: str, timeout: float = 60.0) -> None:
        super().__init__()
        self.set_timeout(timedelta(seconds=timeout))
        self._address, self._token = (host, port), token
        self._lock = threading.Lock()
        self._server: bytes | None = None
        self._connection: _Connection | None = self._connect()
        self.local_address: str = self._connection.socket.getsockname()[0]

    def close(self) -> None:
        """End the connection; the next request would begin another."""
        with self._lock:
            if self._connection is not None:
                self._connection.socket.close()
                self._connection = None

    # ---- what torch calls, from any of its threads

    def set(self, key: str, value: str | bytes) -> None:
        """Put a value."""
        self._ask("set", key, value=value)

    def get(self, key: str) -> bytes:
        """A value, as soon as it is there."""
        found: list[bytes] = []

        def there() -> bool:
            answer, value = self._ask("get", key)
            found.append(value)
            return answer

        self._until(there, [key], self.timeout)
        return found[-1]

    def add(self, key: str, value: int) -> int:
        """Add to a number, 0 in the beginning; returns the sum."""
        return int(self._ask("add", key, value)[1])

    def append(self, key: str, value: str | bytes) -> None:
        """Add to the end of a value."""
        self._ask("append", key, value=value)

    def check(self, keys: list[str]) -> bool:
        """Whether all are there."""
        return self._ask("check", "", keys)[0]

    def compare_set(
        self, key: str, expected_value: str | bytes, desired_value: str | bytes
    ) -> bytes:
        """Put a value if the present one is as expected; returns the one that is there then."""
        expected = _bytes(expected_value)
        return self._ask("compare", key, len(expected), expected + _bytes(desired_value))[1]

    def delete_key(self, key: str) -> bool:
        """Forget a value; returns whether it was there."""
        return self._ask("delete", key)[0]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Until all are there.

        Raises:
            DistStoreError: They are not after the time.
        """
        self._until(lambda: self.check(keys), keys, self.timeout if timeout is None else timeout)

    # ---- messages

    def _until(self, there: Callable[[], bool], keys: list[str], timeout: timedelta) -> None:
        until, pause = time.monotonic() + timeout.total_seconds(), 0.001
        while not there():
            if time.monotonic() >= until:
                raise dist.DistStoreError(
                    f"{', '.join(keys)} did not come within {timeout.total_seconds():g} seconds"
                )
            time.sleep(pause)  # not at the server: other threads ask by the same connection
            pause = min(2 * pause, 0.05)

    def _ask(
        self, operation: str, key: str, argument: Any = None, value: str | bytes = b""
    ) -> tuple[bool, bytes]:
        request = json.dumps([operation, key, argument]).encode() + b"\n" + _bytes(value)
        try:
            with self._lock:
                if self._connection is None:
                    self._connection = self._connect()
                try:
                    answer = self._connection.ask(request)
                except BaseException:  # a signal's, too: the answer is still to come then
                    self._connection.socket.close()
                    self._connection = None
                    raise
        except (OSError, BadMessageError) as error:
            raise dist.DistNetworkError(
                f"the connection to {self._address[0]}:{self._address[1]} was lost: {error}"
            ) from error
        head, _, found = answer.partition(b"\n")
        return bool(json.loads(head)), found

    def _connect(self) -> _Connection:
        connection = _Connection(self._address, self._token)
        if self._server not in (None, connection.server):
            connection.socket.close()
            raise ConnectionResetError("another command listens there now")
        self._server = connection.server
        return connection


class _Connection:
    """The client's side of one, after the handshake."""

    def __init__(self, address: tuple[str, int], token: str) -> None:
        self.socket = socket.create_connection(address, timeout=HANDSHAKE)
        try:
            self._introduce(f"{address[0]}:{address[1]}", token)
        except BaseException:
            self.socket.close()
            raise
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(_ANSWER)

    def _introduce(self, place: str, token: str) -> None:
        greeting = self._receive(len(channel.MAGIC))
        if greeting != channel.MAGIC:
            raise UserError(
                f"What listens at {place} is no rdd_pipeline, or one of another version. Look at "
                "the address, and install the same package on all machines."
            )
        greeting += self._receive(channel.GREETING - len(channel.MAGIC))
        nonce = secrets.token_bytes(channel.DIGEST)
        facts = (greeting, nonce)
        said = channel.proof(token, b"client", *facts)
        self.socket.sendall(channel.MAGIC + nonce + said)
        heard = self._receive(channel.DIGEST)
        if not secrets.compare_digest(heard, channel.proof(token, b"server", *facts)):
            raise UserError(
                f"The token of {place} is not the one given here. Give the one of the command "
                f"there, by {channel.TOKEN_VARIABLE} or a token file."
            )
        self.server = greeting[len(channel.MAGIC) :][: channel.DIGEST]
        self._sent = channel.sealer(token, b"client", *facts)
        self._received = channel.sealer(token, b"server", *facts)

    def ask(self, request: bytes) -> bytes:
        """The answer to a request."""
        self.socket.sendall(self._sent.seal(request))
        head = self._receive(channel.HEAD)
        return self._received.check(head, self._receive(channel.length_of(head)))

    def _receive(self, length: int) -> bytes:
        """Exactly so many bytes."""
        data = bytearray(length)
        view = memoryview(data)
        until = time.monotonic() + (self.socket.gettimeout() or _ANSWER)
        while view:
            count = self.socket.recv_into(view)
            if count == 0:
                raise ConnectionResetError("the other side closed it")
            if time.monotonic() > until:
                raise TimeoutError("timed out")
            view = view[count:]
        return bytes(data)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _keep_alive(connection: socket.socket) -> None:
    """Notice a machine that lost its power: it says nothing, not even that it is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
