"""The Triton kernels of relations, under Triton's interpreter, against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.losses import similarity
from rdd_pipeline.losses.similarity import soft_similarity_kl
from tests.losses.test_fused import compiled
from tests.losses.test_similarity import plain_similarity_kl

if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)
fused = pytest.importorskip("rdd_pipeline.losses.fused_relations", reason="Triton is not there")


def unit_vectors(rows, groups, keys, widths):
    generator = torch.Generator().manual_seed(0)
    return [
        F.normalize(torch.randn(shape, generator=generator), dim=-1)
        for width in widths
        for shape in ((rows, width), (groups, keys, width))
    ]


def both(vectors, temperature, **options):
    """Value and gradients of the kernels and of plain torch in float64."""
    found = fused.similarity_kl(
        *vectors, temperature=temperature, rows_need_grad=True, keys_need_grad=True, **options
    )
    exact = [v.double().requires_grad_() for v in vectors]
    expected = plain_similarity_kl(*exact, temperature)
    grads = torch.autograd.grad(expected, exact[:2])
    return found, (expected.detach().float(), *(grad.float() for grad in grads))


SHAPES = [
    (5, 1, 3, (4, 4)),
    (33, 2, 37, (8, 20)),  # two blocks of rows and of keys, neither of them full
    (1, 3, 1, (3, 5)),  # one key: certain
    (70, 1, 5, (17, 3)),
]


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize(("rows", "groups", "keys", "widths"), SHAPES)
def test_value_and_gradients_are_those_of_plain_torch(rows, groups, keys, widths, temperature):
    vectors = unit_vectors(rows, groups, keys, widths)
    for found, expected in zip(*both(vectors, temperature, half=False), strict=True):
        assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_in_half_precision_what_is_lost_is_small(temperature):
    vectors = unit_vectors(140, 2, 70, (24, 40))
    vectors[1][0, :24] = vectors[0][:24]  # among the keys are the rows themselves, as in a batch
    found, expected = both(vectors, temperature, half=True)
    assert_close(found[0], expected[0], rtol=2e-3, atol=0)
    for ours, exact in zip(found[1:], expected[1:], strict=True):
        assert (ours - exact).norm() < 5e-3 * exact.norm()


def test_rows_of_zeros_add_nothing_and_nothing_gives_zero():
    vectors = unit_vectors(6, 1, 5, (4, 7))
    vectors[0][2:], vectors[2][2:] = 0, 0
    (value, grad_rows, grad_keys), (expected, *_) = both(vectors, 0.1, half=False)
    assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert not grad_rows[2:].any()
    fewer = [vectors[0][:2], vectors[1], vectors[2][:2], vectors[3]]
    assert_close(grad_keys, both(fewer, 0.1, half=False)[0][2])
    for rows, keys in ((0, 5), (3, 0)):
        value, grad, _ = fused.similarity_kl(
            *unit_vectors(rows, 1, keys, (4, 4)),
            temperature=0.1,
            half=False,
            rows_need_grad=True,
            keys_need_grad=True,
        )
        assert value == 0
        assert not grad.any()


def test_it_is_taken_where_it_can_be(monkeypatch):
    monkeypatch.setattr(similarity, "fused_kernels", lambda values, module: fused)
    rows, keys, *others = unit_vectors(7, 2, 6, (4, 5))
    rows.requires_grad_(), keys.requires_grad_()
    counted = torch.arange(7) % 3 > 0
    loss = soft_similarity_kl(rows, keys, *others, temperature=0.1, counted=counted)
    plain = plain_similarity_kl(rows[counted], keys, others[0][counted], others[1], 0.1)
    assert_close(loss, plain, rtol=1e-4, atol=1e-4)
    for found, expected in zip(
        torch.autograd.grad(2 * loss, (rows, keys)),
        torch.autograd.grad(2 * plain, (rows, keys)),
        strict=True,
    ):
        assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert fused.takes(rows, others[0], 0.1)
    assert not fused.takes(rows, others[0], fused.COLDEST / 2)

    def too_small(*_, **__):
        raise fused.OutOfResources(200_000, 100_000, "shared memory")

    monkeypatch.setattr(fused, "similarity_kl", too_small)
    assert_close(
        soft_similarity_kl(rows, keys, *others, temperature=0.1),
        plain_similarity_kl(rows, keys, *others, 0.1),
    )
    wide = torch.zeros(2, fused.WIDEST + 1)
    assert not fused.takes(wide, wide, 0.1)


COMPILE = """
from rdd_pipeline.losses import fused_relations as fused
sizes = ["i32"] * 5 + ["fp32"]
for half, widths in ((True, (128, 256)), (True, (256, 256)), (False, (256, 256)), (True, (64, 64))):
    tiles = fused._tiles(*widths, half)
    options = fused._OPTIONS | {n: tiles.pop(n) for n in ("num_warps", "num_stages")}
    vectors = ["*fp16" if half else "*fp32"] * 4
    maps = ["*fp32"] * 3
    compile(
        fused._relate, [*vectors, *maps, "*fp32", *sizes], options, WITH_GRADIENT=True, **tiles
    )
    compile(fused._gradient_of_keys, [*vectors, *maps, *sizes, "fp32"], options, **tiles)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_an_nvidia_gpu(tmp_path):
    compiled(COMPILE, tmp_path)
