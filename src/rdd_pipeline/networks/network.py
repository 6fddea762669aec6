"""The segmentation network: backbone, decode head, classifier, perhaps an auxiliary head."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple, Self

from torch import Tensor, nn

from rdd_pipeline.config import NetworkParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.networks.backbones import Backbone, make_backbone
from rdd_pipeline.networks.decoders import PyramidDecoder, pyramid_decoder
from rdd_pipeline.networks.heads import HEADS, initialize, make_auxiliary, make_decode_head
from rdd_pipeline.networks.resizing import bilinear


class PaperNetwork(NamedTuple):
    """Definition of a network of the RDD and CIRKD papers."""

    head: str
    backbone: str
    width: int
    auxiliary: bool
    deep_stem: bool
    # timm's name of public weights that fit, None where there are none.
    weights: str | None


PAPER_NETWORKS: dict[str, PaperNetwork] = {
    "deeplabv3_resnet101": PaperNetwork(
        "deeplabv3", "resnet101", 256, True, True, "resnet101s.gluon_in1k"
    ),
    "deeplabv3_resnet18": PaperNetwork("deeplabv3", "resnet18", 128, True, True, None),
    "pspnet_resnet18": PaperNetwork("pspnet", "resnet18", 128, True, True, None),
    "deeplabv3_mobilenetv2": PaperNetwork(
        "deeplabv3", "mobilenetv2_100", 128, False, False, "mobilenetv2_100.ra_in1k"
    ),
    "pspnet_mobilenetv2": PaperNetwork(
        "pspnet", "mobilenetv2_100", 128, False, False, "mobilenetv2_100.ra_in1k"
    ),
}


class NetworkOutput(NamedTuple):
    """What a network returns; N images, h x w = input size / stride.

    Attributes:
        logits: (N, classes, h, w).
        aux_logits: of the auxiliary head, of the logits' shape, or None.
        feature: (N, width, h, w), what the 1x1 classifier sees, dropout included.
        stages: the last-but-one and the last stage of the backbone, (N, C, h, w) each;
            without dilation the former is larger.

    A network of other code (`networks.foreign`) may lack feature and stages: they have 0 channels.
    """

    logits: Tensor
    aux_logits: Tensor | None
    feature: Tensor
    stages: tuple[Tensor, Tensor]


class Network(nn.Module):
    """What every network here is: images (N, 3, H, W) to a `NetworkOutput`.

    Attributes:
        num_classes: channels of the logits.
        auxiliary: the auxiliary head, if it is a part that can be left out.
    """

    num_classes: int
    auxiliary: nn.Module | None


class SegmentationNetwork(Network):
    """Backbone, decode head (`neck`, as checkpoints call it), classifier, auxiliary head.

    Attributes:
        num_classes: channels of the logits.
        stride: input size / size of the logits.
        feature_channels: channels of `NetworkOutput.feature`.
        stage_channels: channels of `NetworkOutput.stages`.
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: nn.Module,
        classifier: nn.Conv2d,
        auxiliary: nn.Module | None,
        *,
        pools_to_one: bool,
        stride: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.classifier = classifier
        self.auxiliary = auxiliary
        self.num_classes: int = classifier.out_channels
        self.feature_channels: int = classifier.in_channels
        self.stage_channels: tuple[int, int] = backbone.channels
        self.stride: int = stride or backbone.stride
        self._pools_to_one = pools_to_one
        self._backbone_is_frozen = False

    def freeze_backbone(self) -> None:
        """Leave the backbone as it is from now on, the statistics of its batch norms included."""
        self.backbone.requires_grad_(False)
        self._backbone_is_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As of any module; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self._backbone_is_frozen:
            self.backbone.eval()
        return self

    def forward(self, images_NCHW: Tensor) -> NetworkOutput:
        """Run on normalized images (N, 3, H, W).

        Raises:
            UserError: in training mode with a single image, see `check_trainable`.
        """
        if self.training:
            self.check_trainable(images_NCHW.shape[0])
        if isinstance(self.neck, nn.Sequential) and isinstance(self.neck[0], PyramidDecoder):
            stages = self.backbone.stages(images_NCHW, len(self.backbone.pyramid))
            feature = self.neck(stages)
            c3, c4 = stages[-2:]
        else:
            c3, c4 = self.backbone(images_NCHW)
            feature = self.neck(c4)
        logits = self.classifier(feature)
        aux_logits = None if self.auxiliary is None else self.auxiliary(c3)
        if aux_logits is not None and c3.shape[-2:] != c4.shape[-2:]:
            # Undilated backbones: the stages differ in size, but RDD compares both heads.
            aux_logits = bilinear(aux_logits, logits.shape[-2:])
        return NetworkOutput(logits, aux_logits, feature, (c3, c4))

    def check_trainable(self, batch_size: int) -> None:
        """Refuse a batch whose statistics do not exist.

        The image pooling of DeepLabV3 and PSPNet leaves one value per image and channel, and
        batch norm needs two to train. Synchronized batch norm counts the other ranks' images.

        Args:
            batch_size: images a device sees in one step.

        Raises:
            UserError: one image, and the pooling's batch norm is in training mode.
        """
        if batch_size >= 2 or not self._pools_to_one:
            return
        norms = [m for m in self.neck.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if any(norm.training and not _counts_other_ranks(norm) for norm in norms):
            raise UserError(
                f"A batch of {batch_size} image on a device cannot train this network: its image "
                "pooling leaves one value per channel and batch norm needs two. Use a batch_size "
                "of at least 2 for each device, or the head `fcn`."
            )


def build_network(
    name: str,
    *,
    num_classes: int,
    pretrained: bool | str | Path = False,
    width: int | None = None,
    auxiliary: bool | None = None,
    output_stride: int = 8,
    dropout: float = 0.1,
) -> SegmentationNetwork:
    """Build a segmentation network in training mode.

    Random weights come from torch's global generator: the same seed gives the same network.

    Args:
        name: one of `PAPER_NETWORKS`, or HEAD_BACKBONE with HEAD one of `HEADS` and
            BACKBONE any timm model, perhaps with its weights tag: `fcn_convnext_atto`,
            `deeplabv3_resnet18.tv_in1k` (with the plain stem, unlike `deeplabv3_resnet18`).
        num_classes: channels of the logits.
        pretrained: backbone weights: False, True (timm downloads them) or a file.
        width: channels of the head; None: as published, else `HeadSpec.width`.
        auxiliary: auxiliary head; None: as published, else yes.
        output_stride: input size / logits size. A backbone that cannot be dilated keeps its own,
            see `SegmentationNetwork.stride`.
        dropout: probability before both classifiers; 0 switches the ASPP's own off too.

    Raises:
        UserError: unknown name, or weights that are missing or do not fit.
    """
    if num_classes < 1:
        raise UserError(f"A network with {num_classes} classes was asked for; give 1 or more.")
    definition = _definition(name)
    head = HEADS[definition.head]
    backbone_name = definition.backbone
    deep_stem = definition.deep_stem
    if pretrained is True and name in PAPER_NETWORKS:
        if definition.weights is None:
            raise UserError(
                f"There are no public backbone weights for {name}: its ResNet-18 has the deep stem "
                "of three 3x3 convolutions. Give a file as `pretrained`, or use "
                f"{definition.head}_resnet18.tv_in1k, which has the plain 7x7 stem."
            )
        # The weights' own timm name has the deep stem built in.
        backbone_name, deep_stem = definition.weights, False
    backbone = make_backbone(
        backbone_name,
        output_stride=output_stride,
        deep_stem=deep_stem,
        pretrained=Path(pretrained) if isinstance(pretrained, str) else pretrained,
        pyramid=head.decoder is not None,
    )
    width = width or definition.width
    auxiliary = definition.auxiliary if auxiliary is None else auxiliary
    c3, c4 = backbone.channels
    if head.decoder is None:
        neck = make_decode_head(definition.head, c4, width, stride=backbone.stride, dropout=dropout)
    else:
        decoder = pyramid_decoder(head.decoder, backbone.pyramid, width, dropout)
        width = decoder.out_channels
        own = 0.0 if head.decoder == "fpn" else dropout
        neck = nn.Sequential(OrderedDict(decoder=decoder, dropout=nn.Dropout(own)))
    network = SegmentationNetwork(
        backbone,
        neck,
        nn.Conv2d(width, num_classes, 1),
        make_auxiliary(c3, num_classes, dropout=dropout) if auxiliary else None,
        pools_to_one=head.pools_to_one,
        stride=head.stride,
    )
    for part in (network.neck, network.classifier, network.auxiliary):
        if part is not None and not (part is network.neck and head.decoder is not None):
            initialize(part)
    return network


def network_from_params(
    params: NetworkParams, *, num_classes: int, pretrained: bool = True
) -> SegmentationNetwork:
    """`build_network` for typed parameters.

    Args:
        params: the architecture and the backbone weights.
        num_classes: channels of the logits.
        pretrained: False ignores `params.pretrained`: for weights that are loaded afterwards.
    """
    return build_network(
        params.name,
        num_classes=num_classes,
        pretrained=params.pretrained if pretrained else False,
        width=params.width,
        auxiliary=params.auxiliary,
        output_stride=params.output_stride,
        dropout=params.dropout,
    )


def _counts_other_ranks(norm: nn.Module) -> bool:
    """Torch's synchronized batch norm, or `training.synchronized`'s for other devices."""
    return isinstance(norm, nn.SyncBatchNorm) or getattr(norm, "synchronized", False)


def _definition(name: str) -> PaperNetwork:
    if name in PAPER_NETWORKS:
        return PAPER_NETWORKS[name]
    head, _, backbone = name.partition("_")
    if head in HEADS and backbone:
        return PaperNetwork(head, backbone, HEADS[head].width, True, False, None)
    raise UserError(
        f"Unknown network {name!r}. Choose one of {', '.join(PAPER_NETWORKS)}, or HEAD_BACKBONE "
        f"with HEAD one of {', '.join(HEADS)} and BACKBONE a timm model, such as "
        "deeplabv3_resnet18d."
    )
