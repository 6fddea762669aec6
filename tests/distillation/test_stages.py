"""Stages: which iterations are whose, and what methods say of them."""

from __future__ import annotations

import pytest

from rdd_pipeline.config import RddParams
from rdd_pipeline.distillation.methods import ABLATIONS, BASELINES, METHODS, RDD_PLUS, STAGES
from rdd_pipeline.distillation.stages import (
    PLAIN,
    RDD,
    Stage,
    stage_before,
    stage_shares,
    stage_span,
)

ITERATIONS = 10
# TFE until 4, TSE until 7, a third one to the end.
CHAIN = (
    RDD[0],
    Stage("tse", RDD[1].loss, end=lambda rdd, iterations: 7),
    Stage("third", PLAIN[0].loss, needs_teacher=False),
)
SETTINGS = RddParams(tfe_length=4)


@pytest.mark.parametrize("length", [0, 1, 4, 0.5, 9, 10])
@pytest.mark.parametrize("stages", [PLAIN, RDD], ids=["plain", "rdd"])
def test_every_iteration_belongs_to_one_stage_and_has_its_loss(stages, length):
    rdd = RddParams(tfe_length=length)
    seen = []
    for stage in stages:
        first, last = stage_span(stages, stage.name, rdd, ITERATIONS)
        for iteration in range(first, last + 1):
            shares = stage_shares(stages, rdd, iteration, ITERATIONS)
            assert shares == {s.name: float(s is stage) for s in stages}
            seen.append(iteration)
    assert seen == list(range(1, ITERATIONS + 1))
    assert stage_span(stages, "whole", rdd, ITERATIONS) == (1, ITERATIONS)


def test_a_chain_of_three_hands_over_twice():
    spans = [stage_span(CHAIN, stage.name, SETTINGS, ITERATIONS) for stage in CHAIN]
    assert spans == [(1, 3), (4, 6), (7, 10)]
    for iteration in range(1, ITERATIONS + 1):
        shares = stage_shares(CHAIN, SETTINGS, iteration, ITERATIONS)
        now = ("tfe", "tse", "third")[(iteration >= 4) + (iteration >= 7)]
        assert shares == {"tfe": 0.0, "tse": 0.0, "third": 0.0} | {now: 1.0}


def test_annealed_every_stage_fades_into_the_next():
    rdd = SETTINGS.model_copy(update={"annealed": True})
    shares = [stage_shares(CHAIN, rdd, i, ITERATIONS) for i in range(1, ITERATIONS + 1)]
    tse = [0, 0, 0, 0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0]
    third = [0, 0, 0, 0, 0, 0, 0, 1 / 3, 2 / 3, 1]
    assert [share["tse"] for share in shares] == pytest.approx(tse)
    assert [share["third"] for share in shares] == pytest.approx(third)
    assert [sum(share.values()) for share in shares] == pytest.approx([1] * ITERATIONS)


def test_a_stage_goes_on_from_the_one_before():
    assert [stage_before(CHAIN, name) for name in ("whole", "tfe", "tse", "third")] == [
        None,
        None,
        "tfe",
        "tse",
    ]


def test_an_unknown_stage_has_no_iterations():
    with pytest.raises(KeyError, match="fourth"):
        stage_span(CHAIN, "fourth", SETTINGS, ITERATIONS)


def test_a_method_that_trains_one_stage_is_called_as_it():
    for name, method in METHODS.items():
        if method.trains != "whole":
            assert name == method.trains
            assert method.stage_before in (None, *METHODS)


def test_only_the_last_stage_makes_a_student():
    assert STAGES == ("tfe",)
    every = METHODS | RDD_PLUS | ABLATIONS
    assert [name for name, method in every.items() if not method.finishes] == ["tfe"]


def test_baselines_do_not_use_rdd_and_all_others_do():
    assert {METHODS[name].uses_rdd for name in BASELINES} == {False}
    others = [METHODS["tfe"], METHODS["tse"], *RDD_PLUS.values(), *ABLATIONS.values()]
    assert {method.stages for method in others} == {RDD}
    assert {method.task for method in others} == {"rdd"}
