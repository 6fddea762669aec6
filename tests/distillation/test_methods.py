from __future__ import annotations

import pytest

from rdd_pipeline.distillation.methods import METHODS, Term, find_method
from rdd_pipeline.distillation.terms import TERMS, LossTerm, build_term
from rdd_pipeline.errors import UserError


def test_the_methods_of_the_main_job_are_there():
    assert {"baseline", "kd", "tfe", "tse"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_term_of_a_method_exists_once_and_can_be_built(name):
    terms = METHODS[name].terms
    losses = [term.loss for term in terms]
    assert len(set(losses)) == len(losses)  # an objective keeps them by that name
    for term in terms:
        assert term.loss in TERMS
        assert term.weight >= 0


def test_kd_has_weight_and_temperature_one_in_rdd():
    for name in ("kd", "tfe", "tse"):
        assert METHODS[name].terms[0] == Term("kd", 1.0, {"temperature": 1.0})


def test_only_the_student_alone_and_the_teacher_need_no_teacher():
    assert {name for name in METHODS if not METHODS[name].needs_teacher} == {"baseline"}
    assert not find_method("teacher").needs_teacher
    assert find_method("teacher").task == "plain"
    assert find_method("teacher").terms == ()


def test_every_method_has_a_title_of_its_own():
    titles = [method.title for method in METHODS.values()]
    assert len(set(titles)) == len(titles)


def test_the_two_stages_of_rdd_are_the_same_method():
    tfe, tse = METHODS["tfe"], METHODS["tse"]
    assert (tfe.task, tfe.terms) == (tse.task, tse.terms)


def test_other_weights_replace_those_of_the_table_and_leave_it_as_it_is():
    changed = find_method("tse", {"kd": 0.25})
    assert [term.weight for term in changed.terms] == [0.25]
    assert changed.terms[0].options == METHODS["tse"].terms[0].options
    assert find_method("tse") == METHODS["tse"]
    assert find_method("tse").terms[0].weight == 1.0


def test_a_weight_of_zero_is_a_weight():
    assert find_method("kd", {"kd": 0.0}).terms[0].weight == 0.0


def test_an_unknown_method_is_refused_and_the_choices_are_named():
    with pytest.raises(UserError, match=r"no method 'kdd'. The methods are: .*baseline.*kd.*tse"):
        find_method("kdd")


def test_a_weight_for_a_term_the_method_does_not_have_is_refused():
    with pytest.raises(
        UserError, match=r"params:methods gives 'kd' weights for at, cwd, but its terms are kd\."
    ):
        find_method("kd", {"cwd": 1.0, "at": 2.0, "kd": 1.0})
    with pytest.raises(UserError, match=r"but its terms are \(none\)"):
        find_method("baseline", {"kd": 1.0})


def test_a_term_is_built_with_its_options():
    term = build_term("kd", {"temperature": 4.0})
    assert isinstance(term, LossTerm)
    assert term.temperature == 4.0


def test_an_unknown_term_is_refused_and_the_choices_are_named():
    with pytest.raises(UserError, match=r"no loss term 'kdd'. The terms are: .*kd"):
        build_term("kdd", {})
