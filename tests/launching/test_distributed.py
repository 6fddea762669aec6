"""Two processes that train together, over gloo: the same as one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rdd_pipeline.distillation.methods import METHODS
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.training import Training
from tests.launching.two_ranks import float64
from tests.training.conftest import CPU
from tests.training.test_methods import CNN, OPTIONS, TRANSFORMER

pytestmark = pytest.mark.timeout(290)

SPREAD = {"batch_size": 4, "ema": {"decay": 0.7}}
EVERY = CPU.model_copy(update={"log_every": 1})
LARGE = ("skd", "af_dcd")  # their maps need a crop of 128
METHODS_OF_BATCH = [name for name in METHODS if name != "tfe"]


@pytest.fixture(scope="module")
def same(make_job):
    """Jobs by name that have to come out the same in one and in two processes."""

    def job(method, network=CNN, **fields):
        crop = (128, 128) if method in LARGE else (32, 32)
        recipe = {"iterations": 2, "batch_size": 8, "validate_every": 2, "augment": {"crop": crop}}
        rdd = {
            "tfe_length": 2,
            "min_kept": 0.5,
            "min_kept_scope": "global",
            **fields.pop("rdd", {}),
        }
        recipe |= {"keep": "last", **fields.pop("recipe", {})}
        return make_job(method, network=network, recipe=recipe, rdd=rdd, methods=OPTIONS, **fields)

    return {
        **{name: job(name) for name in METHODS_OF_BATCH},
        "tse_cwd": job("tse_cwd", recipe={"ema": {"decay": 0.7}}),
        "transformer": job("tse", TRANSFORMER),
        "valid pixels, class weights": job(
            "tse", rdd={"reduction": "valid"}, recipe={"class_weights": True}
        ),
        "cirkd in parts": job("cirkd", recipe={"gradient_accumulation_steps": 2}),
        "tse in parts": job("tse", recipe={"gradient_accumulation_steps": 2}),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, make_job, same, blocks, teacher):
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save((make_job(recipe=SPREAD), same, blocks.images, teacher), folder / "arguments.pt")
    done = subprocess.run(
        [sys.executable, "-m", "tests.launching.two_ranks", str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(2)]


def test_both_ranks_end_equal(ranks):
    (one, network, trained), (other, other_network, _) = (rank["whole"] for rank in ranks)
    assert trained == 8
    assert_close(one["student"], other["student"], rtol=0, atol=0)
    assert_close(network, other_network, rtol=0, atol=0)
    assert_close(one["ema"], other["ema"], rtol=0, atol=0)
    assert one["best"]["miou"] == other["best"]["miou"]
    assert one["history"] == other["history"]
    assert one["cost"]["images"] == 32


def test_a_second_call_trains_nothing(ranks):
    for rank in ranks:
        assert rank["again"][2] == 0
        assert_close(rank["again"][1], rank["whole"][1], rtol=0, atol=0)
        assert rank["elsewhere, again"][2] == 0


def test_any_rank_may_have_the_work_folder(ranks):
    for rank in ranks:
        state, network, trained = rank["elsewhere"]
        assert trained == 8
        assert_close(state["student"], ranks[0]["whole"][0]["student"], rtol=0, atol=0)
        assert_close(network, ranks[0]["whole"][1], rtol=0, atol=0)


def test_a_checkpoint_that_is_due_by_one_clock_alone_is_written_by_all(ranks):
    for rank in ranks:
        _, network, trained = rank["clocks"]
        assert trained == 8
        assert_close(network, ranks[0]["whole"][1], rtol=0, atol=0)


def test_both_ranks_stop_early_together(ranks):
    """At the second validation of TSE, which begins at 5."""
    (one, network, trained), (other, other_network, also_trained) = (r["early"] for r in ranks)
    assert trained == also_trained == 6
    assert_close(one["student"], other["student"], rtol=0, atol=0)
    assert_close(network, other_network, rtol=0, atol=0)


def test_a_nan_on_one_rank_stops_both_before_the_step(ranks):
    messages = {rank["nan"] for rank in ranks}
    assert len(messages) == 1
    assert "non-finite at iteration 3: loss = nan, kd = nan. The step was not" in messages.pop()


def test_a_signal_to_one_rank_stops_both_and_they_go_on(ranks):
    for rank in ranks:
        assert "was asked to stop after iteration 3 of 8" in rank["signal"]
        state, network, trained = rank["resumed"]
        assert trained == 5
        assert_close(state["student"], rank["whole"][0]["student"], rtol=0, atol=0)
        assert_close(network, rank["whole"][1], rtol=0, atol=0)


NAMES = [*METHODS_OF_BATCH, "tse_cwd", "transformer", "valid pixels, class weights"]


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_with_the_whole_batch_comes_to_the_same(name, ranks, same, blocks, teacher):
    with float64():
        alone = train(Training(same[name], blocks.images, teacher), EVERY).state.to_dict()
    one, other = (rank["same"][name][0] for rank in ranks)
    _equal(one, alone)
    for part in ("student", "objective"):
        assert_close(one[part], other[part], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["cirkd", "tse"])
def test_a_batch_in_parts_comes_to_the_same(method, ranks, same, blocks, teacher):
    """In all but batch norm, which sees a part; here is none."""
    job = same[f"{method} in parts"]
    whole, quarters = (
        job.model_copy(
            update={"recipe": job.recipe.model_copy(update={"gradient_accumulation_steps": parts})}
        )
        for parts in (1, 4)
    )
    with float64(batch_norm=False):
        alone, in_parts = (
            train(Training(job, blocks.images, teacher), EVERY).state.to_dict()
            for job in (whole, quarters)
        )
    _equal(in_parts, alone)
    _equal(ranks[1]["same"][f"{method} in parts"][0], alone)


def _equal(one, alone) -> None:
    for part in {"student", "objective", "ema"} & alone.keys():
        assert_close(one[part], alone[part], rtol=1e-6, atol=1e-8)
    for row, row_alone in zip(one["history"], alone["history"], strict=True):
        assert row == pytest.approx(row_alone, rel=1e-6)
