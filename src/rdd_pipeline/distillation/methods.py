"""Every method as data: its task loss and its weighted distillation terms.

Weights are those of the CIRKD code base on Cityscapes; ``params:methods`` overrides them by
method and term. Nothing here computes: `terms.py` says what a term is, `objective.py` adds up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from rdd_pipeline.errors import UserError


@dataclass(frozen=True)
class Term:
    """One weighted distillation loss; `loss` is a key of `terms.TERMS`."""

    loss: str
    weight: float
    options: Mapping[str, float | str | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A named way to train a network.

    Attributes:
        title: What tables and figures call it.
        task: `plain`: cross-entropy on all valid pixels; `rdd`: TFE, then TSE.
        terms: Distillation losses added to the task loss; with any, a teacher is needed.
    """

    title: str
    task: Literal["plain", "rdd"] = "plain"
    terms: tuple[Term, ...] = ()

    @property
    def needs_teacher(self) -> bool:
        """Whether a frozen network has to see every batch."""
        return self.task == "rdd" or bool(self.terms)


KD = Term("kd", 1.0, {"temperature": 1.0})

METHODS: dict[str, Method] = {
    "baseline": Method("student alone"),
    "kd": Method("KD", terms=(KD,)),
    "tfe": Method("RDD, TFE stage", task="rdd", terms=(KD,)),
    "tse": Method("RDD", task="rdd", terms=(KD,)),
}


def find_method(name: str, weights: Mapping[str, float] | None = None) -> Method:
    """Look a method up and put other weights on its terms.

    Args:
        name: Key of `METHODS`; ``teacher`` is the plain task without distillation.
        weights: New weight by term name.

    Raises:
        UserError: Unknown method, or a weight for a term the method does not have.
    """
    if name == "teacher":
        return Method("teacher")
    if name not in METHODS:
        raise UserError(
            f"There is no method {name!r}. The methods are: {', '.join(sorted(METHODS))}."
        )
    method = METHODS[name]
    known = [term.loss for term in method.terms]
    unknown = sorted(set(weights or {}) - set(known))
    if unknown:
        raise UserError(
            f"params:methods gives {name!r} weights for {', '.join(unknown)}, but its terms are "
            f"{', '.join(known) or '(none)'}."
        )
    terms = tuple(
        replace(term, weight=(weights or {}).get(term.loss, term.weight)) for term in method.terms
    )
    return replace(method, terms=terms)
