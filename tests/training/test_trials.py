"""Which settings a sweep tries."""

from __future__ import annotations

import itertools
import math

import pytest
from pydantic import ValidationError

from rdd_pipeline.config import RddParams, RecipeParams, Span, SweepParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.training.trials import settings_of, with_settings

LR, THRESHOLD = "recipe.optimizer.lr", "rdd.threshold"


def random_search(parameters, trials, seed=0):
    return settings_of(
        SweepParams(parameters=parameters, sampler="random", trials=trials, seed=seed)
    )


def test_a_grid_has_every_combination():
    grid = settings_of(SweepParams(parameters={THRESHOLD: [0.3, 0.7], LR: [1, 2, 3]}))
    expected = itertools.product([0.3, 0.7], [1, 2, 3])
    assert [tuple(settings.values()) for settings in grid] == list(expected)
    assert all(list(settings) == [THRESHOLD, LR] for settings in grid)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("0.3/0.5", (0.3, 0.5)),
        ("xor/or", ("xor", "or")),
        ("true/null", (True, None)),
        (0.3, (0.3,)),
        ("1e-4..1e-1:log", Span(low=1e-4, high=1e-1, log=True)),
        ("2..8", Span(low=2, high=8)),
        ({"low": 0.1, "high": 0.9}, Span(low=0.1, high=0.9)),
    ],
)
def test_values_as_files_and_a_command_write_them(written, meant):
    values = {"sampler": "random", "trials": 3}
    nested = SweepParams(parameters={"rdd": {"threshold": written}}, **values)
    dotted = SweepParams(parameters={THRESHOLD: written}, **values)
    assert nested.parameters == dotted.parameters == {THRESHOLD: meant}
    # Kedro reads what it has dumped.
    assert SweepParams.model_validate(nested.model_dump(mode="json")) == nested


def test_draws_are_in_range_and_more_trials_begin_with_those_of_fewer():
    parameters = {
        LR: {"low": 1e-4, "high": 1e-1, "log": True},
        "recipe.batch_size": {"low": 2, "high": 5},
        "rdd.mode": ["xor", "or"],
    }
    many = random_search(parameters, 200)
    assert many[:20] == random_search(parameters, 20)
    assert many != random_search(parameters, 200, seed=1)
    rates = [settings[LR] for settings in many]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    below = sum(rate < 10**-2.5 for rate in rates) / len(rates)
    assert math.isclose(below, 0.5, abs_tol=0.1)  # the middle of the powers of ten
    assert {settings["recipe.batch_size"] for settings in many} == {2, 3, 4, 5}
    assert {settings["rdd.mode"] for settings in many} == {"xor", "or"}


def test_no_setting_is_drawn_twice():
    assert sorted(s["rdd.mode"] for s in random_search({"rdd.mode": ["or", "xor"]}, 9)) == [
        *("or", "xor")
    ]


def test_settings_are_put_on_models_and_mappings_which_stay_as_they_are():
    recipe, rdd = RecipeParams(iterations=7), {"threshold": 0.3}
    tried = with_settings(
        {"recipe": recipe, "rdd": rdd, "methods": {}},
        {"recipe.ema.decay": 0.9, THRESHOLD: 0.5, "methods.weights.cwd.cwd_logits": 2.0},
    )
    assert RecipeParams.model_validate(tried["recipe"]) == RecipeParams(
        iterations=7, ema={"decay": 0.9}
    )
    assert RddParams.model_validate(tried["rdd"]).threshold == 0.5
    assert tried["methods"] == {"weights": {"cwd": {"cwd_logits": 2.0}}}
    assert recipe == RecipeParams(iterations=7)
    assert rdd == {"threshold": 0.3}
    with pytest.raises(UserError, match="but iterations is 7"):
        with_settings({"recipe": recipe}, {"recipe.iterations.many": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parameters": {"teacher.network.width": [8]}}, "cannot be swept: trials share data"),
        ({"parameters": {"rdd": [8]}}, "cannot be swept"),
        ({"parameters": {THRESHOLD: "0.1..0.9"}}, "is a range, of which a grid takes no values"),
        ({"parameters": {THRESHOLD: [0.1]}, "sampler": "random"}, "needs a number of trials"),
        ({"parameters": {THRESHOLD: [0.1]}, "trials": 4}, "a grid has as many as combinations"),
        ({"parameters": {THRESHOLD: []}}, "at least 1 item"),
        ({"parameters": {THRESHOLD: "0.9..0.1"}}, r"low \(0.9\) is not below high"),
        ({"parameters": {THRESHOLD: "0..0.1:log"}}, "log needs values above 0"),
        ({"parameters": {"recipe.iterations": [4]}, "budget": 8}, "both say how long trials are"),
    ],
)
def test_what_cannot_be_sampled_is_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        SweepParams(**values)


def test_nothing_to_try_or_too_much():
    with pytest.raises(UserError, match=r"sweep\.parameters is empty. Say what to try"):
        settings_of(SweepParams())
    many = [n / 100 for n in range(40)]
    with pytest.raises(UserError, match="has 1600 combinations, expected at most 1000"):
        settings_of(SweepParams(parameters={THRESHOLD: many, LR: many}))
