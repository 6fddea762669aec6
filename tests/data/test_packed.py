from __future__ import annotations

import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from rdd_pipeline.config import AugmentParams
from rdd_pipeline.data import packed as cache
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Sample, build_index, of_split
from rdd_pipeline.data.layouts import get_layout
from rdd_pipeline.data.loading import (
    TrainingSet,
    sample_order,
    sample_plan,
)
from rdd_pipeline.data.packed import PackedSource, pack_path, packed_bytes, write_pack
from rdd_pipeline.data.sources import FileSource
from rdd_pipeline.errors import DataProblem

from .files import make_camvid, noise, save

CAMVID = get_layout("camvid")
LOOKUP = CAMVID.labels.lookup
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def samples(tmp_path: Path) -> tuple[Sample, ...]:
    """Four images of 14 x 18 and one of 9 x 20."""
    make_camvid(tmp_path, count=5, size=(14, 18))
    save(tmp_path / "train" / "train3.png", noise(33, 9, 20, 3))
    save(tmp_path / "trainannot" / "train3.png", noise(33, 9, 20, high=12))
    return of_split(build_index(tmp_path, CAMVID).samples, "train")


def files(samples: tuple[Sample, ...], root: Path, **options: Any) -> FileSource:
    return FileSource(samples, root, **{"lookup": LOOKUP, **options})


def packed(
    samples: tuple[Sample, ...], root: Path, workers: int | None = None, **options: Any
) -> Path:
    return write_pack(files(samples, root, **options), root / "packs", workers=workers)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_pack_holds_what_the_files_decode_to(
    samples: tuple[Sample, ...], tmp_path: Path, workers: int
):
    source = files(samples, tmp_path)
    pack = PackedSource(packed(samples, tmp_path, workers=workers), source)
    assert len(pack) == 5
    for position in range(5):
        for got, want in zip(pack[position], source[position], strict=True):
            assert got.dtype == torch.uint8
            assert torch.equal(got, want)


def test_the_pack_is_as_large_as_announced(samples: tuple[Sample, ...], tmp_path: Path):
    assert packed(samples, tmp_path).stat().st_size == packed_bytes(files(samples, tmp_path))
    small = packed(samples, tmp_path, image_size=(7, 9))
    assert small.stat().st_size == packed_bytes(files(samples, tmp_path, image_size=(7, 9)))


def test_training_batches_are_the_same_from_pack_and_files(
    samples: tuple[Sample, ...], tmp_path: Path
):
    def batches(pack: Path | None, image_size: tuple[int, int] | None) -> list[torch.Tensor]:
        folder = None if pack is None else pack.parent
        stream = Images(tmp_path, samples, CAMVID.labels, image_size, folder).training_batches(
            AugmentParams(crop=(12, 10)), seed=1, batch_size=3, iterations=range(1, 7)
        )
        return [tensor for batch in stream for tensor in (batch.images, batch.labels)]

    for size in (None, (11, 13)):
        pack = packed(samples, tmp_path, image_size=size)
        pairs = zip(batches(pack, size), batches(None, size), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_evaluation_batches_are_the_same_from_pack_and_files(
    samples: tuple[Sample, ...], tmp_path: Path
):
    pack = packed(samples, tmp_path)
    both = [
        list(Images(tmp_path, samples, CAMVID.labels, (7, 9), folder).evaluation_batches(2))
        for folder in (pack.parent, None)
    ]
    for one, other in zip(*both, strict=True):
        assert one.indices == other.indices
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_a_pack_that_is_there_is_not_written_again(samples: tuple[Sample, ...], tmp_path: Path):
    path = packed(samples, tmp_path)
    shutil.rmtree(tmp_path / "train")
    before = path.stat().st_mtime_ns
    assert packed(samples, tmp_path) == path
    assert path.stat().st_mtime_ns == before


def test_contents_labels_sizes_and_order_have_packs_of_their_own(
    samples: tuple[Sample, ...], tmp_path: Path
):
    def path(chosen: tuple[Sample, ...] = samples, **changes: object) -> Path:
        return pack_path(files(chosen, tmp_path, **changes), tmp_path)

    paths = {
        path(),
        path(samples[::-1]),
        path(samples[:4]),
        path((samples[0]._replace(mask_digest="0"), *samples[1:])),
        path(lookup=(*LOOKUP[:-1], 255)),
        path(image_size=(4, 4)),
    }
    assert len(paths) == 6
    assert path((samples[0]._replace(image="elsewhere.png"), *samples[1:])) == path()


def test_using_a_pack_does_not_change_the_file(samples: tuple[Sample, ...], tmp_path: Path):
    path = packed(samples, tmp_path)
    before = path.read_bytes()
    pack = PackedSource(path, files(samples, tmp_path))
    pack[0][0].zero_()
    del pack
    assert path.read_bytes() == before


def test_a_pickled_copy_opens_the_file_itself(samples: tuple[Sample, ...], tmp_path: Path):
    pack = PackedSource(packed(samples, tmp_path), files(samples, tmp_path))
    data = pickle.dumps(pack)
    assert len(data) < 20_000
    assert torch.equal(pickle.loads(data)[2][0], pack[2][0])


def test_a_damaged_image_is_read_from_its_files(
    samples: tuple[Sample, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = packed(samples, tmp_path)
    good = path.read_bytes()
    data = bytearray(good)
    data[-3] ^= 1
    path.write_bytes(data)
    pack = PackedSource(path, files(samples, tmp_path))
    for position in range(5):
        assert torch.equal(pack[position][1], files(samples, tmp_path)[position][1])
    assert [record.args[0] for record in caplog.records if record.args] == [4]  # type: ignore[index]
    for _ in range(2):  # mended once
        assert packed(samples, tmp_path) == path
        assert path.read_bytes() == good
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["truncated", "header", "magic", "empty", "renamed"])
def test_a_damaged_pack_is_refused_and_made_again(
    samples: tuple[Sample, ...], tmp_path: Path, damage: str
):
    path = packed(samples, tmp_path)
    good = path.read_bytes()
    source = files(samples, tmp_path)
    if damage == "renamed":
        other = packed(samples[:4], tmp_path)
        path.write_bytes(other.read_bytes())
    else:
        bad = {
            "truncated": good[:-100],
            "header": good[:30] + bytes([good[30] ^ 1]) + good[31:],
            "magic": b"X" + good[1:],
            "empty": b"",
        }[damage]
        path.write_bytes(bad)
    with pytest.raises(DataProblem, match=r"\.pack cannot be used .*Remove it"):
        PackedSource(path, source)
    assert packed(samples, tmp_path) == path
    assert path.read_bytes() == good


def test_a_pack_of_another_number_of_images_is_refused(samples: tuple[Sample, ...], tmp_path: Path):
    path = packed(samples, tmp_path)
    with pytest.raises(DataProblem, match="holds 5 images, expected 4"):
        PackedSource(path, files(samples[:4], tmp_path))


def test_interrupted_packing_leaves_nothing(samples: tuple[Sample, ...], tmp_path: Path):
    (tmp_path / samples[3].image).unlink()
    with pytest.raises(DataProblem, match=r"train3\.png cannot be read"):
        packed(samples, tmp_path)
    assert list((tmp_path / "packs").iterdir()) == []


def test_what_a_killed_process_left_is_removed_but_not_what_another_one_writes(
    samples: tuple[Sample, ...], tmp_path: Path
):
    old, young = (
        tmp_path / "packs" / f"train_x.pack.{name}.tmp" for name in ("0123abcd", "0123abce")
    )
    old.parent.mkdir()
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    packed(samples, tmp_path)
    assert [path.exists() for path in (old, young)] == [False, True]


def test_too_little_space_is_said_before_anything_is_written(
    samples: tuple[Sample, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: Usage(1 << 40, 1 << 40, 1 << 20))
    with pytest.raises(DataProblem, match=r"needs 0\.0 GiB .*only 0\.0 GiB.*cache off"):
        packed(samples, tmp_path)
    assert list((tmp_path / "packs").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(samples: tuple[Sample, ...], tmp_path: Path):
    (tmp_path / "packs").touch()
    with pytest.raises(DataProblem, match=r"packs.*cannot be written .*cache off"):
        packed(samples, tmp_path)


def test_no_samples_make_an_empty_pack(tmp_path: Path):
    assert len(PackedSource(packed((), tmp_path), files((), tmp_path))) == 0


def test_crops_of_the_pack_equal_resizing_whole_images_then_cropping(tmp_path: Path):
    """The hot path against torchvision's resize of the whole image.

    Images may differ by 2 gray levels in 0.1 % of the pixels: both compute in fixed point with
    weights rounded to a few bits, and a window's weights are rounded apart from the whole image's.
    Labels are exact; the reference picks the source pixel under each center in exact arithmetic.
    """
    make_camvid(tmp_path, count=4, size=(150, 210))
    for number in range(4):  # Shapes besides noise: what resizing errors show in most.
        large = np.kron(noise(number, 15, 21, 3), np.ones((10, 10, 1), np.uint8))
        save(tmp_path / "train" / f"train{number}.png", large // 2 + noise(9, 150, 210, 3) // 2)
    chosen = of_split(build_index(tmp_path, CAMVID).samples, "train")
    pack = PackedSource(packed(chosen, tmp_path), files(chosen, tmp_path))
    augment = AugmentParams(crop=(90, 120), flip=0.0)
    dataset = TrainingSet(pack, augment=augment, seed=0, batch_size=4)
    differences, count = [], 0
    for iteration in range(1, 33):
        for slot in range(4):
            got, labels = dataset[iteration, slot]
            image, mask = files(chosen, tmp_path)[sample_order(0, iteration, slot, 4, 4)]
            plan = sample_plan(0, iteration, slot, 150, 210, augment)
            size = [int(150 * plan.scale), int(210 * plan.scale)]
            whole = TF.resize(image, size, antialias=True)
            rows = [int((2 * y + 1) / (2 * plan.scale)) for y in range(size[0])]
            columns = [int((2 * x + 1) / (2 * plan.scale)) for x in range(size[1])]
            height, width = min(90, size[0]), min(120, size[1])
            part = np.s_[..., plan.top : plan.top + height, plan.left : plan.left + width]
            differences.append((got[:, :height, :width].int() - whole[part].int()).abs().flatten())
            assert torch.equal(labels[:height, :width], mask[rows][:, columns][part])
            count += 1
    assert count == 128
    all_of_them = torch.cat(differences)
    assert (all_of_them <= 2).double().mean() >= 0.999
    assert all_of_them.max() <= 3
