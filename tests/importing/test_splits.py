"""Which pictures go where."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.importing.export import split_of
from rdd_pipeline.importing.splits import Entry, Shares, group_names, split_pictures

SHARES = Shares(0.2, 0.2, 0, True)


def entries(names: list[str], **fields: object) -> list[Entry]:
    return [Entry(name, name, None, frozenset({0, 1}))._replace(**fields) for name in names]


def test_shares_are_kept_and_the_seed_decides():
    names = [f"IMG_{n}" for n in range(50)]
    first, how = split_pictures(entries(names), SHARES, [])
    assert [first.count(split) for split in ("train", "val", "test")] == [30, 10, 10]
    assert how == "made with seed 0"
    assert split_pictures(entries(names), SHARES, [])[0] == first
    assert split_pictures(entries(names), SHARES._replace(seed=1), [])[0] != first
    # Neither names nor their order decide.
    turned, _ = split_pictures(entries(names)[::-1], SHARES, [])
    assert turned[::-1] == first


def test_equal_images_are_never_in_two_splits():
    found = [Entry(f"a{n}", f"{n % 10}", None, frozenset()) for n in range(40)]
    remarks: list[str] = []
    splits, _ = split_pictures(found, SHARES, remarks)
    by_digest: dict[str, set[str | None]] = defaultdict(set)
    for entry, split in zip(found, splits, strict=True):
        by_digest[entry.digest].add(split)
    assert all(len(of) == 1 for of in by_digest.values())
    assert set(splits) == {"train", "val", "test"}
    assert remarks == ["30 images are copies of others and are in the same split."]


def test_frames_of_a_video_stay_together():
    names = [f"video{v}/frame_{n:04d}" for v in "abcdefgh" for n in range(10)]
    splits, how = split_pictures(entries(names), SHARES, [])
    by_video = defaultdict(set)
    for name, split in zip(names, splits, strict=True):
        by_video[name.split("/")[0]].add(split)
    assert all(len(of) == 1 for of in by_video.values())
    assert set(splits) == {"train", "val", "test"}
    assert "(8 of them); import_data.grouped=false" in how
    alone, how = split_pictures(entries(names), SHARES._replace(grouped=False), [])
    assert alone.count("val") == 16
    assert how == "made with seed 0"


def test_groups_too_large_to_stay_whole_are_cut_into_stretches_of_their_order():
    """Three walks of twenty photographs: whole, they would leave a third of them for training."""
    names = [f"{day}/DSC{n}" for day in ("mon", "tue", "wed") for n in range(7, 147, 7)]
    shares = Shares(0.15, 0.15, 0, True)
    splits, how = split_pictures(entries(names), shares, [])
    assert [splits.count(split) for split in ("train", "val", "test")] == [44, 8, 8]
    assert "stretches of 4 neighboring names, as 3 groups" in how
    # Neighbors are together: of 57 pairs within a walk single images would part about 25.
    parted = sum(a != b for day in (0, 20, 40) for a, b in pairwise(splits[day : day + 20]))
    assert parted <= 8
    assert splits[::-1] == split_pictures(entries(names[::-1]), shares, [])[0]
    fives = [f"{day}/{n}" for day in "abcde" for n in range(12)]
    assert "whole groups" in split_pictures(entries(fives), shares, [])[1]


def test_names_that_tell_no_videos_apart_make_no_groups():
    assert group_names([f"IMG_{n}" for n in range(9)]) is None
    assert group_names(list("abcdefg")) is None
    assert group_names(["a1", "a2", "b1", "b2"]) is None
    copies = [f"{n}_jpg.rf.{k}{'ab' * 15}" for n in ("x", "y", "z") for k in (1, 2)]
    assert group_names(copies) == ["x", "x", "y", "y", "z", "z"]


def test_a_class_that_only_one_group_shows_is_learned():
    names = [f"{fruit}_{n}" for fruit in ("apple", "pear", "plum", "fig") for n in range(6)]
    found = [
        Entry(name, name, None, frozenset({0, hash_of})) for name in names
        for hash_of in [1 + ["apple", "pear", "plum", "fig"].index(name.split("_")[0])]
    ]  # fmt: skip
    for seed in range(10):
        splits, how = split_pictures(found, SHARES._replace(seed=seed), [])
        shown = {c for e, s in zip(found, splits, strict=True) if s == "train" for c in e.classes}
        assert shown == {0, 1, 2, 3, 4}
        assert how == f"made with seed {seed}"  # whole groups would hide a class


def test_copies_across_the_tool_s_splits_stay_where_they_are_judged_by():
    found = [
        Entry("a", "1", "train", frozenset()), Entry("b", "1", "val", frozenset()),
        Entry("c", "2", "train", frozenset()), Entry("d", "2", "test", frozenset()),
        Entry("e", "3", "val", frozenset()), Entry("f", "3", "test", frozenset()),
        Entry("g", "4", "train", frozenset()),
    ]  # fmt: skip
    remarks: list[str] = []
    splits, how = split_pictures(found, SHARES, remarks)
    assert splits == [None, "val", None, "test", None, "test", "train"]
    assert how == "as they came"
    assert remarks == [
        "1 images of train are also in test and are left out of train.",
        "1 images of train are also in val and are left out of train.",
        "1 images of val are also in test and are left out of val.",
    ]


def test_a_missing_val_is_made_of_train_and_test_stays():
    found = entries([f"a{n}" for n in range(20)], split="train")
    found += entries([f"t{n}" for n in range(5)], split="test")
    splits, how = split_pictures(found, SHARES, [])
    assert splits[20:] == ["test"] * 5
    assert splits[:20].count("val") == 4
    assert how == "as they came, val made of train with seed 0"


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_few_images_still_make_splits(count):
    splits, _ = split_pictures(entries([f"x{n}" for n in range(count)]), SHARES, [])
    assert splits.count("val") == 1
    assert splits.count("test") == (count > 2)
    assert "train" in splits


def test_one_image_is_too_few():
    with pytest.raises(DataProblem, match="at least 2 different ones"):
        split_pictures([Entry("a", "1", None, frozenset())] * 3, SHARES, [])


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train/img", "train"), ("valid", "val"), ("a/validation/b", "val"), ("Training", "train"),
        ("images_train", "train"), ("trainannot", "train"), ("train2017", "train"),
        ("testing/x", "test"), ("instances_val2017", "val"), ("ValImages", "val"),
        ("contest/latest", None), ("trains", None), ("data", None), ("train_and_val", None),
        ("train-00000-of-00001", "train"),
    ],
)  # fmt: skip
def test_a_split_is_a_word_of_a_folder_s_name(path, split):
    assert split_of(path) == split
