"""`trainer.deterministic`: no method needs what CUDA has no repeatable form of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from rdd_pipeline.distillation.methods import METHODS
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses import ohem
from rdd_pipeline.networks.backbones import Backbone
from rdd_pipeline.networks.resizing import RepeatableResizing
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.training import Training

from .conftest import CPU
from .refusing import RefusesLikeCuda
from .test_methods import CNN, NAMES, TRANSFORMER, _job

DETERMINISTIC = CPU.model_copy(update={"deterministic": True})


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU in the part of a GPU."""
    monkeypatch.setattr(
        "rdd_pipeline.networks.backbones.repeatable_resizing", lambda device: RepeatableResizing()
    )
    smallest = ohem._smallest
    monkeypatch.setattr(
        ohem, "_smallest", lambda *args, on_cpu, **named: smallest(*args, on_cpu=False, **named)
    )
    with RefusesLikeCuda():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("method", "network"),
    [
        *(pytest.param(name, CNN, id=f"{name}-cnn") for name in NAMES),
        *(
            # What a network computes with does not depend on the method.
            pytest.param(
                name,
                TRANSFORMER,
                id=f"{name}-transformer",
                marks=[] if name in ("tse", "cirkdv2") else pytest.mark.slow,
            )
            for name in NAMES
        ),
    ],
)
@pytest.mark.usefixtures("refusing")
def test_a_method_needs_nothing_that_cuda_refuses(method, network, make_job, blocks, teacher):
    job = _job(make_job, method, network, iterations=2)  # TFE and TSE are one each
    result = train(Training(job, blocks.images, teacher), DETERMINISTIC)
    assert result.trained == 2


@pytest.mark.usefixtures("refusing")
def test_a_network_that_needs_it_ends_in_one_line(make_job, blocks, teacher, monkeypatch):
    forward = Backbone.forward

    def pooled(backbone, images):
        early, late = forward(backbone, images)
        return early, late + F.adaptive_avg_pool2d(late, 2).mean()

    monkeypatch.setattr(Backbone, "forward", pooled)
    with pytest.raises(UserError) as caught:
        train(Training(_job(make_job, "kd", CNN), blocks.images, teacher), DETERMINISTIC)
    assert str(caught.value) == (
        "kd: trainer.deterministic=true, but torch's aten._adaptive_avg_pool2d_backward has no "
        "repeatable form on cpu, and fcn_test_efficientnet or the method needs it. Choose another "
        "network or set trainer.deterministic=false."
    )


def test_a_repeatable_training_is_the_same_training(make_job, blocks, teacher):
    """On CPU nothing changes; the setting is no part of the fingerprint."""
    job = _job(make_job, "tse", CNN)
    try:
        one = train(Training(job, blocks.images, teacher), DETERMINISTIC)
    finally:
        torch.use_deterministic_algorithms(False)
    other = train(Training(job, blocks.images, teacher), CPU)
    assert all(torch.equal(t, other.network.tensors[k]) for k, t in one.network.tensors.items())


def test_every_method_is_looked_at():
    assert set(NAMES) | {"tfe"} == set(METHODS)
