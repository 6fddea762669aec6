from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from rdd_pipeline.data.index import (
    Sample,
    build_index,
    check_images,
    from_rows,
    index_digest,
    of_split,
    to_rows,
)
from rdd_pipeline.data.layouts import get_layout, some_of
from rdd_pipeline.data.statistics import IGNORED, label_statistics
from rdd_pipeline.errors import DataProblem

from .files import SPLITS, make_camvid, noise, save

CAMVID = get_layout("camvid")


def test_one_sample_for_each_pair_with_size_and_digests(tmp_path: Path):
    index = build_index(make_camvid(tmp_path), CAMVID)
    assert [s.name for s in index.samples] == [f"{split}{n}" for split in SPLITS for n in (0, 1)]
    first = index.samples[0]
    assert (first.image, first.mask) == ("train/train0.png", "trainannot/train0.png")
    assert (first.height, first.width) == (6, 8)
    assert len({s.image_digest for s in index.samples}) == 6
    assert index.warnings == ()


@pytest.mark.parametrize("workers", [1, 4])
def test_class_counts_equal_a_count_over_the_masks(tmp_path: Path, workers: int):
    index = build_index(make_camvid(tmp_path), CAMVID, workers=workers)
    masks = [noise(100 + number, 6, 8, high=12) for number in (0, 1)]
    counts = index.counts["val"]
    assert counts.pixels == tuple(sum(int((m == v).sum()) for m in masks) for v in range(12))
    assert counts.images == tuple(sum(bool((m == v).any()) for m in masks) for v in range(12))


def test_statistics_have_a_row_for_each_split_and_class(tmp_path: Path):
    make_camvid(tmp_path, count=1, splits=("train", "val"))
    mask = np.full((6, 8), 11, np.uint8)
    mask[:3] = 2
    mask[0, 0] = 4
    save(tmp_path / "trainannot" / "train0.png", mask)
    rows = label_statistics(build_index(tmp_path, CAMVID), CAMVID.labels)
    assert len(rows) == 24
    assert rows[2] == {
        "split": "train", "class": "Pole", "pixels": 23, "share": 23 / 24, "images": 1,
    }  # fmt: skip
    assert rows[0]["share"] == 0
    assert rows[0]["images"] == 0
    assert rows[11] == {
        "split": "train", "class": IGNORED, "pixels": 24, "share": 0.5, "images": 1,
    }  # fmt: skip


def test_statistics_of_a_split_without_labels_do_not_divide_by_zero(tmp_path: Path):
    make_camvid(tmp_path, count=1, splits=("train", "val"))
    save(tmp_path / "trainannot" / "train0.png", np.full((6, 8), 11, np.uint8))
    rows = label_statistics(build_index(tmp_path, CAMVID), CAMVID.labels)
    assert [row["share"] for row in rows[:12]] == [0.0] * 11 + [1.0]


def test_digest_depends_on_contents_not_on_folder_or_order(tmp_path: Path):
    here = build_index(make_camvid(tmp_path / "a"), CAMVID).samples
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert index_digest(build_index(tmp_path / "b", CAMVID).samples) == index_digest(here)
    assert index_digest(reversed(here)) == index_digest(here)
    save(tmp_path / "b" / "valannot" / "val0.png", noise(9, 6, 8, high=12))
    assert index_digest(build_index(tmp_path / "b", CAMVID).samples) != index_digest(here)
    assert index_digest(here[1:]) != index_digest(here)


def test_rows_and_back(tmp_path: Path):
    samples = build_index(make_camvid(tmp_path), CAMVID).samples
    rows = to_rows(samples)
    assert rows[0]["name"] == "train0"
    assert from_rows(rows) == samples
    # Tables return numpy numbers and further columns.
    assert from_rows([{**row, "height": np.int64(6), "extra": 1} for row in rows]) == samples


def test_rows_without_a_column_say_so():
    with pytest.raises(DataProblem, match=r"no column split, .*mask_digest; it has name"):
        from_rows([{"name": "a"}])


def test_of_split_keeps_the_order(tmp_path: Path):
    samples = build_index(make_camvid(tmp_path), CAMVID).samples
    assert of_split(samples, "val") == samples[2:4]
    assert of_split(samples, "none") == ()


def test_all_problems_come_in_one_message(tmp_path: Path):
    make_camvid(tmp_path, count=4)
    (tmp_path / "train" / "train0.png").unlink()
    save(tmp_path / "trainannot" / "train1.png", noise(0, 6, 9, high=12))
    save(tmp_path / "trainannot" / "train2.png", noise(0, 8, 6, high=12))
    save(tmp_path / "trainannot" / "train3.png", np.full((6, 8), 77, np.uint8))
    path = tmp_path / "val" / "val0.png"
    path.write_bytes(path.read_bytes()[:90])
    (tmp_path / "val" / "val1.png").write_bytes(b"")
    save(tmp_path / "valannot" / "val2.png", noise(0, 6, 8, 3))
    with pytest.raises(DataProblem) as caught:
        build_index(tmp_path, CAMVID)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("7 problems")
    assert "trainannot/train0.png has no image" in lines[1]
    assert "trainannot/train1.png is 9 x 6 pixels" in lines[2]
    assert "its image train/train1.png 8 x 6" in lines[2]
    assert "EXIF" in lines[3]
    assert "trainannot/train3.png holds mask values 77" in lines[4]
    assert "val/val0.png cannot be decoded" in lines[5]
    assert "val/val1.png is empty" in lines[6]
    assert "valannot/val2.png is a color image" in lines[7]


def test_both_files_of_a_pair_may_be_bad(tmp_path: Path):
    make_camvid(tmp_path, count=1)
    (tmp_path / "train" / "train0.png").write_bytes(b"x")
    save(tmp_path / "trainannot" / "train0.png", np.full((6, 8), 99, np.uint8))
    with pytest.raises(DataProblem, match=r"2 problems[^$]*train/train0[^$]*values 99"):
        build_index(tmp_path, CAMVID)


def test_the_same_image_in_two_splits_is_a_warning(tmp_path: Path):
    make_camvid(tmp_path)
    shutil.copy(tmp_path / "train" / "train1.png", tmp_path / "test" / "test0.png")
    shutil.copy(tmp_path / "train" / "train1.png", tmp_path / "train" / "train0.png")
    warnings = build_index(tmp_path, CAMVID).warnings
    assert len(warnings) == 1
    assert "test/test0.png and train/train0.png are the same image" in warnings[0]


def test_good_pairs_are_indexed_beside_the_problems_of_the_others(tmp_path: Path):
    make_camvid(tmp_path, count=4)
    (tmp_path / "trainannot" / "train0.png").unlink()
    (tmp_path / "train" / "train1.png").write_bytes(b"")
    save(tmp_path / "valannot" / "val2.png", noise(0, 4, 4, high=12))
    save(tmp_path / "train" / "train3.jpg", noise(0, 6, 8, 3))
    index = check_images(tmp_path, CAMVID)
    assert {problem.file for problem in index.problems} == {
        "train/train0.png", "train/train1.png", "valannot/val2.png", "train/train3.jpg",
    }  # fmt: skip
    assert not any(problem.blocks for problem in index.problems)
    assert [s.name for s in index.samples] == [
        "train2", "val0", "val1", "val3", "test0", "test1", "test2", "test3",
    ]  # fmt: skip
    assert sum(index.counts["val"].pixels) == 3 * 48


def test_what_is_not_about_single_images_cannot_be_left_out(tmp_path: Path):
    make_camvid(tmp_path, splits=("train",))
    (problem,) = check_images(tmp_path, CAMVID).problems
    assert problem.blocks
    assert problem.text.startswith("folders val and valannot missing")


def test_warnings_of_the_listing_come_before_those_about_single_images(tmp_path: Path):
    make_camvid(tmp_path)
    shutil.copy(tmp_path / "train" / "train1.png", tmp_path / "test" / "test0.png")
    layout = CAMVID._replace(
        list_pairs=lambda root: CAMVID.list_pairs(root)._replace(warnings=("odd",))
    )
    odd, duplicate = check_images(tmp_path, layout).warnings
    assert odd == "odd"
    assert "same image" in duplicate


def test_some_of_names_the_first_and_counts_the_others():
    assert some_of("abc") == "a, b, c"
    assert some_of("abcde") == "a, b, c and 2 more"


@pytest.mark.parametrize(
    "change", [{"height": "x"}, {"width": "-1"}, {"bits": ""}, {"height": None}]
)
def test_a_row_whose_size_is_no_number_is_named(change: dict[str, str | None]):
    row = Sample("train", "a", "a.png", "b.png", 4, 4, "0", "1")._asdict() | change
    with pytest.raises(DataProblem, match=r"^Row 1 of the index cannot be read \(.*ingestion pip"):
        from_rows([row])
