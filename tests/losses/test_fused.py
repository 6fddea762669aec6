"""The Triton kernels, under Triton's interpreter, against the plain form on the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from rdd_pipeline.collectives import ALONE
from rdd_pipeline.losses import pixelwise
from rdd_pipeline.losses.ohem import ohem_mask
from rdd_pipeline.losses.pixelwise import pixel_labels
from rdd_pipeline.losses.rdd import tse_loss
from tests.losses.test_pixelwise import log_prob as plain_log_prob
from tests.losses.test_pixelwise import make

if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)
fused = pytest.importorskip("rdd_pipeline.losses.fused", reason="Triton is not there")


def log_prob(logits, labels):
    pixels = pixel_labels(labels, num_classes=logits.shape[1], ignore_index=255)
    horizontal = pixelwise._Bilinear.between(logits, labels).horizontal.float()
    return fused.log_prob_of_label(logits, *pixels, horizontal)


SHAPES = [
    ((2, 5, 3, 6), (5, 17)),
    ((1, 3, 5, 7), (5, 7)),  # already full size
    ((1, 3, 9, 8), (4, 5)),  # downwards
    ((1, 3, 1, 1), (4, 5)),
    ((1, 3, 4, 5), (1, 1)),
    ((2, 2, 1, 6), (7, 1)),
    ((1, 1, 3, 3), (6, 6)),  # one class: certain
    ((1, 19, 2, 5), (9, 33)),
    ((1, 45, 2, 3), (5, 9)),  # two blocks of classes in the backward pass
    ((1, 3, 2, 3), (3, 900)),  # two blocks of columns
]


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_value_and_gradient_are_those_of_the_plain_form(shape, size):
    logits, labels = make(shape, size)
    weight = torch.rand(labels.shape)
    exact = logits.detach().double().requires_grad_()
    value, expected = log_prob(logits, labels), plain_log_prob(exact, labels)
    assert_close(value, expected.float(), rtol=2e-6, atol=2e-6)
    assert (value <= 0).all()
    (grad,) = torch.autograd.grad((weight * value).sum(), logits)
    (expected_grad,) = torch.autograd.grad((weight * expected).sum(), exact)
    assert_close(grad, expected_grad.float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type_and_logits_of_any_layout(dtype):
    logits, labels = make((1, 3, 2, 3), (3, 5))
    expected = log_prob(logits, labels)
    channels_last = logits.detach().to(memory_format=torch.channels_last).requires_grad_()
    value = log_prob(channels_last, labels.to(dtype))
    assert torch.equal(value, expected)
    value.sum().backward()
    assert torch.equal(channels_last.grad, torch.autograd.grad(expected.sum(), logits)[0])


def test_gradient_is_the_slope_of_the_value():
    logits, labels = make((1, 4, 2, 3), (5, 6))
    direction = torch.randn_like(logits)
    (grad,) = torch.autograd.grad(log_prob(logits, labels).sum(), logits)
    with torch.no_grad():
        up, down = (
            log_prob(logits + step * direction, labels).double().sum() for step in (1e-2, -1e-2)
        )
    assert_close((up - down) / 2e-2, (grad * direction).double().sum(), rtol=1e-3, atol=1e-3)


def test_nothing_valid_gives_zero_with_zero_gradient():
    logits, labels = make()
    labels.fill_(255)
    value = log_prob(logits, labels)
    value.sum().backward()
    assert not value.any()
    assert not logits.grad.any()


@pytest.mark.parametrize(("images", "height"), [(0, 13), (2, 0)])
def test_empty_batches_and_labels(images, height):
    logits, labels = make()
    value = log_prob(logits[:images], labels[:images, :height])
    assert value.shape == (images, height, 17)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert not grad.any()


def test_nan_matters_only_where_a_valid_pixel_sees_it():
    logits, labels = make((1, 3, 4, 4), (7, 7), ignored=0)
    labels[:, :, 5:] = 255
    expected = log_prob(logits, labels)
    spoiled = logits.detach().clone()
    spoiled[..., 3] = torch.nan  # columns 5 and 6 alone are interpolated from it
    spoiled.requires_grad_()
    value = log_prob(spoiled, labels)
    assert torch.equal(value, expected)
    (grad,) = torch.autograd.grad(value.sum(), spoiled)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), logits)[0])
    labels[0, 0, 5] = 1
    assert log_prob(spoiled, labels)[0, 0, 5].isnan()


@pytest.mark.parametrize("size", [1, 5, 4095, 10_000])
def test_kth_smallest_is_that_of_a_sort(size):
    g = torch.Generator().manual_seed(size)
    values = torch.rand(size, generator=g) ** 4
    values[torch.rand(size, generator=g) < 0.3] = 1.0
    values[torch.rand(size, generator=g) < 0.1] = 0.0
    ordered = values.sort().values
    for k in sorted({1, 2, size // 3, size // 2, size - 1, size} & set(range(1, size + 1))):
        assert fused.kth_smallest(values, k, ALONE).item() == ordered[k - 1].item(), k


def test_kth_smallest_tells_neighboring_numbers_apart():
    one = torch.tensor(0.7)
    near = [one]
    for _ in range(40):
        near.append(torch.nextafter(near[-1], torch.tensor(1.0)))
    values = torch.stack(near).flip(0)
    assert fused.kth_smallest(values, 17, ALONE).item() == values.sort().values[16].item()


def test_the_whole_tse_loss_by_kernels_is_the_plain_one(monkeypatch):
    student, labels = make((2, 3, 2, 3), (4, 5))
    teacher = make((2, 3, 2, 3), (4, 5), seed=1)[0].detach()

    def loss_and_gradient():
        result = tse_loss(student, labels, teacher_logits=teacher, min_kept=0.6)
        return result, torch.autograd.grad(result.loss, student)[0]

    plain, plain_grad = loss_and_gradient()
    mask = ohem_mask(student.detach(), labels, min_kept=0.6)
    for module in ("rdd_pipeline.losses.pixelwise", "rdd_pipeline.losses.ohem"):
        monkeypatch.setattr(f"{module}.fused_kernels", lambda values: fused)
    result, grad = loss_and_gradient()
    assert_close(result.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert_close(grad, plain_grad, rtol=1e-5, atol=1e-6)
    assert_close(result.statistics, plain.statistics, rtol=1e-5, atol=1e-6)
    assert torch.equal(ohem_mask(student.detach(), labels, min_kept=0.6), mask)


COMPILER = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compile(kernel, types, options, **constants):
    signature = dict(zip(kernel.arg_names, types)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, constants, made.metadata.shared)
    assert made.asm["cubin"]
    assert made.metadata.shared <= 227 * 1024, "more shared memory than there is"

"""
COMPILE = """
from rdd_pipeline.losses import fused
options = fused._OPTIONS
sizes = ["i32"] * 5
compile(fused._log_prob, ["*fp32", "*u8", "*u8", "*fp32", "*fp32", *sizes], options,
        CLASSES=32, COLUMNS=64)
maps = ["*fp32", "*i64", "*u8", "*fp32", "*fp32", "*fp32"]
compile(fused._rows_of_gradient, [*maps, *sizes], options, CLASSES=32, COLUMNS=64)
compile(fused._histogram, ["*fp32", "*i32", "*i32", "i32", "i32"], options,
        DIGITS=1024, VALUES=4096)
"""


def compiled(program, tmp_path):
    """Run a program that compiles kernels, in a process without Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILER + program],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)


@pytest.mark.slow
def test_the_kernels_compile_for_an_nvidia_gpu(tmp_path):
    compiled(COMPILE, tmp_path)
