"""Nodes of data_ingestion: bad images are refused in one message, before any training."""

from __future__ import annotations

import logging
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from rdd_pipeline.config import (
    DataParams,
    SceneParams,
)
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import from_rows
from rdd_pipeline.data.layouts import voc
from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.errors import DataProblem, UserError
from rdd_pipeline.pipelines.data_ingestion import nodes as ingestion
from rdd_pipeline.pipelines.data_ingestion.nodes import (
    index_images,
    inspect_images,
    pack_images,
    preview_images,
)
from tests.pipelines.examples import (
    FOLDER,
    change,
    ingest,
    write,
)


def test_a_folder_becomes_an_index_statistics_and_tags(images):
    checked, index, statistics, tags, _ = ingest(images, FOLDER)
    assert list(index["split"]) == ["train"] * 3 + ["val", "test"]
    assert checked.labels.names == CAMVID.names
    assert set(statistics["split"]) == {"train", "val", "test"}
    assert tags["images"] == "5"
    assert tags["layout"] == "camvid"


def test_the_index_survives_its_csv_file(images, tmp_path):
    checked, index, *_ = ingest(images, FOLDER)
    index.to_csv(tmp_path / "index.csv", index=False)
    text = dict.fromkeys(("split", "name", "image_digest", "mask_digest"), str)
    again = pd.read_csv(tmp_path / "index.csv", dtype=text, keep_default_na=False)
    assert from_rows(again.to_dict("records")) == checked.samples  # names such as 0 stay text


def test_scenes_are_rendered_once(tmp_path):
    data = DataParams(
        layout="scenes",
        workers=1,
        scenes=SceneParams(train=1, val=1, test=1, height=48, width=64),
    )
    ingest(tmp_path, data)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(times) == 6
    ingest(tmp_path, data)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == times


def _remove(images: Path) -> None:
    (images / "trainannot" / "1.png").unlink()


def _shrink(images: Path) -> None:
    write(images / "trainannot" / "1.png", np.zeros((16, 20), np.uint8))


def _spoil_label(images: Path) -> None:
    mask = np.zeros((32, 40), np.uint8)
    mask[3, 4] = 17
    write(images / "valannot" / "0.png", mask)


def _truncate(images: Path) -> None:
    path = images / "train" / "2.png"
    path.write_bytes(path.read_bytes()[:200])


def _empty_split(images: Path) -> None:
    for folder in ("train", "trainannot"):
        for path in (images / folder).iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_remove, r"train/1\.png has no mask\. Add it or remove the image"),
        (_shrink, r"trainannot/1\.png is 20 x 16 pixels .* its image train/1\.png 40 x 32"),
        (_spoil_label, r"valannot/0\.png holds mask values 17, allowed are 0-11"),
        (_truncate, r"train/2\.png cannot be decoded"),
        (_empty_split, r"split 'train' is empty"),
    ],
)
def test_a_bad_file_is_named(images, fault, message):
    fault(images)
    with pytest.raises(DataProblem, match=message):
        ingest(images, FOLDER)


def test_all_bad_files_are_in_one_message(images):
    for fault in (_remove, _spoil_label, _truncate):
        fault(images)
    with pytest.raises(DataProblem, match="3 problems with the labeled images") as info:
        ingest(images, FOLDER)
    for name in ("train/1.png", "valannot/0.png", "train/2.png"):
        assert name in str(info.value)


def test_a_missing_folder_and_a_wrong_layout_are_reported(tmp_path):
    with pytest.raises(DataProblem, match=r"gone, does not exist\. Expected: train/NAME"):
        ingest(tmp_path / "gone", FOLDER)
    with pytest.raises(UserError, match=r"Unknown layout 'camvit'. Set `data\.layout`"):
        ingest(tmp_path, DataParams(layout="camvit"))


QUARANTINE = DataParams(layout="camvid", workers=1, on_problem="quarantine")


def _see(images: Path, data: DataParams):
    return inspect_images(images, images.parent / "cache", data)


def test_problems_and_report_are_there_before_the_run_stops(images):
    for fault in (_remove, _spoil_label, _truncate):
        fault(images)
    inspection, _, problems, report = _see(images, FOLDER)
    assert [s.name for s in inspection.images.samples] == ["0", "0"]  # of train and test
    assert [problem["file"] for problem in problems] == [
        "train/1.png", "train/2.png", "valannot/0.png",
    ]  # fmt: skip
    assert "3 found" in report
    assert "The run stopped" in report
    with pytest.raises(DataProblem, match=r"ingestion_report.*data\.on_problem=quarantine"):
        index_images(inspection, FOLDER)


def test_the_report_shows_images_of_every_split_with_their_masks(images, monkeypatch):
    *_, report = _see(images, FOLDER)
    assert report.count("data:image/jpeg;base64,") == report.count("data:image/png;base64,") == 5
    for split in ("train", "val", "test"):
        assert f"<h3>{split}</h3>" in report
    assert "White: ignored" in report

    def read(*_):
        raise AssertionError("nothing has changed")

    with monkeypatch.context() as patched:
        patched.setattr(Images, "read", read)
        assert _see(images, FOLDER)[-1] == report
    write(images / "train/1.png", np.zeros((32, 40, 3), np.uint8))
    changed = _see(images, FOLDER)[-1]
    assert changed != report
    (cache,) = (images.parent / "cache").glob("thumbnails-*.json")
    cache.write_bytes(cache.read_bytes()[:-40])  # damaged: made again
    assert _see(images, FOLDER)[-1] == changed


def test_quarantine_is_not_advised_where_it_does_not_help(images):
    _empty_split(images)
    inspection, _, _, report = _see(images, FOLDER)
    with pytest.raises(DataProblem) as info:
        index_images(inspection, FOLDER)
    for text in (str(info.value), report):
        assert "split" in text
        assert "on_problem=quarantine" not in text


def test_bad_images_are_left_out_when_asked_and_that_is_said(images, caplog):
    for fault in (_remove, _truncate):
        fault(images)
    _, index, _, tags, report = ingest(images, QUARANTINE)
    assert list(index["split"]) == ["train", "val", "test"]
    assert list(index["name"]) == ["0", "0", "0"]
    assert tags["image_problems"] == "2"
    assert "were left out" in report
    assert "2 problems: the images they are about are LEFT OUT, 3 are used" in caplog.text
    assert "train/1.png has no mask" in caplog.text
    whole = ingest(images.parent / "images", QUARANTINE)
    assert whole.tags["data_digest"] == tags["data_digest"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_empty_split, "split 'train' is empty"),
        (_spoil_label, "No image of split 'val' is without a problem"),
    ],
)
def test_leaving_images_out_does_not_cure_everything(images, fault, message):
    fault(images)
    with pytest.raises(DataProblem, match=message):
        ingest(images, QUARANTINE)


def test_what_is_wrong_with_very_many_images_fits_a_log(images, caplog, monkeypatch):
    monkeypatch.setattr(ingestion, "LOGGED", 1)
    for fault in (_remove, _truncate):
        fault(images)
    with caplog.at_level(logging.WARNING):
        ingest(images, QUARANTINE)
    assert "... and 1 more. The report" in caplog.text


class _Page(HTMLParser):
    """Text of a page, its tags in balance and what it loads from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.loads: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        places = [value for key, value in attrs if key in ("src", "href")]
        self.loads += [place for place in places if not place.startswith("data:image/")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(" ".join(data.split()))


def test_the_report_is_one_page_that_needs_nothing_else(images):
    page = _Page(ingest(images, FOLDER).report)
    assert page.open == []
    assert page.loads == []
    for text in ("No problem: every image and mask was decoded", "40 x 32 (3)", "Bicyclist"):
        assert any(text in part for part in page.text), text


def test_shares_in_the_report_are_those_of_the_masks(images):
    report = ingest(images, FOLDER).report
    masks = np.stack([np.asarray(Image.open(p)) for p in (images / "trainannot").iterdir()])
    sky = 100 * (masks == 0).sum() / (masks != 11).sum()
    (_, row) = (part for part in report.split("<tr>") if "</span> Sky" in part)  # legend, table
    assert f"{sky:.2f} %" in row


def test_names_in_the_report_are_escaped(images):
    image = np.zeros((8, 8, 3), np.uint8)
    write(images / "train" / "<script>alert(1)<!-- & 'x'.png", image)
    report = _see(images, FOLDER)[3]
    assert "<script>" not in report
    assert "&lt;script&gt;alert(1)&lt;!-- &amp; " in report
    _Page(report)


def test_the_same_image_in_two_splits_is_in_the_report_and_no_problem(images):
    (images / "test" / "0.png").write_bytes((images / "train" / "1.png").read_bytes())
    report = ingest(images, FOLDER).report
    assert "test/0.png and train/1.png are the same image in two splits" in report


def test_warnings_are_in_log_and_report(images, caplog):
    exif = Image.Exif()
    exif[0x0112] = 3
    path = images / "train" / "0.png"
    Image.open(path).save(path, exif=exif)
    report = ingest(images, FOLDER).report
    text = "1 image with an EXIF rotation that the sizes cannot check (train/0.png)"
    assert text in report
    assert text in caplog.text


def test_many_problems_and_sizes_do_not_make_the_report_endless(images, monkeypatch):
    from rdd_pipeline.pipelines.data_ingestion import report as module

    monkeypatch.setattr(module, "LISTED", 1)
    monkeypatch.setattr(module, "SIZES_SHOWN", 1)
    for fault in (_remove, _truncate):
        fault(images)
    for number in (7, 8):
        size = (number, number)
        write(images / "val" / f"{number}.png", np.zeros((*size, 3), np.uint8))
        write(images / "valannot" / f"{number}.png", np.zeros(size, np.uint8))
    report = _see(images, FOLDER)[3]
    assert "and 1 more, in" in report
    assert "2 other sizes" in report


def test_a_split_made_of_training_images_is_in_log_report_and_tags(images, caplog):
    for folder in ("val", "valannot"):
        (images / folder / "0.png").unlink()
        (images / folder).rmdir()
    with pytest.raises(DataProblem, match=r"val and valannot missing.*data\.val_fraction"):
        ingest(images, FOLDER)
    data = change(FOLDER, val_fraction=0.34, split_seed=3)
    with caplog.at_level(logging.INFO):
        _, index, statistics, tags, report = ingest(images, data)
    assert list(index["split"]) == ["train", "train", "val", "test"]
    assert list(statistics["split"].unique()) == ["train", "val", "test"]
    assert (tags["val_fraction"], tags["split_seed"]) == ("0.34", "3")
    said = "Of the training images 1 to 'val' (data.val_fraction=0.34) went, 2 are left"
    assert said in caplog.text
    assert said.replace("'", "&#39;") in report
    again = ingest(images, data)
    assert again.index.equals(index)
    assert not {"val_fraction", "split_seed"} & _ingest_camvid_tags(images.parent / "other")


def _ingest_camvid_tags(root: Path) -> set[str]:
    for split in ("train", "val"):
        write(root / split / "0.png", np.full((8, 8, 3), len(split), np.uint8))
        write(root / f"{split}annot" / "0.png", np.eye(8, dtype=np.uint8))
    return set(ingest(root, FOLDER).tags)


def test_splits_may_not_take_all_training_images():
    with pytest.raises(ValueError, match="leave no image for training"):
        DataParams(layout="camvid", val_fraction=0.5, test_fraction=0.5)


def test_labels_that_teach_nothing_stop_the_run_before_training(images):
    for path in (images / "trainannot").iterdir():
        write(path, np.full((32, 40), 11, np.uint8))
    for data in (FOLDER, QUARANTINE):
        with pytest.raises(DataProblem, match="split 'train' has no labeled pixel"):
            ingest(images, data)
    assert "split &#39;train&#39; has no labeled pixel" in _see(images, FOLDER)[3]


def test_training_images_of_one_class_stop_the_run(images):
    for path in (images / "trainannot").iterdir():
        write(path, np.zeros((32, 40), np.uint8))
    with pytest.raises(DataProblem, match="holds one class only, 'Sky'; the 10 classes 'Building'"):
        ingest(images, FOLDER)


def _pack(images: Path, ingested: Images, data: DataParams) -> dict[str, Any]:
    packed, info = pack_images(ingested, images.parent / "cache", data)
    assert packed == replace(ingested, packs=None if info["folder"] is None else packed.packs)
    assert info["folder"] == (None if packed.packs is None else str(packed.packs))
    return info


def test_every_split_is_packed_once(images, ingested):
    packed = _pack(images, ingested, FOLDER)
    assert list(packed["splits"]) == ["train", "val", "test"]
    paths = {split: Path(packed["folder"]) / p["file"] for split, p in packed["splits"].items()}
    times = {path: path.stat().st_mtime_ns for path in paths.values()}
    assert _pack(images, ingested, FOLDER) == packed
    assert {path: path.stat().st_mtime_ns for path in paths.values()} == times


def test_only_training_images_are_packed_resized(images, ingested):
    packed = _pack(images, ingested, FOLDER)["splits"]
    small = _pack(images, replace(ingested, image_size=(16, 20)), FOLDER)["splits"]
    assert small["train"]["file"] != packed["train"]["file"]
    assert small["val"] == packed["val"]


def test_the_cache_can_be_switched_off(images, ingested):
    packed = _pack(images, ingested, change(FOLDER, cache=False))
    assert packed == {"folder": None, "splits": {}, "note": "data.cache is false"}
    assert not list((images.parent / "cache").glob("*.pack"))


@pytest.mark.parametrize("word", ["off", "false", False])
def test_off_may_be_written_in_several_ways(word):
    assert DataParams(layout="camvid", cache=word).cache is False
    assert DataParams(layout="camvid", cache="auto").cache == "auto"


def _nearly_full(monkeypatch, free: int) -> None:
    usage = NamedTuple("Usage", [("total", int), ("used", int), ("free", int)])(1 << 40, 0, free)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)


@pytest.mark.parametrize("free", [1 << 20, (1 << 30) + 100])
def test_without_room_images_stay_in_their_files(images, ingested, monkeypatch, free, caplog):
    _nearly_full(monkeypatch, free)
    with caplog.at_level(logging.INFO):
        packed = _pack(images, ingested, FOLDER)
    assert packed["folder"] is None
    assert "more than half of the free disk" in packed["note"]
    assert "No packed cache" in caplog.text
    with pytest.raises(DataProblem, match=r"1 GiB has to stay free.*data\.cache=false"):
        _pack(images, ingested, change(FOLDER, cache=True))


def test_packs_that_are_there_need_no_room(images, ingested, monkeypatch):
    packed = _pack(images, ingested, FOLDER)
    _nearly_full(monkeypatch, 1 << 20)
    assert _pack(images, ingested, FOLDER) == packed
    assert _pack(images, ingested, change(FOLDER, cache=True)) == packed


def test_a_disk_that_fills_up_while_packing(images, ingested, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    packed = _pack(images, ingested, FOLDER)
    assert packed["folder"] is None
    assert "No space left on device" in packed["note"]
    assert not list((images.parent / "cache").glob("*pack*"))
    with pytest.raises(DataProblem, match="No space left on device"):
        _pack(images, ingested, change(FOLDER, cache=True))


def test_an_image_that_changed_since_stops_the_run_with_auto_too(images, ingested):
    write(images / "train" / "1.png", np.zeros((32, 40, 3), np.uint8))
    with pytest.raises(DataProblem, match=r"train/1\.png has changed since the index"):
        _pack(images, ingested, FOLDER)


def test_packs_of_other_images_are_mentioned(images, ingested, caplog):
    _pack(images, replace(ingested, image_size=(16, 20)), FOLDER)
    with caplog.at_level(logging.INFO):
        _pack(images, ingested, FOLDER)
    assert "1 packs of other images or sizes" in caplog.text


def test_download_is_asked_for_before_anything_is_read(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(voc, "download_voc", asked.append)
    with pytest.raises(DataProblem, match=r"does not exist.*data\.download=true gets both"):
        ingest(tmp_path / "voc", DataParams(layout="voc", download=True))
    assert asked == [tmp_path / "voc"]


def test_the_preview_shows_at_most_what_is_there(images, ingested):
    assert isinstance(preview_images(ingested).draw(), Figure)
    assert isinstance(preview_images(replace(ingested, image_size=(16, 24))).draw(), Figure)
