from __future__ import annotations

from rdd_pipeline.distillation.methods import find_method
from rdd_pipeline.training.difficulty import training_notes

from .conftest import LABELS


def test_a_training_by_rdd_notes_what_it_left_out_and_others_nothing():
    shares = {f"{what}.block": 0.9 for what in ("hard_student", "hard_teacher")}
    row = {"iteration": 1.0, "hard_student": 0.5, "hard_teacher": 0.1, "chosen.block": 0.0}
    history = [row | shares] * 20
    (note,) = training_notes(history, method=find_method("tse"), labels=LABELS)
    assert "'block'" in note
    assert training_notes(history, method=find_method("kd"), labels=LABELS) == []
    assert training_notes([], method=find_method("tse"), labels=LABELS) == []
