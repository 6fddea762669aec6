"""What is said of the pixels that TSE chooses, class by class."""

import logging
import math

import pytest
import torch
from torch.testing import assert_close

from rdd_pipeline.losses.class_counts import PixelsOfClass
from rdd_pipeline.training.difficulty import Difficulty, difficulty_notes
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.training import Training

from .conftest import CPU, LABELS

NAMES = ("road", "pole")


def row(hard_teacher=0.2, **of_class):
    return {"iteration": 10, "hard_teacher": hard_teacher, **of_class}


def of(name, *shares):
    """Those that are given of: hard for the student, for the teacher, chosen, hard for both."""
    names = ("hard_student", "hard_teacher", "chosen", "hard_both")
    return {f"{what}.{name}": share for what, share in zip(names, shares, strict=False)}


def tse(*counts):
    return torch.stack(PixelsOfClass.of_tse(torch.tensor(counts)))


def test_counts_of_several_steps_are_shares_of_all_their_pixels():
    difficulty = Difficulty(NAMES)
    difficulty.add(tse([100, 0], [50, 0], [10, 0], [40, 0], [10, 0]))
    difficulty.add(tse([300, 4], [30, 4], [10, 3], [20, 1], [10, 3]))
    shares = difficulty.close()
    expected = {**of("road", 0.2, 0.05, 0.15, 0.05), **of("pole", 1.0, 0.75, 0.25, 0.75)}
    assert_close(shares, expected)
    assert difficulty.close() == {}


def test_a_class_that_was_absent_has_no_share():
    difficulty = Difficulty(NAMES)
    difficulty.add(tse([100, 0], [50, 0], [10, 0], [40, 0], [10, 0]))
    assert set(difficulty.close()) == set(of("road", 0, 0, 0, 0))


def test_what_tfe_weighs_and_tse_finds_are_shares_of_their_own_pixels():
    difficulty = Difficulty(NAMES)
    weighed = torch.stack(PixelsOfClass.of_tfe(torch.tensor([[50, 10], [5, 0], [10, 2]])))
    difficulty.add(weighed)
    difficulty.add(tse([100, 0], [50, 0], [10, 0], [40, 0], [10, 0]))
    assert_close(
        difficulty.close(),
        of("road", 0.5, 0.1, 0.4, 0.1)
        | {"weight_low.road": 0.1, "weight_middle.road": 0.2}
        | {"weight_low.pole": 0.0, "weight_middle.pole": 0.2},
    )


def test_nothing_is_said_of_a_good_teacher():
    good = row(0.1, **of("road", 0.1, 0.02, 0.1), **of("pole", 0.9, 0.3, 0.6))
    assert difficulty_notes([good] * 8, NAMES) == []


def test_a_class_that_is_hard_for_both_is_named():
    left_out = row(0.3, **of("road", 0.1, 0.1, 0.1), **of("pole", 0.98, 0.97, 0.01))
    (note,) = difficulty_notes([left_out] * 8, NAMES)
    assert "next to no pixel of class 'pole' was chosen" in note
    assert "rdd.class_floor=0.2 or rdd.mode=or" in note


def test_several_classes_are_named_in_one_sentence():
    both = row(0.3, **of("road", 0.9, 0.9, 0.0), **of("pole", 0.98, 0.97, 0.01))
    (note,) = difficulty_notes([both] * 8, NAMES)
    assert "classes 'road', 'pole' was chosen" in note


def test_a_class_that_is_easy_for_both_is_no_fault():
    learned = row(0.1, **of("road", 0.01, 0.01, 0.0), **of("pole", 0.4, 0.39, 0.01))
    assert difficulty_notes([learned] * 8, NAMES) == []


def test_a_teacher_that_finds_most_hard_is_named():
    (note,) = difficulty_notes([row(0.66)] * 8, NAMES)
    assert "66 % of the labeled pixels were hard for the teacher" in note


def test_the_second_half_of_tse_counts_and_other_rows_do_not():
    rows = [{"iteration": 1, "loss": 1.0}, *[row(0.9)] * 6, *[row(0.1)] * 6, {"val.miou": 0.5}]
    assert difficulty_notes(rows, NAMES) == []


def test_gaps_of_a_table_are_no_values():
    rows = [row(math.nan, **of("pole", math.nan, math.nan, math.nan))] * 8
    assert difficulty_notes(rows, NAMES) == []


@pytest.mark.parametrize("rows", [[], [row(0.9)]])
def test_too_few_points_say_nothing(rows):
    assert difficulty_notes(rows, NAMES) == []


def test_a_training_counts_by_class_and_warns_once(make_job, blocks, teacher, caplog):
    """An untrained teacher finds nearly everything hard."""
    recipe = {"iterations": 40, "validate_every": 40}
    job = make_job("tse", recipe=recipe, rdd={"tfe_length": 7})
    with caplog.at_level(logging.WARNING):
        result = train(Training(job, blocks.images, teacher), CPU)
    warned = [r.message for r in caplog.records if "hard for the teacher" in r.message]
    assert len(warned) == 1
    counted = [r for r in result.history if any(key.startswith("chosen.") for key in r)]
    assert counted
    for r in counted:
        named = {name for name in LABELS.names if f"chosen.{name}" in r}
        assert named
        for name in named:
            assert 0 <= r[f"chosen.{name}"] <= 1
            either = r[f"hard_student.{name}"] + r[f"hard_teacher.{name}"]
            # XOR, and the job has no class floor.
            assert abs(r[f"chosen.{name}"] - (either - 2 * r[f"hard_both.{name}"])) < 1e-6
    weighed = [r for r in result.history if any(key.startswith("weight_low.") for key in r)]
    assert [r["iteration"] for r in weighed] == [6]  # counted in 5, logged in 6
    for name in LABELS.names:
        assert 0 <= weighed[0][f"weight_low.{name}"] + weighed[0][f"weight_middle.{name}"] <= 1
    assert difficulty_notes(result.history, LABELS.names)
