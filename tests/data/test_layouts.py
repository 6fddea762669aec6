from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from rdd_pipeline.data.labels import LabelSet, make_lookup
from rdd_pipeline.data.layouts import (
    LAYOUTS,
    Layout,
    Listing,
    Pair,
    Problem,
    get_layout,
    list_pairs,
    raise_problems,
)
from rdd_pipeline.errors import DataProblem, UserError

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
    with pytest.raises(UserError, match=r"'camvit'.*data\.layout.*scenes, camvid, .*folders"):
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
    assert "train and trainannot missing" in problems[0].text
    assert "val and valannot missing" in problems[1].text


def test_half_a_split_is_a_problem_even_where_the_split_may_be_missing(tmp_path: Path):
    make_camvid(tmp_path, splits=("train", "val"))
    (tmp_path / "test").mkdir()
    assert "testannot missing" in list_pairs(tmp_path, CAMVID).problems[0].text


def test_every_image_without_mask_and_mask_without_image_is_named(tmp_path: Path):
    make_camvid(tmp_path)
    (tmp_path / "trainannot" / "train0.png").unlink()
    (tmp_path / "trainannot" / "train1.png").unlink()
    (tmp_path / "val" / "val1.png").unlink()
    listing = list_pairs(tmp_path, CAMVID)
    assert [problem.text.split(".png")[0] for problem in listing.problems] == [
        "train/train0", "train/train1", "valannot/val1",
    ]  # fmt: skip
    assert "has no mask" in listing.problems[0].text
    assert "has no image" in listing.problems[2].text


def test_an_empty_split_is_a_problem(tmp_path: Path):
    make_camvid(tmp_path, splits=("train", "test"))
    (tmp_path / "val").mkdir()
    (tmp_path / "valannot").mkdir()
    assert "split 'val' is empty" in list_pairs(tmp_path, CAMVID).problems[0].text


def test_two_images_of_one_name_are_a_problem(tmp_path: Path):
    make_camvid(tmp_path, count=1)
    save(tmp_path / "train" / "train0.jpg", noise(0, 6, 8, 3))
    problems = list_pairs(tmp_path, CAMVID).problems
    assert len(problems) == 1
    assert "have the same name" in problems[0].text


def test_problems_are_counted_and_the_first_twenty_shown(tmp_path: Path):
    with pytest.raises(DataProblem) as caught:
        raise_problems(tmp_path, [Problem("x", f"problem {number}") for number in range(25)])
    text = str(caught.value)
    assert "25 problems" in text
    assert "problem 19" in text
    assert "problem 20" not in text
    assert "5 more" in text
    raise_problems(tmp_path, [])


FIXED = {name: layout for name, layout in LAYOUTS.items() if isinstance(layout, Layout)}
SIZES = {
    "scenes": 11, "camvid": 11, "cityscapes": 19, "voc": 21, "ade20k": 150, "coco_stuff": 171,
}  # fmt: skip


def test_every_label_set_has_the_usual_number_of_classes_in_distinct_colors():
    assert {name: layout.labels.num_classes for name, layout in FIXED.items()} == SIZES
    for layout in FIXED.values():
        labels = layout.labels
        assert len(set(labels.colors)) == labels.num_classes
        assert {value for value in labels.lookup if value >= 0} <= {*range(labels.num_classes), 255}
        assert set(range(labels.num_classes)) <= set(labels.lookup)


@pytest.mark.parametrize("name", FIXED)
def test_an_empty_folder_is_a_problem_of_every_layout(tmp_path: Path, name: str):
    listing = list_pairs(tmp_path, get_layout(name))
    assert listing.pairs == ()
    assert "missing. Expected: " in listing.problems[0].text
    assert "`data.path`" in listing.problems[0].text


IMAGE, MASK = noise(0, 4, 5, 3), np.ones((4, 5), np.uint8)


def put(root: Path, *paths: str) -> None:
    for path in paths:
        save(root / path, MASK if path.endswith(".png") else IMAGE)


class TestCityscapes:
    def test_pairs_are_found_below_the_cities(self, tmp_path: Path):
        for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
            image = f"leftImg8bit/{split}/{city}/{city}_000000_000019_leftImg8bit.png"
            save(tmp_path / image, IMAGE)
            mask = f"gtFine/{split}/{city}/{city}_000000_000019_gtFine"
            put(tmp_path, *(f"{mask}_{kind}.png" for kind in ("labelIds", "instanceIds", "color")))
        put(tmp_path, "leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png")
        listing = list_pairs(tmp_path, get_layout("cityscapes"))
        assert listing.problems == ()
        assert listing.pairs[1] == Pair(
            "train",
            "bochum_000000_000019",
            "leftImg8bit/train/bochum/bochum_000000_000019_leftImg8bit.png",
            "gtFine/train/bochum/bochum_000000_000019_gtFine_labelIds.png",
        )
        assert [pair.split for pair in listing.pairs] == ["train", "train", "val"]

    def test_label_ids_become_the_nineteen_train_ids(self):
        labels = get_layout("cityscapes").labels
        by_name = dict(zip(labels.names, range(19), strict=True))
        assert labels.lookup[7] == by_name["road"] == 0
        assert labels.lookup[26] == by_name["car"] == 13
        assert labels.lookup[33] == by_name["bicycle"] == 18
        assert labels.lookup[4] == labels.lookup[255] == 255
        assert labels.lookup[34] == -1
        assert labels.class_weights is not None
        assert labels.class_weights[17] == 1.1529


class TestVoc:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        put(tmp_path, *(f"JPEGImages/{name}.jpg" for name in "abcd"))
        put(tmp_path, *(f"SegmentationClassAug/{name}.png" for name in "abc"))
        put(tmp_path, "SegmentationClass/c.png", "SegmentationClass/a.png")
        (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
        (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("c\n")
        return tmp_path

    def names(self, listing: Listing) -> list[tuple[str, str, str]]:
        return [(pair.split, pair.name, pair.mask) for pair in listing.pairs]

    def test_trains_on_all_additional_masks_but_those_of_val(self, root: Path):
        listing = list_pairs(root, get_layout("voc"))
        assert listing.problems == ()
        assert self.names(listing) == [
            ("train", "a", "SegmentationClassAug/a.png"),
            ("train", "b", "SegmentationClassAug/b.png"),
            ("val", "c", "SegmentationClass/c.png"),
        ]

    @pytest.mark.parametrize("line", ["b", "/JPEGImages/b.jpg /SegmentationClassAug/b.png"])
    def test_a_list_of_training_images_is_followed(self, root: Path, line: str):
        (root / "ImageSets" / "Segmentation" / "trainaug.txt").write_text(f"{line}\n\n")
        listing = list_pairs(root, get_layout("voc"))
        assert listing.problems == ()
        assert [pair.name for pair in listing.pairs] == ["b", "c"]

    def test_listed_images_that_are_not_there_are_named(self, root: Path):
        (root / "ImageSets" / "Segmentation" / "val.txt").write_text("c\nd\nz\n")
        problems = list_pairs(root, get_layout("voc")).problems
        assert len(problems) == 2
        assert "z of split 'val' has neither" in problems[0].text
        assert "JPEGImages/d.jpg has no mask" in problems[1].text

    def test_without_the_list_of_validation_images_nothing_can_be_said(self, root: Path):
        (root / "ImageSets" / "Segmentation" / "val.txt").unlink()
        assert "val.txt missing" in list_pairs(root, get_layout("voc")).problems[0].text

    def test_palette_borders_are_ignored(self):
        labels = get_layout("voc").labels
        assert labels.lookup[:21] == tuple(range(21))
        assert labels.lookup[255] == 255
        assert labels.colors[:3] == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
        assert labels.colors[15] == (192, 128, 128)


def test_ade20k_counts_from_one_and_ignores_zero(tmp_path: Path):
    for folder in ("training", "validation"):
        put(tmp_path, f"images/{folder}/ADE_1.jpg", f"annotations/{folder}/ADE_1.png")
    layout = get_layout("ade20k")
    listing = list_pairs(tmp_path, layout)
    assert listing.problems == ()
    assert [pair.split for pair in listing.pairs] == ["train", "val"]
    assert layout.labels.lookup[:2] == (255, 0)
    assert layout.labels.lookup[150:152] == (149, -1)
    assert (layout.labels.names[0], layout.labels.names[149]) == ("wall", "flag")


def test_coco_stuff_skips_the_unused_ids(tmp_path: Path):
    for folder in ("train2017", "val2017"):
        put(tmp_path, f"images/{folder}/01.jpg", f"annotations/{folder}/01.png")
    layout = get_layout("coco_stuff")
    assert [pair.split for pair in list_pairs(tmp_path, layout).pairs] == ["train", "val"]
    labels = layout.labels
    assert labels.lookup[11] == labels.lookup[90] == labels.lookup[182] == -1
    assert labels.names[labels.lookup[12]] == "stop sign"
    assert labels.names[labels.lookup[89]] == "toothbrush"
    assert labels.names[labels.lookup[168]] == "tree"
    assert labels.names[labels.lookup[181]] == "wood"


class TestFolders:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for split in ("train", "val", "night"):
            put(tmp_path, f"images/{split}/sub/a.jpg", f"masks/{split}/sub/a.png")
        self.table(tmp_path, {"classes": [{"name": "field"}, {"name": "road", "value": [3, 4]}]})
        return tmp_path

    def table(self, root: Path, content: object, name: str = "labels.json") -> None:
        (root / name).write_text(json.dumps(content))

    def test_labels_come_from_the_table(self, root: Path):
        labels = get_layout("folders", root).labels
        assert labels.names == ("field", "road")
        assert labels.lookup[:5] == (0, -1, -1, 1, 1)
        assert labels.lookup[255] == 255
        assert len(set(labels.colors)) == 2
        assert labels.class_weights is None

    def test_yaml_names_everything(self, root: Path):
        (root / "labels.json").unlink()
        (root / "labels.yaml").write_text(
            "name: farm\nignore: [0]\nclasses:\n"
            "  - {name: field, value: 1, color: [10, 20, 30], weight: 0.5}\n"
            "  - {name: road, value: 2, color: [1, 2, 3], weight: 2}\n"
        )
        labels = get_layout("folders", root).labels
        assert labels.name == "farm"
        assert labels.colors == ((10, 20, 30), (1, 2, 3))
        assert labels.class_weights == (0.5, 2.0)
        assert labels.lookup[:3] == (255, 0, 1)

    def test_splits_are_the_folders_with_subfolders(self, root: Path):
        listing = list_pairs(root, get_layout("folders", root))
        assert listing.problems == ()
        assert [pair.split for pair in listing.pairs] == ["train", "val", "night"]
        assert listing.pairs[0] == Pair(
            "train", "sub/a", "images/train/sub/a.jpg", "masks/train/sub/a.png"
        )

    def test_a_split_on_one_side_only_is_a_problem(self, root: Path):
        put(root, "images/day/a.jpg")
        assert "masks/day missing" in list_pairs(root, get_layout("folders", root)).problems[0].text

    def test_the_folder_must_be_given(self):
        with pytest.raises(UserError, match=r"'folders'.*data\.path"):
            get_layout("folders")

    def test_a_missing_folder_is_named(self, tmp_path: Path):
        with pytest.raises(DataProblem, match=r"nothing, does not exist.*labels\.yaml"):
            get_layout("folders", tmp_path / "nothing")

    def test_a_missing_table_is_named(self, tmp_path: Path):
        with pytest.raises(DataProblem, match=r"no table of labels, expected one of labels\.yaml"):
            get_layout("folders", tmp_path)

    def test_two_tables_are_one_too_many(self, root: Path):
        self.table(root, {}, "labels.yml")
        with pytest.raises(DataProblem, match=r"labels\.yml and labels\.json, expected one"):
            get_layout("folders", root)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([], "table: "),
            ({"classes": []}, "classes: .*at least 1"),
            ({"classes": [{"nam": "a"}]}, r"classes\.0\.name: Field required; classes\.0\.nam: Ex"),
            ({"classes": [{"name": "a", "value": 256}]}, "'a' has mask value 256, expected 0..255"),
            ({"classes": [{"name": "a"}, {"name": "b", "value": 0}]}, "value 0 of class 'b' is"),
            (
                {"classes": [{"name": "a", "value": 255}], "ignore": [7, 255]},
                r"value 255 of class 'a' is used twice: it is in `ignore`.*`ignore: \[7\]`",
            ),
            ({"classes": [{"name": "a"}, {"name": "b", "value": 0}]}, "it is class 'a', too"),
            ({"classes": ["a", 2]}, r"classes\.1: 2 is no class, expected a name or .*quote"),
            ({"classes": [{"name": "a", "color": "red"}]}, "'red' is no color, expected .*#rrggbb"),
            ({"classes": [{"name": "a", "color": [[1, 2, 3], [4, 5, 6]]}]}, "has several colors"),
            ({"classes": ["road"]}, "one class only .'road'.*background"),
            ({"classes": [{"name": "a"}], "ignore": [-1]}, r"ignore holds \[-1\]"),
            ({"classes": [{"name": "a"}, {"name": "a"}]}, "names a class twice"),
            ({"classes": [{"name": "a", "weight": 1}, {"name": "b"}]}, "give all or none"),
        ],
    )
    def test_mistakes_in_the_table_are_explained(self, root: Path, content: object, message: str):
        self.table(root, content)
        with pytest.raises(DataProblem, match=rf"labels\.json.*{message}"):
            get_layout("folders", root)

    def test_a_table_that_is_no_yaml_is_refused(self, root: Path):
        (root / "labels.json").rename(root / "labels.yaml").write_text("a: [")
        with pytest.raises(DataProblem, match=r"labels\.yaml cannot be used"):
            get_layout("folders", root)

    @pytest.mark.parametrize(
        ("name", "text"),
        [("labels.yaml", "classes: " + "[" * 20_000), ("labels.json", "[" * 200_000)],
    )
    def test_a_table_of_endless_nesting_is_refused(self, root: Path, name: str, text: str):
        (root / "labels.json").rename(root / name).write_text(text)
        with pytest.raises(DataProblem, match=rf"{name} cannot be used \(.*recursion"):
            get_layout("folders", root)

    def test_a_table_that_is_no_file_or_too_large_is_named(self, root: Path):
        table = root / "labels.json"
        table.write_text(table.read_text() + " " * 2**20)
        with pytest.raises(UserError, match=r"labels\.json has 1\.0 MB, at most 1\.0 MB"):
            get_layout("folders", root)
        table.unlink()
        os.mkfifo(table)
        with pytest.raises(UserError, match=r"labels\.json is a named pipe"):
            get_layout("folders", root)


class TestFoldersOfAnyShape:
    """Other folder names, endings, lists instead of split folders, colors instead of numbers."""

    def tree(self, root: Path, table: str, *paths: str) -> Listing:
        (root / "labels.yaml").write_text(table)
        put(root, *paths)
        return list_pairs(root, get_layout("folders", root))

    def test_split_folders_may_be_anywhere_in_the_path(self, tmp_path: Path):
        listing = self.tree(
            tmp_path,
            "{classes: [a, b], images: SPLIT/rgb, masks: labels/SPLIT/ids}",
            *(f"{split}/rgb/1.jpg" for split in ("train", "val", "rain")),
            *(f"labels/{split}/ids/1.png" for split in ("train", "val", "rain")),
        )
        assert listing.problems == ()
        assert listing.pairs[2] == Pair("rain", "1", "rain/rgb/1.jpg", "labels/rain/ids/1.png")

    @pytest.mark.parametrize(
        ("images", "masks"),
        [
            ("SPLIT", "SPLITannot"),
            ("SPLIT_img", "SPLIT"),
            ("img-SPLIT-v1", "ids/SPLIT"),
            ("a/SPLIT/rgb", "a/SPLIT_ids/all"),
        ],
    )
    def test_split_may_be_part_of_a_folder_name(self, tmp_path: Path, images: str, masks: str):
        splits = ("train", "val", "rain")
        listing = self.tree(
            tmp_path,
            f"{{classes: [a, b], images: {images}, masks: {masks}}}",
            *(f"{images.replace('SPLIT', split)}/1.jpg" for split in splits),
            *(f"{masks.replace('SPLIT', split)}/1.png" for split in splits),
        )
        assert listing.problems == ()
        assert [pair.split for pair in listing.pairs] == list(splits)
        (tmp_path / masks.replace("SPLIT", "rain") / "1.png").unlink()
        (tmp_path / masks.replace("SPLIT", "rain")).rmdir()
        problems = list_pairs(tmp_path, get_layout("folders", tmp_path)).problems
        assert f"{masks.replace('SPLIT', 'rain')} missing" in problems[0].text

    def test_images_and_masks_may_lie_together_under_endings(self, tmp_path: Path):
        listing = self.tree(
            tmp_path,
            "{classes: [a, b], images: SPLIT, masks: SPLIT, image_ending: _rgb, "
            "mask_ending: _ids}",
            "train/1_ids.png", "train/1_rgb.jpg", "val/x/2_ids.png", "val/x/2_rgb.jpg",
        )  # fmt: skip
        assert listing.problems == ()
        assert listing.pairs == (
            Pair("train", "1", "train/1_rgb.jpg", "train/1_ids.png"),
            Pair("val", "x/2", "val/x/2_rgb.jpg", "val/x/2_ids.png"),
        )

    LISTS = "{classes: [a, b], images: rgb, masks: ids, lists: sets/SPLIT.txt}"

    def lists(self, root: Path, **texts: str) -> None:
        (root / "sets").mkdir()
        for split, text in texts.items():
            (root / "sets" / f"{split}.txt").write_text(text, encoding="utf-8")

    def test_lists_tell_the_splits_apart(self, tmp_path: Path):
        self.lists(tmp_path, train="a b\nsub/c.jpg\n", val="d\n\n", test="e\r\n")
        names = ("a b", "sub/c", "d", "e", "unused")
        listing = self.tree(
            tmp_path,
            self.LISTS,
            *(f"rgb/{name}.jpg" for name in names),
            *(f"ids/{name}.png" for name in names),
        )
        assert listing.problems == ()
        assert [(pair.split, pair.name) for pair in listing.pairs] == [
            ("train", "a b"), ("train", "sub/c"), ("val", "d"), ("test", "e"),
        ]  # fmt: skip

    def test_a_list_that_is_no_file_is_named(self, tmp_path: Path):
        self.lists(tmp_path, train="a", val="b")
        (tmp_path / "sets" / "train.txt").unlink()
        os.mkfifo(tmp_path / "sets" / "train.txt")
        (problem, *_) = self.tree(tmp_path, self.LISTS, "rgb/b.png", "ids/b.png").problems
        assert "train.txt is a named pipe" in problem.text

    def test_listed_names_that_are_not_there_and_missing_lists_are_named(self, tmp_path: Path):
        self.lists(tmp_path, train="a\nsub/z\nb\n")
        listing = self.tree(tmp_path, self.LISTS, "rgb/a.jpg", "ids/a.png", "rgb/b.jpg")
        assert "sets/val.txt missing" in str(listing.problems)
        assert "sets/val.txt" not in str(
            list_pairs(tmp_path, get_layout("folders", tmp_path), made=("val",)).problems
        )
        (tmp_path / "sets" / "val.txt").write_text("a")
        problems = list_pairs(tmp_path, get_layout("folders", tmp_path)).problems
        assert "sub/z of sets/train.txt has neither image nor mask in rgb and ids" in str(problems)
        assert "rgb/b.jpg has no mask" in str(problems)

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ("images: photos", "`lists` has to tell splits apart"),
            ("images: photos, lists: a.txt, masks: m", "`lists` needs SPLIT once"),
            ("lists: SPLIT.txt", "`lists` needs SPLIT once, and then images and masks have none"),
            ("images: ../SPLIT", "expected a path below the table's folder"),
            ("masks: /data/SPLIT", "expected a path below the table's folder"),
            ("masks: SPLIT/SPLIT", "expected SPLIT once"),
            ("encoding: rgb", "encoding: Input should be 'index' or 'color'"),
            ("encoding: color", "class 'a' has no color"),
            ("ignore: [[0, 0, 0]]", "ignore holds colors"),
        ],
    )
    def test_mistakes_in_the_table_are_explained(self, tmp_path: Path, table: str, message: str):
        with pytest.raises(DataProblem, match=rf"labels\.yaml.*{message}"):
            self.tree(tmp_path, f"{{classes: [{{name: a}}, {{name: b}}], {table}}}")

    def test_colors_are_classes(self, tmp_path: Path):
        self.tree(
            tmp_path,
            "encoding: color\nignore: [[0, 0, 0], [9, 9, 9]]\nclasses:\n"
            "  - {name: field, color: [10, 20, 30]}\n  - {name: road, color: [1, 2, 3]}\n",
        )
        labels = get_layout("folders", tmp_path).labels
        assert set(labels.lookup) == {(10, 20, 30, 0), (1, 2, 3, 1), (0, 0, 0, 255), (9, 9, 9, 255)}
        assert labels.model_validate_json(labels.model_dump_json()) == labels

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("{name: a, color: [1, 1, 1]}, {name: b, color: [1, 1, 1]}", "of class 'b' is used"),
            ("{name: a, color: [1, 1, 1], value: 3}", "has a value, but the masks hold colors"),
            ("{name: a, color: [1, 1, 300]}", "0..255 each"),
            ("{name: a, color: [1, 1]}", r"classes\.0\.color"),
            ("{name: a, color: [0, 0, 0]}", "is that of a class and in ignore"),
        ],
    )
    def test_mistakes_in_colors_are_explained(self, tmp_path: Path, rows: str, message: str):
        with pytest.raises(DataProblem, match=message):
            self.tree(tmp_path, f"{{encoding: color, ignore: [[0, 0, 0]], classes: [{rows}]}}")


class TestLists:
    """What the lines of a list may look like; oracle: the pairs that whoever wrote it means."""

    TABLE = "{classes: [a, b], images: %s, masks: %s, lists: SPLIT.txt}"

    def tree(
        self, root: Path, lines: str, *paths: str, images: str = "images", masks: str = "masks"
    ) -> Listing:
        put(root, *paths, f"{images}/v.jpg", f"{masks}/v.png")
        (root / "train.txt").write_text(lines, encoding="utf-8")
        (root / "val.txt").write_text("v\n")
        (root / "labels.yaml").write_text(self.TABLE % (images, masks))
        listing = list_pairs(root, get_layout("folders", root))
        return listing._replace(pairs=tuple(p for p in listing.pairs if p.split == "train"))

    @pytest.mark.parametrize(
        "line", ["photo (2)", "photo.2", "photo 1.5", "photo.jpg.bak", "photo copy", "photo.v2.jpg"]
    )
    def test_a_name_without_files_is_not_taken_for_another(self, tmp_path: Path, line: str):
        listing = self.tree(
            tmp_path, f"{line}\nother\n",
            *(f"{folder}/{name}.{suffix}" for name in ("photo", "other")
              for folder, suffix in (("images", "jpg"), ("masks", "png"))),
        )  # fmt: skip
        assert [pair.name for pair in listing.pairs] == ["other"]
        (problem,) = listing.problems
        assert problem.text.startswith(line.removesuffix(".jpg"))
        assert "of train.txt has neither image nor mask" in problem.text

    @pytest.mark.parametrize("name", ["a (2)", "a.2", "a 1", "1", "a, b", "a.jpg copy"])
    def test_names_may_hold_blanks_and_dots(self, tmp_path: Path, name: str):
        for line in (name, f"{name}.jpg", f"images/{name}.jpg", f"/masks/{name}.png"):
            root = tmp_path / str(len(line))
            listing = self.tree(
                root, line, f"images/{name}.jpg", f"masks/{name}.png", "images/a.jpg", "masks/a.png"
            )
            assert listing.problems == ()
            assert [pair.name for pair in listing.pairs] == [name]

    @pytest.mark.parametrize(
        "line",
        [
            "images/x/1.jpg masks/y/2.png",
            "x/1.jpg y/2.png",
            "/images/x/1.jpg\t/masks/y/2.png",
            "./images/x/1.jpg, ./masks/y/2.png",
            "images/x/1.jpg;masks/y/2.png",
        ],
    )
    def test_two_columns_are_an_image_and_its_mask(self, tmp_path: Path, line: str):
        listing = self.tree(tmp_path, line, "images/x/1.jpg", "masks/y/2.png", "masks/x/1.png")
        assert listing.problems == ()
        assert listing.pairs == (Pair("train", "x/1", "images/x/1.jpg", "masks/y/2.png"),)

    def test_columns_with_blanks_in_the_names(self, tmp_path: Path):
        line = "my photo.jpg my mask 1.png"
        listing = self.tree(tmp_path, line, "images/my photo.jpg", "masks/my mask 1.png")
        assert listing.problems == ()
        assert listing.pairs[0].mask == "masks/my mask 1.png"

    def test_images_and_masks_below_one_root(self, tmp_path: Path):
        """RELLIS-3D: `00000/camera/f.jpg 00000/label_id/f.png`."""
        listing = self.tree(
            tmp_path,
            "00000/camera/f.jpg 00000/label_id/f.png\n00000/camera/g.jpg 00000/label_id/g.png\n",
            "00000/camera/f.jpg", "00000/label_id/f.png", "00000/camera/g.jpg",
            images=".", masks=".",
        )  # fmt: skip
        assert listing.pairs == (
            Pair("train", "00000/camera/f", "00000/camera/f.jpg", "00000/label_id/f.png"),
        )
        (problem,) = listing.problems
        assert "train.txt names 00000/camera/g.jpg 00000/label_id/g.png" in problem.text
        assert "there is no mask 00000/label_id/g.png" in problem.text

    def test_flags_behind_names_are_no_part_of_them(self, tmp_path: Path):
        paths = [f"{f}/{n}.{s}" for n in "ab" for f, s in (("images", "jpg"), ("masks", "png"))]
        listing = self.tree(tmp_path, "a  1\nb -1\n", *paths)
        assert [pair.name for pair in listing.pairs] == ["a", "b"]
        listing = self.tree(tmp_path, "a\nb 1\n", *paths)
        assert [pair.name for pair in listing.pairs] == ["a"]
        assert "b 1 of train.txt has neither" in listing.problems[0].text

    def test_paths_from_the_root_of_the_disk(self, tmp_path: Path):
        line = f"{tmp_path}/images/1.jpg {tmp_path}/masks/1.png"
        assert self.tree(tmp_path, line, "images/1.jpg", "masks/1.png").pairs[0].name == "1"

    def test_a_path_out_of_the_folder_is_not_followed(self, tmp_path: Path):
        put(tmp_path, "secret/1.jpg", "secret/1.png")
        listing = self.tree(tmp_path / "data", "../secret/1.jpg ../secret/1.png")
        assert "there is no image ../secret/1.jpg and no mask" in listing.problems[0].text

    def test_empty_lists_of_further_splits_are_passed_over(self, tmp_path: Path):
        (tmp_path / "default.txt").write_text("\n")
        (tmp_path / "._train.txt").write_bytes(b"\0\5\x16\7\xff")
        listing = self.tree(tmp_path, "1", "images/1.jpg", "masks/1.png")
        assert listing.problems == ()
        assert listing.warnings == ("Split 'default' is passed over: default.txt is empty.",)
        (tmp_path / "test.txt").write_text("")
        text = str(list_pairs(tmp_path, get_layout("folders", tmp_path)).problems)
        assert "split 'test' is empty" in text

    def test_other_names_of_the_splits(self, tmp_path: Path):
        self.tree(tmp_path, "1", "images/1.jpg", "masks/1.png")
        (tmp_path / "train.txt").rename(tmp_path / "training.txt")
        (tmp_path / "val.txt").rename(tmp_path / "valid.txt")
        listing = list_pairs(tmp_path, get_layout("folders", tmp_path))
        assert listing.problems == ()
        assert [pair.split for pair in listing.pairs] == ["train", "val"]


class TestOneFolder:
    """Images and masks in one folder, below one root, or the one below the other."""

    def tree(self, root: Path, table: str, *paths: str) -> Listing:
        put(root, *paths)
        (root / "labels.yaml").write_text(f"classes: [a, b]\n{table}\n")
        return list_pairs(root, get_layout("folders", root))

    def test_the_suffix_tells_them_apart(self, tmp_path: Path):
        listing = self.tree(
            tmp_path, "images: SPLIT\nmasks: SPLIT",
            "train/1.jpg", "train/1.png", "val/s/2.JPG", "val/s/2.png",
        )  # fmt: skip
        assert listing.problems == ()
        assert listing.pairs == (
            Pair("train", "1", "train/1.jpg", "train/1.png"),
            Pair("val", "s/2", "val/s/2.JPG", "val/s/2.png"),
        )

    @pytest.mark.parametrize("suffix", ["jpg", "png"])
    def test_an_ending_of_masks_tells_them_apart(self, tmp_path: Path, suffix: str):
        """Roboflow: `train/x.jpg`, `train/x_mask.png`, and `valid` for `val`."""
        listing = self.tree(
            tmp_path, "images: SPLIT\nmasks: SPLIT\nmask_ending: _mask",
            f"train/1.{suffix}", "train/1_mask.png", f"valid/2.{suffix}", "valid/2_mask.png",
        )  # fmt: skip
        assert listing.problems == ()
        assert listing.pairs == (
            Pair("train", "1", f"train/1.{suffix}", "train/1_mask.png"),
            Pair("val", "2", f"valid/2.{suffix}", "valid/2_mask.png"),
        )

    def test_an_ending_of_images_tells_them_apart(self, tmp_path: Path):
        listing = self.tree(
            tmp_path, "images: SPLIT\nmasks: SPLIT\nimage_ending: _rgb",
            *(f"{split}/1{end}.png" for split in ("train", "val") for end in ("_rgb", "")),
        )  # fmt: skip
        assert listing.problems == ()
        assert listing.pairs[0] == Pair("train", "1", "train/1_rgb.png", "train/1.png")

    def test_an_image_without_mask_is_not_called_a_mask(self, tmp_path: Path):
        listing = self.tree(
            tmp_path, "images: SPLIT\nmasks: SPLIT", "train/1.jpg", "val/2.jpg", "val/2.png"
        )
        assert [problem.text for problem in listing.problems] == [
            "train/1.jpg has no mask. Add it or remove the image."
        ]

    def test_masks_may_lie_below_the_images(self, tmp_path: Path):
        listing = self.tree(
            tmp_path, "images: SPLIT\nmasks: SPLIT/masks",
            *(f"{split}/{name}.png" for split in ("train", "val") for name in ("1", "masks/1")),
        )  # fmt: skip
        assert listing.problems == ()
        assert listing.pairs[0] == Pair("train", "1", "train/1.png", "train/masks/1.png")

    def test_without_splits_all_is_for_training(self, tmp_path: Path):
        listing = self.tree(
            tmp_path, "images: photos\nmasks: ann", "photos/1.jpg", "ann/1.png", "ann/2.png"
        )
        assert listing.pairs == (Pair("train", "1", "photos/1.jpg", "ann/1.png"),)
        assert [problem.file for problem in listing.problems] == ["ann/2.png", "val"]
        assert "no split 'val'" in listing.problems[1].text
        assert "data.val_fraction" in listing.problems[1].text


def test_litter_of_operating_systems_is_passed_over(tmp_path: Path):
    for split in ("train", "val"):
        put(tmp_path, f"images/{split}/a.jpg", f"masks/{split}/a.png", f"images/{split}/.a.jpg")
        put(tmp_path, f"images/{split}/@eaDir/a.jpg/thumb.jpg", f"images/{split}/._a.png")
        put(tmp_path, f"masks/{split}/__MACOSX/a.png")
        (tmp_path / "images" / split / ".DS_Store").write_bytes(b"x")
        (tmp_path / "images" / split / "Thumbs.db").write_bytes(b"x")
    put(tmp_path, "images/__MACOSX/._a.jpg", "masks/@eaDir/a.png")
    (tmp_path / "labels.yaml").write_text("classes: [a, b]")
    listing = list_pairs(tmp_path, get_layout("folders", tmp_path))
    assert listing.problems == listing.warnings == ()
    assert [pair.split for pair in listing.pairs] == ["train", "val"]


def test_litter_is_passed_over_by_fixed_layouts_too(tmp_path: Path):
    make_camvid(tmp_path, count=1)
    put(tmp_path, "train/__MACOSX/a.png", "__MACOSX/train/a.png")
    (tmp_path / "val" / "@eaDir").mkdir()
    assert list_pairs(tmp_path, CAMVID).problems == ()
    city = tmp_path / "city"
    for split in ("train", "val"):
        put(
            city,
            f"leftImg8bit/{split}/a/1_leftImg8bit.png",
            f"gtFine/{split}/a/1_gtFine_labelIds.png",
        )
        put(city, f"leftImg8bit/{split}/@eaDir/1_leftImg8bit.png")
    listing = list_pairs(city, get_layout("cityscapes"))
    assert (listing.problems, len(listing.pairs)) == ((), 2)


def test_names_alone_several_values_and_colors_and_hexadecimal_ones(tmp_path: Path):
    def labels(table: str) -> LabelSet:
        (tmp_path / "labels.yaml").write_text(table)
        return get_layout("folders", tmp_path).labels

    plain = labels("classes: [background, apple]")
    assert plain.names == ("background", "apple")
    assert plain.lookup == make_lookup({0: 0, 1: 1}, ignored=(255,))
    mixed = labels(
        "classes: [background, {name: fruit, value: [1, 4], color: '#Ff8000'}]\nignore: 9"
    )
    assert mixed.lookup == make_lookup({0: 0, 1: 1, 4: 1}, ignored=(9,))
    assert mixed.colors[1] == (255, 128, 0)
    colored = labels(
        "encoding: color\nignore: ['#000000', [1, 1, 1]]\nclasses:\n"
        "  - {name: a, color: [[10, 20, 30], '#0a141f']}\n  - {name: b, color: '#ffffff'}\n"
    )
    assert set(colored.lookup) == {
        (10, 20, 30, 0), (10, 20, 31, 0), (255, 255, 255, 1), (0, 0, 0, 255), (1, 1, 1, 255),
    }  # fmt: skip
    assert colored.colors == ((10, 20, 30), (255, 255, 255))


def test_a_class_of_the_value_255_is_not_ignored(tmp_path: Path):
    (tmp_path / "labels.yaml").write_text("classes: [background, {name: lesion, value: 255}]")
    layout = get_layout("folders", tmp_path)
    assert layout.labels.lookup == make_lookup({0: 0, 255: 1})
    assert layout.default_ignored == ()


def test_accents_count_as_equal_however_they_are_encoded(tmp_path: Path):
    make_camvid(tmp_path, count=1)
    (tmp_path / "train" / "train0.png").rename(tmp_path / "train" / "cafe\u0301.png")
    (tmp_path / "trainannot" / "train0.png").rename(tmp_path / "trainannot" / "caf\u00e9.png")
    listing = list_pairs(tmp_path, CAMVID)
    assert listing.problems == ()
    assert listing.pairs[0].name == "caf\u00e9"


def test_links_to_folders_are_followed_and_circles_end(tmp_path: Path):
    put(tmp_path, "disk/sub/a.jpg", "masks/train/sub/a.png", "images/val/b.jpg", "masks/val/b.png")
    (tmp_path / "images" / "train").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "sub" / "back").symlink_to(tmp_path / "disk")
    (tmp_path / "labels.yaml").write_text("classes: [a, b]")
    listing = list_pairs(tmp_path, get_layout("folders", tmp_path))
    assert listing.problems == ()
    assert [pair.name for pair in listing.pairs] == ["sub/a", "b"]


def test_the_table_in_the_documentation_is_a_valid_one(tmp_path: Path):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    example = text.partition("```yaml\n")[2].partition("```")[0]
    listing = TestFoldersOfAnyShape().tree(
        tmp_path,
        example,
        *(f"images/{split}/a.jpg" for split in ("train", "val")),
        *(f"masks/{split}/a.png" for split in ("train", "val")),
    )
    assert listing.problems == ()
    labels = get_layout("folders", tmp_path).labels
    assert (labels.name, labels.names, labels.class_weights) == (
        "farm",
        ("field", "road"),
        (0.5, 2),
    )
    assert labels.lookup[:8] == (255, 0, 1, -1, -1, -1, -1, 1)


@pytest.mark.parametrize(
    ("table", "paths", "pair"),
    [
        (
            "images: .\nmasks: .\nimage_ending: img\nmask_ending: label",
            ("x_json/img.png", "x_json/label.png", "x_json/label_viz.png"),
            ("x_json/img.png", "x_json/label.png"),
        ),
        (
            "images: JPEGImages\nmasks: SegmentationClass\nlists: ImageSets/Segmentation/SPLIT.txt",
            ("JPEGImages/a 1.5.jpg", "SegmentationClass/a 1.5.png", "SegmentationObject/a 1.5.png"),
            ("JPEGImages/a 1.5.jpg", "SegmentationClass/a 1.5.png"),
        ),
    ],
    ids=["labelme", "CVAT"],
)
def test_what_the_documentation_says_of_other_programs(
    tmp_path: Path, table: str, paths: tuple[str, ...], pair: tuple[str, str]
):
    put(tmp_path, *paths)
    (tmp_path / "labels.yaml").write_text(f"classes: [a, b]\n{table}\n")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a 1.5\n")
    (lists / "default.txt").write_text("")
    listing = list_pairs(tmp_path, get_layout("folders", tmp_path), made=("val",))
    assert listing.problems == ()
    assert [(found.image, found.mask) for found in listing.pairs] == [pair]


def place(root: Path, *paths: str) -> None:
    """Files of any name: listing does not look into them."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


class TestFilesThatAreNotRead:
    def make(self, root: Path) -> Path:
        (root / "labels.yaml").write_text("classes: [{name: a}, {name: b}]")
        place(
            root, *(f"{side}/{s}/0.png" for side in ("images", "masks") for s in ("train", "val"))
        )
        return root

    @pytest.mark.parametrize(
        ("image", "mask"),
        [("x.heic", "x.npy"), ("x.gif", "x.gif"), ("x.jp2", "x.jpg"), ("x.nii.gz", "x.nii.gz"),
         ("x", "x"), ("x.v1", "x.v2"), ("sub/x.gif", "sub/x.pgm")],
    )  # fmt: skip
    def test_a_pair_of_them_is_a_problem_that_names_both(
        self, tmp_path: Path, image: str, mask: str
    ):
        place(self.make(tmp_path), f"images/train/{image}", f"masks/train/{mask}")
        listing = list_pairs(tmp_path, get_layout("folders", tmp_path))
        (problem,) = listing.problems
        assert problem.file == f"images/train/{image}"
        assert f"images/train/{image}" in problem.text
        assert f"masks/train/{mask}" in problem.text
        assert not problem.blocks
        assert len(listing.pairs) == 2

    def test_of_fixed_layouts_and_lists_too(self, tmp_path: Path):
        root = make_camvid(tmp_path / "camvid", count=1)
        place(root, "train/x.heic", "trainannot/x.npy")
        (problem,) = list_pairs(root, CAMVID).problems
        assert "train/x.heic and its mask trainannot/x.npy are not read" in problem.text
        root = tmp_path / "lists"
        root.mkdir()
        (root / "labels.yaml").write_text(
            "{classes: [{name: a}, {name: b}], images: i, masks: m, lists: SPLIT.txt}"
        )
        place(root, "i/a.png", "m/a.png", "i/b.png", "m/b.png", "i/c.heic", "m/c.npy", "i/d.gif")
        (root / "train.txt").write_text("a\nc\n")
        (root / "val.txt").write_text("b\n")
        (problem,) = list_pairs(root, get_layout("folders", root)).problems
        assert "i/c.heic and its mask m/c.npy are not read" in problem.text

    def test_an_empty_split_says_what_lies_there(self, tmp_path: Path):
        root = self.make(tmp_path)
        for side in ("images", "masks"):
            (root / side / "train" / "0.png").unlink()
        place(root, "images/train/a.heic", "images/train/b.heic", "images/train/c.gif")
        place(root, "masks/train/a.npy", "masks/train/b.npy", "masks/train/c.npy")
        problems = list_pairs(root, get_layout("folders", root)).problems
        assert len(problems) == 4
        assert problems[0].blocks
        assert problems[0].text == (
            "split 'train' is empty: no images in images/train, only 2 .heic and 1 .gif files, "
            "which are not read."
        )

    def test_other_things_beside_images_are_no_pairs(self, tmp_path: Path):
        root = self.make(tmp_path)
        for side in ("images", "masks"):
            place(
                root, f"{side}/train/Thumbs.db", f"{side}/train/notes.txt", f"{side}/train/README"
            )
        place(root, "images/train/0.json", "masks/train/0.xml")
        assert list_pairs(root, get_layout("folders", root)).problems == ()

    def test_a_good_pair_may_have_another_file_of_its_name(self, tmp_path: Path):
        root = self.make(tmp_path)
        place(root, "images/train/0.heic", "masks/train/0.npy")
        assert list_pairs(root, get_layout("folders", root)).problems == ()


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
class TestNamesThatAreNotUtf8:
    def make(self, root: Path) -> Path:
        return make_camvid(root, count=2)

    def rename(self, root: Path, path: str) -> None:
        place = os.fsencode(root / path)
        os.rename(place, place.replace(b"train0", b"stra\xdfe"))

    def test_are_problems_that_can_be_written(self, tmp_path: Path):
        root = self.make(tmp_path)
        self.rename(root, "train/train0.png")
        self.rename(root, "trainannot/train0.png")
        listing = list_pairs(root, CAMVID)
        assert [problem.file for problem in listing.problems] == [
            r"train/stra\xdfe.png", r"trainannot/stra\xdfe.png",
        ]  # fmt: skip
        assert listing.problems[0].text == (
            r"the name of train/stra\xdfe.png is not UTF-8 text, as names have to be. Rename it."
        )
        assert not any(problem.blocks for problem in listing.problems)
        json.dumps(listing.problems, ensure_ascii=False).encode()
        assert len(listing.pairs) == 5

    def test_folders_and_splits_are_named_as_well(self, tmp_path: Path):
        (tmp_path / "labels.yaml").write_text("classes: [{name: a}, {name: b}]")
        for side in ("images", "masks"):
            place(
                tmp_path, f"{side}/train/a.png", f"{side}/val/b.png", f"{side}/train/train0/c.png"
            )
            place(tmp_path, f"{side}/train0/d.png")
            self.rename(tmp_path, f"{side}/train/train0")
            self.rename(tmp_path, f"{side}/train0")
        listing = list_pairs(tmp_path, get_layout("folders", tmp_path))
        assert {problem.file for problem in listing.problems} == {
            r"images/stra\xdfe", r"masks/stra\xdfe",
            r"images/train/stra\xdfe", r"masks/train/stra\xdfe",
        }  # fmt: skip
        assert [pair.name for pair in listing.pairs] == ["a", "b"]

    def test_of_lists_and_of_the_folder_itself(self, tmp_path: Path):
        (tmp_path / "labels.yaml").write_text(
            "{classes: [{name: a}, {name: b}], images: i, masks: m, lists: SPLIT.txt}"
        )
        place(tmp_path, "i/a.png", "m/a.png")
        for name in ("train", "val", "train0"):
            (tmp_path / f"{name}.txt").write_text("a\n")
        self.rename(tmp_path, "train0.txt")
        problems = list_pairs(tmp_path, get_layout("folders", tmp_path)).problems
        assert [problem.file for problem in problems] == [r"stra\xdfe.txt"]
        (tmp_path / "train0").mkdir()
        self.rename(tmp_path, "train0")
        with pytest.raises(DataProblem, match=r"stra\\xdfe, is not UTF-8 text.*Rename"):
            list_pairs(Path(os.fsdecode(os.fsencode(tmp_path) + b"/stra\xdfe")), CAMVID)
