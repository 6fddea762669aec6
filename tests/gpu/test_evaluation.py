"""Evaluation on a GPU counts what the CPU counts."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.evaluation.confusion import Scores, confusion_matrix
from rdd_pipeline.evaluation.predict import evaluate
from rdd_pipeline.networks import Preprocessing, build_network

pytestmark = pytest.mark.gpu

CLASSES = 7
PASSES = {
    "plain": {},
    "flip": {"flip": True},
    "scales": {"scales": (0.75, 1.0, 1.25), "flip": True},
    "logits": {"scales": (1.0, 1.5), "average": "logits"},
    "windows": {"window": (48, 40), "overlap": 0.5},
}


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor


def _batches() -> list[Batch]:
    """Images of two sizes; labels have a size of their own, some are ignored."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for size, labels_size in (((96, 128), (96, 128)), ((65, 97), (130, 191))):
        images = torch.randint(0, 256, (3, 3, *size), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, CLASSES, (3, *labels_size), generator=generator)
        labels[:, :9] = 255
        batches.append(Batch(images, labels.to(torch.uint8)))
    return batches


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_network("deeplabv3_test_resnet", num_classes=CLASSES, width=16)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("preprocessing", ["imagenet", "caffe_bgr"])
def test_the_confusion_matrix_is_that_of_the_cpu(network, passes, preprocessing, device):
    found, expected = (
        evaluate(
            network.to(place),
            getattr(Preprocessing, preprocessing)(),
            _batches(),
            num_classes=CLASSES,
            **PASSES[passes],
        )
        for place in (device, torch.device("cpu"))
    )
    pixels = sum(int((batch.labels != 255).sum()) for batch in _batches())
    assert int(found.sum()) == int(expected.sum()) == pixels
    assert torch.equal(found.sum(1), expected.sum(1))
    moved = int((found - expected).abs().sum()) // 2
    assert moved <= pixels * 1e-4, f"{moved} of {pixels} pixels"
    assert Scores.from_matrix(found).miou == pytest.approx(
        Scores.from_matrix(expected).miou, abs=1e-4
    )


def test_in_bfloat16_most_pixels_stay(network, device):
    found, expected = (
        evaluate(
            network.to(device),
            Preprocessing.imagenet(),
            _batches(),
            num_classes=CLASSES,
            precision=precision,
        )
        for precision in (torch.bfloat16, None)
    )
    assert int((found - expected).abs().sum()) < 0.1 * int(expected.sum())


def test_a_wrong_label_is_found_there_too(device):
    labels = torch.full((4, 4), 9, dtype=torch.uint8, device=device)
    with pytest.raises(DataProblem, match=r"Labels hold the values \[9\]"):
        confusion_matrix(torch.zeros_like(labels), labels, CLASSES)
