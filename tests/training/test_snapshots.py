"""Predictions that are kept over a run: small, and of no effect on it.

That they are the same after a stop, in two stages, beside others and under several processes is in
`tests.equal.same_training`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rdd_pipeline.config import RecipeParams
from rdd_pipeline.evaluation.predict import predict_labels
from rdd_pipeline.training import loop
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.snapshots import SIDE, _small, moments, with_snapshot
from rdd_pipeline.training.state import TrainState, digest
from rdd_pipeline.training.training import Training

from .conftest import CPU


@pytest.mark.parametrize(
    ("iterations", "every", "expected"),
    [
        (8, 4, [4, 8]),
        (10, 4, [4, 8, 10]),
        (3, 10, [3]),
        (100, 10, [10, 30, 50, 80, 100]),
        (50, 10, [10, 20, 30, 40, 50]),
    ],
)
def test_moments_are_validations_with_the_first_and_the_last(iterations, every, expected):
    assert moments(RecipeParams(iterations=iterations, validate_every=every)) == expected


@pytest.mark.parametrize("size", [(1024, 2048), (2000, 30), (40, 48), (1, 5000)])
def test_maps_are_small_and_keep_their_proportions(size):
    small = _small(*size)
    assert max(small) <= max(min(SIDE, max(size)), 1)
    assert min(small) >= 1
    assert abs(small[0] / small[1] - size[0] / size[1]) < max(size) / min(size) / 2


def test_a_snapshot_that_is_taken_again_replaces_its_former_self():
    first, second = ({"iteration": step, "maps": {"a": torch.ones(1)}} for step in (4, 8))
    again = {"iteration": 4, "maps": {"a": torch.zeros(1)}}
    assert with_snapshot(None, first) == [first]
    assert with_snapshot([first], second) == [first, second]
    assert with_snapshot([first, second], again) == [again]


def test_they_are_what_the_network_predicts_and_change_nothing(
    make_job, blocks, teacher, monkeypatch
):
    training = Training(make_job("tse"), blocks.images, teacher)
    result = train(training, CPU)
    kept = result.state.snapshots
    assert [one["iteration"] for one in kept] == [4, 8]
    network = replace(result.network, tensors=result.state.student).build()
    val = blocks.images.split("val")
    for sample in val.samples:
        image, label = val.read(sample)
        with torch.inference_mode():
            (expected,) = predict_labels(
                network, result.network.header.preprocessing, image[None], sizes=[label.shape]
            )
        found = kept[-1]["maps"][sample.name]
        assert found.dtype == torch.uint8
        assert torch.equal(found.long(), expected)
    monkeypatch.setattr(loop.Trainer, "_take_snapshot", lambda self: None)
    without = train(training, CPU)
    assert without.state.snapshots is None
    assert without.state.digest() == result.state.digest()
    assert without.network.digest() == result.network.digest()
    assert without.fingerprint == result.fingerprint


def test_states_with_and_without_them_are_read_back():
    kept = [{"iteration": 4, "maps": {"a": torch.ones(2, 3, dtype=torch.uint8)}}]
    for snapshots in (kept, None):
        state = TrainState(iteration=4, snapshots=snapshots)
        assert ("snapshots" in state.to_dict()) == (snapshots is not None)
        assert digest(TrainState.from_bytes(state.to_bytes()).snapshots) == digest(snapshots)
        assert state.digest() == TrainState(iteration=4).digest()


def test_without_a_validation_split_nothing_is_kept(make_job, blocks):
    images = replace(blocks.images, samples=blocks.images.split("train").samples)
    result = train(Training(make_job("baseline"), images), CPU)
    assert result.state.snapshots is None
