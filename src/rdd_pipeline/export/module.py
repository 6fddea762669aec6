"""What is exported: a network with what comes before and after it, as one module.

Suffixes: N images, C classes, H rows, W columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.cost import without_auxiliary
from rdd_pipeline.networks.checkpoint import NetworkCheckpoint
from rdd_pipeline.networks.resizing import bilinear

Output = Literal["mask", "logits", "probabilities"]


class ExportedNetwork(nn.Module):
    """From images to masks, logits or probabilities at the size of the images.

    The auxiliary head, which only training needs, is left out.

    Args:
        checkpoint: The network, in evaluation mode from here on.
        preprocessing: Whether the network's normalization is part of the module: it takes RGB
            (N, 3, H, W) uint8 then, otherwise normalized images in the network's channel order,
            float32.
        output: ``mask`` (N, H, W) uint8, positions in the label names (int32 for more than 256);
            ``logits`` or ``probabilities`` (N, C, H, W) float32.

    Raises:
        UserError: The network sees images of another size.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, checkpoint: NetworkCheckpoint, *, preprocessing: bool = True, output: Output = "mask"
    ) -> None:
        super().__init__()
        how = checkpoint.header.preprocessing
        if how.scale != 1.0:
            raise UserError(
                f"This network sees images resized by {how.scale:g} (image_scale), which an "
                "exported file does not do. Export a student with image_scale 1."
            )
        self.network = without_auxiliary(checkpoint.build())
        self.preprocessing = preprocessing
        self.output: Output = output
        self.name = checkpoint.header.network.name
        self.num_classes = checkpoint.header.num_classes
        self._bgr = how.channel_order == "bgr"
        # Buffers, not Preprocessing's cached constants: tracing would leave tensors without
        # values in that cache.
        self.register_buffer("mean", torch.tensor(how.mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(how.std).reshape(1, 3, 1, 1))
        self.eval()

    @property
    def input_type(self) -> torch.dtype:
        """Of the images."""
        return torch.uint8 if self.preprocessing else torch.float32

    def prepared(self, images_N3HW: Tensor) -> Tensor:
        """What the module takes for RGB images (N, 3, H, W) uint8."""
        return images_N3HW if self.preprocessing else self._normalized(images_N3HW)

    def scores(self, images_N3HW: Tensor) -> Tensor:
        """Logits (N, C, H, W), or the probabilities where those are the output."""
        size = images_N3HW.shape[-2:]
        if self.preprocessing:
            images_N3HW = self._normalized(images_N3HW)
        logits = bilinear(self.network(images_N3HW).logits, size)
        return logits.softmax(dim=1) if self.output == "probabilities" else logits

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        scores = self.scores(image)
        if self.output != "mask":
            return scores
        return scores.argmax(dim=1).to(torch.uint8 if self.num_classes <= 256 else torch.int32)

    def _normalized(self, images_N3HW: Tensor) -> Tensor:
        if self._bgr:
            images_N3HW = images_N3HW.flip(1)
        return (images_N3HW.to(torch.float32) - self.mean) / self.std
