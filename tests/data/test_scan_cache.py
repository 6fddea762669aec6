"""Files that have not changed are not read again, and that never changes what is found."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from rdd_pipeline.data import index as index_module
from rdd_pipeline.data import progress, scan_cache
from rdd_pipeline.data.index import Index, check_images
from rdd_pipeline.data.layouts import get_layout

from .files import make_camvid, noise, save

CAMVID = get_layout("camvid")


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are trusted however young they are; the clock has a test of its own."""
    monkeypatch.setattr(scan_cache, "SETTLED", -(10**12))


def look(root: Path, workers: int = 1) -> Index:
    return check_images(root, CAMVID, workers=workers, cache=root / "memory" / "checks")


def equal(one: Index, other: Index) -> bool:
    return one._replace(read=0) == other._replace(read=0)


def test_the_second_time_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = look(make_camvid(tmp_path))
    assert first.read == 6
    monkeypatch.setattr(index_module, "read_bytes", None)
    second = look(tmp_path, workers=3)
    assert second.read == 0
    assert equal(first, second)


def test_only_what_changed_is_read_again(tmp_path: Path):
    first = look(make_camvid(tmp_path))
    save(tmp_path / "train" / "train1.png", noise(7, 6, 8, 3))
    save(tmp_path / "valannot" / "val0.png", noise(8, 6, 8, high=12))
    second = look(tmp_path)
    assert second.read == 2
    assert second.samples[1].image_digest != first.samples[1].image_digest
    assert equal(second, check_images(tmp_path, CAMVID))


def test_a_change_that_keeps_size_and_time_is_noticed(tmp_path: Path):
    """As `rsync --times` or an unpacked archive leaves it: the entry's own time differs."""
    look(make_camvid(tmp_path))
    path = tmp_path / "train" / "train0.png"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert "train/train0.png cannot be decoded" in look(tmp_path).problems[0].text


def test_a_file_younger_than_the_clock_can_tell_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scan_cache, "SETTLED", 3600 * 10**9)
    look(make_camvid(tmp_path))
    assert look(tmp_path).read == 6


def test_bad_files_are_read_every_time(tmp_path: Path):
    make_camvid(tmp_path)
    (tmp_path / "val" / "val1.png").write_bytes(b"")
    assert [look(tmp_path).read for _ in range(2)] == [6, 1]
    assert len(look(tmp_path).problems) == 1


def test_removed_pairs_are_forgotten_and_new_ones_read(tmp_path: Path):
    look(make_camvid(tmp_path, count=3))
    for folder in ("train", "trainannot"):
        (tmp_path / folder / "train2.png").rename(tmp_path / folder / "other.png")
    second = look(tmp_path)
    assert second.read == 1
    assert "train2" not in (tmp_path / "memory" / "checks").read_text()


@pytest.mark.parametrize("damage", ["bit", "truncated", "empty", "text", "no newline"])
def test_a_damaged_memory_is_not_believed(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    first = look(make_camvid(tmp_path))
    path = tmp_path / "memory" / "checks"
    good = path.read_bytes()
    middle = len(good) // 2
    path.write_bytes(
        {
            "bit": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "truncated": good[:-9],
            "empty": b"",
            "text": b"{}\n{}",
            "no newline": good.replace(b"\n", b"", 1),
        }[damage]
    )
    second = look(tmp_path)
    assert second.read == 6
    assert equal(first, second)
    assert "checks is damaged" in caplog.text
    assert look(tmp_path).read == 0


def test_a_memory_of_another_version_is_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    look(make_camvid(tmp_path))
    monkeypatch.setattr(scan_cache, "_FORMAT", b"checked files 99 ")
    assert look(tmp_path).read == 6
    assert caplog.text == ""
    assert look(tmp_path).read == 0


def test_every_flipped_byte_of_the_memory_is_noticed(tmp_path: Path):
    look(make_camvid(tmp_path, count=1, splits=("train", "val")))
    path = tmp_path / "memory" / "checks"
    good = path.read_bytes()
    key = good.split(b'"key":"')[1][:32].decode()
    assert scan_cache._load(path, key)
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        assert scan_cache._load(path, key) == {}, position


def test_other_labels_and_another_folder_have_facts_of_their_own(tmp_path: Path):
    make_camvid(tmp_path / "a")
    memory = tmp_path / "checks"
    check_images(tmp_path / "a", CAMVID, cache=memory)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert check_images(tmp_path / "b", CAMVID, cache=memory).read == 6
    fewer = CAMVID.labels.model_copy(update={"lookup": (255, *CAMVID.labels.lookup[1:])})
    other = check_images(tmp_path / "b", CAMVID._replace(labels=fewer), cache=memory)
    assert other.read == 6
    assert other.counts["train"].pixels[0] == 0


def test_interrupted_work_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_camvid(tmp_path, count=4)
    real, seen = index_module.read_bytes, []

    def stop(path: Path) -> bytes:
        seen.append(path)
        if len(seen) > 10:
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "read_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            look(tmp_path)
    index = look(tmp_path)
    assert index.read == 12 - 5
    assert equal(index, check_images(tmp_path, CAMVID))


def test_a_killed_process_loses_what_it_did_since_the_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scan_cache, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(scan_cache.ScanCache, "save", lambda self, complete: None)
    look(make_camvid(tmp_path))
    assert look(tmp_path).read == 0


def test_a_memory_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    make_camvid(tmp_path)
    (tmp_path / "memory").touch()
    assert len(look(tmp_path).samples) == 6
    assert "cannot be written" in caplog.text


def test_nothing_is_left_beside_the_memory(tmp_path: Path):
    look(make_camvid(tmp_path))
    assert [path.name for path in (tmp_path / "memory").iterdir()] == ["checks"]


class TestProgress:
    @pytest.mark.parametrize("terminal", [True, False])
    def test_items_pass_through_in_order(self, terminal: bool, monkeypatch: pytest.MonkeyPatch):
        console = Console(force_terminal=terminal, quiet=not terminal)
        monkeypatch.setattr(progress.rich, "get_console", lambda: console)
        assert list(progress.tracked(iter("abc"), "letters", 3)) == ["a", "b", "c"]

    def test_there_is_a_line_now_and_then_without_a_terminal(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
        with caplog.at_level("INFO"):
            list(progress.tracked([1, 2], "files", 2))
        assert [record.getMessage() for record in caplog.records] == [
            "files 1/2  0 s left",
            "files 2/2  0 s left",
        ]
