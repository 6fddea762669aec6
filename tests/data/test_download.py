"""Torchvision's own code with tiny archives: only the transfer itself is replaced."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from rdd_pipeline.config import DataParams
from rdd_pipeline.data import download as module
from rdd_pipeline.data.download import download_voc
from rdd_pipeline.data.index import check_images, of_split
from rdd_pipeline.data.layouts import LAYOUTS, Layout, get_layout, prepare
from rdd_pipeline.data.reading import read_mask
from rdd_pipeline.errors import DataProblem, UserError

from .files import noise, save

savemat = pytest.importorskip("scipy.io").savemat
SIZE = (6, 8)


def unpack_voc(target: Path) -> None:
    """Five images; `a` is in VOC's train, `b` in its val, the others have no mask there."""
    root = target / "VOCdevkit" / "VOC2012"
    for number, name in enumerate("abcde"):
        save(root / "JPEGImages" / f"{name}.jpg", noise(number, *SIZE, 3))
    for number, name in enumerate("ab"):
        mask = Image.fromarray(noise(number, *SIZE, high=21))
        mask.putpalette(list(range(63)))
        (root / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(root / "SegmentationClass" / f"{name}.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    for name, names in (("train", "a\n"), ("val", "b\n"), ("trainval", "a\nb\n")):
        (lists / f"{name}.txt").write_text(names)


def unpack_sbd(target: Path) -> None:
    """Masks of a and c in its train, of b and d in its val."""
    root = target / "benchmark_RELEASE" / "dataset"
    for folder in ("cls", "img", "inst"):
        (root / folder).mkdir(parents=True)
    for number, name in enumerate("abcd"):
        mask = noise(40 + number, *SIZE, high=21)
        savemat(root / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": mask}})
        save(root / "img" / f"{name}.jpg", noise(number, *SIZE, 3))
    (root / "train.txt").write_text("a\nc\n")
    (root / "val.txt").write_text("b\nd\n")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is downloaded: name of the archive and its checksum."""
    from torchvision.datasets import sbd, voc

    found: list[tuple[str, str]] = []

    def transfer(url: str, root: str, filename: str, md5: str) -> None:
        found.append((filename, md5))
        (unpack_voc if "VOC" in filename else unpack_sbd)(Path(root))

    monkeypatch.setattr(voc, "download_and_extract_archive", transfer)
    monkeypatch.setattr(sbd, "download_and_extract_archive", transfer)
    return found


def test_voc_with_the_masks_of_sbd_is_what_the_layout_reads(tmp_path: Path, asked):
    prepare(tmp_path / "voc", DataParams(layout="voc", download=True))
    assert [name for name, _ in asked] == ["VOCtrainval_11-May-2012.tar", "benchmark.tgz"]
    assert all(len(checksum) == 32 for _, checksum in asked)
    index = check_images(tmp_path / "voc", get_layout("voc"))
    assert index.problems == ()
    assert [s.name for s in of_split(index.samples, "train")] == ["a", "c", "d"]
    assert [s.name for s in of_split(index.samples, "val")] == ["b"]


def test_vocs_own_masks_come_before_those_of_sbd(tmp_path: Path, asked):
    download_voc(tmp_path)
    lookup = get_layout("voc").labels.lookup
    for name, seed in (("a", 0), ("c", 42), ("d", 43)):
        mask = read_mask(tmp_path / "SegmentationClassAug" / f"{name}.png", lookup)
        assert np.array_equal(mask.numpy(), noise(seed, *SIZE, high=21)), name
    assert not (tmp_path / "SegmentationClassAug" / "b.png").exists()


def test_nothing_is_left_beside_it_and_nothing_is_downloaded_twice(tmp_path: Path, asked):
    download_voc(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets"}
    download_voc(tmp_path)
    assert len(asked) == 2


def test_someones_own_folders_are_left_alone(tmp_path: Path, asked):
    (tmp_path / "JPEGImages").mkdir()
    download_voc(tmp_path)
    assert asked == []
    assert [path.name for path in tmp_path.iterdir()] == ["JPEGImages"]


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_an_interrupted_download_goes_on(
    tmp_path: Path, asked, monkeypatch: pytest.MonkeyPatch, after: int
):
    """Stopped at the move of each of VOC's folders, and at that of the finished masks."""
    real, moves = module.os.replace, []

    def stop(source: Path, target: Path) -> None:
        moves.append(target)
        if len(moves) == after:
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", stop)
        with pytest.raises(DataProblem, match=r"No space left .*goes on where it stopped"):
            download_voc(tmp_path / "part")
    download_voc(tmp_path / "part")
    download_voc(tmp_path / "whole")

    def contents(root: Path) -> dict[str, bytes]:
        paths = [path for path in root.rglob("*") if path.is_file()]
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}

    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_half_of_sbd_unpacked_is_no_obstacle(tmp_path: Path, asked):
    sbd = tmp_path / "download" / "sbd"
    unpack_sbd(sbd)
    shutil.move(sbd / "benchmark_RELEASE" / "dataset" / "cls", sbd)
    download_voc(tmp_path)
    assert len(list((tmp_path / "SegmentationClassAug").iterdir())) == 3


def test_without_a_network_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from torchvision.datasets import voc

    def fail(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(voc, "download_and_extract_archive", fail)
    with pytest.raises(
        DataProblem, match=r"cannot be downloaded into .*Name or service.*By hand: put VOCdevkit"
    ):
        prepare(tmp_path, DataParams(layout="voc", download=True))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "voc"])
def test_for_the_others_the_message_says_where_to_get_it_and_what_is_expected(
    tmp_path: Path, name: str
):
    with pytest.raises(UserError, match=rf"'{name}' cannot be downloaded .*Expected: ") as caught:
        prepare(tmp_path / "here", DataParams(layout=name, download=True))
    layout = LAYOUTS[name]
    if isinstance(layout, Layout):
        assert layout.expected in str(caught.value)
    assert str(tmp_path / "here") in str(caught.value)


def test_an_unknown_layout_names_the_choices(tmp_path: Path):
    with pytest.raises(UserError, match="Unknown layout 'vocc'"):
        prepare(tmp_path, DataParams(layout="vocc", download=True))
