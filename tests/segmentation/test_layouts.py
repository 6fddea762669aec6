from __future__ import annotations

from pathlib import Path

import pytest

from rdd_pipeline.errors import DataProblem, UserError
from rdd_pipeline.segmentation.layouts import (
    LAYOUTS,
    Pair,
    get_layout,
    list_pairs,
    raise_problems,
)

from .files import make_camvid, noise, save

CAMVID = get_layout("camvid")


def test_lists_pairs_of_all_splits_in_a_fixed_order(tmp_path: Path):
    listing = list_pairs(make_camvid(tmp_path), CAMVID)
    assert listing.problems == ()
    assert listing.pairs[0] == Pair("train", "train0", "train/train0.png", "trainannot/train0.png")
    assert [pair.name for pair in listing.pairs] == [
        "train0", "train1", "val0", "val1", "test0", "test1",
    ]  # fmt: skip


def test_takes_jpeg_images_beside_png(tmp_path: Path):
    make_camvid(tmp_path, count=1)
    (tmp_path / "train" / "train0.png").unlink()
    save(tmp_path / "train" / "train0.JPG", noise(0, 6, 8, 3), format="JPEG")
    assert list_pairs(tmp_path, CAMVID).pairs[0].image == "train/train0.JPG"


def test_other_files_and_hidden_ones_do_not_count(tmp_path: Path):
    make_camvid(tmp_path, count=1)
    (tmp_path / "train" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "train" / "._train0.png").write_bytes(b"x")
    listing = list_pairs(tmp_path, CAMVID)
    assert len(listing.pairs) == 3
    assert not listing.problems


def test_the_test_split_may_be_missing(tmp_path: Path):
    listing = list_pairs(make_camvid(tmp_path, splits=("train", "val")), CAMVID)
    assert {pair.split for pair in listing.pairs} == {"train", "val"}
    assert not listing.problems


def test_unknown_layout_names_the_choices():
    with pytest.raises(UserError, match=r"'camvit'.*data\.layout.*scenes, camvid"):
        get_layout("camvit")


def test_missing_folder_says_what_was_expected_and_where_to_point(tmp_path: Path):
    missing = tmp_path / "nothing"
    with pytest.raises(DataProblem, match=r"nothing, does not exist.*trainannot.*data\.path"):
        list_pairs(missing, CAMVID)


def test_a_file_in_place_of_the_folder_is_told_apart(tmp_path: Path):
    path = tmp_path / "camvid.zip"
    path.write_bytes(b"x")
    with pytest.raises(DataProblem, match="is a file, not a folder"):
        list_pairs(path, CAMVID)


def test_an_empty_folder_lacks_train_and_val(tmp_path: Path):
    problems = list_pairs(tmp_path, CAMVID).problems
    assert len(problems) == 2
    assert "train and trainannot missing" in problems[0]
    assert "val and valannot missing" in problems[1]


def test_half_a_split_is_a_problem_even_where_the_split_may_be_missing(tmp_path: Path):
    make_camvid(tmp_path, splits=("train", "val"))
    (tmp_path / "test").mkdir()
    assert "testannot missing" in list_pairs(tmp_path, CAMVID).problems[0]


def test_every_image_without_mask_and_mask_without_image_is_named(tmp_path: Path):
    make_camvid(tmp_path)
    (tmp_path / "trainannot" / "train0.png").unlink()
    (tmp_path / "trainannot" / "train1.png").unlink()
    (tmp_path / "val" / "val1.png").unlink()
    listing = list_pairs(tmp_path, CAMVID)
    assert [problem.split(".png")[0] for problem in listing.problems] == [
        "train/train0", "train/train1", "valannot/val1",
    ]  # fmt: skip
    assert "has no mask" in listing.problems[0]
    assert "has no image" in listing.problems[2]


def test_an_empty_split_is_a_problem(tmp_path: Path):
    make_camvid(tmp_path, splits=("train", "test"))
    (tmp_path / "val").mkdir()
    (tmp_path / "valannot").mkdir()
    assert "split 'val' is empty" in list_pairs(tmp_path, CAMVID).problems[0]


def test_two_images_of_one_name_are_a_problem(tmp_path: Path):
    make_camvid(tmp_path, count=1)
    save(tmp_path / "train" / "train0.jpg", noise(0, 6, 8, 3))
    problems = list_pairs(tmp_path, CAMVID).problems
    assert len(problems) == 1
    assert "have the same name" in problems[0]


def test_problems_are_counted_and_the_first_twenty_shown(tmp_path: Path):
    with pytest.raises(DataProblem) as caught:
        raise_problems(tmp_path, [f"problem {number}" for number in range(25)])
    text = str(caught.value)
    assert "25 problems" in text
    assert "problem 19" in text
    assert "problem 20" not in text
    assert "5 more" in text
    raise_problems(tmp_path, [])


def test_each_layout_lists_no_split_twice(tmp_path: Path):
    make_camvid(tmp_path)
    for name in ("scenes", "camvid"):
        pairs = list_pairs(tmp_path, LAYOUTS[name]).pairs
        assert len({(pair.split, pair.name) for pair in pairs}) == len(pairs)
