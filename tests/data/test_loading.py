from __future__ import annotations

import itertools
import pickle
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from rdd_pipeline.config import AugmentParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Sample, build_index, of_split
from rdd_pipeline.data.layouts import get_layout
from rdd_pipeline.data.loading import (
    Batch,
    Loader,
    rank_slots,
    sample_order,
    sample_plan,
)
from rdd_pipeline.data.reading import read_image, read_mask
from rdd_pipeline.data.sources import FileSource
from rdd_pipeline.errors import DataProblem, UserError

from .files import make_camvid, noise, save

CAMVID = get_layout("camvid")
LOOKUP = CAMVID.labels.lookup
AUGMENT = AugmentParams(crop=(12, 10))


@pytest.fixture
def samples(tmp_path: Path) -> tuple[Sample, ...]:
    make_camvid(tmp_path, count=5, size=(14, 18))
    return of_split(build_index(tmp_path, CAMVID).samples, "train")


def batches(samples: tuple[Sample, ...], root: Path, **changes: object) -> list[Batch]:
    options: dict[str, Any] = {"augment": AUGMENT, "seed": 3, "batch_size": 4} | changes
    first, last = options.pop("first_iteration", 1), options.pop("last_iteration", 6)
    loader = {f.name: options.pop(f.name) for f in fields(Loader) if f.name in options}
    images = Images(root, samples, CAMVID.labels, options.pop("image_size", None))
    stream = images.training_batches(
        iterations=range(first, last + 1), loader=Loader(**loader), **options
    )
    return list(stream)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.iteration == b.iteration
        and torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("batch_size", [1, 4, 7, 12])
def test_each_epoch_shows_each_image_once(batch_size: int):
    order = [
        sample_order(0, iteration, slot, 10, batch_size)
        for iteration in range(1, 61)
        for slot in range(batch_size)
    ]
    epochs = [order[start : start + 10] for start in range(0, len(order) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_the_order_is_a_function_of_seed_iteration_and_slot():
    keys = list(itertools.product(range(1, 8), range(4)))
    forward = {key: sample_order(5, *key, 9, 4) for key in keys}
    assert all(sample_order(5, *key, 9, 4) == forward[key] for key in reversed(keys))
    assert any(sample_order(6, *key, 9, 4) != forward[key] for key in keys)


def test_slots_and_iterations_get_different_crops():
    plans = {sample_plan(0, it, slot, 100, 100, AUGMENT) for it in (1, 2, 3) for slot in range(4)}
    assert len(plans) == 12


def test_batches_hold_bytes_of_the_crop_size(samples: tuple[Sample, ...], tmp_path: Path):
    batch = batches(samples, tmp_path)[0]
    assert batch.iteration == 1
    assert batch.images.shape == (4, 3, 12, 10)
    assert batch.labels.shape == (4, 12, 10)
    assert batch.images.dtype == batch.labels.dtype == torch.uint8
    assert set(batch.labels.unique().tolist()) <= {*range(11), 255}


def test_training_goes_on_from_any_iteration(samples: tuple[Sample, ...], tmp_path: Path):
    whole = batches(samples, tmp_path)
    assert same(batches(samples, tmp_path, first_iteration=4), whole[3:])
    assert batches(samples, tmp_path, first_iteration=7) == []


def test_loader_processes_do_not_change_the_pixels(samples: tuple[Sample, ...], tmp_path: Path):
    assert same(batches(samples, tmp_path, workers=2), batches(samples, tmp_path))


def test_the_cache_does_not_change_the_pixels(samples: tuple[Sample, ...], tmp_path: Path):
    assert same(batches(samples, tmp_path, cache_bytes=0), batches(samples, tmp_path))


def test_the_global_random_state_is_neither_read_nor_changed(
    samples: tuple[Sample, ...], tmp_path: Path
):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = batches(samples, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(batches(samples, tmp_path), first)


COLORFUL = AugmentParams(crop=(12, 10), photometric=1.0)


def test_colors_change_only_the_images_and_only_when_asked(
    samples: tuple[Sample, ...], tmp_path: Path
):
    plain, colorful = batches(samples, tmp_path), batches(samples, tmp_path, augment=COLORFUL)
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(plain, colorful, strict=True))
    changed = [
        not torch.equal(one, other)
        for a, b in zip(plain, colorful, strict=True)
        for one, other in zip(a.images, b.images, strict=True)
    ]
    assert 15 <= sum(changed) <= 24  # each of four changes happens half of the time


@pytest.mark.parametrize("change", [{"workers": 1}, {"first_iteration": 4}])
def test_colors_follow_from_seed_iteration_and_slot(
    samples: tuple[Sample, ...], tmp_path: Path, change: dict[str, int]
):
    whole = batches(samples, tmp_path, augment=COLORFUL)
    again = batches(samples, tmp_path, augment=COLORFUL, **change)
    assert same(again, whole[change.get("first_iteration", 1) - 1 :])
    other = batches(samples, tmp_path, augment=COLORFUL, seed=4)
    assert not same(other, whole)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_shares_make_up_the_batch(
    samples: tuple[Sample, ...], tmp_path: Path, world_size: int
):
    shares = [
        batches(samples, tmp_path, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    joined = [
        Batch(
            parts[0].iteration,
            torch.cat([part.images for part in parts]),
            torch.cat([part.labels for part in parts]),
        )
        for parts in zip(*shares, strict=True)
    ]
    assert same(joined, batches(samples, tmp_path))


def test_more_ranks_than_slots_are_refused():
    with pytest.raises(UserError, match=r"batch_size \(2\) is smaller .*processes \(3\)"):
        rank_slots(2, 0, 3)
    assert [list(rank_slots(5, rank, 2)) for rank in (0, 1)] == [[0, 1], [2, 3, 4]]


def test_no_training_images_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no training images"):
        batches((), tmp_path)


def test_image_size_is_applied_before_the_crop(samples: tuple[Sample, ...], tmp_path: Path):
    augment = AugmentParams(crop=(7, 9), scale_min=1.0, scale_max=1.0, flip=0.0)
    batch = batches(
        samples, tmp_path, augment=augment, image_size=(7, 9), batch_size=1, last_iteration=1
    )[0]
    sample = samples[sample_order(3, 1, 0, 5, 1)]
    assert torch.equal(batch.images[0], read_image(tmp_path / sample.image, image_size=(7, 9)))
    mask = read_mask(tmp_path / sample.mask, LOOKUP, image_size=(7, 9))
    assert torch.equal(batch.labels[0], mask)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changed_since_the_index_is_named(
    samples: tuple[Sample, ...], tmp_path: Path, workers: int
):
    save(tmp_path / samples[2].image, noise(77, 14, 18, 3))
    with pytest.raises(DataProblem, match=r"train/train2\.png has changed .*data_ingestion"):
        batches(samples, tmp_path, workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanished_is_named_without_a_traceback(
    samples: tuple[Sample, ...], tmp_path: Path, workers: int
):
    (tmp_path / samples[1].mask).unlink()
    with pytest.raises(DataProblem, match=r"trainannot/train1\.png cannot be read") as caught:
        batches(samples, tmp_path, workers=workers)
    assert "Traceback" not in str(caught.value)


class TestFileSource:
    def source(self, samples: tuple[Sample, ...], root: Path, cache_bytes: int) -> FileSource:
        return FileSource(samples, root, lookup=LOOKUP, cache_bytes=cache_bytes)

    def test_reads_image_and_mask(self, samples: tuple[Sample, ...], tmp_path: Path):
        image, mask = self.source(samples, tmp_path, 0)[1]
        assert torch.equal(image, read_image(tmp_path / samples[1].image))
        assert torch.equal(mask, read_mask(tmp_path / samples[1].mask, LOOKUP))

    def test_decodes_once_while_it_fits(self, samples: tuple[Sample, ...], tmp_path: Path):
        source = self.source(samples, tmp_path, 10_000)
        first = source[0][0]
        assert source[0][0] is first

    def test_forgets_what_was_used_longest_ago(self, samples: tuple[Sample, ...], tmp_path: Path):
        size = 14 * 18 * 4
        source = self.source(samples, tmp_path, 2 * size)
        kept, forgotten = source[0][0], source[1][0]
        assert source[0][0] is kept
        source[2]
        assert source[0][0] is kept
        assert source[1][0] is not forgotten

    def test_keeps_nothing_larger_than_its_memory(
        self, samples: tuple[Sample, ...], tmp_path: Path
    ):
        source = self.source(samples, tmp_path, 100)
        assert source[0][0] is not source[0][0]

    def test_a_pickled_copy_begins_empty(self, samples: tuple[Sample, ...], tmp_path: Path):
        source = self.source(samples, tmp_path, 10_000)
        empty = len(pickle.dumps(source))
        source[0]
        assert len(pickle.dumps(source)) == empty
        assert torch.equal(pickle.loads(pickle.dumps(source))[0][0], source[0][0])


class TestEvaluation:
    def test_ranks_share_the_images_without_repeats(self, tmp_path: Path):
        make_camvid(tmp_path, count=7, splits=("train", "val"))
        chosen = of_split(build_index(tmp_path, CAMVID).samples, "val")
        seen = Counter(
            position
            for rank in range(3)
            for batch in Images(tmp_path, chosen, CAMVID.labels).evaluation_batches(
                2, Loader(rank=rank, world_size=3)
            )
            for position in batch.indices
        )
        assert seen == Counter(range(7))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_only_images_of_equal_size_share_a_batch(self, tmp_path: Path, workers: int):
        make_camvid(tmp_path, count=5)
        for number in (1, 3):
            save(tmp_path / "val" / f"val{number}.png", noise(50 + number, 9, 7, 3))
            save(tmp_path / "valannot" / f"val{number}.png", noise(number, 9, 7, high=12))
        chosen = of_split(build_index(tmp_path, CAMVID).samples, "val")
        got = list(
            Images(tmp_path, chosen, CAMVID.labels).evaluation_batches(2, Loader(workers=workers))
        )
        assert [batch.indices for batch in got] == [(0, 2), (4,), (1, 3)]
        for batch in got:
            for position, image, labels in zip(*batch, strict=True):
                assert torch.equal(image, read_image(tmp_path / chosen[position].image))
                assert torch.equal(labels, read_mask(tmp_path / chosen[position].mask, LOOKUP))

    def test_resized_images_keep_labels_at_their_own_size(
        self, samples: tuple[Sample, ...], tmp_path: Path
    ):
        images = Images(tmp_path, samples, CAMVID.labels, image_size=(7, 9))
        batch = next(images.evaluation_batches(3))
        assert batch.images.shape == (3, 3, 7, 9)
        assert batch.labels.shape == (3, 14, 18)

    def test_no_images_give_no_batches(self, tmp_path: Path):
        for workers in (0, 1):
            images = Images(tmp_path, (), CAMVID.labels)
            assert not list(images.evaluation_batches(2, Loader(workers=workers)))
