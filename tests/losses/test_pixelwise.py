"""The log-probability kernel against the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses import pixelwise
from rdd_pipeline.losses.pixelwise import log_prob_of_label, pixel_labels
from tests.losses.reference import upsampled


def make(shape=(2, 5, 4, 6), size=(13, 17), *, dtype=torch.float32, ignored=0.2, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(0, shape[1], (shape[0], *size), generator=g)
    labels[torch.rand(labels.shape, generator=g) < ignored] = 255
    return logits, labels


def log_prob(logits, labels):
    return log_prob_of_label(
        logits, pixel_labels(labels, num_classes=logits.shape[1], ignore_index=255)
    )


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 5, 4, 6), (13, 17)),
        ((1, 3, 5, 7), (5, 7)),  # already full size
        ((1, 3, 9, 8), (4, 5)),  # downwards
        ((1, 3, 1, 1), (4, 5)),
        ((1, 3, 4, 5), (1, 1)),
        ((2, 2, 1, 6), (7, 1)),
        ((1, 1, 3, 3), (6, 6)),  # one class: certain
    ],
)
def test_equals_minus_cross_entropy_of_upsampled_logits(shape, size):
    logits, labels = make(shape, size)
    weight = torch.rand(labels.shape)
    ours = log_prob(logits, labels)
    plain = -F.cross_entropy(upsampled(logits, labels), labels, ignore_index=255, reduction="none")
    assert_close(ours, plain, rtol=2e-5, atol=2e-6)
    grad, expected = (torch.autograd.grad((weight * x).sum(), logits)[0] for x in (ours, plain))
    assert_close(grad, expected, rtol=2e-5, atol=2e-5)


def test_bands_of_rows_make_no_difference(monkeypatch):
    logits, labels = make(size=(29, 31))
    weight = torch.rand(labels.shape)
    weight[:, 8:20] = 0  # some bands hold no gradient at all
    results = []
    for elements in (1, 5 * 31 * 3, 2**19):
        monkeypatch.setattr(pixelwise, "_BAND_ELEMENTS_CPU", elements)
        value = log_prob(logits, labels)
        results.append((value, torch.autograd.grad((weight * value).sum(), logits)[0]))
    for value, grad in results[1:]:
        assert_close(value, results[0][0], rtol=1e-6, atol=1e-6)
        assert_close(grad, results[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("images", [1, 3])
def test_threads_make_no_difference_and_their_number_stays(monkeypatch, threads, images):
    logits, labels = make((images, 5, 3, 6), size=(29, 31))
    weight = torch.rand(labels.shape)
    expected = log_prob(logits, labels)
    expected_grad = torch.autograd.grad((weight * expected).sum(), logits)[0]
    monkeypatch.setattr(pixelwise, "_BAND_ELEMENTS_CPU", 5 * 31 * 2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        value = log_prob(logits, labels)
        grads = [
            torch.autograd.grad((weight * log_prob(logits, labels)).sum(), logits)[0]
            for _ in range(5)
        ]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_close(value, expected, rtol=1e-6, atol=1e-6)
    assert_close(grads[0], expected_grad, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(grad, grads[0]) for grad in grads)  # the order of sums is fixed


def test_number_of_threads_stays_when_a_thread_fails(monkeypatch):
    logits, labels = make()
    monkeypatch.setattr(pixelwise, "_BAND_ELEMENTS_CPU", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="index 9 is out of bounds"):
            log_prob_of_label(logits, pixelwise.PixelLabels(labels.fill_(9), labels != 255))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_gradcheck_in_float64():
    logits, labels = make((2, 3, 3, 2), (7, 5), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: log_prob(z, labels), logits)


def test_float64_stays_and_half_precision_is_computed_in_float32():
    logits, labels = make(dtype=torch.float64)
    assert log_prob(logits, labels).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        half = logits.detach().to(dtype).requires_grad_()
        value = log_prob(half, labels)
        assert value.dtype == torch.float32
        assert_close(value, log_prob(half.float(), labels))
        value.sum().backward()
        assert half.grad.dtype == dtype


def test_autocast_does_not_lower_the_precision():
    logits, labels = make()
    outside = log_prob(logits, labels)
    grad_outside = torch.autograd.grad(outside.sum(), logits)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = log_prob(logits, labels)
        grad_inside = torch.autograd.grad(inside.sum(), logits)[0]
    assert torch.equal(inside, outside)
    assert torch.equal(grad_inside, grad_outside)


def test_huge_logits_stay_finite():
    logits, labels = make()
    value = log_prob(logits * 1e4, labels)
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_makes_no_difference(layout):
    logits, labels = make()
    assert_close(
        log_prob(logits.contiguous(memory_format=layout), labels), log_prob(logits, labels)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_of_labels_and_labels_stay_as_they_are(dtype):
    logits, labels = make()
    given = labels.to(dtype)
    assert torch.equal(log_prob(logits, given), log_prob(logits, labels))
    assert torch.equal(given.long(), labels)


def test_ignored_pixels_are_zero_and_may_hold_nan():
    logits, labels = make((2, 3, 6, 8), (6, 8))
    clean = log_prob(logits, labels)
    grad_clean = torch.autograd.grad(clean.sum(), logits)[0]
    ignored = (labels == 255).unsqueeze(1)
    dirty_logits = logits.detach().masked_fill(ignored, float("nan")).requires_grad_()
    dirty = log_prob(dirty_logits, labels)
    dirty.sum().backward()
    assert torch.equal(dirty, clean)
    assert torch.equal(dirty_logits.grad, grad_clean)
    assert (dirty[labels == 255] == 0).all()
    assert (dirty_logits.grad.masked_select(ignored) == 0).all()


def test_nan_below_an_ignored_region_stays_there_through_the_upsampling():
    logits, labels = make((2, 3, 4, 5), (13, 17), ignored=0)
    labels[0, :, :9] = 255  # columns 0 and 1 of the logits reach no valid pixel
    clean = log_prob(logits, labels)
    dirty_logits = logits.detach().clone()
    dirty_logits[0, :, :, :2] = float("nan")
    dirty = log_prob(dirty_logits.requires_grad_(), labels)
    dirty.sum().backward()
    assert_close(dirty, clean)
    assert dirty_logits.grad.isfinite().all()


def test_nothing_valid_gives_zero_and_zero_gradient():
    logits, labels = make()
    value = log_prob(logits, torch.full_like(labels, 255))
    value.sum().backward()
    assert (value == 0).all()
    assert (logits.grad == 0).all()


def test_second_derivative_is_refused():
    logits, labels = make()
    (grad,) = torch.autograd.grad(
        log_prob(logits, labels).square().sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_labels_out_of_range_are_named():
    logits, labels = make()
    labels[0, 0, 0] = 7
    with pytest.raises(UserError, match=r"label 7, expected 0 to 4 or 255"):
        log_prob(logits, labels)
    labels[0, 0, 0] = -2
    with pytest.raises(UserError, match="label -2"):
        log_prob(logits, labels)


def test_shapes_that_do_not_belong_together_are_named():
    logits, labels = make()
    with pytest.raises(UserError, match="do not fit labels"):
        log_prob(logits[:1], labels)
    with pytest.raises(UserError, match="integer type"):
        pixel_labels(labels.float(), num_classes=5, ignore_index=255)
    with pytest.raises(UserError, match=r"\(batch, height, width\)"):
        pixel_labels(labels[0], num_classes=5, ignore_index=255)


def test_image_without_rows_or_batch_without_images_is_no_error():
    logits, labels = make()
    assert log_prob(logits[:0], labels[:0]).shape == (0, 13, 17)
