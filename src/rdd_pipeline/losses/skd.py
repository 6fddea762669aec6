"""SKD, structured knowledge distillation: pair-wise and holistic (adversarial).

Liu et al., CVPR 2019, arXiv 1903.04197, section 3.1. The discriminator of the holistic loss has an
optimizer of its own (Adam, 4e-4, betas .9 and .99). A step of the student uses
`generator_loss(D(student_logits))`, a step of the discriminator
`discriminator_loss(D(teacher_logits), D(student_logits.detach()))`; the gradient that the first
leaves in D has to be cleared before the second.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.base import DistillationLoss, LossContext
from rdd_pipeline.losses.maps import as_float, matrix_product, mean_square, paired_maps, rows_of
from rdd_pipeline.networks import NetworkOutput

_WIDTHS = (64, 128, 256, 512)
_ATTENTION_FROM = 256
_KERNEL = 4


def skd_pairwise_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """SKD's pair-wise loss: mean squared difference of the cosines between all positions.

    Features are max-pooled 2x2 first. Mean over images and pairs. Liu et al., CVPR 2019,
    arXiv 1903.04197, section 3.1.

    Args:
        student_feature: (N, Ds, h, w).
        teacher_feature: (N, Dt, h', w').

    Raises:
        UserError: Batches differ.
    """
    student, teacher = paired_maps(student_feature, teacher_feature, "features")

    def cosines(feature: Tensor) -> Tensor:
        pooled = F.max_pool2d(feature, 2, ceil_mode=True)
        unit_NDP = F.normalize(pooled, dim=1).flatten(2)
        return matrix_product(unit_NDP.mT, unit_NDP)

    return mean_square(cosines(student) - cosines(teacher))


def discriminator_loss(teacher_scores: Tensor, student_scores: Tensor) -> Tensor:
    """Hinge loss of the discriminator: mean relu(1 - D(z_t)) + mean relu(1 + D(z_s)).

    Args:
        teacher_scores: Scores of the teacher's logits, any shape.
        student_scores: Scores of the student's detached logits, any shape.
    """
    real = F.relu(1 - as_float(teacher_scores))
    fake = F.relu(1 + as_float(student_scores))
    return real.sum() / max(1, real.numel()) + fake.sum() / max(1, fake.numel())


def generator_loss(student_scores: Tensor) -> Tensor:
    """Hinge loss of the student: -mean D(z_s).

    Args:
        student_scores: Scores of the student's logits, any shape.
    """
    return -as_float(student_scores).sum() / max(1, student_scores.numel())


class SKDHolisticLoss(DistillationLoss):
    """SKD's holistic loss: student and discriminator learn in one backward pass.

    The student's loss goes through a discriminator whose parameters count as constants, the
    discriminator's through detached logits, so each gradient reaches one of them only. The
    published code alternates two passes; with plain gradient steps of both it is the same.
    """

    def __init__(self, context: LossContext) -> None:
        super().__init__()
        height, width = (
            min(context.student.logits.shape[axis], context.teacher.logits.shape[axis])
            for axis in (2, 3)
        )
        self.discriminator = HolisticDiscriminator(context.num_classes, (height, width))

    def forward(
        self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """See `DistillationLoss.forward`."""
        constant = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooled = functional_call(self.discriminator, constant, (student.logits,))
        return {
            "skd_generator": generator_loss(fooled),
            "skd_discriminator": discriminator_loss(
                self.discriminator(teacher.logits.detach()),
                self.discriminator(student.logits.detach()),
            ),
        }

    def adversaries(self) -> Iterator[nn.Module]:
        """The discriminator."""
        yield self.discriminator


class HolisticDiscriminator(nn.Module):
    """Scores how much logits look like a teacher's.

    Batch norm on the logits; convolutions 4x4 of stride 2 with spectral norm and LeakyReLU(.1),
    widths 64, 128, 256, 512, with self-attention after those of 256 and 512; a convolution 4x4 to
    one channel. The published four convolutions need maps of 64 x 64; for smaller ones the last
    are left out, so that 4 x 4 positions are left for the score.
    """

    def __init__(self, num_classes: int, size: tuple[int, int]) -> None:
        """Layers for logits of the given size.

        Args:
            num_classes: C.
            size: (h, w) of the smallest logits that will be scored.

        Raises:
            UserError: The map is smaller than 8 x 8, too small for a single convolution.
        """
        super().__init__()
        depth = discriminator_depth(size)
        if depth == 0:
            raise UserError(
                f"SKD's discriminator needs logits of at least 8 x 8 positions, got {size[0]} x "
                f"{size[1]}. Use a larger crop, or leave the holistic loss out."
            )
        layers: list[nn.Module] = [nn.BatchNorm2d(num_classes)]
        width = num_classes
        for next_width in _WIDTHS[:depth]:
            convolution = nn.Conv2d(width, next_width, _KERNEL, stride=2, padding=1)
            layers += [spectral_norm(convolution), nn.LeakyReLU(0.1)]
            if next_width >= _ATTENTION_FROM:
                layers.append(GatedSelfAttention(next_width))
            width = next_width
        layers.append(nn.Conv2d(width, 1, _KERNEL))
        self.layers = nn.Sequential(*layers)

    def forward(self, logits: Tensor) -> Tensor:
        """Scores (N, 1, h', w') of logits (N, C, h, w); higher looks more like a teacher's."""
        scores: Tensor = self.layers(as_float(logits))
        return scores


class GatedSelfAttention(nn.Module):
    """x + gate * attention(x), with a gate that starts at 0. Zhang et al., ICML 2019 (SAGAN)."""

    def __init__(self, channels: int) -> None:
        """Layers for maps of the given width; queries and keys have an eighth of it."""
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, kernel_size=1)
        self.key = nn.Conv2d(channels, channels // 8, kernel_size=1)
        self.value = nn.Conv2d(channels, channels, kernel_size=1)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of the same shape (N, D, h, w)."""
        query, key, value = (
            rows_of(layer(maps)).unsqueeze(1) for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)
        return maps + self.gate * attended.transpose(1, 2).reshape(maps.shape)


def discriminator_depth(size: tuple[int, int]) -> int:
    """Strided convolutions, at most four, after which 4 x 4 positions are left; 0: none fits."""
    side, depth = min(size), 0
    while depth < len(_WIDTHS) and side // 2 >= _KERNEL:
        side, depth = side // 2, depth + 1
    return depth
