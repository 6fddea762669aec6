"""Focal, Dice and Lovasz in whole trainings, in the precision that users get."""

import pytest

from rdd_pipeline.errors import UserError
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.training import Training
from tests.equal import same_training

from .conftest import CPU


@pytest.fixture
def run(blocks, teacher):
    def run(job, folder=None):
        training = Training(job, blocks.images, teacher)
        return train(training if folder is None else training.stored_in(folder), CPU)

    return run


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["baseline", "tse"])
def test_a_training_shows_them_as_curves_and_learns_otherwise(run, make_job, method, precision):
    rdd = {"tfe_length": 0, "mode": "or"}
    plain = run(make_job(method, rdd=rdd, precision=precision))
    recipe = {"task_loss": {"focal_gamma": 2.0, "dice": 1.0, "lovasz": 0.5}}
    job = make_job(method, rdd=rdd, recipe=recipe, precision=precision)
    result = run(job)
    assert not same_training(result, plain)
    assert result.fingerprint != plain.fingerprint
    rows = [row for row in result.history if "loss" in row]
    assert rows
    assert all(0 < row["dice"] <= 1 and 0 < row["lovasz"] <= 1 for row in rows)
    assert not any("dice" in row for row in plain.history)


def test_tfe_weighs_dice_and_refuses_lovasz(run, make_job):
    assert any("dice" in row for row in run(make_job(recipe={"task_loss": {"dice": 1.0}})).history)
    for rdd in ({}, {"tfe_length": 0, "annealed": True}):
        with pytest.raises(UserError, match="Lovasz loss knows no weights of pixels"):
            run(make_job(recipe={"task_loss": {"lovasz": 1.0}}, rdd=rdd))
