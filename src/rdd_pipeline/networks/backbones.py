"""timm backbones as feature extractors, and weights for them."""

from __future__ import annotations

import difflib
import logging
import socket
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from rdd_pipeline.errors import UserError
from rdd_pipeline.lazy import Lazy
from rdd_pipeline.networks.files import check_finite, mismatch, read_state_dict, some
from rdd_pipeline.networks.resizing import bilinear, repeatable_resizing

logger = logging.getLogger(__name__)

# timm and torchvision import torch's compiler, a third of all imports of a run in which nothing is
# built.
timm = Lazy("timm")
get_pretrained_cfg = Lazy("timm.models.get_pretrained_cfg")

# The peers' ResNets: three 3x3 convolutions (64, 64, 128) instead of one 7x7.
DEEP_STEM: dict[str, Any] = {"stem_type": "deep", "stem_width": 64}

PYRAMID = (4, 8, 16, 32)
"""Strides of the stages that heads with a pyramid take."""

# Two sizes that are no squares and no multiples of a 7 x 7 window.
_PROBES = ((64, 96), (128, 64))


class Backbone(nn.Module):
    """A timm network without its classifier: images to the last two stages.

    Attributes:
        stride: input size / size of the last stage.
        channels: channels of the last-but-one and of the last stage.
        pyramid: channels and strides of all stages.
        resize_to: 1, or the multiple the images are resized up to before the backbone sees them,
            because it works on a fixed grid of patches, or what follows on halves of maps.
    """

    def __init__(self, features: nn.Module, *, resize_to: int = 1) -> None:
        super().__init__()
        self.features = features
        info: Any = features.feature_info
        channels, reduction = info.channels(), info.reduction()
        if len(channels) < 2:
            raise UserError(
                f"The backbone has {len(channels)} stage, two are needed. Choose another one."
            )
        self.channels: tuple[int, int] = (channels[-2], channels[-1])
        self.stride: int = reduction[-1]
        self.pyramid: list[tuple[int, int]] = list(zip(channels, reduction, strict=True))
        self.resize_to = resize_to
        self._channels_are_last = str(getattr(features, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The last-but-one and the last stage, (N, C3, h3, w3) and (N, C4, h, w)."""
        early, late = self.stages(images_NCHW, 2)
        return early, late

    def stages(self, images_NCHW: Tensor, count: int) -> list[Tensor]:
        """So many of the last stages, (N, C, h, w) each, in order."""
        if self.resize_to > 1:
            height, width = images_NCHW.shape[-2:]
            size = (_round_up(height, self.resize_to), _round_up(width, self.resize_to))
            # A branch on the size would be frozen in an exported program; resizing to the same size
            # changes nothing.
            if torch.compiler.is_exporting() or size != (height, width):
                images_NCHW = bilinear(images_NCHW, size)
        with repeatable_resizing(images_NCHW.device):
            stages = list(self.features(images_NCHW)[-count:])
        if self._channels_are_last:
            stages = [stage.permute(0, 3, 1, 2).contiguous() for stage in stages]
        return stages


def make_backbone(
    name: str,
    *,
    output_stride: int,
    deep_stem: bool = False,
    pretrained: bool | Path = False,
    pyramid: bool = False,
) -> Backbone:
    """A timm model as a backbone, with random or trained weights.

    Args:
        name: a timm model, with or without a weights tag (`resnet18.tv_in1k`).
        output_stride: wished input size / size of the last stage. Networks that cannot be
            dilated keep their own stride, which is logged and is `Backbone.stride`.
        deep_stem: the published ResNets' stem of three convolutions.
        pretrained: False, True (timm downloads), or a file with timm's names.
        pyramid: for a head that takes all stages: not dilated, whatever `output_stride` says, and
            images are resized up to a multiple of its stride.

    Raises:
        UserError: unknown name, a network without the stages of a pyramid, one that takes no images
            of any size or gives no feature maps, weights that do not fit or cannot be downloaded.
    """
    _check_name(name)
    options: dict[str, Any] = dict(DEEP_STEM) if deep_stem else {}
    overlay: dict[str, Any] = {}
    download = pretrained is True
    if download:
        cached = _check_downloadable(name)
        overlay = {"pretrained_cfg_overlay": {"file": cached}} if cached else {}
    # timm has no flag that says what a model's constructor takes: try, best first. Vision
    # transformers and Swin fix the input size unless told otherwise, and cannot be dilated.
    attempts: list[dict[str, Any]] = [
        {"output_stride": output_stride},
        {"dynamic_img_size": True},
        {"strict_img_size": False},
        {},
    ]
    if pyramid:
        del attempts[0]
        output_stride = PYRAMID[-1]
    features: nn.Module | None = None
    problems: list[str] = []
    dilated = False
    for attempt in attempts:
        try:
            features = timm.create_model(name, features_only=True, **attempt, **options)
        except (TypeError, AssertionError, NotImplementedError, RuntimeError) as error:
            problems.append(str(error) or type(error).__name__)
            continue
        dilated = "output_stride" in attempt
        if download:
            features = _create_trained(name, {**attempt, **options, **overlay})
        break
    if features is None:
        raise UserError(
            f"timm's {name} cannot be a backbone: it gives no feature maps ({problems[-1]}). "
            "Choose a convolutional network or a transformer with features_only."
        )
    if dilated:
        backbone = Backbone(features)
    else:
        backbone = Backbone(features, resize_to=max(features.feature_info.reduction()))  # type: ignore[union-attr, operator]
        _check_any_size(backbone, name)
    if pyramid and tuple(stride for _, stride in backbone.pyramid[-4:]) != PYRAMID:
        strides = ", ".join(str(stride) for _, stride in backbone.pyramid)
        raise UserError(
            f"timm's {name} has stages of the strides {strides}; this head takes "
            f"{', '.join(map(str, PYRAMID))}. Choose a backbone with such stages (ResNets, "
            "EfficientNets, ConvNeXts, PVTs, Swins), or the head fcn, deeplabv3 or pspnet."
        )
    if backbone.stride != output_stride:
        logger.info(
            "Backbone %s cannot be given output stride %d: its own stride %d is used.",
            name,
            output_stride,
            backbone.stride,
        )
    if isinstance(pretrained, Path):
        load_backbone_weights(backbone, pretrained, name=name, deep_stem=deep_stem)
    return backbone


def load_backbone_weights(
    backbone: Backbone, path: Path, *, name: str, deep_stem: bool = False
) -> None:
    """Copy trained weights, in timm's names and of any float type, from a file.

    The file may hold more than the backbone needs as long as timm's classification network has
    it too (the classifier, a final convolution); nothing else may be missing, misshaped or left.

    Raises:
        UserError: the file is no weights file or holds another network's weights.
    """
    given = read_state_dict(path)
    own = backbone.features.state_dict()
    with torch.device("meta"):
        whole = timm.create_model(name, **(DEEP_STEM if deep_stem else {})).state_dict()
    by_name = {_canonical(key): key for key in given}
    allowed = {_canonical(key) for key in whole}
    # Feature extractors that wrap the whole model put this before the names.
    prefix = "model." if all(key.startswith(("model.", "body.")) for key in own) else ""
    missing, misshaped, loaded = [], [], {}
    for key, tensor in own.items():
        canonical = _canonical(key.removeprefix(prefix))
        source = by_name.pop(canonical, None)
        if source is None:
            # Files from before PyTorch 0.4.1 lack the counters, which only cumulative batch
            # norm uses.
            if not key.endswith("num_batches_tracked"):
                missing.append(key.removeprefix(prefix))
            continue
        value = given[source]
        if value.shape != tensor.shape:
            misshaped.append(f"{source} {tuple(value.shape)} instead of {tuple(tensor.shape)}")
        else:
            loaded[key] = value.to(tensor.dtype)
    unexpected = [source for canonical, source in by_name.items() if canonical not in allowed]
    fault = mismatch(missing, unexpected, misshaped)
    if fault is not None:
        hint = f"Choose weights of timm's {name}."
        stem = given.get("conv1.weight")
        if deep_stem and stem is not None and stem.ndim == 4 and stem.shape[-1] == 7:
            hint = (
                "They have the plain 7x7 stem, the published networks the deep one of three 3x3 "
                f"convolutions. Choose weights of the deep stem, or the network HEAD_{name}.TAG "
                f"with a timm tag, such as deeplabv3_{name}.tv_in1k, which has the plain stem."
            )
        raise UserError(f"Weights in {path} do not fit the backbone {name}: {fault}. {hint}")
    check_finite(loaded, f"Weights file {path}")
    backbone.features.load_state_dict(loaded, strict=False)


def _round_up(size: int, multiple: int) -> int:
    # No negative number: ONNX's integer division rounds towards zero.
    return (size + multiple - 1) // multiple * multiple


def _canonical(key: str) -> str:
    # timm's FeatureListNet flattens stages.0 to stages_0.
    return key.replace("_", ".")


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=4, cutoff=0.7)
        hint = f"Close names: {', '.join(close)}. " if close else ""
        raise UserError(
            f"timm {version('timm')} has no model {architecture!r}. {hint}"
            "timm.list_models() lists all."
        )
    if tag:
        try:
            get_pretrained_cfg(name)
        except RuntimeError as error:
            pretrained = timm.list_pretrained(f"{architecture}.*")
            tags = [entry.partition(".")[2] for entry in pretrained]
            raise UserError(
                f"timm's {architecture} has no weights tag {tag!r}. It has: {some(tags, 8)}."
            ) from error


def _check_any_size(backbone: Backbone, name: str) -> None:
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            for height, width in _PROBES:
                last = backbone(torch.zeros(1, 3, height, width))[1]
                if last.ndim != 4 or last.shape[1] != backbone.channels[1]:
                    raise RuntimeError(f"its last stage has the shape {tuple(last.shape)}")
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            f"timm's {name} cannot be a backbone: it does not take images of any size ({error}). "
            "Choose another one, such as a convolutional network, a vit_* or a swin_*."
        ) from error
    finally:
        backbone.train(training)


def _check_downloadable(name: str) -> str | None:
    """Path of timm's weights in the cache, None if they have to be (and can be) downloaded.

    Without a network the download would retry for three quarters of a minute before it fails,
    so whether the server answers is looked at first, briefly.
    """
    source = _source(name)
    info = get_pretrained_cfg(name)
    if info is None or not source:
        raise UserError(
            f"There are no public weights for timm's {name}. Give a file as `pretrained`, or "
            "false for random weights."
        )
    server = source
    if info.hf_hub_id:
        from huggingface_hub import constants, try_to_load_from_cache

        for file in (info.hf_hub_filename, "model.safetensors", "pytorch_model.bin"):
            path = try_to_load_from_cache(info.hf_hub_id, file) if file else None
            if isinstance(path, str):
                return path
        if constants.HF_HUB_OFFLINE:
            raise UserError(_no_download(name, "HF_HUB_OFFLINE is set"))
        server = constants.ENDPOINT
    address = urlsplit(server)
    if address.hostname and not urllib.request.getproxies():
        try:
            port = address.port or (80 if address.scheme == "http" else 443)
            socket.create_connection((address.hostname, port), timeout=5.0).close()
        except OSError as error:
            raise UserError(_no_download(name, str(error))) from error
    return None


def are_weights_at_hand(name: str) -> bool:
    """Whether timm's weights of a backbone are here or their server answers (within seconds)."""
    try:
        _check_downloadable(name)
    except UserError:
        return False
    return True


def _source(name: str) -> str:
    """Where timm finds the weights: an id of the hub or an address; empty when nowhere."""
    info = get_pretrained_cfg(name)
    return str(info.hf_hub_id or info.url or "") if info is not None else ""


def _create_trained(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, features_only=True, **options)
    except Exception as error:  # whatever the hub, the network or the file raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(_no_download(name, reason)) from error
    return model


def _no_download(name: str, reason: str) -> str:
    return (
        f"Weights {_source(name)!r} of the backbone {name} could not be downloaded ({reason}). "
        "Fetch their model.safetensors on a machine with a network and give its path as "
        "`pretrained`, or set `pretrained: false` for random weights."
    )
