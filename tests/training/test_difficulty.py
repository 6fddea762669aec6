"""What is said of the pixels that TSE chooses, class by class."""

import logging
import math

import pytest
import torch
from torch.testing import assert_close

from rdd_pipeline.training.difficulty import Difficulty, difficulty_notes
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.training import Training

from .conftest import CPU, LABELS

NAMES = ("road", "pole")


def row(hard_teacher=0.2, **of_class):
    return {"iteration": 10, "hard_teacher": hard_teacher, **of_class}


def of(name, hard_student, hard_teacher, chosen):
    values = {"hard_student": hard_student, "hard_teacher": hard_teacher, "chosen": chosen}
    return {f"{what}.{name}": value for what, value in values.items()}


def test_counts_of_several_steps_are_shares_of_all_their_pixels():
    difficulty = Difficulty(NAMES)
    difficulty.add(torch.tensor([[100, 0], [50, 0], [10, 0], [40, 0]]))
    difficulty.add(torch.tensor([[300, 4], [30, 4], [10, 3], [20, 1]]))
    shares = difficulty.close()
    assert_close(shares, {**of("road", 0.2, 0.05, 0.15), **of("pole", 1.0, 0.75, 0.25)})
    assert difficulty.close() == {}


def test_a_class_that_was_absent_has_no_share():
    difficulty = Difficulty(NAMES)
    difficulty.add(torch.tensor([[100, 0], [50, 0], [10, 0], [40, 0]]))
    assert set(difficulty.close()) == set(of("road", 0, 0, 0))


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
    job = make_job("tse", recipe={"iterations": 40, "validate_every": 40})
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
            assert r[f"chosen.{name}"] <= either + 1e-6
    assert difficulty_notes(result.history, LABELS.names)
