from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rdd_pipeline.errors import UserError
from rdd_pipeline.files import to_checked_json
from rdd_pipeline.training import store as store_module
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.state import MAGIC, TrainState
from rdd_pipeline.training.store import RunStore
from tests import warm
from tests.equal import equal

from .conftest import CPU
from .test_state import _sealed, _Trap
from .train_once import the_training


def _state(iteration: int = 3) -> TrainState:
    return TrainState(
        iteration,
        student={"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7)},
        optimizer={
            "state": {0: {"momentum": torch.ones(2, dtype=torch.float64)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "nesterov": False}],
        },
        history=[{"iteration": 1, "loss": 0.5}],
    )


@pytest.fixture
def store(tmp_path) -> RunStore:
    return RunStore(tmp_path, "0123456789abcdef")


def _names(store: RunStore) -> list[str]:
    return sorted(path.name for path in store.path.glob("state-*"))


def test_nothing_was_saved_yet(store):
    assert store.latest() is None
    assert store.finished_state() is None
    assert store.recall("scores") is None
    assert not store.path.exists()


def test_the_newest_two_states_are_kept(store):
    for iteration in (5, 10, 1000, 11):
        store.save(_state(iteration))
    assert _names(store) == ["state-000000011.ckpt", "state-000001000.ckpt"]
    assert store.latest().iteration == 1000


def test_a_saved_state_comes_back_with_its_fingerprint(store):
    store.save(_state())
    found = store.latest()
    assert found.fingerprint == store.fingerprint
    assert equal(found.to_dict(), _state().to_dict() | {"fingerprint": store.fingerprint})


def test_what_was_remembered_of_other_work_is_not_believed(store, caplog):
    other = RunStore(store.path.parent, "fedcba9876543210")
    other.remember("scores", {"miou": 0.9})
    store.remember("scores", {"miou": 0.5})
    assert store.recall("scores") == {"miou": 0.5}
    (store.path / "scores.json").write_bytes((other.path / "scores.json").read_bytes())
    assert store.recall("scores") is None
    assert "computed anew" in caplog.text


def test_what_an_older_version_remembered_is_recalled(store):
    store.path.mkdir()
    (store.path / "scores.json").write_bytes(to_checked_json({"miou": 0.5}))
    assert store.recall("scores") == {"miou": 0.5}


def test_files_that_are_nested_without_end_count_as_missing(store):
    store.save(_state())
    for name in ("done", "job", "scores"):
        (store.path / f"{name}.json").write_text("[" * 100_000)
    assert store.finished_state() is None
    assert store.description() is None
    assert store.recall("scores") is None


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(store):
    store.save(_state())
    store.finish(3)
    store.remember("scores", {"miou": 0.5})
    for path in [*store.path.iterdir(), store.path / "job.json"]:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    assert store.latest() is None
    assert store.finished_state() is None
    assert store.recall("scores") is None
    assert store.description() is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "folder"])
def test_a_damaged_state_is_named_and_the_older_one_is_used(store, caplog, damage):
    store.save(_state(5))
    newest = store.save(_state(10))
    data = bytearray(newest.read_bytes())
    if damage == "truncated":
        newest.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 4
        newest.write_bytes(data)
    elif damage == "empty":
        newest.write_bytes(b"")
    else:
        newest.unlink()
        newest.mkdir()
    assert store.latest().iteration == 5
    assert str(newest) in caplog.text
    assert "Trying the one before it" in caplog.text


def _positions(data: bytes, count: int) -> list[int]:
    """Places in a state file: each of its parts and, up to `count`, others drawn once for all."""
    numbers = data.find(torch.arange(6.0).numpy().tobytes())
    payload = len(MAGIC) + 32
    chosen = {
        *(0, len(MAGIC) - 1),  # magic
        *(len(MAGIC), payload - 1),  # digest
        *range(payload, payload + 4),  # the zip reader's own magic
        *range(numbers, numbers + 24),  # tensor data, which no reader but the digest checks
        *(len(data) - 22, len(data) - 1),  # the end record of the zip file
    }
    assert numbers > payload
    others = random.Random(0).sample(range(len(data)), len(data))
    while len(chosen) < count:
        chosen.add(others.pop())
    return sorted(chosen)


def _flips(data: bytes, count: int) -> Iterator[bytes]:
    draws = random.Random(1)
    for position in _positions(data, count):
        yield (
            data[:position] + bytes([data[position] ^ draws.randint(1, 255)]) + data[position + 1 :]
        )


def _truncations(data: bytes, count: int) -> Iterator[bytes]:
    for length in _positions(data, count):
        yield data[:length]


@pytest.mark.parametrize("count", [60, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damages", [_flips, _truncations])
def test_whatever_byte_is_damaged_the_state_is_named_and_the_older_one_used(
    store, caplog, damages, count
):
    older = store.save(_state(5))
    newest = store.save(_state(10))
    whole = {path: path.read_bytes() for path in (older, newest)}
    files = list(zip(*(damages(whole[path], count) for path in (older, newest)), strict=True))
    assert len(files) == count
    for damaged_older, damaged_newest in files:
        newest.write_bytes(damaged_newest)
        caplog.clear()
        assert store.latest().iteration == 5
        (line,) = caplog.messages
        assert str(newest) in line
        assert line.endswith("Trying the one before it.")

        older.write_bytes(damaged_older)
        caplog.clear()
        assert store.latest() is None
        first, second = caplog.messages
        assert str(newest) in first
        assert str(older) in second
        older.write_bytes(whole[older])
    newest.write_bytes(whole[newest])
    assert store.latest().iteration == 10


def test_a_state_with_a_pickled_object_is_named_and_the_older_one_used(store, tmp_path, caplog):
    trap = tmp_path / "trap"
    store.save(_state(5))
    newest = store.save(_state(10))
    buffer = io.BytesIO()
    values = _state(10).to_dict() | {"fingerprint": store.fingerprint, "x": _Trap(trap)}
    torch.save(values, buffer)
    newest.write_bytes(_sealed(buffer.getvalue()))
    assert store.latest().iteration == 5
    assert not trap.exists()
    (line,) = caplog.messages
    assert f"{newest} holds something other than tensors and plain values" in line


@pytest.mark.parametrize("damaged", [{15}, {10, 15}])
def test_damaged_states_do_not_push_out_what_is_saved_after_them(store, damaged):
    for iteration in (10, 15):
        path = store.save(_state(iteration))
        if iteration in damaged:
            path.write_bytes(path.read_bytes()[:-1])
    store.latest()
    for iteration in (7, 8, 9):  # where training goes on, before the damaged ones
        newest = store.save(_state(iteration + 4 * (10 not in damaged)))
    again = RunStore(store.path.parent, store.fingerprint)
    reached = again.latest().iteration
    assert newest.name == f"state-{reached:09d}.ckpt"
    newest.write_bytes(b"")
    assert again.latest().iteration == reached - 1


def test_with_all_states_damaged_there_is_none(store):
    for iteration in (5, 10):
        store.save(_state(iteration)).write_bytes(b"x")
    assert store.latest() is None


def test_states_of_other_work_are_ignored(store, tmp_path, caplog):
    other = RunStore(tmp_path, "ffffffffffffffff")
    foreign = other.save(_state(20))
    mine = store.save(_state(5))
    foreign.rename(mine.with_name(foreign.name))
    assert store.latest().iteration == 5
    assert "belongs to other work" in caplog.text


def test_files_of_other_names_are_not_looked_at(store, caplog):
    store.save(_state(5))
    for name in ("state-5.ckpt", ".state-000000009.ckpt.1.tmp", "notes.txt"):
        (store.path / name).write_bytes(b"x")
    assert store.latest().iteration == 5
    assert not caplog.text


def test_finished_work_hands_its_final_state_out(store):
    store.save(_state(10))
    assert store.finished_state() is None
    store.finish(10)
    assert store.finished_state().iteration == 10


def test_finishing_drops_all_but_the_final_state(store):
    for iteration in (5, 10):
        store.save(_state(iteration))
    store.finish(10)
    assert _names(store) == ["state-000000010.ckpt"]


def test_finished_work_whose_final_state_is_damaged_is_not_finished(store):
    final = store.save(_state(10))
    store.finish(10)
    final.write_bytes(final.read_bytes()[:-1])
    assert store.finished_state() is None
    assert store.latest() is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"iteration": 9}'])
def test_a_damaged_mark_of_completion_means_not_complete(store, content):
    store.save(_state(10))
    store.finish(10)
    (store.path / "done.json").write_text(content)
    assert store.finished_state() is None


def test_remembered_results_come_back_and_damaged_ones_do_not(store):
    store.remember("scores-1", {"miou": 0.25})
    assert store.recall("scores-1") == {"miou": 0.25}
    assert store.recall("scores-2") is None
    path = store.path / "scores-1.json"
    for content in ('{"miou": 0.', '{"miou": 0.25}', path.read_text().replace("0.25", "0.52")):
        path.write_text(content)
        assert store.recall("scores-1") is None


@pytest.mark.parametrize("spoiled", ['{"miou": 0.25}', "[1]", "changed", "truncated", "garbage"])
def test_a_remembered_result_that_was_changed_is_named_once_and_not_believed(
    store, caplog, spoiled
):
    store.remember("scores-1", {"miou": 0.25, "iou": {"sky": None, "tree": 1 / 3}})
    path = store.path / "scores-1.json"
    whole = path.read_bytes()
    changes = {
        "changed": whole.replace(b"0.25", b"0.75"),
        "truncated": whole[:-1],
        "garbage": b"\xff\xfe" + whole,
    }
    path.write_bytes(changes.get(spoiled, spoiled.encode()))
    assert path.read_bytes() != whole
    assert store.recall("scores-1") is None
    (line,) = caplog.messages
    assert line == f"{path} is damaged or has no digest; what it held is computed anew."
    store.remember("scores-1", {"miou": 0.25})
    assert store.recall("scores-1") == {"miou": 0.25}
    assert len(caplog.messages) == 1


def test_a_state_that_another_process_drops_meanwhile_is_passed_over(store, monkeypatch, caplog):
    older = store.save(_state(5))
    read = Path.read_bytes

    def dropped(path):
        monkeypatch.setattr(Path, "read_bytes", read)
        RunStore(store.path.parent, store.fingerprint).save(_state(6))
        older.unlink()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", dropped)
    assert store.latest().iteration == 6
    assert not caplog.messages


def test_a_process_that_is_behind_replaces_no_later_state(store):
    ahead = RunStore(store.path.parent, store.fingerprint)
    for iteration in (8, 9):
        ahead.save(_state(iteration))
    store.save(_state(3))
    assert _names(store) == ["state-000000003.ckpt", "state-000000009.ckpt"]
    ahead.save(_state(10))
    ahead.finish(10)
    store.save(_state(4))
    assert store.finished_state().iteration == 10
    store.save(_state(10))
    store.finish(10)
    assert _names(store) == ["state-000000010.ckpt"]


def test_the_description_is_written_once(store):
    store.describe({"seed": 1, "root": Path("images")})
    store.describe({"seed": 2})
    assert '"seed": 1' in (store.path / "job.json").read_text()
    assert store.description() == {"seed": 1, "root": "images"}


def test_a_description_that_was_changed_or_copied_is_left_out(store, tmp_path, caplog):
    store.describe({"seed": 1})
    path = store.path / "job.json"
    text = path.read_text()
    path.write_text(text.replace('"seed": 1', '"seed": 7'))
    assert store.description() is None
    assert "job.json is damaged or of other work" in caplog.text
    other = RunStore(tmp_path / "other", "f" * 16)
    other.describe({"seed": 1})
    path.write_bytes((other.path / "job.json").read_bytes())
    assert store.description() is None
    path.write_text(text)
    assert store.description() == {"seed": 1}
    path.write_text('{"seed": 3}')  # of a version that wrote no digest
    assert store.description() == {"seed": 3}


def test_every_write_of_the_folder_is_atomic(store, monkeypatch):
    paths = []
    monkeypatch.setattr(store_module, "write_atomically", lambda path, _: paths.append(path.name))
    store.describe({})
    store.save(_state(1))
    store.finish(1)
    store.remember("scores", {})
    assert paths == ["job.json", "state-000000001.ckpt", "done.json", "scores.json"]


def test_two_processes_that_train_the_same_at_once_are_both_right(blocks, tmp_path):
    alone = train(the_training(blocks.root), CPU)
    words = ["-m", "tests.training.train_once", str(blocks.root), str(tmp_path), "2"]
    processes = [warm.start(words, cwd=warm.ROOT, env=os.environ) for _ in range(2)]
    for process in processes:
        done = process.wait()
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [alone.network.digest(), "6"]
    store = RunStore(tmp_path, alone.fingerprint)
    assert equal(store.finished_state().student, alone.state.student)
    assert sorted(path.name for path in store.path.iterdir()) == [
        "done.json",
        "job.json",
        "state-000000006.ckpt",
    ]


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../0123456789abcdef", "/x", "0123456789abcdeg", "imported-../aaaaaa"],
)
def test_work_is_never_kept_outside_of_its_folder(tmp_path, name):
    with pytest.raises(UserError, match="is no fingerprint of a training"):
        RunStore(tmp_path, name)


def test_what_a_killed_process_left_in_the_folder_is_removed(store):
    store.save(_state(5))
    left = store.path / ".state-000000009.ckpt.0123abcd.tmp"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    assert store.latest().iteration == 5
    assert not left.exists()
