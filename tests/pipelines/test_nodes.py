"""Node functions called directly: bad input is refused in one message, before any training."""

from __future__ import annotations

import io
import logging
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import rich
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from scipy import stats

from rdd_pipeline import commands as rdd_commands
from rdd_pipeline.commands import Session, remember_session
from rdd_pipeline.config import (
    AugmentParams,
    DataParams,
    EvaluationParams,
    MethodsParams,
    NetworkParams,
    OptimizerParams,
    RddParams,
    RecipeParams,
    SceneParams,
    TeacherParams,
    TrainerParams,
)
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import from_rows
from rdd_pipeline.data.labels import make_lookup
from rdd_pipeline.data.layouts import voc
from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.errors import DataProblem, UserError
from rdd_pipeline.networks import NetworkCheckpoint, network_from_params, save_checkpoint
from rdd_pipeline.pipelines import _training
from rdd_pipeline.pipelines._shared import from_project, images_root, rows_of
from rdd_pipeline.pipelines._summary import make_summarize_node
from rdd_pipeline.pipelines._training import draw_history, protocol_digest, score_network
from rdd_pipeline.pipelines.data_ingestion import nodes as ingestion
from rdd_pipeline.pipelines.data_ingestion.nodes import (
    index_images,
    inspect_images,
    pack_images,
    preview_images,
)
from rdd_pipeline.pipelines.distill_tse.nodes import draw_pixels
from rdd_pipeline.pipelines.evaluation.nodes import compare_methods, draw_comparison
from rdd_pipeline.pipelines.train_teacher.nodes import (
    check_networks,
    evaluate_teacher,
    train_teacher,
)
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.state import TrainState


@pytest.fixture(autouse=True)
def _no_session(monkeypatch):
    """Commands to paste carry the parameters of this process's last run, another test's too."""
    monkeypatch.setattr(rdd_commands, "_session", Session())


STUDENT = NetworkParams(name="fcn_test_efficientnet", width=8, output_stride=16)
TEACHER = NetworkParams(name="deeplabv3_test_efficientnet", width=8, output_stride=16)
RECIPE = RecipeParams(
    iterations=2,
    batch_size=2,
    validate_every=2,
    optimizer=OptimizerParams(lr=0.05),
    augment=AugmentParams(crop=(32, 32)),
)
CPU = TrainerParams(device="cpu", precision="float32")
FOLDER = DataParams(layout="camvid", workers=1)


class Ingested(NamedTuple):
    """What ingestion hands on."""

    images: Images
    index: pd.DataFrame
    statistics: pd.DataFrame
    tags: dict[str, str]
    report: str


def _write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def images(tmp_path) -> Path:
    """Three pairs for training, one each for validation and test, in CamVid's layout."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        for number in range(count):
            image = rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)
            mask = np.repeat(rng.integers(0, 12, (4, 5), dtype=np.uint8), 8, 0).repeat(8, 1)
            _write(tmp_path / "images" / split / f"{number}.png", image)
            _write(tmp_path / "images" / f"{split}annot" / f"{number}.png", mask)
    return tmp_path / "images"


def _ingest(images: Path, data: DataParams) -> Ingested:
    """The two nodes that make the index, one after the other as Kedro runs them."""
    cache = images.parent / "cache"
    inspection, statistics, _, report = inspect_images(images, cache, data)
    checked, index, tags = index_images(inspection, data)
    return Ingested(checked, index, statistics, tags, report)


@pytest.fixture
def ingested(images) -> Images:
    """The images, checked."""
    return _ingest(images, FOLDER).images


# ---- data_ingestion


def test_a_folder_becomes_an_index_statistics_and_tags(images):
    checked, index, statistics, tags, _ = _ingest(images, FOLDER)
    assert list(index["split"]) == ["train"] * 3 + ["val", "test"]
    assert checked.labels.names == CAMVID.names
    assert set(statistics["split"]) == {"train", "val", "test"}
    assert tags["images"] == "5"
    assert tags["layout"] == "camvid"


def test_the_index_survives_its_csv_file(images, tmp_path):
    checked, index, *_ = _ingest(images, FOLDER)
    index.to_csv(tmp_path / "index.csv", index=False)
    text = dict.fromkeys(("split", "name", "image_digest", "mask_digest"), str)
    again = pd.read_csv(tmp_path / "index.csv", dtype=text, keep_default_na=False)
    assert from_rows(rows_of(again)) == checked.samples  # names such as 0 stay text


def test_scenes_are_rendered_once(tmp_path):
    data = DataParams(
        layout="scenes",
        workers=1,
        scenes=SceneParams(train=1, val=1, test=1, height=48, width=64),
    )
    _ingest(tmp_path, data)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(times) == 6
    _ingest(tmp_path, data)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == times


def _remove(images: Path) -> None:
    (images / "trainannot" / "1.png").unlink()


def _shrink(images: Path) -> None:
    _write(images / "trainannot" / "1.png", np.zeros((16, 20), np.uint8))


def _spoil_label(images: Path) -> None:
    mask = np.zeros((32, 40), np.uint8)
    mask[3, 4] = 17
    _write(images / "valannot" / "0.png", mask)


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
        _ingest(images, FOLDER)


def test_all_bad_files_are_in_one_message(images):
    for fault in (_remove, _spoil_label, _truncate):
        fault(images)
    with pytest.raises(DataProblem, match="3 problems with the labeled images") as info:
        _ingest(images, FOLDER)
    for name in ("train/1.png", "valannot/0.png", "train/2.png"):
        assert name in str(info.value)


def test_a_missing_folder_and_a_wrong_layout_are_reported(tmp_path):
    with pytest.raises(DataProblem, match=r"gone, does not exist\. Expected: train/NAME"):
        _ingest(tmp_path / "gone", FOLDER)
    with pytest.raises(UserError, match=r"Unknown layout 'camvit'. Set `data\.layout`"):
        _ingest(tmp_path, DataParams(layout="camvit"))


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
    _, index, _, tags, report = _ingest(images, QUARANTINE)
    assert list(index["split"]) == ["train", "val", "test"]
    assert list(index["name"]) == ["0", "0", "0"]
    assert tags["image_problems"] == "2"
    assert "were left out" in report
    assert "2 problems: the images they are about are LEFT OUT, 3 are used" in caplog.text
    assert "train/1.png has no mask" in caplog.text
    whole = _ingest(images.parent / "images", QUARANTINE)
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
        _ingest(images, QUARANTINE)


def test_what_is_wrong_with_very_many_images_fits_a_log(images, caplog, monkeypatch):
    monkeypatch.setattr(ingestion, "LOGGED", 1)
    for fault in (_remove, _truncate):
        fault(images)
    with caplog.at_level(logging.WARNING):
        _ingest(images, QUARANTINE)
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
        if tag != "meta":
            self.open.append(tag)
        self.loads += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(" ".join(data.split()))


def test_the_report_is_one_page_that_needs_nothing_else(images):
    page = _Page(_ingest(images, FOLDER).report)
    assert page.open == []
    assert page.loads == []
    for text in ("None. Every image and mask was decoded", "40 x 32 (3)", "Bicyclist"):
        assert any(text in part for part in page.text), text


def test_shares_in_the_report_are_those_of_the_masks(images):
    report = _ingest(images, FOLDER).report
    masks = np.stack([np.asarray(Image.open(p)) for p in (images / "trainannot").iterdir()])
    sky = 100 * (masks == 0).sum() / (masks != 11).sum()
    row = next(part for part in report.split("<tr>") if "</span> Sky" in part)
    assert f"{sky:.3f} %" in row


def test_names_in_the_report_are_escaped(images):
    image = np.zeros((8, 8, 3), np.uint8)
    _write(images / "train" / "<script>alert(1)<!-- & 'x'.png", image)
    report = _see(images, FOLDER)[3]
    assert "<script>" not in report
    assert "&lt;script&gt;alert(1)&lt;!-- &amp; " in report
    _Page(report)


def test_the_same_image_in_two_splits_is_in_the_report_and_no_problem(images):
    (images / "test" / "0.png").write_bytes((images / "train" / "1.png").read_bytes())
    report = _ingest(images, FOLDER).report
    assert "test/0.png and train/1.png are the same image in two splits" in report


def test_warnings_are_in_log_and_report(images, caplog):
    exif = Image.Exif()
    exif[0x0112] = 3
    path = images / "train" / "0.png"
    Image.open(path).save(path, exif=exif)
    report = _ingest(images, FOLDER).report
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
        _write(images / "val" / f"{number}.png", np.zeros((*size, 3), np.uint8))
        _write(images / "valannot" / f"{number}.png", np.zeros(size, np.uint8))
    report = _see(images, FOLDER)[3]
    assert "and 1 more, in" in report
    assert "2 other sizes" in report


def test_a_split_made_of_training_images_is_in_log_report_and_tags(images, caplog):
    for folder in ("val", "valannot"):
        (images / folder / "0.png").unlink()
        (images / folder).rmdir()
    with pytest.raises(DataProblem, match=r"val and valannot missing.*data\.val_fraction"):
        _ingest(images, FOLDER)
    data = _change(FOLDER, val_fraction=0.34, split_seed=3)
    with caplog.at_level(logging.INFO):
        _, index, statistics, tags, report = _ingest(images, data)
    assert list(index["split"]) == ["train", "train", "val", "test"]
    assert list(statistics["split"].unique()) == ["train", "val", "test"]
    assert (tags["val_fraction"], tags["split_seed"]) == ("0.34", "3")
    said = "Of the training images 1 to 'val' (data.val_fraction=0.34) went, 2 are left"
    assert said in caplog.text
    assert said.replace("'", "&#39;") in report
    again = _ingest(images, data)
    assert again.index.equals(index)
    assert not {"val_fraction", "split_seed"} & _ingest_camvid_tags(images.parent / "other")


def _ingest_camvid_tags(root: Path) -> set[str]:
    for split in ("train", "val"):
        _write(root / split / "0.png", np.full((8, 8, 3), len(split), np.uint8))
        _write(root / f"{split}annot" / "0.png", np.eye(8, dtype=np.uint8))
    return set(_ingest(root, FOLDER).tags)


def test_splits_may_not_take_all_training_images():
    with pytest.raises(ValueError, match="leave no image for training"):
        DataParams(layout="camvid", val_fraction=0.5, test_fraction=0.5)


def test_labels_that_teach_nothing_stop_the_run_before_training(images):
    for path in (images / "trainannot").iterdir():
        _write(path, np.full((32, 40), 11, np.uint8))
    for data in (FOLDER, QUARANTINE):
        with pytest.raises(DataProblem, match="split 'train' has no labeled pixel"):
            _ingest(images, data)
    assert "split &#39;train&#39; has no labeled pixel" in _see(images, FOLDER)[3]


def test_training_images_of_one_class_stop_the_run(images):
    for path in (images / "trainannot").iterdir():
        _write(path, np.zeros((32, 40), np.uint8))
    with pytest.raises(DataProblem, match="holds one class only, 'Sky'; the 10 classes 'Building'"):
        _ingest(images, FOLDER)


# ---- packed cache


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
    packed = _pack(images, ingested, _change(FOLDER, cache=False))
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
        _pack(images, ingested, _change(FOLDER, cache=True))


def test_packs_that_are_there_need_no_room(images, ingested, monkeypatch):
    packed = _pack(images, ingested, FOLDER)
    _nearly_full(monkeypatch, 1 << 20)
    assert _pack(images, ingested, FOLDER) == packed
    assert _pack(images, ingested, _change(FOLDER, cache=True)) == packed


def test_a_disk_that_fills_up_while_packing(images, ingested, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    packed = _pack(images, ingested, FOLDER)
    assert packed["folder"] is None
    assert "No space left on device" in packed["note"]
    assert not list((images.parent / "cache").glob("*pack*"))
    with pytest.raises(DataProblem, match="No space left on device"):
        _pack(images, ingested, _change(FOLDER, cache=True))


def test_an_image_that_changed_since_stops_the_run_with_auto_too(images, ingested):
    _write(images / "train" / "1.png", np.zeros((32, 40, 3), np.uint8))
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
        _ingest(tmp_path / "voc", DataParams(layout="voc", download=True))
    assert asked == [tmp_path / "voc"]


def test_the_preview_shows_at_most_what_is_there(images, ingested):
    assert isinstance(preview_images(ingested), Figure)
    assert isinstance(preview_images(replace(ingested, image_size=(16, 24))), Figure)


def test_paths_of_users_start_at_the_project_and_know_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[tool.kedro]\npackage_name = "x"\n')
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert from_project(Path("weights/x.pth")) == tmp_path / "weights/x.pth"
    assert from_project(Path("~/x.pth")) == tmp_path / "home/x.pth"
    assert from_project(tmp_path / "x") == tmp_path / "x"
    assert (
        images_root(tmp_path / "raw", DataParams(layout="camvid", path=Path("mine")))
        == tmp_path / "mine"
    )
    assert images_root(tmp_path / "raw", DataParams(layout="camvid")) == tmp_path / "raw"


# ---- train_teacher


def _check(ingested, **change):
    return check_networks(
        images=ingested,
        **{
            "teacher": TeacherParams(network=TEACHER),
            "student": STUDENT,
            "teacher_recipe": RECIPE,
            "recipe": RECIPE,
            "rdd": RddParams(tfe_length=1, min_kept=0.1),
            "methods": MethodsParams(),
            "seed": 0,
            "seeds": 1,
            "trainer": CPU,
            **change,
        },
    )


def test_the_plan_counts_both_networks(ingested):
    plan = _check(ingested)
    for role, params in (("teacher", TEACHER), ("student", STUDENT)):
        network = network_from_params(params, num_classes=11)
        assert plan[role]["name"] == params.name
        assert plan[role]["trained_parameters"] == sum(p.numel() for p in network.parameters())
        network.auxiliary = None
        assert plan[role]["parameters"] == sum(p.numel() for p in network.parameters())
        assert plan[role]["stride"] == 16
        assert plan[role]["macs"] > 0


def _change(params, **fields):
    return params.model_copy(update=fields)


NO_AUXILIARY = TeacherParams(network=_change(TEACHER, auxiliary=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": _change(STUDENT, name="resnet18")}, "Unknown network 'resnet18'. Choose"),
        ({"student": _change(STUDENT, name="fcn_resnet1")}, "resnet1"),
        ({"student": _change(STUDENT, pretrained=Path("/gone.pth"))}, "gone.pth"),
        (
            {"teacher": TeacherParams(network=TEACHER, weights=Path("/gone.safetensors"))},
            "gone.safetensors",
        ),
        ({"recipe": _change(RECIPE, class_weights=True)}, "recipe.class_weights is on, but label"),
        ({"teacher_recipe": _change(RECIPE, class_weights=True)}, "teacher_recipe.class_weights"),
        ({"teacher_recipe": _change(RECIPE, batch_size=1)}, "batch_size of at least 2"),
        (
            {"student": TEACHER, "recipe": _change(RECIPE, batch_size=1)},
            "batch_size of at least 2",
        ),
        ({"rdd": RddParams(tfe_length=3)}, "rdd.tfe_length is 3 iterations, the run has 2"),
        (
            {"teacher": NO_AUXILIARY, "rdd": RddParams(tfe_length=2)},
            "TFE compares the teacher's two",
        ),
        ({"teacher": NO_AUXILIARY, "rdd": RddParams(annealed=True)}, "TFE compares the teacher"),
        ({"teacher": NO_AUXILIARY, "rdd": RddParams(tfe_length=0)}, "only the student has an aux"),
        ({"methods": MethodsParams(weights={"kdd": {}})}, "no method 'kdd'"),
        ({"methods": MethodsParams(weights={"kd": {"cwd": 1.0}})}, "but its losses are kd"),
        ({"methods": MethodsParams(options={"cwd": {"at": {}}})}, "but its losses are kd, cwd_log"),
        ({"methods": MethodsParams(weights={"tfe": {"kd": 1.0}})}, "say it of 'tse'"),
        ({"seeds": 0}, "no list, found 0"),
        ({"seeds": [1, 2]}, "params:seeds: it is the number of seeds"),
        ({"seed": -1}, r"params:seed: expected a whole number, 0 or more, found -1"),
        ({"trainer": TrainerParams(device="gpu")}, "trainer.device is 'gpu'; expected auto"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_trained(ingested, change, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        _check(ingested, **change)


def test_a_teacher_without_auxiliary_head_will_do_where_none_is_compared(ingested):
    student = _change(STUDENT, auxiliary=False)
    _check(ingested, teacher=NO_AUXILIARY, student=student, rdd=RddParams(tfe_length=0))


@pytest.fixture
def teacher_file(tmp_path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "teacher.safetensors"
    network = network_from_params(TEACHER, num_classes=11)
    save_checkpoint(
        NetworkCheckpoint.from_network(network, params=TEACHER, label_names=CAMVID.names), path
    )
    return path


def _other_classes(path: Path) -> None:
    network = network_from_params(TEACHER, num_classes=2)
    save_checkpoint(
        NetworkCheckpoint.from_network(network, params=TEACHER, label_names=("a", "b")), path
    )


def _other_labels(path: Path) -> None:
    network = network_from_params(TEACHER, num_classes=11)
    names = ("Air", *CAMVID.names[1:])
    save_checkpoint(
        NetworkCheckpoint.from_network(network, params=TEACHER, label_names=names), path
    )


def _text(path: Path) -> None:
    path.write_text("these are no weights")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_other_classes, "Teacher has 2 classes, the label set 11. Choose weights"),
        (_other_labels, "Class 0 is 'Air' for the teacher"),
        (_text, "teacher.safetensors"),
        (_cut, "teacher.safetensors"),
    ],
)
def test_a_teacher_file_that_does_not_fit_is_refused(ingested, teacher_file, fault, message):
    fault(teacher_file)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        _check(ingested, teacher=TeacherParams(network=TEACHER, weights=teacher_file))


def test_a_teacher_file_is_imported_evaluated_and_drawn_without_any_training(
    images, ingested, teacher_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(_training, "train", None)
    teacher = TeacherParams(network=TEACHER, weights=teacher_file)
    plan = _check(ingested, teacher=teacher)
    shared = {
        "images": ingested,
        "work_folder": tmp_path / "work",
        "trainer": CPU,
    }
    weights, history, training = train_teacher(
        **shared,
        network_plan=plan,
        teacher=teacher,
        teacher_recipe=RECIPE,
        rdd=RddParams(),
        methods=MethodsParams(),
        evaluation=EvaluationParams(),
        seed=0,
    )
    metrics, figure = evaluate_teacher(
        **shared, weights=weights, training=training, evaluation=EvaluationParams()
    )
    (metrics,) = metrics.values()
    assert isinstance(figure, Figure)
    assert metrics["about"]["method"] == "teacher"
    assert set(metrics["splits"]) == {"val", "test"}
    history.to_csv(tmp_path / "history.csv", index=False)
    assert isinstance(draw_history(pd.read_csv(tmp_path / "history.csv")), Figure)


# ---- scores


@pytest.fixture
def teacher() -> NetworkCheckpoint:
    torch.manual_seed(0)
    network = network_from_params(TEACHER, num_classes=11)
    return NetworkCheckpoint.from_network(network, params=TEACHER, label_names=CAMVID.names)


def test_scores_are_computed_once_and_looked_up_then(
    images, ingested, teacher, tmp_path, monkeypatch
):
    arguments = {
        "name": "teacher",
        "evaluation": EvaluationParams(splits=("val",)),
        "trainer": CPU,
        "comparison": "",
        "work_folder": tmp_path / "work",
    }
    first = score_network(teacher, ingested, **arguments)
    monkeypatch.setattr(_training, "score_splits", None)
    assert score_network(teacher, ingested, **arguments) == first
    others = [
        {"evaluation": EvaluationParams(splits=("val",), flip=True)},
        {"evaluation": EvaluationParams(splits=("val", "test"))},
    ]
    for other in others:
        with pytest.raises(TypeError):  # would be computed
            score_network(teacher, ingested, **{**arguments, **other})
    with pytest.raises(TypeError):
        score_network(teacher, replace(ingested, image_size=(16, 24)), **arguments)


def _confusion(network: NetworkCheckpoint, root: Path, samples, lookup: np.ndarray) -> np.ndarray:
    """Pixels by (label, prediction), counted by numpy."""
    counts = np.zeros((11, 11), int)
    model = network.build().eval()
    for sample in samples:
        image = torch.from_numpy(np.array(Image.open(root / sample.image))).permute(2, 0, 1)[None]
        labels = lookup[np.array(Image.open(root / sample.mask))]
        with torch.no_grad():
            logits = model(network.header.preprocessing.normalize(image)).logits
        logits = torch.nn.functional.interpolate(
            logits, size=labels.shape, mode="bilinear", align_corners=True
        )
        np.add.at(counts, (labels[labels < 11], logits[0].argmax(0).numpy()[labels < 11]), 1)
    return counts


def _lookup(train_ids: dict[int, int], ignored: tuple[int, ...] = (11,)) -> tuple[int, ...]:
    return make_lookup({**{raw: raw for raw in range(11)}, **train_ids}, ignored=ignored)


@pytest.mark.parametrize(
    "change",
    [
        {"lookup": _lookup({0: 3, 3: 0})},
        {"lookup": make_lookup({raw: raw for raw in range(10)}, ignored=(10, 11))},
        {"lookup": make_lookup({raw: min(raw, 10) for raw in range(12)})},
    ],
    ids=["values swapped", "class ignored", "ignored is a class"],
)
def test_masks_that_mean_something_else_are_scored_anew(
    images, ingested, teacher, tmp_path, change
):
    arguments = {
        "name": "teacher",
        "evaluation": EvaluationParams(splits=("val",)),
        "trainer": CPU,
        "comparison": "",
        "work_folder": tmp_path / "work",
    }
    before = score_network(teacher, ingested, **arguments)
    labels = CAMVID.model_copy(update=change)
    after = score_network(teacher, replace(ingested, labels=labels), **arguments)
    expected = _confusion(teacher, images, ingested.split("val").samples, np.array(labels.lookup))
    assert np.array_equal(after["splits"]["val"]["confusion"], expected)
    assert not np.array_equal(before["splits"]["val"]["confusion"], expected)
    assert after["about"]["data_digest"] != before["about"]["data_digest"]


def test_scores_are_looked_up_when_only_figures_change(
    images, ingested, teacher, tmp_path, monkeypatch
):
    arguments = {
        "name": "teacher",
        "evaluation": EvaluationParams(splits=("val",)),
        "trainer": CPU,
        "comparison": "",
        "work_folder": tmp_path / "work",
    }
    first = score_network(teacher, ingested, **arguments)
    monkeypatch.setattr(_training, "score_splits", None)
    painted = CAMVID.model_copy(update={"colors": CAMVID.colors[::-1], "name": "other"})
    assert score_network(teacher, replace(ingested, labels=painted), **arguments) == first


def test_splits_that_are_not_there_are_left_out_and_one_must_be_there(
    images, ingested, teacher, tmp_path
):
    arguments = {
        "name": "teacher",
        "trainer": CPU,
        "comparison": "",
        "work_folder": tmp_path,
    }
    metrics = score_network(
        teacher, ingested, evaluation=EvaluationParams(splits=("val", "later")), **arguments
    )
    assert set(metrics["splits"]) == {"val"}
    with pytest.raises(UserError, match="None of the splits later has images"):
        score_network(
            teacher, ingested, evaluation=EvaluationParams(splits=("later",)), **arguments
        )


def test_students_are_comparable_when_all_but_the_method_is_equal(ingested):
    def relabeled(**change) -> dict[str, Images]:
        return {"images": replace(ingested, labels=CAMVID.model_copy(update=change))}

    weighted = relabeled(class_weights=(1.0,) * 11)
    base = {
        "images": ingested,
        "student": STUDENT,
        "recipe": RECIPE,
        "methods": MethodsParams(),
        "evaluation": EvaluationParams(),
        "trainer": CPU,
    }
    key = protocol_digest(**base)
    for irrelevant in (
        {"evaluation": EvaluationParams(batch_size=1, figure_images=0)},
        relabeled(name="other", colors=CAMVID.colors[::-1]),
        weighted,  # the recipe does not use them
        {"methods": MethodsParams(weights={"cwd": {"cwd_logits": 2.0}})},
        {"trainer": _change(CPU, workers=0, threads=1)},
    ):
        assert protocol_digest(**{**base, **irrelevant}) == key
    for changed in (
        {"images": replace(ingested, samples=ingested.samples[1:])},
        relabeled(lookup=_lookup({}, ignored=(11, 12))),
        relabeled(names=CAMVID.names[::-1]),
        {"images": replace(ingested, image_size=(16, 16))},
        {"student": TEACHER},
        {"recipe": _change(RECIPE, iterations=3)},
        {"methods": MethodsParams(kd=5.0)},
        {"methods": MethodsParams(preset="reference_code")},
        {"evaluation": EvaluationParams(flip=True)},
        {"evaluation": EvaluationParams(scales=(0.5, 1.0))},
        {"trainer": _change(CPU, precision="bfloat16")},
    ):
        assert protocol_digest(**{**base, **changed}) != key, changed
    with_weights = {**base, "recipe": _change(RECIPE, class_weights=True)}
    assert protocol_digest(**{**with_weights, **weighted}) != protocol_digest(**with_weights)


def test_students_scored_with_other_labels_are_not_compared(images, ingested, teacher, tmp_path):
    """The same masks, once with class 10 and once with it ignored: two blocks, no gain."""
    ignored = make_lookup({raw: raw for raw in range(10)}, ignored=(10, 11))
    scored = {}
    for method, labels in (
        ("baseline", CAMVID),
        ("tse", CAMVID.model_copy(update={"lookup": ignored})),
        ("kd", CAMVID),
    ):
        relabeled = replace(ingested, labels=labels)
        key = protocol_digest(relabeled, STUDENT, RECIPE, MethodsParams(), EvaluationParams(), CPU)
        scored[method] = score_network(
            teacher,
            relabeled,
            name=method,
            evaluation=EvaluationParams(),
            trainer=CPU,
            comparison=key,
            work_folder=tmp_path / "work",
        )
    rows = compare_methods(list(scored.values()), EvaluationParams()).set_index("method")
    assert rows.loc["baseline", "protocol_digest"] == rows.loc["kd", "protocol_digest"]
    assert rows.loc["baseline", "protocol_digest"] != rows.loc["tse", "protocol_digest"]
    assert rows.loc["kd", "val_gain"] == 0.0
    assert math.isnan(rows.loc["tse", "val_gain"])
    everything = list(scored.values())
    text = make_summarize_node("distill_tse")(
        {"0": _metrics("teacher", 0.5, comparison="")}, everything, tmp_path, {"0": scored["tse"]}
    )
    assert "student alone" not in text
    assert "student by RDD" in text


# ---- results of RDD


def test_pixels_are_drawn_for_any_teacher_and_number_of_images(images, ingested, teacher):
    torch.manual_seed(1)
    student = NetworkCheckpoint.from_network(
        network_from_params(STUDENT, num_classes=11), params=STUDENT, label_names=CAMVID.names
    )
    blind = NetworkCheckpoint.from_network(
        network_from_params(NO_AUXILIARY.network, num_classes=11),
        params=NO_AUXILIARY.network,
        label_names=CAMVID.names,
    )
    for one, count, splits in (
        (teacher, 1, ("val",)),
        (teacher, 5, ("train",)),
        (blind, 1, ("val",)),
        (teacher, 0, ("val",)),
        (teacher, 1, ("later",)),
    ):
        figure = draw_pixels(
            ingested,
            {"0": one},
            {"0": student, "1": None},
            RddParams(min_kept=100),
            EvaluationParams(figure_images=count, splits=splits),
        )
        assert isinstance(figure, Figure)


def _metrics(method: str, miou: float, *, seed: str = "0", comparison: str = "c") -> dict:
    return {
        "about": {
            "method": method,
            "title": method.upper(),
            "network": f"net of {method}",
            "seed": seed,
            "protocol_digest": comparison,
            "data_digest": "d",
        },
        "splits": {"val": {"miou": miou}},
        "cost": {"parameters": 1_234_567, "macs": 5, "images_per_second": 10.0},
    }


TEACHER_METRICS = {"0": _metrics("teacher", 0.5, comparison="")}


def test_the_table_shows_the_student_alone_only_of_the_same_recipe_and_seed(tmp_path, capsys):
    summarize = make_summarize_node("distill_tse")
    teacher, student = TEACHER_METRICS, _metrics("tse", 0.4)
    others = [
        _metrics("baseline", 0.1, seed="1"),
        _metrics("baseline", 0.2, comparison="other"),
    ]
    text = summarize(teacher, [*others, student], tmp_path, {"0": student})
    assert "BASELINE" not in text
    assert "train the student alone" in capsys.readouterr().out
    text = summarize(teacher, [*others, _metrics("baseline", 0.3)], tmp_path, {"0": student})
    assert text.splitlines() == [
        "| network |  | parameters | val | vs. alone (val) |",
        "|---|---|---|---|---|",
        "| TEACHER | net of teacher | 1.23 M | 50.0 | – |",
        "| BASELINE | net of baseline | 1.23 M | 30.0 | – |",
        "| student by TSE | net of tse | 1.23 M | 40.0 | +10.0 |",
        "",
        "One seed: a difference may be chance, whichever way it points.",
    ]


def test_the_table_shows_everything_trained_alike_with_all_seeds_and_the_paired_interval(tmp_path):
    def of_seeds(method: str, *scores: float, **more: str) -> dict[str, dict]:
        return {str(i): _metrics(method, s, seed=str(i), **more) for i, s in enumerate(scores)}

    alone, student = of_seeds("baseline", 0.3, 0.4, 0.5), of_seeds("tse", 0.31, 0.44, 0.53)
    student["0"]["about"]["notes"] = ["class pole got no chosen pixels"]
    trained = [
        *of_seeds("cwd", 0.35, 0.45, 0.55).values(),
        *of_seeds("kd", 0.35, 0.45).values(),  # lacks a seed
        *of_seeds("at", 0.35, 0.45, 0.55, comparison="other").values(),
        *of_seeds("tfe", 0.2, 0.2, 0.2).values(),  # weights on the way
        *alone.values(),
    ]
    summarize = make_summarize_node("distill_tse")
    text = summarize(TEACHER_METRICS, trained, tmp_path, alone, student)
    rows = {line.split(" | ")[0]: line.split(" | ")[3:] for line in text.splitlines()}
    differences = np.array([1.0, 4.0, 3.0])
    half = stats.t.interval(0.95, 2, scale=stats.sem(differences))[1]
    assert [name for name in rows if name.startswith("| ")][1:] == [
        "| TEACHER",
        "| BASELINE",
        "| student by CWD",
        "| student by TSE",
    ]
    assert rows["| student by TSE"] == [
        "42.7 (11.1)",
        f"{differences.mean():+.1f} ± {half:.1f} n.s. |",
    ]
    assert rows["| student by CWD"] == ["45.0 (10.0)", "+5.0 ± 0.0 |"]
    assert "TSE: class pole got no chosen pixels (seed 0)" in text


@pytest.mark.parametrize(("width", "shown"), [(100, True), (60, False)])
def test_the_table_keeps_its_cells_whole_in_a_narrow_terminal(tmp_path, monkeypatch, width, shown):
    out = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=out, width=width))
    metrics = [_metrics("baseline", 0.3), _metrics("tse", 0.4)]
    metrics[1]["about"]["title"] = "RDD variant OR"
    by_seed = [{"0": result} for result in metrics]
    make_summarize_node("distill_tse")(TEACHER_METRICS, [], tmp_path, *by_seed)
    (line,) = [line for line in out.getvalue().splitlines() if "RDD variant OR" in line]
    assert ("net of tse" in line) is shown
    assert " ".join(line.replace("net of tse", "").split()).startswith("student by RDD variant OR")
    assert line.split()[-2:] == ["40.0", "+10.0"]
    assert "…" not in out.getvalue()


@pytest.mark.parametrize(
    ("pipeline", "trained", "commands"),
    [
        ("train_teacher", [], ["--pipeline=distill_tse"]),
        ("distill_tfe", ["tfe"], ["--pipeline=distill_tse"]),
        ("distill_tse", ["baseline", "tse"], ["params=seeds=3", "--pipeline=distill_baselines"]),
        ("distill_baselines", ["baseline", "kd"], ["=distill_tse", "--pipeline=evaluation"]),
        (
            "distill_rdd_plus",
            ["tse_cwd"],
            ["=distill_baselines --to-outputs=metrics_baseline", "=distill_tse", "=evaluation"],
        ),
        ("ablations", ["baseline", "rdd_or"], ["--pipeline=distill_tse", "=evaluation"]),
    ],
)
def test_every_pipeline_ends_with_its_table_and_a_next_step(
    tmp_path, capsys, pipeline, trained, commands
):
    metrics = [_metrics(method, 0.4) for method in trained]
    everything = [*TEACHER_METRICS.values(), *metrics]
    by_seed = [{"0": result} for result in metrics]
    text = make_summarize_node(pipeline)(TEACHER_METRICS, everything, tmp_path, *by_seed)
    assert text.count("| net of ") == 1 + len(trained)
    printed = [line for line in capsys.readouterr().out.splitlines() if ": kedro run" in line]
    assert len(printed) == len(commands)
    for line, command in zip(printed, commands, strict=True):
        assert command in line


def test_the_hint_is_a_command_of_this_session_in_one_line(tmp_path, capsys):
    student = _metrics("tse", 0.4)
    folder = "/data/a folder of a long name/" + "x" * 80
    remember_session(Session("fruit", {"data": {"path": folder}, "seeds": 1}))
    try:
        make_summarize_node("distill_tse")(TEACHER_METRICS, [student], tmp_path, {"0": student})
    finally:
        remember_session(Session())
    command = (
        "kedro run --pipeline=distill_baselines --env=fruit "
        f"'--params=data.path={folder},seeds=1' --to-outputs=metrics_baseline"
    )
    assert command in capsys.readouterr().out


# ---- evaluation


def test_nothing_trained_is_said_with_what_to_do():
    with pytest.raises(UserError, match=r"Nothing has been trained .* --pipeline=distill_tse"):
        compare_methods([], EvaluationParams())


def test_the_comparison_survives_its_csv_file_and_is_drawn(tmp_path, capsys):
    results = [
        _metrics("teacher", 0.9, comparison=""),
        *(_metrics("baseline", 0.5 + 0.1 * s, seed=str(s)) for s in range(2)),
        *(_metrics("tse", 0.6 + 0.1 * s, seed=str(s)) for s in range(2)),
    ]
    table = compare_methods(results, EvaluationParams())
    assert "60.00" not in capsys.readouterr().err
    table.to_csv(tmp_path / "t.csv", index=False)
    again = pd.read_csv(tmp_path / "t.csv")
    assert [row["method"] for row in rows_of(again)] == ["teacher", "tse", "baseline"]
    assert isinstance(draw_comparison(again), Figure)


def test_a_training_node_trains_what_its_parameters_say(images, ingested, tmp_path, monkeypatch):
    trainings = []

    def spy(training, trainer, on_log):
        trainings.append(training)
        return train(training, trainer, on_log=on_log)

    monkeypatch.setattr(_training, "train", spy)
    node = _training.make_train_node("baseline", "whole")
    assert node.__name__ == "train_baseline"
    weights, history, training = node(
        images=pack_images(ingested, images.parent / "cache", FOLDER)[0],
        work_folder=tmp_path / "work",
        method_plan={},
        student=STUDENT,
        recipe=RECIPE,
        rdd=RddParams(),
        methods=MethodsParams(),
        evaluation=EvaluationParams(),
        seed=5,
        seeds=1,
        trainer=CPU,
    )
    (spied,) = trainings
    job = spied.job
    assert list(training) == list(weights) == ["5"]
    assert training["5"]["notes"] == []
    assert (job.method, job.seed, job.precision) == ("baseline", 5, "float32")
    assert spied.images.root == images
    assert spied.images.packs == images.parent / "cache"
    assert weights["5"].header.provenance["seed"] == "5"
    assert list(history["iteration"])[-1] == 2
    assert training["5"]["cost"]["images_per_second"] > 0


def test_several_seeds_are_trained_scored_and_handed_on_side_by_side(images, ingested, tmp_path):
    """Each of them ends as it does in a run of its own; TSE goes on from its own TFE stage."""
    teacher = NetworkCheckpoint.from_network(
        network_from_params(TEACHER, num_classes=11), params=TEACHER, label_names=CAMVID.names
    )
    shared = {
        "images": ingested,
        "work_folder": tmp_path / "work",
        "student": STUDENT,
        "recipe": RECIPE,
        "trainer": CPU,
    }
    training = {
        **shared,
        "method_plan": {},
        "rdd": RddParams(tfe_length=2, min_kept=0.1),
        "methods": MethodsParams(),
        "evaluation": EvaluationParams(),
        "teacher_weights": {"0": teacher},
    }
    tfe = _training.make_train_node("tfe", "tfe", keep_state=True)
    tse = _training.make_train_node("tse", "tse")
    *_, states = tfe(**training, seed=4, seeds=2)
    assert {seed: state.iteration for seed, state in states.items()} == {"4": 1, "5": 1}
    weights, history, record = tse(**training, seed=4, seeds=2, initial_states=states)
    assert {s: w.header.provenance["seed"] for s, w in weights.items()} == {"4": "4", "5": "5"}
    assert set(history["seed"]) == {4, 5}

    # The same seed in a folder of its own, nothing to look up.
    training["work_folder"] = tmp_path / "other"
    *_, states = tfe(**training, seed=5, seeds=1)
    alone, *_ = tse(**training, seed=5, seeds=1, initial_states=states)
    assert alone["5"].digest() == weights["5"].digest() != weights["4"].digest()

    metrics, _ = _training.make_evaluate_node("tse")(
        **shared,
        weights=weights,
        training={**record, "4": {**record["4"], "notes": ["a note"]}},
        rdd=RddParams(mode="or"),
        methods=MethodsParams(),
        evaluation=EvaluationParams(),
    )
    assert record["4"]["notes"] == []
    about = {seed: result["about"] for seed, result in metrics.items()}
    assert {seed: one["seed"] for seed, one in about.items()} == {"4": "4", "5": "5"}
    assert [one["notes"] for one in about.values()] == [["a note"], []]
    assert {one["title"] for one in about.values()} == {"RDD variant OR"}
    assert about["4"]["protocol_digest"] == about["5"]["protocol_digest"]
    for result in metrics.values():
        assert set(result) == {"about", "cost", "splits"}
        assert result["cost"]["images_per_second"] > 0


def test_more_seeds_than_the_tfe_stage_was_run_with_are_refused(images, ingested, tmp_path):
    with pytest.raises(UserError, match="goes on from the state of stage `tfe`; none was given"):
        _training.make_train_node("tse", "tse")(
            images=ingested,
            work_folder=tmp_path,
            method_plan={},
            student=STUDENT,
            recipe=RECIPE,
            rdd=RddParams(tfe_length=2, min_kept=0.1),
            methods=MethodsParams(),
            evaluation=EvaluationParams(),
            seed=4,
            seeds=1,
            trainer=CPU,
            teacher_weights={
                "0": NetworkCheckpoint.from_network(
                    network_from_params(TEACHER, num_classes=11),
                    params=TEACHER,
                    label_names=CAMVID.names,
                )
            },
            initial_states={"0": TrainState()},
        )


@pytest.mark.parametrize("teacher_file", [False, True])
def test_a_method_is_checked_before_anything_is_trained(ingested, tmp_path, teacher_file):
    path = tmp_path / "teacher.safetensors"
    if teacher_file:  # its own architecture counts
        network = network_from_params(TEACHER, num_classes=11)
        save_checkpoint(
            NetworkCheckpoint.from_network(network, params=TEACHER, label_names=CAMVID.names), path
        )
    arguments = {
        "images": ingested,
        "network_plan": {},
        "teacher": TeacherParams(network=TEACHER, weights=path if teacher_file else None),
        "student": STUDENT,
        "recipe": RECIPE,
        "rdd": RddParams(tfe_length=1, min_kept=0.1),
        "methods": MethodsParams(weights={"cwd": {"cwd_logits": 2.0}}),
    }
    plan = _training.make_check_node("cwd")(**arguments)
    assert plan["weights"] == {"kd": 1.0, "cwd_logits": 2.0, "cwd_feature": 50.0}
    assert _training.make_check_node("rdd_or")(**arguments)["rdd"]["mode"] == "or"
    # The crop of this recipe is too small for a discriminator.
    with pytest.raises(UserError, match=r"'skd' cannot be trained\. .*at least 8 x 8 positions"):
        _training.make_check_node("skd")(**arguments)
    without = TeacherParams(network=_change(TEACHER, auxiliary=False))
    if not teacher_file:
        with pytest.raises(UserError, match="only the student has an auxiliary head"):
            _training.make_check_node("tse_cwd")(**{**arguments, "teacher": without})
