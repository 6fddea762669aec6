"""Whoever does not know the token: nothing of what they send is read, and the training goes on."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import pickle
import secrets
import socket
import stat
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from rdd_pipeline.config import TrainerParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import content_digest
from rdd_pipeline.launching import channel, exchange, store, worker
from rdd_pipeline.launching.channel import MAGIC, TOKEN_VARIABLE, find_token, new_token
from rdd_pipeline.launching.exchange import VERSIONS, Exchange
from rdd_pipeline.launching.join import join
from rdd_pipeline.launching.store import ClientStore, StoreServer

TOKEN, OTHER = new_token(), new_token()


@pytest.fixture
def server():
    server = StoreServer("127.0.0.1", 0, TOKEN)
    yield server
    server.close()


@pytest.fixture
def client(server):
    client = ClientStore("127.0.0.1", server.port, TOKEN, timeout=1.0)
    yield client
    client.close()


def _stranger(server: StoreServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def _is_closed(connection: socket.socket) -> bool:
    """After whatever is still to be read."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


# ---- the store, as torch's own


def test_the_store_does_what_torchs_does(client):
    theirs = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for one in (client, theirs):
        with pytest.raises(dist.DistStoreError):
            one.wait(["a"], timedelta(seconds=0.05))
    said = [
        [
            one.compare_set("a", "", "first"),
            one.compare_set("a", "wrong", "second"),
            one.compare_set("a", "first", "third"),
            one.compare_set("none", "expected", "desired"),
            one.check(["none"]),
            one.add("number", 3),
            one.add("number", -1),
            one.get("number"),
            one.check(["a", "number"]),
            one.append("a", b"\0and\n"),
            one.get("a"),
            one.multi_get(["a", "number"]),
            one.delete_key("a"),
            one.delete_key("a"),
            one.check(["a"]),
        ]
        for one in (client, theirs)
    ]
    assert said[0] == said[1]


def test_a_value_that_comes_later_is_waited_for(client, server):
    other = ClientStore("127.0.0.1", server.port, TOKEN)
    threading.Timer(0.2, other.set, ("late", b"value")).start()
    assert client.get("late") == b"value"
    with pytest.raises(dist.DistStoreError, match="never did not come within 1 seconds"):
        client.get("never")


def test_a_request_that_a_signal_cuts_short_leaves_no_answer_behind(client, monkeypatch):
    client.set("a", "1")
    receive = store._Connection._receive
    monkeypatch.setattr(
        store._Connection, "_receive", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        client.get("a")
    monkeypatch.setattr(store._Connection, "_receive", receive)
    assert client.add("b", 5) == 5


def test_another_command_at_the_same_place_is_not_taken_for_the_first(server, client):
    server.close()
    again = StoreServer("127.0.0.1", server.port, TOKEN)
    for _ in range(2):
        with pytest.raises(dist.DistNetworkError, match="was lost"):
            client.get("a")
    again.close()


# ---- strangers who connect


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (secrets.token_bytes(1000), "it is no rdd_pipeline, or of another version"),
        (b"\xff" * 8 + bytes(200_000), "it is no rdd_pipeline"),  # a huge length
        (b"GET / HTTP/1.1\r\nHost: node1:29400\r\n\r\n", "it is no rdd_pipeline"),
        (b"rdd_pipeline rendezvous 0\n" + bytes(64), "of another version"),
        (MAGIC + bytes(64), "its token is another one"),
        (MAGIC + secrets.token_bytes(64), "its token is another one"),
        (MAGIC[:5], "it said nothing for 0.3 seconds"),
        (b"", "it said nothing for 0.3 seconds"),
    ],
    ids=["noise", "huge", "http", "former", "zeros", "other-token", "half", "nothing"],
)
def test_a_stranger_is_sent_away_and_named_once(server, client, caplog, monkeypatch, said, reason):
    monkeypatch.setattr(store, "HANDSHAKE", 0.3)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with _stranger(server) as connection, contextlib.suppress(ConnectionError):
                connection.sendall(said)
                assert _is_closed(connection)
        client.set("a", "still")
    assert client.get("a") == b"still"
    (line,) = caplog.messages
    assert line.startswith("A connection from 127.0.0.1 to the rendezvous was closed: ")
    assert reason in line


def test_a_proof_that_was_overheard_is_no_good_for_another_connection(server, caplog):
    nonce = secrets.token_bytes(channel.DIGEST)
    with _stranger(server) as first, _stranger(server) as second:
        greeting = first.recv(channel.GREETING, socket.MSG_WAITALL)
        second.recv(channel.GREETING, socket.MSG_WAITALL)
        said = MAGIC + nonce + channel.proof(TOKEN, b"client", greeting, nonce)
        second.sendall(said)
        assert second.recv(channel.DIGEST, socket.MSG_WAITALL) == channel.REFUSED
        first.sendall(said)
        assert first.recv(channel.DIGEST, socket.MSG_WAITALL) == channel.proof(
            TOKEN, b"server", greeting, nonce
        )


def test_hundreds_of_held_connections_hold_neither_descriptors_nor_others_up(
    server, client, caplog
):
    before = len(os.listdir("/proc/self/fd"))
    held = [_stranger(server) for _ in range(300)]
    other = ClientStore("127.0.0.1", server.port, TOKEN)
    other.set("a", "here")
    assert client.get("a") == b"here"
    # Both ends are this process's: `held` and one, and what the server keeps.
    assert len(os.listdir("/proc/self/fd")) - before - len(held) - 2 <= store.STRANGERS
    assert "there were more than 128 without a token at a time" in caplog.text
    for connection in held:
        connection.close()


# ---- the token is right, the messages are not


def _request() -> bytes:
    return b'["set", "a", null]\nvalue'


def _sealed(client: ClientStore) -> bytes:
    return client._connection._sent.seal(_request())


def _changed(client: ClientStore) -> bytes:
    return _sealed(client)[:-1] + b"!"


def _repeated(client: ClientStore) -> bytes:
    return 2 * _sealed(client)


def _left_out(client: ClientStore) -> bytes:
    _sealed(client)
    return _sealed(client)


def _sent_back(client: ClientStore) -> bytes:
    return client._connection._received.seal(_request())


@pytest.mark.parametrize("message", [_changed, _repeated, _left_out, _sent_back])
def test_a_message_that_was_meddled_with_ends_the_connection(server, client, caplog, message):
    client._connection.socket.sendall(message(client))
    assert _is_closed(client._connection.socket)
    assert "a message was changed, repeated or left out on its way" in caplog.text
    other = ClientStore("127.0.0.1", server.port, TOKEN)
    assert other.check(["a"]) is (message is _repeated)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (b'["eval", "a", null]\n', "it asked for 'eval'"),
        (b"not JSON", "Expecting value"),
        (b'{"a": 1}\n', "not enough values"),
    ],
)
def test_a_request_that_is_none_ends_the_connection(client, caplog, request_, reason):
    with pytest.raises(ConnectionResetError):
        client._connection.ask(request_)
    assert reason in caplog.text


def test_a_length_that_no_message_has_is_not_waited_for(client, caplog):
    client._connection.socket.sendall(b"\xff" * channel.HEAD)
    assert _is_closed(client._connection.socket)
    assert "a message of 4294967295 bytes was announced, at most 8388608" in caplog.text


def test_an_answer_that_was_meddled_with_is_not_read(client):
    connection = client._connection
    connection._received = channel.sealer(OTHER, b"server", b"", b"")
    with pytest.raises(dist.DistNetworkError, match="a message was changed, repeated or left out"):
        client.get("a")


# ---- the token


def test_a_token_is_found_in_the_environment_or_a_file(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert find_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert find_token(None) == TOKEN
    file = tmp_path / "token"
    made = find_token(file, make=True)
    assert find_token(file) == find_token(file, make=True) == made != TOKEN
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not caplog.messages
    file.chmod(0o640)
    find_token(file)
    assert "Others may read the token file" in caplog.text


@pytest.mark.parametrize("token", ["", "short", "a b" * 20, "$local_rank" * 5, "x" * 513])
def test_what_is_no_token_is_refused(token, tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(UserError, match="RDD_TOKEN holds no token: expected 32 to 512 letters"):
        find_token(None)
    with pytest.raises(UserError, match=r"token file .*gone cannot be read \(No such file"):
        find_token(tmp_path / "gone")


def test_a_joining_machine_needs_a_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match="No token was given"):
        join("127.0.0.1:1")


def test_a_new_token_is_shown_in_the_command_to_paste(monkeypatch, capsys, caplog):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    here = exchange.host(TrainerParams(nodes=2, rendezvous=endpoint))
    exchange.close(endpoint)
    command = f"{TOKEN_VARIABLE}={here.token} python -m rdd_pipeline.launching.join {endpoint}"
    assert command in capsys.readouterr().err
    assert here.token not in caplog.text
    assert len(here.token) == 43


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_a_wildcard_is_no_address(host):
    trainer = TrainerParams(nodes=2, rendezvous=f"{host}:29400", public_address=True)
    with pytest.raises(UserError, match="which is all networks of this machine"):
        exchange.host(trainer)


def test_a_public_address_is_taken_only_when_asked_for():
    trainer = TrainerParams(nodes=2, rendezvous="8.8.8.8:29400")
    with pytest.raises(UserError, match=r"8.8.8.8 is a public address.*public_address=true"):
        exchange.host(trainer)
    with pytest.raises(UserError, match="this machine cannot listen there"):
        exchange.host(trainer.model_copy(update={"public_address": True}))


# ---- a first machine that is none, or not to be trusted


class _Evil:
    def __reduce__(self):
        return os.system, ("touch rdd-evil",)


def test_even_who_has_the_token_runs_no_code_by_the_rendezvous(
    server, client, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    handler = Exchange(f"127.0.0.1:{server.port}", TOKEN).rendezvous(1, 1, "localhost", 5.0)
    client.set("torch.rendezvous.training-1", base64.b64encode(pickle.dumps(_Evil())))
    with pytest.raises(UserError, match=r"put posix.system into the rendezvous.*Nothing of it was"):
        handler.next_rendezvous()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def first(server):
    """A store of somebody who has the token, and another machine's way to it."""
    evil = ClientStore("127.0.0.1", server.port, TOKEN)
    return evil, Exchange(f"127.0.0.1:{server.port}", TOKEN)


def _offer(evil: ClientStore, name: str, data: bytes, size: int, digest: str) -> None:
    evil.set(f"rdd/1/{name}/0", data)
    evil.set("rdd/1/files", json.dumps({name: [size, digest]}))


@pytest.mark.parametrize("name", ["../task.json", "absolute", ".ssh/authorized_keys", "x"])
def test_a_file_that_no_training_has_is_not_written(first, tmp_path, name):
    evil, here = first
    name = str(tmp_path / "evil") if name == "absolute" else name
    data = b"* * * * * root id\n"
    folder = tmp_path / "folder"
    folder.mkdir()
    _offer(evil, name, data, len(data), content_digest(data))
    with pytest.raises(UserError, match=r"expected are task.json and teacher.safetensors.*Nothing"):
        here.fetch(1, folder)
    assert list(tmp_path.rglob("*")) == [folder]
    assert not Path(name).exists()


@pytest.mark.parametrize(
    ("size", "data", "message"),
    [
        (1 << 40, b"x", "offers 'task.json' of 1099511627776 bytes"),
        (-1, b"x", "offers 'task.json' of -1 bytes"),
        (3, b"four", "task.json arrived damaged"),
        (5, b"four", "task.json arrived damaged"),
        (4, b"fuor", "task.json arrived damaged"),
    ],
)
def test_a_file_of_another_size_or_content_is_not_written(first, tmp_path, size, data, message):
    evil, here = first
    _offer(evil, "task.json", data, size, content_digest(b"four"))
    with pytest.raises(UserError, match=message):
        here.fetch(1, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_fit_on_the_disk_is_not_begun(first, tmp_path, monkeypatch):
    evil, here = first
    monkeypatch.setattr(exchange.shutil, "disk_usage", lambda _: SimpleNamespace(free=3))
    _offer(evil, "task.json", b"four", 4, content_digest(b"four"))
    with pytest.raises(UserError, match="Free some space, or set TMPDIR"):
        here.fetch(1, tmp_path)


def test_a_file_that_does_not_come_is_not_waited_for_for_ever(first, tmp_path):
    evil, here = first
    evil.set("rdd/1/files", json.dumps({"task.json": [4, content_digest(b"four")]}))
    here.store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(UserError, match=r"did not arrive: rdd/1/task.json/0 did not come within"):
        here.fetch(1, tmp_path)
    evil.set("rdd/1/over", "")
    assert not here.fetch(1, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="does not say which versions it runs"):
        here.register()


def test_a_first_machine_that_does_not_answer_is_not_waited_for_for_ever(server, monkeypatch):
    monkeypatch.setattr(store, "_ANSWER", 0.3)
    client = ClientStore("127.0.0.1", server.port, TOKEN)
    monkeypatch.setattr(StoreServer, "_answer", lambda *_: time.sleep(1) or b"true\n")
    with pytest.raises(dist.DistNetworkError, match="was lost: timed out"):
        client.get("a")


def test_the_interface_of_an_address_is_found():
    assert worker._interface("127.0.0.1").startswith("lo")
    assert worker._interface("192.0.2.77") is None
    assert worker._interface("no.such.name.invalid") is None


@pytest.mark.parametrize("name", VERSIONS)
def test_another_version_is_refused_by_name(first, name):
    evil, here = first
    evil.set("rdd/versions", json.dumps({**VERSIONS, name: "0.0.1"}))
    with pytest.raises(UserError) as refused:
        here.register()
    assert f"The first machine runs {name} 0.0.1, this one {name} {VERSIONS[name]}." in str(
        refused.value
    )
    evil.set("rdd/versions", json.dumps(VERSIONS))
    here.register()


def test_another_token_is_refused(server, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, OTHER)
    with pytest.raises(UserError, match=r"The token of 127.0.0.1:\d+ is not the one given here"):
        join(f"127.0.0.1:{server.port}")


@contextlib.contextmanager
def _impostor(*said: bytes):
    """Endpoint of a program that says something to whoever connects, and nothing more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held = []

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(listener.accept()[0])
                    for words in said:
                        held[-1].sendall(words)

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"], "is no rdd_pipeline, or one of another version"),
        ([b"rdd_pipeline rendezvous 0\n", bytes(64)], "is no rdd_pipeline, or one of another ver"),
        ([MAGIC, bytes(64), bytes(32)], "is not the one given here"),
        ([MAGIC, bytes(64), secrets.token_bytes(32)], "is not the one given here"),
        ([], r"There is no training at .* after 0.1 seconds \(timed out\)"),
    ],
)
def test_an_impostor_is_not_told_anything(said, message, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    monkeypatch.setattr(store, "HANDSHAKE", 0.5)
    begun = time.monotonic()
    with _impostor(*said) as endpoint, pytest.raises(UserError, match=message):
        join(endpoint, timeout=0.1)
    assert time.monotonic() - begun < 5
