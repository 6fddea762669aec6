"""What a network expects its images to look like. It travels with the network's checkpoint."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rdd_pipeline.config import Channels, Deviations, NetworkParams, Params, Scale
from rdd_pipeline.lazy import Lazy
from rdd_pipeline.networks.network import PAPER_NETWORKS
from rdd_pipeline.networks.resizing import bilinear

get_pretrained_cfg = Lazy("timm.models.get_pretrained_cfg")


class Preprocessing(Params):
    """(image - mean) / std for each channel, in units of 0 to 255; the size may change, too."""

    added = ("scale",)

    channel_order: Literal["rgb", "bgr"] = "rgb"
    mean: Channels = Field(description="In the network's channel order, 0 to 255.")
    std: Deviations = Field(description="In the network's channel order, 0 to 255.")
    scale: Scale = Field(1.0, description="Factor by which images are resized.")

    def normalize(self, images_NCHW: Tensor) -> Tensor:
        """Images as the network expects them, float32 on the device of the images.

        Args:
            images_NCHW: RGB, uint8 or float, 0 to 255, (N, 3, H, W).

        Returns:
            (N, 3, *self.size((H, W))).

        Raises:
            ValueError: the images do not have three channels.
        """
        if images_NCHW.ndim != 4 or images_NCHW.shape[1] != 3:
            raise ValueError(
                f"Images have the shape {tuple(images_NCHW.shape)}, expected (N, 3, H, W)."
            )
        if self.channel_order == "bgr":
            red, green, blue = images_NCHW.unbind(dim=1)
            images_NCHW = torch.stack((blue, green, red), dim=1)
        images_NCHW = images_NCHW.to(torch.float32)
        if self.scale != 1.0:
            height, width = images_NCHW.shape[-2:]
            images_NCHW = bilinear(images_NCHW, self.size((height, width)))
        mean, std = (_constant(values, images_NCHW.device) for values in (self.mean, self.std))
        return (images_NCHW - mean) / std

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that the network sees of an image of that size."""
        height, width = (max(round(side * self.scale), 1) for side in size)
        return height, width

    def mean_rgb(self) -> Channels:
        """The mean in RGB order: what padded pixels hold so that they become zero."""
        return self.mean if self.channel_order == "rgb" else self.mean[::-1]

    @classmethod
    def imagenet(cls) -> Preprocessing:
        """RGB with the statistics of ImageNet: torchvision's and most of timm's weights."""
        return _from_unit_range((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    @classmethod
    def half(cls) -> Preprocessing:
        """RGB from -1 to 1: x / 127.5 - 1."""
        return cls(mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5))

    @classmethod
    def caffe_bgr(cls) -> Preprocessing:
        """BGR minus the mean: the CIRKD and RDD code bases."""
        return cls(
            channel_order="bgr",
            mean=(104.00698793, 116.66876762, 122.67891434),
            std=(1.0, 1.0, 1.0),
        )

    @classmethod
    def for_network(cls, params: NetworkParams) -> Preprocessing:
        """What the backbone's weights were trained with.

        `auto` asks timm for the weights' mean and deviation, also for a file, and takes
        ImageNet's where the backbone starts from random weights. A file that was trained
        otherwise than timm's weights of that name needs `preprocessing` set.
        """
        found = cls._of_colors(params)
        return found.model_copy(update={"scale": params.image_scale})

    @classmethod
    def _of_colors(cls, params: NetworkParams) -> Preprocessing:
        presets = {"imagenet": cls.imagenet, "half": cls.half, "caffe_bgr": cls.caffe_bgr}
        if params.preprocessing != "auto":
            return presets[params.preprocessing]()
        if params.pretrained is False:
            return cls.imagenet()
        if params.name in PAPER_NETWORKS:
            definition = PAPER_NETWORKS[params.name]
            backbone = definition.weights or definition.backbone
        else:
            backbone = params.name.partition("_")[2]
        info = get_pretrained_cfg(backbone)
        return cls.imagenet() if info is None else _from_unit_range(info.mean, info.std)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _constant(channels: Channels, device: torch.device) -> Tensor:
    """(1, 3, 1, 1), made once for each device: copying it there makes a GPU wait."""
    return torch.tensor(channels, device=device).reshape(1, 3, 1, 1)


def _from_unit_range(mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing:
    red, green, blue = (255 * value for value in mean)
    red_std, green_std, blue_std = (255 * value for value in std)
    return Preprocessing(mean=(red, green, blue), std=(red_std, green_std, blue_std))
