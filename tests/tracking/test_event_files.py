"""TensorBoard's event files, read by another reader."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from rdd_pipeline.tracking.event_files import EventFile, crc32c
from tests.tracking.events import read_events, read_points

WORDS = {"loss": 1.5, "train/lr": 0.25, "test_classes/iou.Straße": -2.0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kd/events.out.tfevents.0.test"


def _written(path: Path, *steps: int, **values: float) -> None:
    file = EventFile(path)
    for step in steps:
        file.add(step, values or WORDS)
    file.flush()


def test_the_crc_is_that_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"") == 0


def test_another_reader_finds_the_points(path):
    before = time.time()
    _written(path, 1, 300, 10**12)
    assert read_points(path) == {
        tag: [(step, value) for step in (1, 300, 10**12)] for tag, value in WORDS.items()
    }
    assert all(before <= event.wall_time <= time.time() for event in read_events(path))


def test_a_file_without_points_is_whole(path):
    _written(path)
    _written(path)
    assert len(read_events(path)) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, -1e300, 0.0])
def test_any_number_can_be_written(path, value):
    _written(path, 1, loss=value)
    expected = math.copysign(math.inf, value) if abs(value) > 1e38 else value
    assert read_points(path)["loss"][0][1] == pytest.approx(expected, nan_ok=True)


def test_what_is_told_again_is_not_written_again(path):
    _written(path, 1, 2, 3)
    _written(path, 1, 3, 4)
    _written(path, 2, miou=0.5)
    assert [step for step, _ in read_points(path)["loss"]] == [1, 2, 3, 4]
    assert read_points(path)["miou"] == [(2, 0.5)]


def test_a_revised_value_is_written_once_more_where_it_differs(path):
    for value in (0.5, 0.5, 0.75, math.nan, math.nan):
        file = EventFile(path)
        file.add(6, {"miou_test": value}, revised=True)
        file.flush()
    written = [value for _, value in read_points(path)["miou_test"]]
    assert written == pytest.approx([0.5, 0.75, math.nan], nan_ok=True)


def test_a_writer_may_be_killed_at_any_byte(path):
    _written(path, 1)
    whole = path.read_bytes()
    _written(path, 2)
    for end in range(len(path.read_bytes())):
        torn = path.with_name(f"tfevents.{end}")
        torn.write_bytes(path.read_bytes()[:end])
        _written(torn, 1, 2)
        steps = [step for step, _ in read_points(torn)["loss"]]
        assert steps == [1, 2]
        assert end < len(whole) or torn.read_bytes()[: len(whole)] == whole


def test_a_file_that_was_deleted_is_not_made_without_its_beginning(path):
    file = EventFile(path)
    path.unlink()
    file.add(1, WORDS)
    with pytest.raises(FileNotFoundError):
        file.flush()
    file.flush()
