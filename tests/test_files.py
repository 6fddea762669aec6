"""Files that are whole or not there, and digests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from rdd_pipeline.config import NetworkParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import (
    NotWrittenError,
    content_digest,
    file_digest,
    folder_aside,
    json_digest,
    move_whole,
    not_a_file,
    read_regular,
    remove_leftovers,
    require_regular_file,
    write_atomically,
    written_whole,
)
from rdd_pipeline.networks import NetworkCheckpoint, network_from_params, save_checkpoint


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_when_writing_fails_the_old_content_stays_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = os if failing == "fsync" else Path
    monkeypatch.setattr(target, failing, fail)
    with pytest.raises(UserError, match=r"file .* could not be written: No space left .*Free some"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "Free some space"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "Make it writable"),
        (errno.EACCES, "Make it writable"),
    ],
)
def test_what_cannot_be_written_says_why_and_what_to_do(tmp_path, number, advice):
    path = tmp_path / "a" / "file"
    for write in (written_whole, folder_aside):
        match = rf"a/file.* {os.strerror(number)}\. .*{advice}"
        with pytest.raises(NotWrittenError, match=match), write(path):
            raise OSError(number, os.strerror(number))
        assert list(path.parent.iterdir()) == []
    with pytest.raises(FileNotFoundError), written_whole(path):
        Path("nowhere").read_bytes()  # what is read meanwhile is another matter


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path):
    path = tmp_path / "scores.json"
    path.mkdir()
    with pytest.raises(NotWrittenError, match=r"scores\.json.*directory\. Remove what is in"):
        write_atomically(path, b"{}")
    assert [child.name for child in tmp_path.iterdir()] == ["scores.json"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "a" / "x", Path("/proc/a/x")):
        for write in (written_whole, folder_aside):
            remedy = "Choose another folder" if path.parts[1] == "proc" else "Remove what is in its"
            match = rf"The folder .* could not be made: .*\. {remedy}"
            with pytest.raises(NotWrittenError, match=match), write(path):
                pass


def test_a_file_above_the_limit_of_the_process_is_one_line(tmp_path):
    command = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100));"
        "from pathlib import Path; from rdd_pipeline.files import write_atomically\n"
        f"try: write_atomically(Path({str(tmp_path / 'file')!r}), bytes(200))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert "could not be written: File too large. Raise the limit" in done.stdout
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from pathlib import Path
from rdd_pipeline.files import folder_aside, written_whole
with written_whole(Path("work/state")) as file, folder_aside(Path("models/kd")) as folder:
    file.write(b"half")
    (folder / "1").write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read()
    os._exit(9)
"""


def test_what_a_killed_writer_left_goes_and_what_is_being_written_stays(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    writer.stdout.readline()
    with written_whole(tmp_path / "work" / "own") as file, folder_aside(tmp_path / "b") as folder:
        assert remove_leftovers(tmp_path) == []
        writer.communicate()
        assert len(remove_leftovers(tmp_path)) == 2
        assert folder.is_dir()
        file.write(b"whole")
        (folder / "1").write_bytes(b"x")
        move_whole(folder, tmp_path / "models" / "2026")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["1", "2026", "models", "own", "work"]


def test_what_another_machine_writes_is_left_behind_after_a_day(tmp_path):
    names = [
        ".state.ckpt.00000000-0123abcd.tmp",
        ".state.ckpt.0123abcd.tmp",
        ".scores-1.json.4711.tmp",
        ".0123abcd.figure.png",
        "train_00.pack.0123abcd.tmp",
    ]
    kept = [".gitkeep", ".notes.tmp", "a.tmp", "2026-11-27T09.00.00.000Z/x", "old"]
    for name in (*names, *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    empty = tmp_path / "x.csv" / "2026-11-27T09.10.00.000Z"
    empty.mkdir(parents=True)
    assert remove_leftovers(tmp_path) == []
    for path in list(tmp_path.rglob("*")):
        os.utime(path, times=(1e9, 1e9))
    assert {path.name for path in remove_leftovers(tmp_path)} == {*names, empty.name}
    assert all((tmp_path / name).exists() for name in kept)


def test_a_file_that_is_taken_for_left_behind_is_begun_again(tmp_path, monkeypatch):
    lock = fcntl.flock
    seen = []

    def late(descriptor: int, how: int) -> None:
        if not seen:
            seen.extend(tmp_path.iterdir())
            seen[0].unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_atomically(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert seen


def test_an_error_of_the_one_who_writes_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half() -> None:
        with written_whole(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_and_content_is_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two", durable=False)
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_several_may_write_one_file_at_once(tmp_path):
    """Threads of one process, too: a name made of the process's number alone would be shared."""
    path = tmp_path / "file"
    contents = [bytes([number]) * 100_000 for number in range(8)]
    threads = [
        threading.Thread(target=write_atomically, args=(path, content)) for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_for_weights_too(tmp_path, monkeypatch):
    params = NetworkParams(name="fcn_test_efficientnet", width=8)
    network = network_from_params(params, num_classes=2)
    checkpoint = NetworkCheckpoint.from_network(network, params=params, label_names=("a", "b"))

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"net\.safetensors \(\d+\.\d MB\) could not be written"):
        save_checkpoint(checkpoint, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.pth does not exist\. Give the path"):
        file_digest(tmp_path / "gone.pth")


def test_digests_are_those_of_hashlib(tmp_path):
    data = bytes(torch.arange(200, dtype=torch.uint8).tolist())
    path = tmp_path / "file"
    path.write_bytes(data)
    assert file_digest(path) == hashlib.sha256(data).hexdigest()
    assert content_digest(data) == hashlib.blake2b(data, digest_size=16).hexdigest()
    assert content_digest(b"") != content_digest(b"\0")


def test_json_digest_is_the_same_in_every_process_and_order():
    assert json_digest({"b": 1, "a": [None, 0.5]}) == json_digest({"a": [None, 0.5], "b": 1})
    assert json_digest({"a": 1}) == "f9d86028c6e0d64e"  # sha256 of {"a": 1}


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (Path.mkdir, "is a folder"),
        (_pipe, "is a named pipe"),
        (_socket, "is a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.symlink_to(path), "cannot be used"),
        (lambda path: path.symlink_to("nowhere"), "does not exist"),
        (lambda path: None, "does not exist"),
    ],
)
def test_what_is_no_file_is_named_before_it_is_opened(tmp_path, monkeypatch, make, found):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    make(Path("x"))
    for read in (lambda path: require_regular_file(path, "Weights file"), file_digest):
        with pytest.raises(UserError, match=rf"eights file x {re.escape(found)}.* Give the path"):
            read(Path("x"))


def test_a_pipe_in_the_place_of_a_stored_file_is_not_waited_for(tmp_path):
    path = tmp_path / "scores.json"
    path.write_bytes(b"{}")
    assert read_regular(path) == b"{}"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_regular(path)
    os.mkfifo(path)
    with pytest.raises(OSError, match=r"is a named pipe: .*scores.json"):
        read_regular(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "labels.yaml"
    path.write_bytes(b"12345")
    assert not_a_file(path) is None
    assert require_regular_file(path, "The table", largest=5) == path
    with pytest.raises(UserError, match=r"The table .*labels.yaml has 0.0 MB, at most 0.0 MB"):
        require_regular_file(path, "The table", largest=4)
