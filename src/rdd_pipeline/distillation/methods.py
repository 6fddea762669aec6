"""Every method as data: its task loss and its weighted distillation losses.

Weights are those of the CIRKD code base on Cityscapes; DIST's and MGD's those of their papers,
which have no plain KD beside them. ``params:methods`` overrides weights and options by method.
A new loss is one file in `rdd_pipeline.losses` and one entry in `METHODS`, which names it as
``loss_files.FILE.FUNCTION``: the table is read by commands that need no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rdd_pipeline.config import MethodsParams, Option, RddParams
from rdd_pipeline.distillation.stages import PLAIN, RDD, Stage, stage_before
from rdd_pipeline.errors import UserError
from rdd_pipeline.lazy import Lazy

if TYPE_CHECKING:
    from rdd_pipeline.losses.base import DistillationLoss, LossContext

loss_files = Lazy("rdd_pipeline.losses")

T = TypeVar("T")
Scale = Callable[["LossContext"], float]


@dataclass(frozen=True)
class LossSpec:
    """A distillation loss of a method: how it is built, and how much it weighs.

    A loss that returns one scalar is called as its spec; several have names of their own, by which
    weights and scales are given and which are those of the curves.

    Attributes:
        name: What `params:methods` calls it.
        build: Makes it from the `LossContext` and its options.
        weight: Its weight, or the weights by name.
        scale: For losses whose size depends on the number of positions: by what they are to be
            multiplied to weigh what they weigh on the published maps of 64 x 128.
        options: Settings of the loss.
        reference_code: Settings on top of `options` under ``methods.preset=reference_code``: where
            the published code deviates from its paper.
    """

    name: str
    build: Callable[..., DistillationLoss]
    weight: float | Mapping[str, float]
    scale: Scale | Mapping[str, Scale] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    reference_code: Mapping[str, Option] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every loss by its name."""
        return self.by_name(self.weight)

    def by_name(self, value: T | Mapping[str, T]) -> dict[str, T]:
        """What is given for each of the losses; a single one has the spec's name."""
        return dict(value) if isinstance(value, Mapping) else {self.name: value}

    def module(self, context: LossContext) -> DistillationLoss:
        """Build the loss for the networks of a training.

        Raises:
            UserError: There is no such option, or the networks' maps do not suit the loss.
        """
        try:
            return self.build(context, **self.options)
        except TypeError as error:
            raise UserError(
                f"params:methods.options does not suit the loss {self.name!r} ({error}). Its "
                "options are the arguments in its file of rdd_pipeline/losses."
            ) from error

    def scales(self, context: LossContext) -> dict[str, float]:
        """Factors beside the weights, by name; 1 where missing."""
        return {name: scale(context) for name, scale in self.by_name(self.scale).items()}


@dataclass(frozen=True)
class Method:
    """A named way to train a network.

    Attributes:
        title: What tables and figures call it.
        losses: Distillation losses added to the task loss; with any, a teacher is needed.
        stages: Its task losses, one after the other.
        trains: The stage that the method's own job trains, from the state in which the method of
            the stage before ended (it is called as that stage); ``whole``: all of them in one go.
        rdd: Settings of RDD that make this method, by field of `RddParams`.
        reference_code: Losses under ``methods.preset=reference_code``, where the code behind the
            published tables has others.
        weighted_tfe: Whether class weights, where the recipe has them, hold for TFE too.
    """

    title: str
    losses: tuple[LossSpec, ...] = ()
    stages: tuple[Stage, ...] = PLAIN
    trains: str = "whole"
    rdd: Mapping[str, Any] = field(default_factory=dict)
    reference_code: tuple[LossSpec, ...] | None = None
    weighted_tfe: bool = True

    @property
    def needs_teacher(self) -> bool:
        """Whether a frozen network has to see every batch."""
        return any(stage.needs_teacher for stage in self.stages) or bool(self.losses)

    @property
    def uses_rdd(self) -> bool:
        """Whether the settings of RDD decide anything."""
        return self.stages != PLAIN

    @property
    def task(self) -> str:
        """What fingerprints call the stages."""
        return {PLAIN: "plain", RDD: "rdd"}.get(
            self.stages, "+".join(stage.name for stage in self.stages)
        )

    @property
    def stage_before(self) -> str | None:
        """Stage, and method, whose last state this one goes on from."""
        return stage_before(self.stages, self.trains)

    @property
    def finishes(self) -> bool:
        """Whether its weights are those of a finished student."""
        return self.trains in ("whole", self.stages[-1].name)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every loss by its name."""
        return {name: weight for spec in self.losses for name, weight in spec.weights.items()}

    def settings(self, rdd: RddParams) -> RddParams:
        """The run's settings of RDD with those that make this method put on top."""
        return RddParams.model_validate({**rdd.model_dump(), **self.rdd})


def compare(
    maps: Literal["logits", "feature"], function: Callable[..., Any]
) -> Callable[..., DistillationLoss]:
    """How to build a loss of one kind of maps of both networks, see `losses.base.compare`."""

    def build(context: LossContext, **options: Option) -> DistillationLoss:
        loss: DistillationLoss = loss_files.base.compare(maps, function)(context, **options)
        return loss

    return build


KD = LossSpec("kd", compare("logits", loss_files.kd.kd_loss), 1.0)
ADVERSARIAL = LossSpec(
    "skd_holistic",
    loss_files.skd.SKDHolisticLoss,
    {"skd_generator": 0.001, "skd_discriminator": 0.1},
)
CWD_LOGITS = LossSpec("cwd_logits", compare("logits", loss_files.cwd.cwd_loss), 3.0)
CWD = (
    KD,
    CWD_LOGITS,
    LossSpec(
        "cwd_feature",
        loss_files.cwd.CWDFeatureLoss,
        50.0,
        reference_code={"divisor": "student", "adapter": "unless_equal"},
    ),
)
IFVD = (KD, LossSpec("ifvd", loss_files.ifvd.build_ifvd, 20.0))
MGD = LossSpec(
    "mgd",
    loss_files.mgd.MGDLoss,
    2e-5,
    scale=loss_files.mgd.mgd_scale,
    reference_code={"adapter": "unless_equal"},
)

METHODS: dict[str, Method] = {
    "baseline": Method("student alone"),
    "kd": Method("KD", (KD,)),
    "fitnet": Method("FitNet", (KD, LossSpec("fitnet", loss_files.fitnet.FitNetLoss, 10.0))),
    "at": Method(
        "AT",
        (
            KD,
            LossSpec(
                "at",
                compare("feature", loss_files.at.at_loss),
                10_000.0,
                scale=loss_files.base.unit_map_scale,
            ),
        ),
    ),
    "skd": Method(
        "SKD",
        (
            KD,
            LossSpec("skd_pairwise", compare("feature", loss_files.skd.skd_pairwise_loss), 10.0),
            ADVERSARIAL,
        ),
    ),
    "ifvd": Method("IFVD", IFVD, reference_code=(*IFVD, ADVERSARIAL)),
    "cwd": Method("CWD", CWD, reference_code=(*CWD, ADVERSARIAL)),
    "dsd": Method(
        "DSD",
        (
            LossSpec("psd", loss_files.dsd.build_psd, 1000.0, scale=loss_files.base.unit_map_scale),
            LossSpec(
                "csd",
                compare("logits", loss_files.dsd.csd_loss),
                10.0,
                scale=loss_files.dsd.csd_scale,
            ),
        ),
    ),
    "cirkd": Method(
        "CIRKD",
        (
            KD,
            LossSpec("cirkd_minibatch", loss_files.cirkd.build_cirkd_minibatch, 1.0),
            LossSpec(
                "cirkd_memory",
                loss_files.cirkd.CIRKDMemoryLoss,
                {"cirkd_pixel": 0.1, "cirkd_region": 0.1},
                reference_code={"preset": "cirkd_published"},
            ),
        ),
    ),
    "dist": Method("DIST", (LossSpec("dist", loss_files.dist.build_dist, 1.0),)),
    "mgd": Method("MGD", (MGD,), reference_code=(MGD, CWD_LOGITS)),
    "af_dcd": Method(
        "Af-DCD",
        (
            KD,
            LossSpec(
                "af_dcd",
                loss_files.af_dcd.AfDCDLoss,
                {"af_dcd_feature": 2e-6, "af_dcd_contrast": 0.005},
                scale={"af_dcd_feature": loss_files.mgd.mgd_scale},
            ),
        ),
    ),
    "cirkdv2": Method(
        "CIRKDv2",
        (
            KD,
            LossSpec(
                "cirkdv2",
                loss_files.cirkdv2.CIRKDv2Loss,
                {
                    "cirkd_minibatch": 1.0,
                    "cirkd_pixel": 0.1,
                    "cirkd_region": 0.1,
                    "fitnet": 10.0,
                    "channel_minibatch": 1.0,
                    "channel_memory": 0.1,
                    "channel_mse": 100.0,
                },
                scale={"channel_mse": loss_files.cirkdv2.channel_mse_scale},
                reference_code={"preset": "cirkd_published", "attention_bias": False},
            ),
        ),
    ),
    # It splits KD itself in edge and body: none beside it.
    "bpkd": Method(
        "BPKD",
        (LossSpec("bpkd", loss_files.bpkd.build_bpkd, {"bpkd_edge": 50.0, "bpkd_body": 20.0}),),
    ),
    # Both in the place of plain KD. Published for whole images: DKD's weights are those of
    # ImageNet; for standardized logits the weight is that of KD here.
    "dkd": Method(
        "DKD", (LossSpec("dkd", loss_files.dkd.build_dkd, {"dkd_target": 1.0, "dkd_rest": 0.5}),)
    ),
    "kd_standardized": Method(
        "KD, standardized logits",
        (
            LossSpec(
                "kd_standardized",
                compare("logits", loss_files.standardized.standardized_kd_loss),
                1.0,
            ),
        ),
    ),
    "tfe": Method("RDD, TFE stage", (KD,), RDD, trains="tfe"),
    "tse": Method("RDD", (KD,), RDD, trains="tse"),
}

LOSSES: dict[str, LossSpec] = {
    spec.name: spec
    for method in METHODS.values()
    for spec in (*method.losses, *(method.reference_code or ()))
}
"""Every distillation loss by its name."""

STAGES = tuple(name for name, method in METHODS.items() if not method.finishes)
"""Methods that end early in a run: weights on the way, no student to be compared with others."""

RDD_STAGES = tuple(name for name, method in METHODS.items() if method.trains != "whole")
"""The stages of the main job, methods called as the stage; they have pipelines of their own."""

BASELINES = tuple(name for name in METHODS if name not in RDD_STAGES)
"""The student alone and every method beside RDD."""

RDD_PLUS: dict[str, Method] = {
    f"tse_{name}": replace(METHODS[name], title=f"RDD + {METHODS[name].title}", stages=RDD)
    for name in BASELINES
    if name not in ("baseline", "kd")  # RDD's own form has KD
}
"""Every method with RDD in the place of its task loss."""

# What can be changed about RDD, as in the published ablations, and the class floor, which is ours.
ABLATIONS: dict[str, Method] = {
    f"rdd_{name}": Method(f"RDD, {title}", (KD,), RDD, rdd=settings)
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
    """Look a method up and put the run's weights and options on its losses.

    Args:
        name: Key of `METHODS`, `RDD_PLUS` or `ABLATIONS`; ``teacher`` is the plain task without
            distillation.
        changes: Other weights and options by method, and the preset. A stage follows what is said
            of the method that trains the last one (TFE of ``tse``).

    Raises:
        UserError: Unknown method, or a weight or option of a loss the method does not have.
    """
    if name == "teacher":
        return Method("teacher")
    every = METHODS | RDD_PLUS | ABLATIONS
    if name not in every:
        raise UserError(
            f"There is no method {name!r}. The methods are: {', '.join(sorted(METHODS))}; beside "
            f"RDD: {', '.join(sorted(RDD_PLUS))}; ablations of RDD: "
            f"{', '.join(sorted(ABLATIONS))}."
        )
    method = every[name]
    if changes is None:
        return method
    key = name if method.finishes else method.stages[-1].name
    weights, options = changes.weights.get(key, {}), changes.options.get(key, {})
    everywhere = {"kd": changes.kd}
    reference_code = changes.preset == "reference_code"
    if reference_code:
        method = replace(method, losses=method.reference_code or method.losses, weighted_tfe=False)
    _require_known(name, "weights", weights, list(method.weights))
    _require_known(name, "options", options, [spec.name for spec in method.losses])
    losses = tuple(
        replace(
            spec,
            weight={
                loss: weights.get(loss, everywhere.get(loss, weight))
                for loss, weight in spec.weights.items()
            },
            options={
                **spec.options,
                **(spec.reference_code if reference_code else {}),
                **options.get(spec.name, {}),
            },
            reference_code={},
        )
        for spec in method.losses
    )
    return replace(method, losses=losses, reference_code=None)


def method_title(name: str, rdd: RddParams) -> str:
    """What tables, figures and runs call a method under the run's settings of RDD.

    RDD is what its paper calls so: the mode XOR. Another mode is a variant and says so; OHEM asks
    the student alone.

    Args:
        name: As for `find_method`.
        rdd: Settings of the run.
    """
    method = find_method(name)
    mode = method.settings(rdd).mode if method.uses_rdd else "xor"
    if mode == "xor" or name in STAGES or "mode" in method.rdd:
        return method.title
    rest = method.title.removeprefix("RDD")
    if mode == "ohem":
        return "OHEM" + (rest or " + KD")
    return f"RDD variant {mode.upper()}{rest}"


def check_changes(changes: MethodsParams) -> None:
    """Refuse weights and options of methods that do not exist, or of losses they do not have.

    Raises:
        UserError: As `find_method`, or something was said of a stage before the last.
    """
    for name in {*changes.weights, *changes.options}:
        if name in STAGES:
            last = METHODS[name].stages[-1].name
            raise UserError(
                f"params:methods names the method {name!r}. The {name.upper()} stage is the first "
                f"part of RDD: say it of {last!r}, and all stages follow."
            )
        find_method(name, changes)


def _require_known(method: str, what: str, given: Mapping[str, Any], known: list[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UserError(
            f"params:methods gives {method!r} {what} for {', '.join(unknown)}, but its losses are "
            f"{', '.join(known) or '(none)'}."
        )
