"""Losses promise float32, whatever autocast and the process's switches for matrix products say."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rdd_pipeline.losses.af_dcd import af_dcd_contrast_loss
from rdd_pipeline.losses.at import at_loss
from rdd_pipeline.losses.bpkd import bpkd_losses
from rdd_pipeline.losses.cirkd import cirkd_minibatch_loss
from rdd_pipeline.losses.cross_entropy import cross_entropy_loss
from rdd_pipeline.losses.cwd import cwd_feature_loss, cwd_loss
from rdd_pipeline.losses.dist import dist_loss
from rdd_pipeline.losses.dkd import dkd_losses
from rdd_pipeline.losses.dsd import csd_loss, psd_loss
from rdd_pipeline.losses.fitnet import fitnet_loss
from rdd_pipeline.losses.ifvd import ifvd_loss
from rdd_pipeline.losses.kd import kd_loss
from rdd_pipeline.losses.maps import full_precision, matrix_product
from rdd_pipeline.losses.mgd import mgd_loss
from rdd_pipeline.losses.rdd import tfe_loss, tse_loss
from rdd_pipeline.losses.skd import skd_pairwise_loss
from rdd_pipeline.losses.standardized import standardized_kd_loss

CLASSES = 5
GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.randint(0, CLASSES, (2, 40, 56), generator=GENERATOR)
LABELS[:, :3] = 255
TEACHER, AUX = torch.randn(2, 2, CLASSES, 6, 8, generator=GENERATOR)
STUDENT = torch.randn(2, CLASSES, 6, 8, generator=GENERATOR)

MATRIX_PRODUCTS = {
    "cross-entropy": lambda s: cross_entropy_loss(s, LABELS).loss,
    "tfe": lambda s: tfe_loss(s, LABELS, teacher_logits=TEACHER, teacher_aux_logits=AUX).loss,
    "tse": lambda s: tse_loss(s, LABELS, teacher_logits=TEACHER, min_kept=0.1).loss,
    "csd": lambda s: csd_loss(s, TEACHER),
    "skd": lambda s: skd_pairwise_loss(s, TEACHER),
    "cirkd": lambda s: cirkd_minibatch_loss(s, TEACHER),
}
NONE = {
    "fitnet": lambda s: fitnet_loss(s, TEACHER),
    "at": lambda s: at_loss(s, TEACHER),
    "ifvd": lambda s: ifvd_loss(s, TEACHER, LABELS, num_classes=CLASSES),
    "cwd feature": lambda s: cwd_feature_loss(s, TEACHER),
    "psd": lambda s: psd_loss([s, s * s], [TEACHER, TEACHER * TEACHER]),
    "mgd": lambda s: mgd_loss(s, TEACHER),
    "af-dcd": lambda s: af_dcd_contrast_loss(s, TEACHER, groups=5, pool=1),
    "kd": lambda s: kd_loss(s, TEACHER),
    "cwd": lambda s: cwd_loss(s, TEACHER),
    "dist": lambda s: dist_loss(s, TEACHER),
    "dkd": lambda s: sum(dkd_losses(s, TEACHER, LABELS)),
    "kd standardized": lambda s: standardized_kd_loss(s, TEACHER),
    "bpkd": lambda s: bpkd_losses(s, TEACHER, LABELS).edge,
}
ALL = MATRIX_PRODUCTS | NONE
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mm.out", "addmm_", "baddbmm_", "_scaled_mm"}


@pytest.fixture
def reckless():
    """Process-wide switches as people set them for their networks."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def _precisions() -> tuple[str, str]:
    backends = torch.backends
    return backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision


class _Watch(TorchDispatchMode):
    """Notes under which switches each matrix product is computed, on any machine."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            self.seen.append((*_precisions(), args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ALL)
def test_every_matrix_product_is_a_float32_one_forward_and_backward(name, reckless):
    student = STUDENT.clone().requires_grad_()
    # One image of few pixels is computed in the calling thread, which is what is watched.
    with _Watch() as forward:
        loss = ALL[name](student)
    with _Watch() as backward:
        loss.backward()
    assert set(forward.seen) | set(backward.seen) <= {("ieee", "ieee", torch.float32)}
    assert bool(forward.seen) == (name in MATRIX_PRODUCTS)
    # CIRKD computes its gradient in the forward pass.
    assert bool(backward.seen) == (name in MATRIX_PRODUCTS and name != "cirkd")


@pytest.mark.parametrize("name", ALL)
def test_switches_and_autocast_change_no_bit(name, reckless):
    def value_and_gradient(student):
        student = student.clone().requires_grad_()
        loss = ALL[name](student)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        careless = value_and_gradient(STUDENT)
    torch.set_float32_matmul_precision("highest")
    assert_close(careless, value_and_gradient(STUDENT), rtol=0, atol=0)


def test_the_switches_are_as_before_afterwards(reckless):
    before = _precisions()
    with full_precision(STUDENT):
        assert _precisions() == ("ieee", "ieee")
    assert _precisions() == before
    with pytest.raises(ZeroDivisionError), full_precision(STUDENT):
        1 / 0  # noqa: B018
    assert _precisions() == before != ("ieee", "ieee")


def test_matrix_product_is_torchs_with_its_gradient():
    a = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    assert_close(matrix_product(a, b), a @ b)
    assert torch.autograd.gradcheck(matrix_product, (a, b))
    # One of the two without gradient; the same tensor twice.
    assert torch.autograd.gradcheck(lambda x: matrix_product(x, b.detach()), (a,))
    assert torch.autograd.gradcheck(lambda x: matrix_product(x, x.mT), (a,))
