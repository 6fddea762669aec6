"""Typed parameters: one frozen model for each ``params:`` key.

Kedro builds these models from the YAML files and ``--params`` before any node runs, so a wrong
name, type or range stops the run before anything is read or trained. The models know nothing of
Kedro: ``python -m rdd_pipeline.launching JOB.json`` builds the same ones from JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    StrictBool,
    field_validator,
    model_serializer,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FLOAT32 = 1e38
"""What float32, in which networks compute, can still hold."""
LARGEST_SEED = 10_000_000_000
"""With a seed up to this torch's generator takes that of every step, see `training.loop`."""
COUNT = 999_999_999
"""Largest number of iterations or pixels: names of checkpoints have nine digits for them."""
MOST_PIXELS = 178_956_970
"""Of one image or crop; as RGB half a gigabyte."""

NotNegative = Annotated[float, Field(ge=0.0, le=FLOAT32)]
Positive = Annotated[float, Field(gt=0.0, le=FLOAT32)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Scale = Annotated[float, Field(ge=0.01, le=16.0)]
Seconds = Annotated[float, Field(gt=0.0, le=1e6)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Count = Annotated[int, Field(ge=0, le=COUNT)]
PositiveCount = Annotated[int, Field(gt=0, le=COUNT)]
Few = Annotated[int, Field(gt=0, le=4096)]
"""Of processes, threads, machines."""
Many = Annotated[int, Field(gt=0, le=65_536)]
"""Of images in a step, of channels."""
Side = Annotated[int, Field(gt=0, le=32_768)]
Option = (
    bool
    | Annotated[int, Field(ge=-COUNT, le=COUNT)]
    | Annotated[float, Field(ge=-COUNT, le=COUNT)]
    | str
)


def _fits_memory(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"{height} x {width} pixels are {height * width / 1e6:.0f} million, expected at most "
            f"{MOST_PIXELS // 1_000_000} million"
        )
    return size


Size = Annotated[tuple[Side, Side], AfterValidator(_fits_memory)]
"""(height, width) in pixels."""
Overlap = Annotated[float, Field(ge=0.0, le=0.95)]
OVERLAP_MEANING = (
    "Share of a window that the next one covers too, at least; there they are blended."
)


FORMER_NAMES: Mapping[str, Any] = {"former_names": True}
"""``model_dump(context=FORMER_NAMES)`` is what digests are made of: what was only renamed keeps its
digest, so that finished work is found."""


class Params(BaseModel):
    """Base of all parameters: immutable and finite, and a name it does not know is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    added: ClassVar[tuple[str, ...]] = ()
    """Fields that are left out of a dump while they have their default, because they came later:
    fingerprints of older work stay as they were."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former name of a field, or ``field=value`` with the former value -> the name it has now. A
    former name is an error that says the new one."""

    @model_validator(mode="before")
    @classmethod
    def _no_former_names(cls, values: Any) -> Any:
        faults = []
        for former, name in cls.renamed.items() if isinstance(values, Mapping) else ():
            field, _, value = former.partition("=")
            if value and values.get(field) == value:
                faults.append(f"{former} is now called {field}={name}")
            elif not value and field in values:
                faults.append(f"{former} is now called {name}")
        if faults:
            raise ValueError(f"{'; '.join(faults)}.")
        return values

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        for name in self.added:
            if getattr(self, name) == type(self).model_fields[name].default:
                values.pop(name, None)
        if info.context is FORMER_NAMES:
            _rename_back(values, self.renamed)
        return values


def _rename_back(values: dict[str, Any], renamed: Mapping[str, str]) -> None:
    pairs = [(*former.partition("=")[::2], name) for former, name in renamed.items()]
    for field, value, name in pairs:
        if value and values.get(field) == name:
            values[field] = value
    for field, value, name in pairs:
        if not value and name in values:
            values[field] = values.pop(name)


class SceneParams(Params):
    """Generated road scenes, used by the layout ``scenes`` only."""

    seed: Seed = Field(0, description="Decides every scene; the training seed does not.")
    train: int = Field(240, gt=0, le=1_000_000, description="Number of training images.")
    val: int = Field(60, gt=0, le=1_000_000, description="Number of validation images.")
    test: int = Field(100, gt=0, le=1_000_000, description="Number of test images.")
    height: int = Field(96, ge=48, le=8192, description="Image height in pixels.")
    width: int = Field(128, ge=64, le=8192, description="Image width in pixels.")
    label_noise: float = Field(
        0.0,
        ge=0.0,
        le=0.5,
        description="Share of the training labels that are wrong, as people make them wrong: "
        "drifted outlines, missed small objects, wrong classes. val and test stay right.",
    )


class DataParams(Params):
    """Where the labelled images are and how they are read."""

    layout: str = Field(
        description="How the folder is organized: a key of `LAYOUTS` in data/layouts, such as "
        "camvid, or folders (image and mask trees with a labels.yaml).",
    )
    path: Path | None = Field(
        None,
        description="Folder with the images. None: the catalog entry `raw_images`, "
        "data/01_raw/DATASET. `~` is allowed; a relative path starts at the project.",
    )
    image_size: Size | None = Field(
        None,
        description="(height, width) every image is resized to when it is read; None keeps its "
        "own. Evaluation always compares at the label's own size.",
    )
    bits: int = Field(
        16,
        ge=8,
        le=16,
        description="Bits of the values of 16-bit gray images, of which the upper 8 are used: 12 "
        "for a 12-bit camera's 0..4095. Ingestion warns where fewer are in use.",
    )
    workers: Few | Literal["auto"] = Field(
        "auto", description="Threads that check the files; auto: one for each core."
    )
    download: bool = Field(
        False,
        description="Download the data set if it is not there (voc, with SBD's masks; for the "
        "other layouts the message says where to get it).",
    )
    on_problem: Literal["stop", "quarantine"] = Field(
        "stop",
        description="`stop`: end the run with one list of all bad images. `quarantine`: leave them "
        "out and report it. The report is written in either case.",
    )
    val_fraction: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the training images that become split `val`, for a data set without "
        "one. 0: the data set has to have it.",
    )
    test_fraction: float = Field(0.0, ge=0.0, lt=1.0, description="Likewise for `test`.")
    split_seed: Seed = Field(
        0,
        description="Decides, with the images' contents, which ones val_fraction and test_fraction "
        "take. Equal images stay together.",
    )
    cache: bool | Literal["auto"] = Field(
        "auto",
        description="Keep the decoded images in one file for each split, which training reads "
        "many times faster. auto: when it takes at most half of the free disk. The pixels are the "
        "same with and without.",
    )
    scenes: SceneParams = SceneParams()

    def deciding(self) -> dict[str, Any]:
        """What decides which images there are and what they hold, to be digested."""
        return self.model_dump(mode="json", exclude={"workers", "download", "cache"})

    @model_validator(mode="after")
    def _training_images_are_left(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction ({self.val_fraction}) and test_fraction ({self.test_fraction}) "
                "leave no image for training: their sum has to be below 1."
            )
        return self


class ImportParams(Params):
    """What a labeling tool wrote, to be made a data set of the layout ``folders``."""

    source: Path | None = Field(
        None,
        description="Folder with the tool's export, or with images and masks. `~` is allowed; a "
        "relative path starts at the project.",
    )
    name: str | None = Field(
        None,
        pattern="^[A-Za-z0-9][A-Za-z0-9_-]{0,59}$",
        description="Name of the data set, its environment (--env) and its folders. None: that of "
        "the source.",
    )
    output: Path | None = Field(None, description="Folder of the data set. None: data/01_raw/NAME.")
    val: float = Field(
        0.15, gt=0.0, lt=1.0, description="Share of the images for `val` if it has to be made."
    )
    test: float = Field(0.15, ge=0.0, lt=1.0, description="Likewise for `test`; 0: none is made.")
    seed: Seed = Field(0, description="Decides which images those are.")
    grouped: bool = Field(
        True,
        description="Keep images together whose names differ in their last number only, where "
        "such names tell the frames of several videos apart.",
    )
    images: Literal["copy", "link"] = Field(
        "copy", description="Copies, or links to the source, which then has to stay."
    )
    unlabeled: Literal["auto", "background", "ignore"] = Field(
        "auto",
        description="Pixels that nobody labeled: a class of their own (background), or counted "
        "for nothing (ignore). auto: background, which is what the tools mean.",
    )
    classes: tuple[str, ...] = Field(
        (),
        description="Other names of the classes, in the order in which they are reported: a list, "
        "or NAME/NAME/NAME.",
    )
    pretrained: bool | Literal["auto"] = Field(
        "auto",
        description="Whether the environment's networks begin with ImageNet weights; auto: if "
        "they are here or the server that has them answers.",
    )
    skip_bad: bool = Field(
        False, description="Leave out pictures that something is wrong with, instead of stopping."
    )
    overwrite: bool = Field(
        False, description="Replace the data set of that name that is there already."
    )

    @field_validator("classes", mode="before")
    @classmethod
    def _in_one_word(cls, value: Any) -> Any:
        # A list cannot be typed into --params.
        return [name.strip() for name in value.split("/")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _training_images_are_left(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError(
                f"val ({self.val}) and test ({self.test}) leave no image for training: their sum "
                "has to be below 1."
            )
        return self

    def deciding(self) -> dict[str, Any]:
        """What decides the data set that is written, to be digested."""
        return self.model_dump(mode="json", exclude={"overwrite", "pretrained"})


class NetworkParams(Params):
    """One segmentation network: a head on a timm backbone."""

    added = ("image_scale",)
    renamed: ClassVar[Mapping[str, str]] = {"preprocessing=published": "caffe_bgr"}

    name: str = Field(
        description="A network of the papers (networks.PAPER_NETWORKS, e.g. deeplabv3_resnet101) "
        "or HEAD_BACKBONE with HEAD one of networks.heads.HEADS (deeplabv3, pspnet, ...) and "
        "BACKBONE any timm model name."
    )
    pretrained: bool | Path = Field(
        False,
        description="Backbone weights: false, true (timm downloads them) or the path of a "
        "safetensors or state-dict file in timm's names.",
    )
    width: Many | None = Field(
        None, description="Channels of the head. None: as published, else the head's own."
    )
    auxiliary: bool | None = Field(
        None, description="Auxiliary head on the last-but-one stage. None: as published, else yes."
    )
    output_stride: Literal[8, 16, 32] = Field(8, description="Input size / logits size.")
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    preprocessing: Literal["auto", "imagenet", "half", "caffe_bgr"] = Field(
        "auto",
        description="What the network is fed. auto: what timm says of the pretrained weights, else "
        "`imagenet` (RGB mean/std); `half`: (x - 127.5) / 127.5; `caffe_bgr`: BGR minus mean.",
    )
    image_scale: Scale = Field(
        1.0,
        description="Factor by which images are resized before this network sees them, in training "
        "and afterwards: a teacher may look at larger ones than its student.",
    )


REFERENCE = r"^[^:]+:[A-Za-z_]\w*$"
"""``package:function`` or ``path/to/file.py:function``."""

Channels = tuple[float, float, float]
Deviations = tuple[
    Annotated[float, Field(gt=0.0)],
    Annotated[float, Field(gt=0.0)],
    Annotated[float, Field(gt=0.0)],
]


class TeacherParams(Params):
    """Where the teacher comes from: trained here, a checkpoint that exists, or any other code."""

    added = ("module", "arguments", "classes", "mean", "std")
    renamed: ClassVar[Mapping[str, str]] = {"format=published": "cirkd_names"}

    network: NetworkParams
    weights: Path | None = Field(
        None,
        description="Checkpoint of a trained teacher: a .safetensors file of this project, or a "
        "state dict (safetensors, or .pth holding tensors only). None: train it here.",
    )
    format: Literal["native", "cirkd_names"] = Field(
        "native",
        description="`cirkd_names`: the names of the CIRKD/RDD code base, fed BGR minus mean.",
    )
    module: str | None = Field(
        None,
        pattern=REFERENCE,
        description="A network of other code: package:function or path/to/file.py:function. The "
        "function is called with num_classes and `arguments`, and returns an nn.Module that gives "
        "logits, or a mapping with `logits` and, where it has them, `aux_logits`, `feature` and "
        "`stages`. It is never trained here; of `network` only `preprocessing` counts then.",
    )
    arguments: dict[str, JsonValue] = Field(
        {}, description="Keyword arguments of the function that `module` names."
    )
    classes: tuple[Annotated[int, Field(ge=0, le=65_535)], ...] | tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Classes of `module`. Names: those of its channels in order, among them all "
        "of the label set. Numbers: its channel for each class of the label set. None: the same "
        "classes in the same order.",
    )
    mean: Channels | None = Field(
        None, description="RGB mean of what `module` is fed, 0 to 255; with `std`."
    )
    std: Deviations | None = Field(
        None, description="RGB standard deviation, 0 to 255; with `mean`."
    )

    @model_validator(mode="after")
    def _module_is_whole(self) -> Self:
        given = [
            name
            for name in ("arguments", "classes", "mean", "std")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.module is None and given:
            raise ValueError(f"{', '.join(given)} are of a `module`, but none is given.")
        if self.module is not None and self.format != "native":
            raise ValueError(f"format is {self.format}, which a `module` does not have.")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: give both, or none of them.")
        if self.mean is not None and 0 < max(self.mean) <= 1:
            raise ValueError(
                f"mean is {list(self.mean)}: expected values of 0 to 255, these look like 0 to 1. "
                "Multiply mean and std by 255."
            )
        return self


class OptimizerParams(Params):
    """Optimizer and learning-rate schedule; the defaults are the field's common recipe."""

    added = ("backbone_lr_factor",)

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = Field(0.02, description="Learning rate of the first iteration.")
    momentum: Momentum = Field(0.9, description="SGD only.")
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.999), description="AdamW only.")
    weight_decay: NotNegative = 1e-4
    power: float = Field(0.9, ge=0.0, le=1000.0, description="lr * (1 - (it-1)/iterations)^power.")
    warmup: Count = Field(
        0, description="Iterations over which the learning rate rises linearly to its schedule."
    )
    backbone_lr_factor: NotNegative = Field(
        1.0, description="Learning rate of the backbone as a factor of that of all else."
    )


class AugmentParams(Params):
    """Random scale, crop, flip and colors of a training sample."""

    added = ("photometric",)

    crop: Size = Field((512, 1024), description="(height, width) of a training sample.")
    scale_min: Scale = 0.5
    scale_max: Scale = 2.0
    scale_step: float = Field(0.1, ge=0.0, le=16.0, description="Grid of scales; 0: continuous.")
    flip: Fraction = Field(0.5, description="Probability of a horizontal flip.")
    photometric: Fraction = Field(
        0.0,
        description="Strength of random changes of brightness, contrast, saturation and hue; 1: "
        "the usual ranges (12.5 %, 50 %, 50 %, 18 degrees), each in half of the samples. 0: off.",
    )

    @model_validator(mode="after")
    def _scales_in_order(self) -> Self:
        if self.scale_min > self.scale_max:
            raise ValueError(
                f"scale_min ({self.scale_min}) is larger than scale_max ({self.scale_max}). "
                "Swap them."
            )
        return self


class TaskLossParams(Params):
    """What the task loss is beside plain cross-entropy, for the teacher as for the students.

    RDD's weights and choice of pixels hold for all of it, but for Lovasz in the TFE stage, whose
    weights it does not know.
    """

    focal_gamma: Annotated[float, Field(ge=0.0, le=20.0)] = Field(
        0.0,
        description="Focal loss: each pixel's cross-entropy times (1 - p)**gamma, p the "
        "probability of its label; 2 is usual. 0: cross-entropy.",
    )
    dice: NotNegative = Field(
        0.0, description="Weight of the soft Dice loss of the main head, beside the rest. 0: off."
    )
    lovasz: NotNegative = Field(
        0.0, description="Weight of the Lovasz-softmax loss of the main head. 0: off."
    )


class EmaParams(Params):
    """Exponential moving average of the network's weights: it is validated, kept and handed on."""

    decay: Momentum = Field(
        0.999,
        description="Share of the average that a step leaves as it was, after a warm-up of "
        "(1 + t) / (10 + t) in iteration t.",
    )


class EarlyStoppingParams(Params):
    """When a training ends before its last iteration: val mIoU rises no more.

    Of RDD the validations of the TSE stage count. The learning rate is that of the whole run.
    """

    patience: PositiveCount = Field(
        description="Stop after so many validations in a row without improvement."
    )
    min_delta: float = Field(
        0.0,
        ge=0.0,
        le=100.0,
        description="Points of mIoU that an improvement has to be more than.",
    )
    min_iterations: Count = Field(0, description="No validation before this iteration counts.")


class RecipeParams(Params):
    """How one network is trained. Every method of a comparison shares one recipe."""

    added = ("gradient_accumulation_steps", "backbone", "task_loss", "ema", "early_stopping")
    renamed: ClassVar[Mapping[str, str]] = {"accumulate": "gradient_accumulation_steps"}

    iterations: PositiveCount = Field(40_000, description="Optimizer steps, not epochs.")
    batch_size: Many = Field(16, description="Images a step, over all devices together.")
    gradient_accumulation_steps: Many = Field(
        1,
        description="Micro-batches per device and step. Saves memory at the cost of one more "
        "student forward; losses stay those of the whole batch, batch norm sees a micro-batch.",
    )
    optimizer: OptimizerParams = OptimizerParams()
    augment: AugmentParams = AugmentParams()
    aux_weight: NotNegative = Field(0.4, description="Weight of the auxiliary head's loss.")
    task_loss: TaskLossParams = TaskLossParams()
    class_weights: bool = Field(
        False, description="Weigh the task loss with the label set's class weights, in all methods."
    )
    clip_norm: Positive | None = Field(None, description="Largest gradient norm; None: off.")
    validate_every: PositiveCount = Field(1000, description="Iterations between validations.")
    backbone: Literal["trained", "frozen"] = Field(
        "trained",
        description="frozen: the pretrained weights of the backbone, and the statistics of its "
        "batch norms, stay as they are.",
    )
    ema: EmaParams | None = Field(
        None,
        description="Average the weights over the steps (batch norm's statistics, too) and "
        "validate, keep and hand on the average; training goes on with the plain weights, and "
        "RDD's difficulty looks at them. {}: with its defaults. None: off.",
    )
    early_stopping: EarlyStoppingParams | None = Field(
        None, description="Stop where validation mIoU rises no more. None: off."
    )
    keep: Literal["best", "last"] = Field(
        "best", description="Weights handed on: of the best validation mIoU, or of the last step."
    )


class RddParams(Params):
    """Relative Difficulty Distillation (arXiv 2407.03719), methods TFE and TSE.

    Mode `xor` without class floor is the paper's method; the others are variants, and are called so
    in tables and figures.
    """

    added = ("min_kept_scope", "class_floor", "confidence")
    renamed: ClassVar[Mapping[str, str]] = {
        "warmup": "tfe_length",
        "scope": "min_kept_scope",
        "min_kept_scope=rank": "local",
    }

    tfe_length: Count | Fraction = Field(
        0.1,
        description="Length of the TFE stage: an iteration count (integer) or a fraction of the "
        "run (float). TSE begins at iteration `tfe_length`; iterations count from 1.",
    )
    mode: Literal["xor", "or", "and", "ohem"] = Field(
        "xor", description="Chosen pixels from the student's and the teacher's hard ones."
    )
    threshold: Fraction = Field(0.7, description="A pixel is hard up to this probability.")
    min_kept: Count | Fraction = Field(
        100_000,
        description="At least so many pixels of the batch are hard: a count (integer) or a "
        "fraction of the batch's pixels (float).",
    )
    class_floor: Fraction = Field(
        0.0,
        description="Ours, not the paper's: at least this share of each class's pixels is chosen, "
        "as far as the student finds them hard, those least hard for the teacher first. 0: off.",
    )
    reduction: Literal["paper", "valid"] = Field(
        "paper", description="TFE divides by all pixels (paper) or by the valid ones."
    )
    confidence: Literal["heads", "flip", "entropy"] = Field(
        "heads",
        description="What TFE takes for the teacher's confidence in a pixel: that its two heads "
        "agree (heads, as published), that it says the same of the mirrored image (flip, a second "
        "forward of the teacher during TFE), or that its entropy is low (entropy).",
    )
    annealed: bool = Field(False, description="After TFE, fade to TSE instead of switching.")
    min_kept_scope: Literal["local", "global"] = Field(
        "local",
        description="With several devices: min_kept counts the pixels of each device's share of "
        "the batch (local, as published) or of the whole batch (global).",
    )

    def warmup_iterations(self, iterations: int) -> int:
        """First iteration of the TSE stage for a run of `iterations` steps."""
        if isinstance(self.tfe_length, float):
            return round(self.tfe_length * iterations)
        return self.tfe_length


class EvaluationParams(Params):
    """Evaluation of trained networks, of whole images unless a window is set."""

    added = ("window", "overlap")

    splits: tuple[str, ...] = Field(("val", "test"), description="Splits that are there are used.")
    batch_size: Many = Field(8, description="Images of equal size evaluated together.")
    scales: tuple[Scale, ...] = Field(
        (1.0,), min_length=1, max_length=64, description="Multi-scale evaluation."
    )
    flip: bool = Field(False, description="Average with the mirrored image.")
    average: Literal["softmax", "logits"] = Field(
        "softmax", description="What several scales or flips average."
    )
    window: Side | Size | None = Field(
        None,
        description="Larger images are predicted by a sliding window: side of a square or (height, "
        "width) in pixels of the images as they are evaluated. None: all images as a whole.",
    )
    overlap: Overlap = Field(0.25, description=OVERLAP_MEANING)
    figure_images: int = Field(3, ge=0, le=1000, description="Images shown in the figure.")
    metric: str = Field(
        "miou",
        description="What the evaluation pipeline compares: miou, pixel_accuracy, mean_accuracy or "
        "boundary_miou.",
    )

    def protocol(self) -> dict[str, Any]:
        """What decides the scores of a network on a split, to be digested."""
        windows = {"window", "overlap"} if self.window else set()
        return self.model_dump(mode="json", include={"scales", "flip", "average"} | windows)

    @property
    def window_size(self) -> tuple[int, int] | None:
        """(height, width) of the window."""
        return (self.window, self.window) if isinstance(self.window, int) else self.window

    def prediction(self) -> dict[str, Any]:
        """How images are predicted, as the functions of `evaluation.predict` take it."""
        return {
            "scales": self.scales,
            "flip": self.flip,
            "average": self.average,
            "window": self.window_size,
            "overlap": self.overlap,
        }


class PredictParams(Params):
    """Masks of new images by a trained network, pipeline ``predict``."""

    images: str | None = Field(
        None,
        description="What is predicted: a folder (with all below it), a glob in quotes, a text "
        "file with a path in each line, an image, or a video (for which ffmpeg is needed). `~` is "
        "allowed; a relative path starts at the project.",
    )
    weights: Path | None = Field(
        None,
        description="The network: a .safetensors file of this project, or a folder of the catalog. "
        "None: the newest one of `method` of this data set.",
    )
    method: str = Field(
        "tse", description="Method whose student is used where no weights are given, or `teacher`."
    )
    seed: Seed | None = Field(None, description="Which of several seeds; None: the first one.")
    output: Path | None = Field(
        None,
        description="Folder for masks, overlays and the table. None: the catalog entry "
        "`predictions_folder`, data/07_model_output/DATASET/predictions.",
    )
    window: Side | Size | Literal["auto"] | None = Field(
        "auto",
        description="Larger images are predicted by a sliding window: side of a square or (height, "
        "width) in pixels. auto: 1024 for images of more than 4 million pixels. None: all as a "
        "whole.",
    )
    overlap: Overlap = Field(0.25, description=OVERLAP_MEANING)
    image_size: Size | Literal["trained"] | None = Field(
        "trained",
        description="(height, width) images are resized to for the network; masks have the images' "
        "own size. trained: as in its training (`data.image_size`). None: their own.",
    )
    scales: tuple[Scale, ...] = Field(
        (1.0,), min_length=1, max_length=64, description="Average over resized images."
    )
    flip: bool = Field(False, description="Average with the mirrored image.")
    format: Literal["index", "raw", "cityscapes"] = Field(
        "index",
        description="Values of a mask: positions of the classes (index), those of the data set's "
        "own masks (raw), or label ids under the names that Cityscapes' server expects.",
    )
    overlays: bool = Field(True, description="Also write each image below its colored mask.")
    threshold: Fraction = Field(
        0.5, description="The table says which share of the pixels is less confident than this."
    )
    every: PositiveCount = Field(1, description="Of a video, each frame of so many.")
    batch_size: Many = Field(
        8, description="Images of equal size predicted together, up to 4 million pixels."
    )
    workers: Few | Literal["auto"] = Field(
        "auto", description="Threads that read images and write masks; auto: one a core, up to 16."
    )


class ExportParams(Params):
    """Which network leaves the project, in which form, and how far it may deviate from torch."""

    weights: Path | None = Field(
        None,
        description="What is exported: a .safetensors file of this project, or a folder of the "
        "catalog. None: the newest network of `method` of this data set.",
    )
    method: str = Field(
        "tse",
        description="`teacher`, or the method whose student is exported; best: of all students "
        "the one with the best mIoU on val.",
    )
    seed: Seed | None = Field(None, description="Which of several seeds. None: the first one.")
    formats: tuple[Literal["onnx", "pt2", "int8"], ...] = Field(
        ("onnx", "pt2", "int8"),
        min_length=1,
        description="onnx: float32; pt2: a torch.export program; int8: ONNX with 8-bit weights and "
        "activations.",
    )
    preprocessing: bool = Field(
        True,
        description="Whether the file takes RGB bytes and normalizes them itself. false: it takes "
        "normalized float32 images.",
    )
    output: Literal["mask", "logits", "probabilities"] = Field(
        "mask", description="What the file returns, at the size of the image."
    )
    tolerance: Fraction = Field(
        0.9999, description="Share of the pixels whose class must be torch's (onnx, pt2)."
    )
    int8_tolerance: float = Field(
        1.0,
        ge=0.0,
        le=100.0,
        description="Points of mIoU that int8 may lose; layers stay float until it does not.",
    )
    check_split: str = Field("val", description="Split with the images that files are checked on.")
    check_images: int = Field(20, gt=0, le=100_000, description="How many of them.")
    calibration_images: int = Field(
        32, gt=0, le=100_000, description="Training images that the ranges of int8 come from."
    )


class BenchmarkParams(Params):
    """How networks are timed, pipeline ``benchmark``."""

    runtimes: tuple[Literal["eager", "compiled", "onnx", "int8"], ...] = Field(
        ("eager", "onnx", "int8"),
        min_length=1,
        description="Ways to run a network; compiled (torch.compile) takes minutes for each.",
    )
    image_size: Size | None = Field(
        None, description="(height, width) of the images; None: as the networks see them here."
    )
    runs: int = Field(20, ge=3, le=100_000, description="Timed runs of one image, at most.")
    warm_up: int = Field(3, ge=0, le=10_000, description="Runs before those.")
    seconds: Seconds = Field(10.0, description="Limit of each measurement after 3 runs.")
    batch_size: Many = Field(4, description="Images at once, for the throughput.")


class TrainerParams(Params):
    """How a job runs here. Only `precision` changes what is computed.

    The number of processes changes roundings, and which pixels `rdd.min_kept` counts.
    """

    renamed: ClassVar[Mapping[str, str]] = {"patience": "timeout"}

    device: str = Field(
        "auto", description="auto, cpu, cuda, cuda:N or mps (a Mac's GPU; never tried on one)."
    )
    devices: Few | Literal["auto"] = Field(
        1,
        description="GPUs that train one network together, each with its share of the batch; auto: "
        "all that share it evenly. On CPU the number of processes, which is 1 for auto.",
    )
    nodes: Few = Field(
        1, description="Machines that train one network together, each with `devices` processes."
    )
    rendezvous: str | None = Field(
        None,
        description="HOST:PORT of the first machine, where the others meet it: each of them runs "
        "`python -m rdd_pipeline.launching.join HOST:PORT`.",
    )
    token_file: str | None = Field(
        None,
        description="File with the token that the machines know one another by; made if it is not "
        "there. None: the environment's RDD_TOKEN, or a new one that is shown at the start.",
    )
    public_address: bool = Field(
        False, description="`rendezvous` may be a public address: a firewall keeps others away."
    )
    address: str | None = Field(
        None,
        description="Name or address of this machine in the network of the others; None: the one "
        "by which it reaches `rendezvous`.",
    )
    timeout: Seconds = Field(
        600.0,
        description="Seconds to wait for machines that have not joined yet or were lost, and for "
        "a process that does not answer.",
    )
    max_restarts: Count = Field(
        3,
        description="With several devices: how often processes that died are started again, from "
        "the last checkpoint.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 autocast where the device has it in hardware, else float32.",
    )
    channels_last: bool = True
    workers: Annotated[int, Field(ge=0, le=4096)] | Literal["auto"] = Field(
        "auto", description="Loader processes; auto: 0 on CPU, up to 8 beside each GPU."
    )
    threads: Few | None = Field(
        None, description="CPU threads torch computes with; None: torch's own choice."
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Compile the networks with torch.compile, each anew for every crop size: "
        "minutes before the first step, and equal losses but for rounding. auto: where it was "
        "measured to pay, which is nowhere yet.",
    )
    share_teacher: StrictBool | Few = Field(
        False,
        description="Train the students of a run together on one device: images are loaded and "
        "the teacher is computed once for all that see the same ones (those of one seed). A "
        "number: at most so many at once. Weights are those of separate trainings.",
    )
    profile: bool = Field(
        False,
        description="Measure the first steps of each training: a table of the time by phase and a "
        "trace (chrome://tracing) go into its work folder and to MLflow.",
    )
    tensorboard: bool = Field(
        False,
        description="Write the curves and scores that MLflow gets for TensorBoard, too, below "
        "data/08_reporting/DATASET/tensorboard.",
    )
    system_metrics: bool = Field(
        False,
        description="Log the use of CPU, memory and GPUs during each training as MLflow's system "
        "metrics; needs the extra `system`.",
    )
    log_every: PositiveCount = Field(10, description="Iterations between points of the curves.")
    checkpoint_every: Positive = Field(
        60.0, description="Seconds between checkpoints; one is also written at every validation."
    )
    deterministic: bool = Field(
        False,
        description="Same weights bit for bit on CUDA too, at some cost in speed; on CPU they "
        "always are.",
    )

    @model_validator(mode="after")
    def _shared_on_one_device(self) -> Self:
        if not self.share_teacher:
            return self
        for name, value, single in (
            ("devices", self.devices, self.devices in (1, "auto")),
            ("nodes", self.nodes, self.nodes == 1),
            ("profile", self.profile, not self.profile),
        ):
            if not single:
                raise ValueError(
                    f"share_teacher is {self.share_teacher} and {name} {value}, but students share "
                    f"a teacher on one device, and are not measured one by one. Leave {name} out, "
                    "or share_teacher."
                )
        return self

    @model_validator(mode="after")
    def _machines_meet_somewhere(self) -> Self:
        if self.nodes > 1 and self.rendezvous is None:
            raise ValueError(
                f"nodes is {self.nodes}, but rendezvous is not set. Give HOST:PORT of this "
                "machine, the first one, e.g. trainer.rendezvous=node1:29400."
            )
        return self


class MethodsParams(Params):
    """Changes to the methods' definitions in `distillation/methods.py`."""

    added = ("compare_at",)
    renamed: ClassVar[Mapping[str, str]] = {
        "preset=published": "reference_code",
        "relations": "cross_image",
        "cross_image=gathered": "global",
        "cross_image=rank": "local",
    }

    preset: Literal["paper", "reference_code"] = Field(
        "paper",
        description="`reference_code`: what the code behind the published tables computes where it "
        "deviates from its paper. CWD: divisor, no adapter at equal widths, adversarial term; "
        "IFVD: adversarial term; MGD: CWD on logits beside it, no adapter at equal widths; CIRKD: "
        "which pixels the memory keeps; CIRKDv2: the same, attention without bias; RDD: TFE "
        "without class weights. Weights that were published by data set are in conf/.",
    )
    scale_by_positions: bool = Field(
        True,
        description="Losses whose size depends on the number of positions of a map (AT, DSD, MGD, "
        "Af-DCD's feature, CIRKDv2's channel MSE) are scaled to weigh what their published weights "
        "weigh on maps of 64 x 128. false: the plain weights.",
    )
    compare_at: Literal["teacher", "student"] = Field(
        "teacher",
        description="At which size the distillation losses compare maps: the student's are resized "
        "to the teacher's, or the teacher's to the student's. With a teacher of stride 4 and a "
        "student of stride 8 the latter costs a quarter, and a sixteenth where all pairs of "
        "positions are compared (CIRKD).",
    )
    kd: NotNegative = Field(
        1.0,
        description="Weight of plain pixel-wise KD in every method that has it among its losses.",
    )
    cross_image: Literal["global", "local"] = Field(
        "global",
        description="With several devices: losses across images (CIRKD, CIRKDv2, DIST) relate the "
        "images of all devices (global), or of each device's own share of the batch only (local).",
    )
    weights: dict[str, dict[str, NotNegative]] = Field(
        {}, description="Other weights by method and loss, e.g. {cwd: {cwd_logits: 2.0}}."
    )
    options: dict[str, dict[str, dict[str, Option]]] = Field(
        {},
        description="Settings of a method's losses (arguments in their files of `losses/`), e.g. "
        "{cirkd: {cirkd_memory: {pixel_slots: 2000}}}.",
    )


class Span(Params):
    """All values from `low` to `high`; whole numbers where both are."""

    low: Annotated[int | float, Field(ge=-FLOAT32, le=FLOAT32)]
    high: Annotated[int | float, Field(ge=-FLOAT32, le=FLOAT32)]
    log: bool = Field(False, description="Equally likely in each power of ten.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) is not below high ({self.high}).")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs values above 0, low is {self.low}.")
        return self


Choices = Span | Annotated[tuple[JsonValue, ...], Field(min_length=1)]

SWEPT = ("student", "recipe", "rdd", "methods")
"""Sections that a sweep may change: what decides a student's training under one teacher."""


class SweepParams(Params):
    """Trainings of one method with other settings, compared on val, pipeline ``sweep``."""

    method: str = Field("tse", description="What is trained.")
    parameters: dict[str, Choices] = Field(
        {},
        description="Values by dotted name of a parameter of student, recipe, rdd or methods: a "
        "list (in --params 0.3/0.5/0.7), or a range of a random search, {low: 0.001, high: 0.1, "
        "log: true} (in --params 0.001..0.1:log).",
    )
    sampler: Literal["grid", "random"] = Field(
        "grid", description="All combinations of the lists, or so many `trials` drawn at random."
    )
    trials: Annotated[int, Field(gt=0, le=1000)] | None = Field(
        None, description="How many a random search draws; of a grid there are as many as it has."
    )
    seed: Seed = Field(
        0, description="Decides what is drawn. More trials begin with those of fewer."
    )
    metric: Literal["val.miou", "val.pixel_accuracy"] = Field(
        "val.miou", description="What settings are chosen by; the test split is never looked at."
    )
    budget: PositiveCount | None = Field(
        None, description="Iterations of a trial. None: those of the recipe, a whole training."
    )

    @field_validator("parameters", mode="before")
    @classmethod
    def _by_dotted_name(cls, value: Any) -> Any:
        return _choices(value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _can_be_sampled(self) -> Self:
        for name, choices in self.parameters.items():
            section, _, field = name.partition(".")
            if section not in SWEPT or not field:
                raise ValueError(
                    f"{name} cannot be swept: trials share data, teacher and evaluation. Expected "
                    f"a parameter of {', '.join(SWEPT[:-1])} or {SWEPT[-1]}, such as "
                    "rdd.threshold."
                )
            if self.sampler == "grid" and isinstance(choices, Span):
                raise ValueError(
                    f"{name} is a range, of which a grid takes no values. Give a list, or "
                    "sweep.sampler=random with sweep.trials=N."
                )
        if (self.sampler == "random") != (self.trials is not None):
            raise ValueError(
                f"sampler is {self.sampler} and trials {self.trials}: a random search needs a "
                "number of trials, a grid has as many as combinations."
            )
        if self.budget is not None and "recipe.iterations" in self.parameters:
            raise ValueError("budget and recipe.iterations both say how long trials are.")
        return self


def _choices(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Lists and ranges by dotted name, of what YAML files nest and --params writes as text."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and not {"low", "high"} & value.keys():
            found |= _choices(value, f"{name}.")
        elif isinstance(value, str) and ".." in value:
            low, _, rest = value.partition("..")
            high, _, log = rest.partition(":")
            found[name] = {"low": _scalar(low), "high": _scalar(high)}
            if log:
                found[name] |= {log: True}
        elif isinstance(value, str):
            found[name] = [_scalar(part) for part in value.split("/")]
        else:
            found[name] = value if isinstance(value, list | tuple | Mapping | Span) else [value]
    return found


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


class Parameters(Params):
    """All parameters of the project by their ``params:`` key, of whatever pipeline.

    What is not here is no parameter: a run with another name does not start
    (`hooks.parameters`), and a test compares this list with what the pipelines' nodes take.
    """

    added = ("predict", "import_data", "sweep")

    seed: Seed = Field(0, strict=True, description="Decides everything random.")
    seeds: int = Field(
        1,
        gt=0,
        le=10_000,
        strict=True,
        description="The number of seeds, no list: every student is trained with seed, seed + 1, "
        "..., under one teacher.",
    )
    data: DataParams
    teacher: TeacherParams
    teacher_recipe: RecipeParams
    student: NetworkParams
    recipe: RecipeParams
    rdd: RddParams
    methods: MethodsParams
    trainer: TrainerParams
    evaluation: EvaluationParams
    predict: PredictParams = PredictParams()
    export: ExportParams = ExportParams()
    benchmark: BenchmarkParams = BenchmarkParams()
    import_data: ImportParams = ImportParams()
    sweep: SweepParams = SweepParams()

    @model_validator(mode="after")
    def _seeds_in_range(self) -> Self:
        if self.seed + self.seeds - 1 > LARGEST_SEED:
            raise ValueError(
                f"seed ({self.seed}) and seeds ({self.seeds}) lead beyond {LARGEST_SEED}. Lower "
                "one of them."
            )
        return self
