from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdd_pipeline.evaluation import predict
from rdd_pipeline.evaluation.confusion import confusion_matrix
from rdd_pipeline.evaluation.predict import (
    evaluate,
    evaluation_mode,
    predict_labels,
    predict_logits,
    score_bands,
    window_starts,
)
from rdd_pipeline.networks.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(mean=(10.0, 20.0, 30.0), std=(50.0, 60.0, 70.0))


class Output(NamedTuple):
    logits: Tensor


class Tiny(nn.Module):
    """Stride 4, three classes, batch norm; its kernel is not symmetric, so mirroring matters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 5, stride=4, padding=2)
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3).eval()
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(self.conv.weight.shape, generator=generator))

    def forward(self, images: Tensor) -> Output:
        return Output(self.frozen(self.norm(self.conv(images))))


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor | list[Tensor]


@pytest.fixture
def network() -> Tiny:
    return Tiny().eval()


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 17, 25), dtype=torch.uint8, generator=generator)


def _up(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


def test_one_pass_gives_the_upsampled_logits(network: Tiny, images: Tensor) -> None:
    expected = _up(network(PREPROCESSING.normalize(images)).logits, (30, 40))
    actual = predict_logits(network, PREPROCESSING, images, size=(30, 40))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_several_passes_average_what_is_asked(network: Tiny, images: Tensor, average: str) -> None:
    inputs = PREPROCESSING.normalize(images)
    passes = []
    for size in ((17, 25), (34, 50)):
        scaled = _up(inputs, size)
        for mirrored in (False, True):
            logits = network(scaled.flip(3) if mirrored else scaled).logits
            # Mirror back at full size: the other order than in the code under test.
            full = _up(logits, (17, 25))
            full = full.flip(3) if mirrored else full
            passes.append(full.softmax(1) if average == "softmax" else full)
    actual = predict_logits(
        network,
        PREPROCESSING,
        images,
        size=(17, 25),
        scales=(1.0, 2.0),
        flip=True,
        average=average,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(actual, torch.stack(passes).mean(0), rtol=1e-4, atol=1e-5)


def test_averaged_probabilities_sum_to_one(network: Tiny, images: Tensor) -> None:
    scores = predict_logits(network, PREPROCESSING, images, size=(9, 9), flip=True)
    torch.testing.assert_close(scores.sum(1), torch.ones(2, 9, 9))


def test_flip_averaging_is_symmetric(network: Tiny, images: Tensor) -> None:
    scores = predict_logits(network, PREPROCESSING, images, size=(17, 25), flip=True)
    mirrored = predict_logits(network, PREPROCESSING, images.flip(3), size=(17, 25), flip=True)
    torch.testing.assert_close(scores, mirrored.flip(3), rtol=1e-4, atol=1e-5)


def test_labels_of_each_image_have_the_size_asked_for(network: Tiny, images: Tensor) -> None:
    maps = predict_labels(network, PREPROCESSING, images, sizes=[(17, 25), (40, 30)])
    assert [tuple(label.shape) for label in maps] == [(17, 25), (40, 30)]
    whole = predict_logits(network, PREPROCESSING, images, size=(40, 30))
    assert torch.equal(maps[1], whole[1].argmax(0))


@pytest.mark.parametrize("size", [(17, 25), (1, 25), (29, 7), (40, 60)])
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_large_images_are_labeled_band_by_band(network, images, monkeypatch, size, rows, average):
    how = {"scales": (0.5, 1.0), "flip": True, "average": average}
    with torch.no_grad():
        whole = predict_logits(network, PREPROCESSING, images, size=size, **how)
        seen = []
        resize = predict.bilinear
        monkeypatch.setattr(predict, "_SCORES_AT_ONCE", 3 * rows * size[1])
        monkeypatch.setattr(predict, "bilinear", lambda *a: seen.append(resize(*a)) or seen[-1])
        labels = predict_labels(network, PREPROCESSING, images, sizes=[size, size], **how)
    for scores, label in zip(whole, labels, strict=True):
        best, second = scores.topk(2, dim=0).values
        clear = best - second > 1e-5
        assert clear.float().mean() > 0.9
        assert torch.equal(label[clear], scores.argmax(0)[clear])
    if rows < size[0]:
        # The images themselves are resized to half; all else is a few rows at a time.
        assert max(len(x[0, 0]) for x in seen if x.shape[-1] == size[1]) <= max(rows + 2, 9)


def test_half_precision_scores_are_compared_in_float32(network: Tiny, images: Tensor) -> None:
    scores = predict_logits(network, PREPROCESSING, images, size=(17, 25), precision=torch.bfloat16)
    exact = predict_logits(network, PREPROCESSING, images, size=(17, 25))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact)
    torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.3)


def test_no_scale_is_refused(network: Tiny, images: Tensor) -> None:
    with pytest.raises(ValueError, match="scales is empty"):
        predict_logits(network, PREPROCESSING, images, size=(4, 4), scales=())


def _batches(images: Tensor) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 3, (2, 20, 30), generator=generator).to(torch.uint8)
    labels[:, :3] = 255
    return [Batch(images, labels), Batch(images[:1], labels[1:])]


def test_one_matrix_over_all_batches(network: Tiny, images: Tensor) -> None:
    batches = _batches(images)
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for batch in batches:
        scores = predict_logits(network, PREPROCESSING, batch.images, size=(20, 30))
        assert isinstance(batch.labels, Tensor)
        expected += confusion_matrix(scores.argmax(1), batch.labels, 3)
    assert torch.equal(evaluate(network, PREPROCESSING, batches, num_classes=3), expected)


def test_labels_of_one_batch_may_differ_in_size(network: Tiny, images: Tensor) -> None:
    labels = [torch.zeros(8, 9, dtype=torch.uint8), torch.full((5, 6), 255, dtype=torch.uint8)]
    matrix = evaluate(network, PREPROCESSING, [Batch(images, labels)], num_classes=3)
    assert matrix.sum() == 72
    assert matrix[1:].sum() == 0


def test_no_batches_give_an_empty_matrix(network: Tiny) -> None:
    assert evaluate(network, PREPROCESSING, [], num_classes=3).tolist() == [[0] * 3] * 3


def test_evaluation_leaves_modes_and_statistics_as_they_were(images: Tensor) -> None:
    network = Tiny()
    network.train()
    network.frozen.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    evaluate(network, PREPROCESSING, _batches(images), num_classes=3)
    assert network.training
    assert network.norm.training
    assert not network.frozen.training
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_modes_come_back_after_an_error(images: Tensor) -> None:
    network = Tiny().train()
    with pytest.raises(RuntimeError, match="channels"):
        evaluate(network, PREPROCESSING, [_wrong(images)], num_classes=3)
    assert network.norm.training


def _wrong(images: Tensor) -> Batch:
    class Broken(NamedTuple):
        images: Tensor
        labels: Tensor

    batch = _batches(images)[0]

    class Raising:
        labels = batch.labels

        @property
        def images(self) -> Tensor:
            raise RuntimeError("no channels")

    return Raising()  # type: ignore[return-value]


def test_no_gradient_is_kept_in_evaluation_mode(network: Tiny) -> None:
    with evaluation_mode(network):
        assert not network(torch.zeros(1, 3, 8, 8)).logits.requires_grad
    assert torch.is_grad_enabled()


# ---- sliding windows


def _blend_naively(network, image, window, overlap, average, **how):
    """Full accumulation of scores and weights, pixel weights as a minimum of distances."""
    height, width = image.shape[-2:]
    rows, columns = min(window[0], height), min(window[1], width)

    def starts(side: int, part: int) -> list[int]:
        count = 1
        while (side - part) > (count - 1) * max(1, part - math.ceil(overlap * part)):
            count += 1
        return [round(i * (side - part) / max(count - 1, 1)) for i in range(count)]

    total, weights = torch.zeros(3, height, width), torch.zeros(height, width)
    for top in starts(height, rows):
        for left in starts(width, columns):
            part = image[None, :, top : top + rows, left : left + columns]
            scores = predict_logits(
                network, PREPROCESSING, part, size=(rows, columns), average=average, **how
            )[0]
            if average == "softmax" and not how.get("flip"):
                scores = scores.softmax(0)
            weight = torch.tensor(
                [
                    [
                        (min(y, rows - 1 - y) + 1.0) * (min(x, columns - 1 - x) + 1)
                        for x in range(columns)
                    ]
                    for y in range(rows)
                ]
            )
            total[:, top : top + rows, left : left + columns] += weight * scores
            weights[top : top + rows, left : left + columns] += weight
    return total / weights


@pytest.mark.parametrize("window", [(8, 9), (17, 6), (5, 25), (1, 3), (16, 24)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_windows_are_blended_as_a_full_accumulation(
    network, images, monkeypatch, window, overlap, average
):
    monkeypatch.setattr(predict, "_SCORES_AT_ONCE", 3 * 25 * 2)
    monkeypatch.setattr(predict, "_PIXELS_AT_ONCE", 200)
    with torch.no_grad():
        each = score_bands(
            *(network, PREPROCESSING, images),
            sizes=[(17, 25)] * 2, average=average, window=window, overlap=overlap,
        )  # fmt: skip
        for image, bands in zip(images, each, strict=True):
            found = list(bands)
            assert max(band.scores.shape[1] for band in found) <= 2
            expected = _blend_naively(network, image, window, overlap, average)
            scores = torch.cat([band.scores for band in found], dim=1)
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
            sums = torch.cat([band.probabilities() for band in found], dim=1).sum(0)
            torch.testing.assert_close(sums, torch.ones(17, 25))


def test_scales_and_mirror_images_are_of_each_window(network, images):
    how = {"scales": (0.5, 1.0), "flip": True}
    with torch.no_grad():
        (bands,) = score_bands(
            *(network, PREPROCESSING, images[:1]), sizes=[(17, 25)], window=(9, 9), **how
        )
        scores = torch.cat([band.scores for band in bands], dim=1)
        expected = _blend_naively(network, images[0], (9, 9), 0.25, "softmax", **how)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(17, 25), (1, 1), (9, 40), (50, 60), (33, 5)])
@pytest.mark.parametrize("window", [(4, 9), (16, 30)])
def test_blended_scores_have_the_size_of_the_labels(network, images, size, window):
    with torch.no_grad():
        (bands,) = score_bands(*(network, PREPROCESSING, images[:1]), sizes=[size], window=window)
        scores = torch.cat([band.scores for band in bands], dim=1)
        expected = _up(_blend_naively(network, images[0], window, 0.25, "softmax")[None], size)[0]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_window_that_holds_the_image_changes_nothing(network, images):
    batches = _batches(images)
    whole = evaluate(network, PREPROCESSING, batches, num_classes=3)
    same = evaluate(network, PREPROCESSING, batches, num_classes=3, window=(17, 25))
    other = evaluate(network, PREPROCESSING, batches, num_classes=3, window=(8, 8))
    assert torch.equal(whole, same)
    assert whole.sum() == other.sum()
    assert not torch.equal(whole, other)


@pytest.mark.parametrize(("side", "window", "overlap"), [(10, 4, 0.5), (11, 4, 0), (5, 1, 0.9)])
def test_windows_cover_a_side_and_overlap(side, window, overlap):
    starts = window_starts(side, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == side - window
    for first, second in itertools.pairwise(starts):
        assert 0 < second - first <= max(1, window - overlap * window)
    assert window_starts(3, 4, 0.5) == [0]
