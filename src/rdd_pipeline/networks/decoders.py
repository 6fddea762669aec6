"""Decoders of segmentation_models_pytorch on a timm backbone: heads that take all stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rdd_pipeline.errors import UserError
from rdd_pipeline.networks.heads import adaptive_average


class PyramidDecoder(nn.Module):
    """A decoder that takes the stages of a backbone, from stride 2 or 4 to stride 32.

    Args:
        decoder: Of segmentation_models_pytorch. It takes a list of maps, the first of the size of
            the image, of which only that size counts, the second of stride 2.
        first_stride: Of the backbone's first stage; without one of stride 2 the decoder gets a map
            with 0 channels in its place.
        channels: Of the result.
    """

    def __init__(self, decoder: nn.Module, first_stride: int, channels: int) -> None:
        super().__init__()
        self.decoder, self.out_channels = decoder, channels
        self._first_stride = first_stride

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Feature (N, out_channels, h, w) of the stages (N, C, h, w), the finest first."""
        first, stride = stages[0], self._first_stride
        images, _, height, width = first.shape
        missing = [
            first.new_empty((images, 0, height * stride // s, width * stride // s))
            for s in (1, 2)
            if s < stride
        ]
        feature: Tensor = self.decoder([*missing, *stages])
        return feature


class _AdaptiveAverage(nn.Module):
    """`nn.AdaptiveAvgPool2d` that can be exported with free height and width."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return adaptive_average(x_NCHW, self.bins)


def _make_exportable(decoder: nn.Module) -> None:
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.AdaptiveAvgPool2d):
            size = module.output_size
            bins = size[0] if isinstance(size, tuple) else size
            if bins is not None and bins > 1:
                decoder.set_submodule(name, _AdaptiveAverage(bins))


def pyramid_decoder(
    name: str, stages: Sequence[tuple[int, int]], width: int, dropout: float
) -> PyramidDecoder:
    """A decoder by the name of its head.

    Args:
        name: unet, unetplusplus, manet, linknet, fpn, upernet or segformer.
        stages: Channels and strides of the backbone's stages, of stride 2 or 4 to 32.
        width: Channels of the decoder: of the deepest block of the U-Nets, which halve them at each
            of their five blocks; of the result of the others.
        dropout: Of FPN's own dropout; the others have none.

    Raises:
        UserError: segmentation_models_pytorch is not installed, or the width does not suit.
    """
    try:
        import segmentation_models_pytorch as smp
        from segmentation_models_pytorch.base import initialization
    except ImportError as error:
        raise UserError(
            f"The head {name} is that of segmentation_models_pytorch, which is not installed: "
            "pip install 'rdd-pipeline[teachers]'"
        ) from error
    parts = smp.decoders
    halved = [max(width >> block, 1) for block in range(5)]
    missing = [0] if stages[0][1] > 2 else []
    channels = [3, *missing, *(found for found, _ in stages)]
    decoders: dict[str, tuple[Any, dict[str, Any], int]] = {
        "unet": (parts.unet.decoder.UnetDecoder, {"decoder_channels": halved}, halved[-1]),
        "unetplusplus": (
            parts.unetplusplus.decoder.UnetPlusPlusDecoder,
            {"decoder_channels": halved},
            halved[-1],
        ),
        "manet": (parts.manet.decoder.MAnetDecoder, {"decoder_channels": halved}, halved[-1]),
        "linknet": (parts.linknet.decoder.LinknetDecoder, {"prefinal_channels": width}, width),
        "fpn": (
            parts.fpn.decoder.FPNDecoder,
            {
                "pyramid_channels": 2 * width,
                "segmentation_channels": width,
                "dropout": dropout,
            },
            width,
        ),
        "upernet": (parts.upernet.decoder.UPerNetDecoder, {"decoder_channels": width}, width),
        "segformer": (
            parts.segformer.decoder.SegformerDecoder,
            {"segmentation_channels": width},
            width,
        ),
    }
    make, options, result = decoders[name]
    try:
        decoder = make(encoder_channels=channels, **options)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"The head {name} cannot have the width {width}: {error}. Choose another, such as 64."
        ) from error
    initialization.initialize_decoder(decoder)
    _make_exportable(decoder)
    return PyramidDecoder(decoder, stages[0][1], result)
