"""Heads of the segmentation networks: what turns a backbone's last stage into a feature.

Shape suffixes: N images, C channels, H rows, W columns, K bins of a pooling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rdd_pipeline.lazy import Lazy
from rdd_pipeline.networks.resizing import bilinear

_segmentation = Lazy("torchvision.models.segmentation")

# Pixels of the input between the taps of the three dilated branches: 12, 24, 36 at stride 8 as
# published, 6, 12, 18 at stride 16 (Chen et al. 2017, sec. 3.3).
ASPP_REACH = (96, 192, 288)
PYRAMID_BINS = (1, 2, 3, 6)


def averaging_matrix(bins: int, size: int, like: Tensor) -> Tensor:
    """Matrix (bins, size) whose row k averages the positions of bin k.

    The bins are those of `torch.nn.AdaptiveAvgPool1d`: from floor(k size / bins) to
    ceil((k + 1) size / bins). As a product of matrices the pooling exports to ONNX with free
    height and width; `AdaptiveAvgPool2d` freezes the size it was traced at.
    """
    bin_K1 = torch.arange(bins, device=like.device)[:, None]
    position_S = torch.arange(size, device=like.device)
    first_K1 = bin_K1 * size // bins
    past_K1 = ((bin_K1 + 1) * size + bins - 1) // bins
    inside_KS = ((position_S >= first_K1) & (position_S < past_K1)).to(like.dtype)
    return inside_KS / inside_KS.sum(dim=1, keepdim=True)


def adaptive_average(x_NCHW: Tensor, bins: int) -> Tensor:
    """Mean over a bins x bins grid of overlapping windows, (N, C, bins, bins)."""
    rows_KH = averaging_matrix(bins, x_NCHW.shape[2], x_NCHW)
    columns_KW = averaging_matrix(bins, x_NCHW.shape[3], x_NCHW)
    return rows_KH @ x_NCHW @ columns_KW.T


class PyramidPooling(nn.Module):
    """Input beside its averages over 1, 4, 9 and 36 windows (Zhao et al. 2017, PSPNet).

    Each average goes through a 1x1 convolution to a quarter of the channels and is upsampled
    (bilinear, corners aligned): (N, C, H, W) becomes (N, C + 4 (C // 4), H, W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter = max(channels // len(PYRAMID_BINS), 1)
        self.out_channels = channels + quarter * len(PYRAMID_BINS)
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, quarter, 1, bias=False), nn.BatchNorm2d(quarter), nn.ReLU()
            )
            for _ in PYRAMID_BINS
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the concatenation of the input and its upsampled averages."""
        size = x_NCHW.shape[-2:]
        pooled = [
            bilinear(conv(adaptive_average(x_NCHW, bins)), size)
            for bins, conv in zip(PYRAMID_BINS, self.convs, strict=True)
        ]
        return torch.cat([x_NCHW, *pooled], dim=1)


def _aspp(channels: int, width: int, stride: int, dropout: float) -> tuple[nn.Module, int]:
    aspp = _segmentation.deeplabv3.ASPP(
        channels, [max(reach // stride, 1) for reach in ASPP_REACH], width
    )
    if dropout == 0.0:
        aspp.project[3].p = 0.0
    return aspp, width


def _pyramid(channels: int, width: int, stride: int, dropout: float) -> tuple[nn.Module, int]:
    pyramid = PyramidPooling(channels)
    return pyramid, pyramid.out_channels


class HeadSpec(NamedTuple):
    """What a decode head has before its 3x3 convolution.

    Attributes:
        context: makes, of the backbone's channels, the head's width, the stride and the dropout, a
            module and the number of its channels; None: nothing.
        pools_to_one: whether an image pooling in it leaves one value per image and channel, which
            batch norm cannot train with a single image.
        decoder: name of the decoder of segmentation_models_pytorch (`pyramid_decoder`) that takes
            all stages instead, not dilated; None: the head takes the last one.
        width: channels where nothing is said.
        stride: input size / size of the logits; None: that of the backbone.
    """

    context: Callable[[int, int, int, float], tuple[nn.Module, int]] | None
    pools_to_one: bool
    decoder: str | None = None
    width: int = 128
    stride: int | None = None


HEADS: dict[str, HeadSpec] = {
    "deeplabv3": HeadSpec(_aspp, pools_to_one=True),  # torchvision's ASPP
    "pspnet": HeadSpec(_pyramid, pools_to_one=True),
    "fcn": HeadSpec(None, pools_to_one=False),
    "unet": HeadSpec(None, pools_to_one=False, decoder="unet", width=256, stride=1),
    "unetplusplus": HeadSpec(None, pools_to_one=False, decoder="unetplusplus", width=256, stride=1),
    "manet": HeadSpec(None, pools_to_one=False, decoder="manet", width=256, stride=1),
    "linknet": HeadSpec(None, pools_to_one=False, decoder="linknet", width=32, stride=1),
    "fpn": HeadSpec(None, pools_to_one=False, decoder="fpn", width=128, stride=4),
    "upernet": HeadSpec(None, pools_to_one=True, decoder="upernet", width=256, stride=4),
    "segformer": HeadSpec(None, pools_to_one=False, decoder="segformer", width=256, stride=4),
}
"""Decode heads by the name that begins a network's (`build_network`)."""


def make_decode_head(
    head: str, channels: int, width: int, *, stride: int, dropout: float
) -> nn.Sequential:
    """Everything between the backbone's last stage and the 1x1 classifier.

    Args:
        head: key of `HEADS`.
        channels: channels of the backbone's last stage.
        width: channels of the result.
        stride: input size / feature size; the dilation of the ASPP reaches equally far in the
            image at every stride.
        dropout: probability before the classifier. 0 also removes the ASPP's own dropout of 0.5.

    Returns:
        Modules `context` (where the head has one), `conv` (3x3), `norm`, `act`, `dropout`.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    context = HEADS[head].context
    if context is not None:
        layers["context"], channels = context(channels, width, stride, dropout)
    layers["conv"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    layers["norm"] = nn.BatchNorm2d(width)
    layers["act"] = nn.ReLU()
    layers["dropout"] = nn.Dropout(dropout)
    return nn.Sequential(layers)


def make_auxiliary(channels: int, num_classes: int, *, dropout: float) -> nn.Sequential:
    """Auxiliary head on the last-but-one stage: 3x3 convolution to a quarter, then 1x1."""
    # FCNHead takes a quarter of the channels: at least one must be left.
    head: nn.Sequential = _segmentation.fcn.FCNHead(max(channels, 4), num_classes)
    if channels < 4:
        head[0] = nn.Conv2d(channels, 1, 3, padding=1, bias=False)
    head[3] = nn.Dropout(dropout)
    return head


def initialize(module: nn.Module) -> None:
    """Random start of a head: Kaiming normal convolutions, 1x1 classifiers near zero.

    Decided by torch's global generator alone. A classifier (the convolution with a bias) starts
    near zero, so the first loss is close to log(classes).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            if layer.bias is None:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
