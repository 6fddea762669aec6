"""A training job: everything that decides the result of a training, as one typed value."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rdd_pipeline.config import (
    FORMER_NAMES,
    EvaluationParams,
    MethodsParams,
    NetworkParams,
    Params,
    RddParams,
    RecipeParams,
    Seed,
)
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.distillation.methods import Method, find_method
from rdd_pipeline.distillation.stages import stage_span
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import file_digest, json_digest

TRAINING_FORMAT = 4
"""Raised whenever the same job would give other weights than before: old work is not reused."""


class TrainingJob(Params):
    """One network to be trained on one data set by one method with one seed."""

    added = ("evaluation",)

    method: str = Field(description="`teacher` or a key of distillation.methods.METHODS.")
    stage: str = Field("whole", description="One of the method's stages, or `whole`: all of them.")
    seed: Seed = 0
    network: NetworkParams
    recipe: RecipeParams
    rdd: RddParams = Field(
        RddParams(), description="Settings of the run; an ablation puts its own on top."
    )
    methods: MethodsParams = MethodsParams()
    evaluation: EvaluationParams = Field(
        EvaluationParams(),
        description="How validation scores the network; of it, recipe.keep picks the best weights.",
    )
    precision: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _frozen_backbone_is_trained(self) -> Self:
        if self.recipe.backbone == "frozen" and self.network.pretrained is False:
            raise ValueError(
                f"recipe.backbone is frozen, but the backbone of {self.network.name} has random "
                "weights. Give it trained ones (pretrained), or train it."
            )
        return self

    @model_validator(mode="after")
    def _stage_fits(self) -> Self:
        stages = [stage.name for stage in self.definition.stages]
        if self.stage != "whole" and not self.definition.uses_rdd:
            raise ValueError(f"Method {self.method!r} has no stages; stage must be `whole`.")
        if self.stage not in ("whole", *stages):
            choices = ", ".join(map(repr, ["whole", *stages[:-1]])) + f" or {stages[-1]!r}"
            raise ValueError(
                f"Method {self.method!r} has no stage {self.stage!r}; expected {choices}."
            )
        if self.definition.uses_rdd and self.warmup > self.recipe.iterations:
            raise ValueError(
                f"rdd.tfe_length is {self.warmup} iterations, the run has "
                f"{self.recipe.iterations}. Lower rdd.tfe_length or raise recipe.iterations."
            )
        return self

    def by(self, method: str) -> Self:
        """What the same run trains by another method."""
        values = {"method": method, "stage": find_method(method).trains}
        return self.model_validate(dict(self) | values)

    @property
    def definition(self) -> Method:
        """The method's task loss and distillation losses, with this job's weights and options."""
        return find_method(self.method, self.methods)

    @property
    def title(self) -> str:
        """What people call it."""
        stage = "" if self.stage == "whole" else f" ({self.stage} stage)"
        return self.method + stage + (f", seed {self.seed}" if self.seed else "")

    @property
    def rdd_settings(self) -> RddParams:
        """Settings of RDD as this method has them."""
        return self.definition.settings(self.rdd)

    @property
    def warmup(self) -> int:
        """First iteration of the TSE stage."""
        return self.rdd_settings.warmup_iterations(self.recipe.iterations)

    @property
    def first_iteration(self) -> int:
        """Iterations count from 1."""
        return self._span[0]

    @property
    def last_iteration(self) -> int:
        """Below `first_iteration` when the stage is empty."""
        return self._span[1]

    @property
    def ends_run(self) -> bool:
        """Whether no stage comes after this job."""
        return self.stage in ("whole", self.definition.stages[-1].name)

    @property
    def first_of_last_stage(self) -> int:
        """First iteration of the method's last stage."""
        stages = self.definition.stages
        return stage_span(stages, stages[-1].name, self.rdd_settings, self.recipe.iterations)[0]

    @property
    def _span(self) -> tuple[int, int]:
        stages = self.definition.stages
        return stage_span(stages, self.stage, self.rdd_settings, self.recipe.iterations)

    def fingerprint(
        self, images: Images, *, teacher_digest: str | None, start_digest: str | None
    ) -> str:
        """Digest (16 hex digits) of everything that decides the weights this job ends with.

        Where the images lie, packed or not, is not part of it, what they hold is, and of the label
        set what its masks mean, not its colors; a backbone file counts by its content.
        A stage that does not look at the settings of later ones (`Stage.settings`) is shared by
        runs that differ in those.
        """
        definition, rdd = self.definition, self.rdd_settings
        apart = {"method", "methods", "rdd", "evaluation"}
        facts = self.model_dump(mode="json", exclude=apart, context=FORMER_NAMES)
        stops_early = self.recipe.early_stopping is not None and self.ends_run
        if not stops_early:  # a stage before the last one is never cut short
            facts["recipe"].pop("early_stopping", None)
        facts["image_size"] = images.image_size
        labels = images.labels
        facts["labels"] = {**labels.meaning(), "class_weights": labels.class_weights}
        facts["definition"] = {
            "task": definition.task,
            "terms": [
                {"module": s.name, "weights": s.weights, "options": s.options}
                for s in definition.losses
            ],
        }
        if not self.methods.scale_by_positions:
            facts["scale_by_positions"] = False
        if self.recipe.class_weights and not definition.weighted_tfe:
            facts["weighted_tfe"] = False
        protocol = self.evaluation.protocol()
        # The protocol decides which of the validated weights are the best, and when it is over.
        if (
            self.recipe.keep == "best" or stops_early
        ) and protocol != EvaluationParams().protocol():
            facts["evaluation"] = protocol
        if self.methods.compare_at == "student" and definition.losses:
            facts["compare_at"] = "student"
        if self.methods.cross_image == "local":
            facts["relations"] = "rank"
        if definition.uses_rdd:
            read = {stage.name: stage.settings for stage in definition.stages}.get(self.stage)
            include = None if read is None else set(read)
            facts["rdd"] = rdd.model_dump(mode="json", include=include, context=FORMER_NAMES)
            # Two ways to say the same: a fraction of the run and a count.
            facts["rdd"]["warmup"] = self.warmup
        if isinstance(self.network.pretrained, Path):
            facts["network"]["pretrained"] = file_digest(self.network.pretrained)
        facts |= {
            "format": TRAINING_FORMAT,
            "index": images.index_digest,
            "teacher": teacher_digest,
            "start": start_digest,
        }
        return json_digest(facts)


def check_class_weights(recipe: RecipeParams, labels: LabelSet, name: str = "recipe") -> None:
    """Refuse weights of classes that the label set does not have; `name` is the recipe's.

    Raises:
        UserError: It has none.
    """
    if recipe.class_weights and labels.class_weights is None:
        raise UserError(
            f"{name}.class_weights is on, but label set {labels.name!r} has no class weights. "
            "Turn it off."
        )


def check_early_stopping(recipe: RecipeParams, images: Images, name: str = "recipe") -> None:
    """Refuse to stop by validations that never come; `name` is the recipe's.

    Raises:
        UserError: There is nothing to validate on.
    """
    if recipe.early_stopping and not images.split("val").samples:
        raise UserError(
            f"{name}.early_stopping stops by the mIoU on split `val`, which has no images. Give it "
            f"some (data.val_fraction), or leave {name}.early_stopping out."
        )
