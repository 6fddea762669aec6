from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rdd_pipeline.config import OptimizerParams
from rdd_pipeline.training.schedule import build_optimizer, learning_rate

PUBLISHED = OptimizerParams(lr=0.02, power=0.9)


def test_equals_the_published_schedule():
    with np.load(Path(__file__).parents[1] / "vectors" / "losses_c19.npz") as archive:
        # Stored as int16, which 39999 does not fit.
        iterations, rates = archive["poly/iteration"].astype(np.uint16), archive["poly/lr"]
    assert iterations.max() == 39_999
    # The published code counts iterations from 0.
    ours = [learning_rate(PUBLISHED, int(i) + 1, 40_000) for i in iterations]
    np.testing.assert_allclose(ours, rates, rtol=1e-6)


def test_the_first_iteration_has_the_full_rate_and_the_last_one_is_above_zero():
    assert learning_rate(PUBLISHED, 1, 10) == 0.02
    assert learning_rate(PUBLISHED, 10, 10) == pytest.approx(0.02 * 0.1**0.9)


def test_equals_torchs_own_poly_schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=50, power=0.9)
    for iteration in range(1, 51):
        ours = learning_rate(PUBLISHED, iteration, 50)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_power_zero_keeps_the_rate():
    params = OptimizerParams(lr=0.5, power=0.0)
    assert [learning_rate(params, i, 4) for i in (1, 2, 3, 4)] == [0.5] * 4


def test_warm_up_rises_linearly_to_the_schedule():
    params = OptimizerParams(lr=1.0, power=0.0, warmup=3)
    rates = [learning_rate(params, i, 6) for i in range(1, 7)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_warm_up_multiplies_the_schedule():
    plain, warm = OptimizerParams(lr=0.1), OptimizerParams(lr=0.1, warmup=4)
    ratios = [learning_rate(warm, i, 9) / learning_rate(plain, i, 9) for i in range(1, 10)]
    assert ratios == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("iteration", [0, -1, 11])
def test_an_iteration_outside_the_run_is_refused(iteration):
    with pytest.raises(ValueError, match=rf"Iteration {iteration} is outside 1\.\.10"):
        learning_rate(PUBLISHED, iteration, 10)


def test_sgd_takes_its_settings_and_leaves_frozen_parameters_out():
    trained, frozen = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), False)
    params = OptimizerParams(lr=0.3, momentum=0.8, weight_decay=0.01)
    optimizer = build_optimizer(params, [trained, frozen])
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.8, 0.01)
    assert len(group["params"]) == 1
    assert group["params"][0] is trained


def test_adamw_takes_its_settings():
    params = OptimizerParams(name="adamw", lr=0.3, betas=(0.5, 0.6), weight_decay=0.2)
    optimizer = build_optimizer(params, [nn.Parameter(torch.zeros(2))])
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.3, (0.5, 0.6), 0.2)
