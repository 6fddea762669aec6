"""Ready functions for `teacher.module`: networks of torchvision, segmentation_models_pytorch, transformers.

```yaml
teacher:
  module: rdd_pipeline.networks.adapters:transformers
  arguments: {folder: models/segformer-b5}     # config.json and model.safetensors, from anywhere
  classes: [road, sidewalk, ...]               # its channels in order, if they are not ours
```

Nothing is downloaded unless torchvision or segmentation_models_pytorch are told so by an argument,
no code that comes with weights is run, and only safetensors are read. The last two need the extra
`teachers` (``pip install 'rdd-pipeline[teachers]'``).
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.segmentation._utils import _SimpleSegmentationModel

from rdd_pipeline.errors import UserError
from rdd_pipeline.networks.resizing import bilinear

EXTRA = "pip install 'rdd-pipeline[teachers]'"
MASKS = ("mask2former", "maskformer", "eomt", "eomt_dinov3")
"""Models of transformers that classify masks."""


# ---- torchvision


def torchvision(num_classes: int, *, name: str, **options: Any) -> nn.Module:
    """A segmentation network of torchvision, with all that it has.

    Args:
        num_classes: Channels of its logits.
        name: As torchvision calls it: deeplabv3_resnet101, fcn_resnet50, lraspp_mobilenet_v3_large.
        options: Of its function, such as ``aux_loss=False``. Weights are given by
            `teacher.weights`; the auxiliary head is there unless it is switched off.

    Raises:
        UserError: There is no such network.
    """
    defaults = {"weights": None, "weights_backbone": None, "num_classes": num_classes}
    if not name.startswith("lraspp"):
        defaults["aux_loss"] = True
    try:
        model = get_model(name, **{**defaults, **options})
    except ValueError as error:
        raise UserError(f"torchvision has no network {name!r} ({error}).") from error
    if isinstance(model, _SimpleSegmentationModel):
        return TorchvisionTeacher(model)
    return OutputOf(model, "out")


class TorchvisionTeacher(nn.Module):
    """DeepLabV3 or FCN: logits at the stride of the backbone, its auxiliary ones, the feature."""

    def __init__(self, model: _SimpleSegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs of a teacher."""
        maps = self.model.backbone(images)
        *before, last = self.model.classifier
        feature = maps["out"]
        for layer in before:
            feature = layer(feature)
        found = {"logits": last(feature), "feature": feature}
        if self.model.aux_classifier is not None:
            found["aux_logits"] = self.model.aux_classifier(maps["aux"])
            found["stages"] = [maps["aux"], maps["out"]]
        return found


class OutputOf(nn.Module):
    """The logits that a module returns under another name."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.model(images)[self.name]
        return logits


# ---- segmentation_models_pytorch


def smp(num_classes: int, *, arch: str = "", folder: str = "", **options: Any) -> nn.Module:
    """A network of segmentation_models_pytorch, with feature and stages.

    Args:
        num_classes: Channels of its logits.
        arch: As `smp.create_model` calls it: unet, fpn, segformer, dpt, upernet, ...
        folder: Instead: what `save_pretrained` has written, config.json and model.safetensors.
        options: With `arch`, of its class: ``encoder_name="resnet50"``. The encoder starts from
            random weights unless ``encoder_weights`` says otherwise (then smp downloads them).

    Raises:
        UserError: segmentation_models_pytorch is not installed, or has no such network.
    """
    try:
        import segmentation_models_pytorch
    except ImportError as error:
        raise UserError(f"segmentation_models_pytorch is not installed: {EXTRA}") from error
    if bool(arch) == bool(folder):
        raise UserError("teacher.arguments has to have either arch or folder of smp.")
    if folder:
        place = _local_folder(folder, "segmentation_models_pytorch")
        return SmpTeacher(segmentation_models_pytorch.from_pretrained(str(place), **options))
    options = {"encoder_weights": None, **options}
    try:
        model = segmentation_models_pytorch.create_model(arch, classes=num_classes, **options)
    except KeyError as error:
        raise UserError(f"segmentation_models_pytorch: {error.args[0]}.") from error
    return SmpTeacher(model)


class SmpTeacher(nn.Module):
    """Encoder, decoder and head, called one by one for what lies between them.

    Images are resized up to the next multiple of the encoder's stride, for DPT of twice that. The
    logits are those before the head enlarges them.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Outputs of a teacher; the stages only where the encoder gives maps."""
        stride = int(self.model.encoder.output_stride)
        stride *= 2 if type(self.model).__name__ == "DPT" else 1
        features = self.model.encoder(up_to_multiple(images, stride))
        if isinstance(features, tuple) and isinstance(features[-1], list):  # ViTs: with tokens
            decoded = self.model.decoder(*features)
            features = features[0]
        else:
            decoded = self.model.decoder(features)
        head = self.model.segmentation_head
        classifier = head[0] if isinstance(head, nn.Sequential) else head.head  # DPT's
        found = {"logits": classifier(decoded), "feature": decoded}
        stages = [stage for stage in features[-2:] if stage.dim() == 4 and stage.shape[1] > 0]
        return found | ({"stages": stages} if len(stages) == 2 else {})


# ---- transformers


def transformers(
    num_classes: int,
    *,
    folder: str = "",
    config: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """A network of Hugging Face transformers for semantic segmentation, or for masks.

    Semantic ones (SegFormer, UperNet, BEiT, DPT, ...) give their logits at their own stride, with
    feature, stages and auxiliary logits where they have a `decode_head`. Those that classify masks
    (Mask2Former, MaskFormer, EoMT) give `class_log_probabilities`.

    Args:
        num_classes: Channels of the logits of a `config`; a folder has its own number.
        folder: config.json and model.safetensors, as `save_pretrained` or a download leaves them.
            Mean and deviation come from its preprocessor_config.json where there is one.
        config: Instead: values of a configuration with ``model_type``, for random weights.
        image_size: (height, width) that images are resized to; None: what the model needs.

    Raises:
        UserError: transformers is not installed, the folder is no model, or one of another kind.
    """
    try:
        import transformers as library
    except ImportError as error:
        raise UserError(f"transformers is not installed: {EXTRA}") from error
    if bool(folder) == bool(config):
        raise UserError("teacher.arguments has to have either folder or config of transformers.")
    offline = {"local_files_only": True, "trust_remote_code": False}
    place = _local_folder(folder, "transformers") if folder else None
    if place is not None:
        found = library.AutoConfig.from_pretrained(place, **offline)
    else:
        found = library.AutoConfig.for_model(**{"num_labels": num_classes, **dict(config or {})})
    kind = found.model_type
    auto: Any
    if kind in MASKS:
        auto = library.AutoModelForUniversalSegmentation
    elif type(found) in library.AutoModelForSemanticSegmentation._model_mapping:
        auto = library.AutoModelForSemanticSegmentation
    else:
        raise UserError(
            f"{kind} of transformers is no network for semantic segmentation that is known here. "
            f"Expected one of AutoModelForSemanticSegmentation, or {', '.join(MASKS)}."
        )
    if place is None:
        model = auto.from_config(found)
    else:
        model = auto.from_pretrained(place, config=found, use_safetensors=True, **offline)
    if image_size is None and kind == "eomt":  # its positions are those of one size
        image_size = (found.image_size, found.image_size)
    teacher = MaskTeacher if kind in MASKS else SemanticTeacher
    module = teacher(model.float(), image_size, _patch(found))
    if place is not None and (place / "preprocessor_config.json").is_file():
        module.preprocessing = _preprocessing(place / "preprocessor_config.json")
    return module


class _Transformer(nn.Module):
    """A model of transformers that is fed images of a size that it can take."""

    preprocessing: Mapping[str, Any] | None = None
    """Mean and std, 0 to 255; read where the parameters say nothing."""

    def __init__(self, model: nn.Module, size: tuple[int, int] | None, multiple: int) -> None:
        super().__init__()
        self.model, self.size, self.multiple = model, size, multiple

    def fed(self, images: Tensor) -> Any:
        """What the model returns for the images."""
        if self.size is not None:
            images = bilinear(images, self.size)
        return self.model(pixel_values=up_to_multiple(images, self.multiple))


class SemanticTeacher(_Transformer):
    """A model that returns logits; some enlarge them, so they are taken where they arise."""

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Outputs of a teacher."""
        with _watched(self.model) as seen:
            found = self.fed(images)
        return {"logits": found.logits} | seen


class MaskTeacher(_Transformer):
    """A model that returns classes and masks of queries."""

    def forward(self, images: Tensor) -> Tensor:
        """`class_log_probabilities` of what it returns."""
        found = self.fed(images)
        return class_log_probabilities(found.class_queries_logits, found.masks_queries_logits)


def class_log_probabilities(classes_NQC: Tensor, masks_NQhw: Tensor) -> Tensor:
    """Logits (N, C, h, w) of a network that classifies masks.

    ``log(sum over queries of softmax(classes) * sigmoid(masks) + 1e-6)`` without the class "no
    object", normalized over the classes: logarithms of probabilities. Their sum over queries is the
    published inference of MaskFormer (Cheng et al., NeurIPS 2021). They are meant for a
    temperature of 1: a softmax at another one has no meaning that the network was trained for.

    Args:
        classes_NQC: (N, Q, C + 1), the last class is "no object".
        masks_NQhw: (N, Q, h, w).
    """
    classes = classes_NQC.float().softmax(-1)[..., :-1]
    scores = torch.einsum("nqc,nqhw->nchw", classes, masks_NQhw.float().sigmoid())
    return (scores + 1e-6).log().log_softmax(1)


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What passes a `decode_head`: its logits and their feature, the stages, auxiliary logits."""
    seen: dict[str, Any] = {}

    def at_classifier(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(feature=inputs[0], logits=output)

    def at_auxiliary(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen["aux_logits"] = output

    def at_head(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        maps = inputs[0] if inputs else None
        if isinstance(maps, list | tuple) and len(maps) > 1 and all(m.dim() == 4 for m in maps):
            seen["stages"] = list(maps[-2:])

    hooks = []
    for name, module in model.named_modules():
        if name in ("decode_head.classifier", "auxiliary_head.classifier"):
            watch = at_classifier if name.startswith("decode") else at_auxiliary
            hooks.append(module.register_forward_hook(watch))
        elif name == "decode_head":
            hooks.append(module.register_forward_pre_hook(at_head))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# ---- parts


def up_to_multiple(images_NCHW: Tensor, multiple: int) -> Tensor:
    """Images resized up to the next multiple in height and width; most often as they are."""
    size = tuple(-(-side // multiple) * multiple for side in images_NCHW.shape[-2:])
    return images_NCHW if size == images_NCHW.shape[-2:] else bilinear(images_NCHW, size)


def _local_folder(folder: str, library: str) -> Path:
    place = Path(folder).expanduser()
    if not (place / "config.json").is_file() or not any(place.glob("*.safetensors")):
        raise UserError(
            f"{place.absolute()} is no model of {library}: expected a folder with config.json and "
            "model.safetensors. Download them on a machine with a network; weights in other "
            "formats are not read, as they may hold code."
        )
    return place


def _patch(config: Any) -> int:
    """Multiple of which the sides of an image have to be."""
    for part in (config, getattr(config, "backbone_config", None)):
        size = getattr(part, "patch_size", None)
        if isinstance(size, int):
            return size
    return 1


def _preprocessing(path: Path) -> dict[str, Any] | None:
    """Mean and deviation, 0 to 255, of a preprocessor_config.json."""
    found = json.loads(path.read_text("utf-8"))
    if not found.get("do_normalize", True):
        return None
    unit = found.get("rescale_factor") or 1 / 255
    if {"image_mean", "image_std"} <= set(found):
        return {
            "mean": [value / unit for value in found["image_mean"]],
            "std": [value / unit for value in found["image_std"]],
        }
    return None
