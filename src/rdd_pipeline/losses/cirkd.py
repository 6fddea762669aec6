"""CIRKD, cross-image relational distillation: pixels related to those of other images.

Not the features are compared but how they relate to one another, in the batch and, by a memory
bank, across batches. Layers that are trained take any floating type: outside of autocast they
compute in float32 (on CUDA in TF32 where the process allows it, as in the networks), inside they
follow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdd_pipeline.collectives import ALONE, Collectives
from rdd_pipeline.config import Option
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses import memory_bank
from rdd_pipeline.losses.base import DistillationLoss, FunctionalLoss, LossContext
from rdd_pipeline.losses.layers import ProjectionHead
from rdd_pipeline.losses.maps import (
    as_float,
    full_precision,
    paired_maps,
    resize_labels,
    rows_of,
)
from rdd_pipeline.losses.similarity import soft_similarity_kl
from rdd_pipeline.networks import NetworkOutput

MemoryPreset = Literal["class_pixels", "cirkd_published"]


class MemoryLosses(NamedTuple):
    """Unweighted losses of CIRKD's memory."""

    pixel: Tensor
    region: Tensor


def cirkd_minibatch_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    temperature: float = 0.1,
    ranks: Collectives = ALONE,
) -> Tensor:
    """CIRKD across the images of a batch: how each position relates to those of every image.

    For every ordered pair (i, j) of images, the image with itself too: cosines of all positions of
    i with all of j, softmax over those of j at T; KL(teacher || student) in nats, mean over the
    positions of i; mean over pairs. Yang et al., CVPR 2022, arXiv 2204.06986, section 3.2.

    Args:
        student_feature: (N, Ds, h, w).
        teacher_feature: (N, Dt, h', w').
        temperature: T.
        ranks: Processes whose images are one batch.

    Raises:
        UserError: Batches differ.
    """
    student, teacher = paired_maps(student_feature, teacher_feature, "features")
    student_NPD, teacher_NPD = (
        rows_of(F.normalize(feature, dim=1)) for feature in (student, teacher)
    )
    half = student_feature.dtype.itemsize == 2
    return relations_in_batch(student_NPD, teacher_NPD, temperature, ranks, half=half)


def build_cirkd_minibatch(context: LossContext, *, temperature: float = 0.1) -> DistillationLoss:
    """`cirkd_minibatch_loss` of both networks' features."""
    context.require("feature")
    return FunctionalLoss(
        lambda student, teacher, _: cirkd_minibatch_loss(
            student.feature, teacher.feature, temperature=temperature, ranks=context.related
        )
    )


class CIRKDMemory(nn.Module):
    """CIRKD across steps: how each position relates to what the teacher saw in earlier batches.

    Two queues of the teacher's vectors for each class: regions (mean vector of a class in an image)
    and pixels. A step first enqueues its own, then draws slots, the same for every class, and
    compares the relations of each valid position with them: softmax of the cosines at T,
    KL(teacher || student) in nats, mean over the positions. A batch without valid position gives 0
    with gradient 0 and enqueues nothing. Yang et al., CVPR 2022, arXiv 2204.06986, section 3.3.

    Attributes:
        pixel_queue: Buffer (C, pixel_slots, Dt) of unit vectors; random ones at first.
        region_queue: Buffer (C, region_slots, Dt).
        pixel_pointer: Buffer (C,), int64, the slot that is written next.
        region_pointer: Buffer (C,), int64.
    """

    pixel_queue: Tensor
    region_queue: Tensor
    pixel_pointer: Tensor
    region_pointer: Tensor

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        num_classes: int,
        *,
        pixel_slots: int = 20_000,
        region_slots: int = 2_000,
        pixels_per_image: int = 16,
        pixel_contrast: int = 4096,
        region_contrast: int = 1024,
        temperature: float = 0.1,
        preset: MemoryPreset = "class_pixels",
        ignore_index: int = 255,
        ranks: Collectives = ALONE,
    ) -> None:
        """A projection head and empty queues.

        Args:
            student_channels: Ds.
            teacher_channels: Dt.
            num_classes: C.
            pixel_slots: Length of each class's queue of pixels.
            region_slots: Length of each class's queue of regions.
            pixels_per_image: Pixels enqueued for a class and image, at most.
            pixel_contrast: Pixels a position is compared with, all classes together; ``// C + 1``
                slots are drawn of each.
            region_contrast: The same of regions.
            temperature: T.
            preset: Which pixels are enqueued for a class: pixels of that class, drawn at random, or
                (`cirkd_published`) as the published code does, for a class of n pixels some of the
                image's first n positions, whatever they show.
            ignore_index: Label of ignored pixels.
            ranks: Processes that share the batches; their queues stay equal.

        Raises:
            UserError: The preset is unknown.
        """
        super().__init__()
        if preset not in get_args(MemoryPreset):
            raise UserError(
                f"Unknown preset {preset!r} of CIRKD's memory. Choose one of "
                f"{', '.join(get_args(MemoryPreset))}."
            )
        self.num_classes = num_classes
        self.pixels_per_image = pixels_per_image
        self.pixel_draws = min(pixel_slots, pixel_contrast // num_classes + 1)
        self.region_draws = min(region_slots, region_contrast // num_classes + 1)
        self.temperature = temperature
        self.preset = preset
        self.ignore_index = ignore_index
        self.ranks = ranks
        self.projection = ProjectionHead(student_channels, teacher_channels)
        for name, slots in (("pixel", pixel_slots), ("region", region_slots)):
            queue = F.normalize(torch.randn(num_classes, slots, teacher_channels), dim=2)
            self.register_buffer(f"{name}_queue", queue)
            pointer = torch.zeros(num_classes, dtype=torch.long)
            self.register_buffer(f"{name}_pointer", pointer)

    def forward(
        self, student_feature: Tensor, teacher_feature: Tensor, labels: Tensor
    ) -> MemoryLosses:
        """Enqueue the batch and return both losses.

        Args:
            student_feature: (N, Ds, h, w).
            teacher_feature: (N, Dt, h', w').
            labels: (N, H, W), any integer type; resized to h' x w' by nearest neighbor.

        Raises:
            UserError: Batches differ, or the batch holds more images than a queue has slots.
        """
        half = student_feature.dtype.itemsize == 2
        student, teacher = paired_maps(student_feature, teacher_feature, "features")
        student = as_float(self.projection(student))
        labels_NP = resize_labels(labels, (teacher.shape[2], teacher.shape[3])).flatten(1)
        student_NPD, teacher_NPD = (rows_of(F.normalize(f, dim=1)) for f in (student, teacher))
        self.enqueue(teacher_NPD, labels_NP)

        anchors = labels_NP != self.ignore_index
        student_MD, teacher_MD = student_NPD.flatten(0, 1), teacher_NPD.flatten(0, 1)
        positions = self.ranks.divisor(anchors.sum())
        terms = []
        for queue, draws in (
            (self.pixel_queue, self.pixel_draws),
            (self.region_queue, self.region_draws),
        ):
            keys = queue[:, memory_bank.random_slots(queue.shape[1], draws, queue.device)].flatten(
                0, 1
            )
            keys = keys.to(student.dtype).unsqueeze(0)
            total = soft_similarity_kl(
                student_MD,
                keys,
                teacher_MD,
                keys,
                temperature=self.temperature,
                counted=anchors.flatten(),
                half=half,
            )
            terms.append(total / positions)
        return MemoryLosses(*terms)

    @torch.no_grad()
    def enqueue(self, teacher_NPD: Tensor, labels_NP: Tensor) -> None:
        """Write the regions and pixels of all ranks' images into the queues, image after image.

        Args:
            teacher_NPD: Unit vectors of the teacher at P positions of N images, (N, P, Dt).
            labels_NP: Their classes (N, P), int64.

        Raises:
            UserError: The batch holds more images than a queue has slots.
        """
        positions, width = teacher_NPD.shape[1:]
        images = self.ranks.size * len(teacher_NPD)
        if images == 0:
            return
        slots = min(self.pixel_queue.shape[1], self.region_queue.shape[1])
        if images > slots:
            raise UserError(
                f"A batch of {images} images does not fit into queues of {slots} slots. "
                "Use at least as many slots as a batch has images."
            )
        classes = torch.arange(self.num_classes, device=labels_NP.device)
        of_class_NCP = labels_NP.unsqueeze(1) == classes.view(1, -1, 1)
        counts_NC = of_class_NCP.sum(2)

        with full_precision(teacher_NPD):
            regions_NCD = F.normalize(of_class_NCP.to(teacher_NPD.dtype) @ teacher_NPD, dim=2)
        memory_bank.write(
            self.region_queue,
            self.region_pointer,
            self.ranks.gather(regions_NCD).transpose(0, 1),
            self.ranks.gather(counts_NC).transpose(0, 1) > 0,
        )

        most = min(self.pixels_per_image, positions, self.pixel_queue.shape[1] // images)
        if self.preset == "cirkd_published":
            order = torch.arange(positions, device=labels_NP.device)
            candidates_NCP = order < counts_NC.unsqueeze(2)
        else:
            candidates_NCP = of_class_NCP
        of_all = (images, self.num_classes, positions)
        keys_NCP = self.ranks.own(memory_bank.random_order(of_all, labels_NP.device))
        keys_NCP = keys_NCP.masked_fill(~candidates_NCP, torch.inf)
        index_NCK = keys_NCP.topk(most, dim=2, largest=False).indices
        keep_NCK = torch.arange(most, device=labels_NP.device) < counts_NC.unsqueeze(2)
        pixels_NKD = teacher_NPD.gather(1, index_NCK.flatten(1).unsqueeze(2).expand(-1, -1, width))
        pixels_NCKD = pixels_NKD.view(-1, self.num_classes, most, width)
        memory_bank.write(
            self.pixel_queue,
            self.pixel_pointer,
            self.ranks.gather(pixels_NCKD).transpose(0, 1).flatten(1, 2),
            self.ranks.gather(keep_NCK.byte()).transpose(0, 1).flatten(1, 2).bool(),
        )


class CIRKDMemoryLoss(DistillationLoss):
    """CIRKD's relations with earlier batches; options are those of `CIRKDMemory`."""

    def __init__(self, context: LossContext, **options: Option) -> None:
        super().__init__()
        self.memory = make_memory(context, options)

    def forward(
        self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """See `DistillationLoss.forward`."""
        losses = self.memory(student.feature, teacher.feature, labels)
        return {"cirkd_pixel": losses.pixel, "cirkd_region": losses.region}


def make_memory(context: LossContext, options: Mapping[str, Option]) -> CIRKDMemory:
    """The memory for the features of a training's networks."""
    return CIRKDMemory(
        *context.feature_widths,
        context.num_classes,
        ignore_index=context.ignore_index,
        ranks=context.ranks,
        **options,  # type: ignore[arg-type]
    )


def relations_in_batch(
    student_NRD: Tensor,
    teacher_NRD: Tensor,
    temperature: float,
    ranks: Collectives,
    *,
    half: bool = False,
) -> Tensor:
    """Mean over pairs of images and rows of the KL of the first's relations with the second.

    The first are this rank's images, the second those of all ranks. `half`: see
    `soft_similarity_kl`.
    """
    total = soft_similarity_kl(
        student_NRD.flatten(0, 1),
        ranks.gather(student_NRD),
        teacher_NRD.flatten(0, 1),
        ranks.gather(teacher_NRD),
        temperature=temperature,
        half=half,
    )
    images, rows = student_NRD.shape[:2]
    return total / max(1, rows * images**2 * ranks.size)
