"""Every method as data: its task loss and its weighted distillation terms.

Weights are those of the CIRKD code base on Cityscapes; DIST's and MGD's those of their papers,
which have no plain KD beside them. ``params:methods`` overrides weights and options by method.
Nothing here computes: `terms.py` says what a term is, `objective.py` adds up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rdd_pipeline.config import MethodsParams, Option, RddParams
from rdd_pipeline.errors import UserError


@dataclass(frozen=True)
class Term:
    """One distillation module and the weights of the losses it returns.

    Attributes:
        module: Key of `terms.TERMS`.
        weights: Weight by name of a loss; the names are those of the curves.
        options: Settings of the module.
        published: Settings on top of `options` under ``methods.preset=reference_code``: where the
            published code deviates from its paper.
    """

    module: str
    weights: Mapping[str, float]
    options: Mapping[str, Option] = field(default_factory=dict)
    published: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A named way to train a network.

    Attributes:
        title: What tables and figures call it.
        task: `plain`: cross-entropy on all valid pixels; `rdd`: TFE, then TSE.
        terms: Distillation losses added to the task loss; with any, a teacher is needed.
        rdd: Settings of RDD that make this method, by field of `RddParams`.
        published: Terms under ``methods.preset=reference_code``, where the code behind published
            tables has others.
        weighted_tfe: Whether class weights, where the recipe has them, hold for TFE too.
    """

    title: str
    task: Literal["plain", "rdd"] = "plain"
    terms: tuple[Term, ...] = ()
    rdd: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[Term, ...] | None = None
    weighted_tfe: bool = True

    @property
    def needs_teacher(self) -> bool:
        """Whether a frozen network has to see every batch."""
        return self.task == "rdd" or bool(self.terms)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every loss by its name."""
        return {name: weight for term in self.terms for name, weight in term.weights.items()}

    def settings(self, rdd: RddParams) -> RddParams:
        """The run's settings of RDD with those that make this method put on top."""
        return RddParams.model_validate({**rdd.model_dump(), **self.rdd})


KD = Term("kd", {"kd": 1.0})
ADVERSARIAL = Term("skd_holistic", {"skd_generator": 0.001, "skd_discriminator": 0.1})
CWD_LOGITS = Term("cwd_logits", {"cwd_logits": 3.0})
CWD = (
    KD,
    CWD_LOGITS,
    Term(
        "cwd_feature",
        {"cwd_feature": 50.0},
        published={"divisor": "student", "adapter": "unless_equal"},
    ),
)
IFVD = (KD, Term("ifvd", {"ifvd": 20.0}))
MGD = Term("mgd", {"mgd": 2e-5}, published={"adapter": "unless_equal"})

METHODS: dict[str, Method] = {
    "baseline": Method("student alone"),
    "kd": Method("KD", terms=(KD,)),
    "fitnet": Method("FitNet", terms=(KD, Term("fitnet", {"fitnet": 10.0}))),
    "at": Method("AT", terms=(KD, Term("at", {"at": 10_000.0}))),
    "skd": Method(
        "SKD",
        terms=(
            KD,
            Term("skd_pairwise", {"skd_pairwise": 10.0}),
            ADVERSARIAL,
        ),
    ),
    "ifvd": Method("IFVD", terms=IFVD, published=(*IFVD, ADVERSARIAL)),
    "cwd": Method("CWD", terms=CWD, published=(*CWD, ADVERSARIAL)),
    "dsd": Method("DSD", terms=(Term("psd", {"psd": 1000.0}), Term("csd", {"csd": 10.0}))),
    "cirkd": Method(
        "CIRKD",
        terms=(
            KD,
            Term("cirkd_minibatch", {"cirkd_minibatch": 1.0}),
            Term(
                "cirkd_memory",
                {"cirkd_pixel": 0.1, "cirkd_region": 0.1},
                published={"preset": "cirkd_published"},
            ),
        ),
    ),
    "dist": Method("DIST", terms=(Term("dist", {"dist": 1.0}),)),
    "mgd": Method("MGD", terms=(MGD,), published=(MGD, CWD_LOGITS)),
    "af_dcd": Method(
        "Af-DCD", terms=(KD, Term("af_dcd", {"af_dcd_feature": 2e-6, "af_dcd_contrast": 0.005}))
    ),
    "cirkdv2": Method(
        "CIRKDv2",
        terms=(
            KD,
            Term(
                "cirkdv2",
                {
                    "cirkd_minibatch": 1.0,
                    "cirkd_pixel": 0.1,
                    "cirkd_region": 0.1,
                    "fitnet": 10.0,
                    "channel_minibatch": 1.0,
                    "channel_memory": 0.1,
                    "channel_mse": 100.0,
                },
                published={"preset": "cirkd_published", "attention_bias": False},
            ),
        ),
    ),
    # Splits KD itself in edge and body, hence none beside it.
    "bpkd": Method("BPKD", terms=(Term("bpkd", {"bpkd_edge": 50.0, "bpkd_body": 20.0}),)),
    "tfe": Method("RDD, TFE stage", task="rdd", terms=(KD,)),
    "tse": Method("RDD", task="rdd", terms=(KD,)),
}

STAGES = ("tfe",)
"""Methods that end early in a run: weights on the way, no student to be compared with others."""

RDD_STAGES = ("tfe", "tse")
"""The two stages of the main job; they have pipelines of their own."""

BASELINES = tuple(name for name in METHODS if name not in RDD_STAGES)
"""The student alone and every method beside RDD."""

COMPANIONS: dict[str, Method] = {
    f"tse_{name}": replace(METHODS[name], title=f"RDD + {METHODS[name].title}", task="rdd")
    for name in BASELINES
    if name not in ("baseline", "kd")  # RDD's own form has KD
}
"""Every method with RDD in the place of its task loss."""

# What can be changed about RDD, as in the published ablations, and the class floor, which is ours.
ABLATIONS: dict[str, Method] = {
    f"rdd_{name}": Method(f"RDD, {title}", task="rdd", terms=(KD,), rdd=settings)
    for name, title, settings in (
        ("warmup_00", "warm-up 0 %", {"tfe_length": 0}),
        ("warmup_10", "warm-up 10 %", {"tfe_length": 0.1}),
        ("warmup_20", "warm-up 20 %", {"tfe_length": 0.2}),
        ("warmup_30", "warm-up 30 %", {"tfe_length": 0.3}),
        ("xor", "hard XOR", {"mode": "xor"}),
        ("or", "hard OR", {"mode": "or"}),
        ("and", "hard AND", {"mode": "and"}),
        ("ohem", "OHEM (student only)", {"mode": "ohem"}),
        ("threshold_50", "threshold 0.5", {"threshold": 0.5}),
        ("threshold_70", "threshold 0.7", {"threshold": 0.7}),
        ("threshold_90", "threshold 0.9", {"threshold": 0.9}),
        ("kept_05", "5 % kept", {"min_kept": 0.05}),
        ("kept_10", "10 % kept", {"min_kept": 0.1}),
        ("kept_20", "20 % kept", {"min_kept": 0.2}),
        ("annealed", "annealed", {"annealed": True}),
        ("class_floor", "class floor 20 %", {"class_floor": 0.2}),
    )
}
"""RDD with one setting changed."""


def find_method(name: str, changes: MethodsParams | None = None) -> Method:
    """Look a method up and put the run's weights and options on its terms.

    Args:
        name: Key of `METHODS`, `COMPANIONS` or `ABLATIONS`; ``teacher`` is the plain task without
            distillation.
        changes: Other weights and options by method, and the preset. The TFE stage is the first
            part of ``tse`` and follows what is said of that.

    Raises:
        UserError: Unknown method, or a weight or option of a term the method does not have.
    """
    if name == "teacher":
        return Method("teacher")
    every = METHODS | COMPANIONS | ABLATIONS
    if name not in every:
        raise UserError(
            f"There is no method {name!r}. The methods are: {', '.join(sorted(METHODS))}; with RDD "
            f"as companion: {', '.join(sorted(COMPANIONS))}; ablations of RDD: "
            f"{', '.join(sorted(ABLATIONS))}."
        )
    method = every[name]
    if changes is None:
        return method
    key = "tse" if name == "tfe" else name
    weights, options = changes.weights.get(key, {}), changes.options.get(key, {})
    everywhere = {"kd": changes.kd}
    published = changes.preset == "reference_code"
    if published:
        method = replace(method, terms=method.published or method.terms, weighted_tfe=False)
    _require_known(name, "weights", weights, list(method.weights))
    _require_known(name, "options", options, [term.module for term in method.terms])
    terms = tuple(
        replace(
            term,
            weights={
                loss: weights.get(loss, everywhere.get(loss, weight))
                for loss, weight in term.weights.items()
            },
            options={
                **term.options,
                **(term.published if published else {}),
                **options.get(term.module, {}),
            },
            published={},
        )
        for term in method.terms
    )
    return replace(method, terms=terms, published=None)


def method_title(name: str, rdd: RddParams) -> str:
    """What tables, figures and runs call a method under the run's settings of RDD.

    RDD is what its paper calls so: the mode XOR. Another mode is a variant and says so; OHEM asks
    the student alone.

    Args:
        name: As for `find_method`.
        rdd: Settings of the run.
    """
    method = find_method(name)
    mode = method.settings(rdd).mode if method.task == "rdd" else "xor"
    if mode == "xor" or name in STAGES or "mode" in method.rdd:
        return method.title
    rest = method.title.removeprefix("RDD")
    if mode == "ohem":
        return "OHEM" + (rest or " + KD")
    return f"RDD variant {mode.upper()}{rest}"


def check_changes(changes: MethodsParams) -> None:
    """Refuse weights and options of methods that do not exist, or of terms they do not have.

    Raises:
        UserError: As `find_method`, or something was said of ``tfe``.
    """
    for name in {*changes.weights, *changes.options}:
        if name == "tfe":
            raise UserError(
                "params:methods names the method 'tfe'. The TFE stage is the first part of RDD: "
                "say it of 'tse', and both stages follow."
            )
        find_method(name, changes)


def _require_known(method: str, what: str, given: Mapping[str, Any], known: list[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UserError(
            f"params:methods gives {method!r} {what} for {', '.join(unknown)}, but its terms are "
            f"{', '.join(known) or '(none)'}."
        )
