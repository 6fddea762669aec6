"""Distillation losses on relations: SKD, CIRKD and CIRKDv2.

Not the features are compared but how they relate to one another, so student and teacher may differ
in width, unless said otherwise. A student of another stride is resized (bilinear) to the
teacher's size. Computing is done in float32 (float64 stays), whatever comes in and whatever
autocast and the TF32 switches say. Layers that are trained take any floating type, too: outside of
autocast they compute in float32 (on CUDA in TF32 where the process allows it, as in the networks),
inside they follow it. No gradient reaches the teacher.

Modules here hold what a checkpoint has to hold: projection heads (trained with the student) and
queues of teacher vectors (buffers). Processes that share a batch (`ranks`, see `collectives`)
write all that any of them enqueues into their queues, which are equal hence. Under DDP set
``broadcast_buffers=False``: with 19 classes the queues are 400 MB that would otherwise be sent at
every step.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdd_pipeline.collectives import ALONE, Ranks
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.maps import (
    as_float,
    full_precision,
    matrix_product,
    paired_maps,
    resize_labels,
    rows_of,
)
from rdd_pipeline.losses.similarity import soft_similarity_kl

MemoryPreset = Literal["class_pixels", "cirkd_published"]


class MemoryTerms(NamedTuple):
    """Unweighted terms of CIRKD's memory."""

    pixel: Tensor
    region: Tensor


class ChannelTerms(NamedTuple):
    """Unweighted channel terms of CIRKDv2."""

    minibatch: Tensor
    memory: Tensor
    mse: Tensor


def skd_pairwise_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """SKD's pair-wise term: mean squared difference of the cosines between all positions.

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

    difference = cosines(student) - cosines(teacher)
    return difference.square().sum() / max(1, difference.numel())


def cirkd_minibatch_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    temperature: float = 0.1,
    ranks: Ranks = ALONE,
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
    return _relations_in_batch(student_NPD, teacher_NPD, temperature, ranks)


class ProjectionHead(nn.Sequential):
    """conv1x1 - batch norm - ReLU - conv1x1, to the teacher's width. Trained with the student."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        """Layers for features of the given widths."""
        super().__init__(
            nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(teacher_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=1, bias=False),
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Projected feature (N, Dt, h, w) from (N, Ds, h, w) of any floating type."""
        projected: Tensor = super().forward(as_float(feature))  # type: ignore[no-untyped-call]
        return projected


class CirkdMemory(nn.Module):
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
        ranks: Ranks = ALONE,
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
    ) -> MemoryTerms:
        """Enqueue the batch and return both terms.

        Args:
            student_feature: (N, Ds, h, w).
            teacher_feature: (N, Dt, h', w').
            labels: (N, H, W), any integer type; resized to h' x w' by nearest neighbor.

        Raises:
            UserError: Batches differ, or the batch holds more images than a queue has slots.
        """
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
            keys = queue[:, random_slots(queue.shape[1], draws, queue.device)].flatten(0, 1)
            keys = keys.to(student.dtype).unsqueeze(0)
            total = soft_similarity_kl(
                student_MD,
                keys,
                teacher_MD,
                keys,
                temperature=self.temperature,
                counted=anchors.flatten(),
            )
            terms.append(total / positions)
        return MemoryTerms(*terms)

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
        _write(
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
        keys_NCP = self.ranks.own(_random_order(of_all, labels_NP.device))
        keys_NCP = keys_NCP.masked_fill(~candidates_NCP, torch.inf)
        index_NCK = keys_NCP.topk(most, dim=2, largest=False).indices
        keep_NCK = torch.arange(most, device=labels_NP.device) < counts_NC.unsqueeze(2)
        pixels_NKD = teacher_NPD.gather(1, index_NCK.flatten(1).unsqueeze(2).expand(-1, -1, width))
        pixels_NCKD = pixels_NKD.view(-1, self.num_classes, most, width)
        _write(
            self.pixel_queue,
            self.pixel_pointer,
            self.ranks.gather(pixels_NCKD).transpose(0, 1).flatten(1, 2),
            self.ranks.gather(keep_NCK.byte()).transpose(0, 1).flatten(1, 2).bool(),
        )


class SelfAttentionBlock(nn.Module):
    """CIRKDv2's refinement of the student's feature, used in training only.

    q, k, v by 1x1 convolutions to half the width, softmax(q k / sqrt(Ds / 2)) v over all positions,
    1x1 convolution back with batch norm and ReLU, joined with the input and brought back to its
    width by another one.
    """

    def __init__(self, channels: int, *, bias: bool = True) -> None:
        """Layers for a feature of the given width; published are q, k and v without bias."""
        super().__init__()
        inner = max(1, channels // 2)
        self.query = nn.Conv2d(channels, inner, kernel_size=1, bias=bias)
        self.key = nn.Conv2d(channels, inner, kernel_size=1, bias=bias)
        self.value = nn.Conv2d(channels, inner, kernel_size=1, bias=bias)
        self.expand = _conv_norm_relu(inner, channels)
        self.join = _conv_norm_relu(2 * channels, channels)

    def forward(self, feature: Tensor) -> Tensor:
        """Refined feature of the same shape (N, Ds, h, w), from one of any floating type."""
        feature = as_float(feature)
        query, key, value = (
            rows_of(layer(feature)).unsqueeze(1) for layer in (self.query, self.key, self.value)
        )
        # Scales by 1 / sqrt(width) and does not keep the matrix of all pairs.
        attended = F.scaled_dot_product_attention(query, key, value).squeeze(1)
        maps = attended.transpose(1, 2).reshape(len(feature), -1, *feature.shape[2:])
        refined: Tensor = self.join(torch.cat([feature, self.expand(maps)], dim=1))
        return refined


class ChannelRelations(nn.Module):
    """CIRKDv2's channel terms: how the channels, seen as maps, relate to one another.

    Both features are average-pooled 4x4, the student's goes through a projection head to Dt
    channels; each channel is then a row, L2-normalized over positions.

    * mini-batch: for every ordered pair of images the similarities of all channels of one with all
      of the other, softmax at T; KL(teacher || student) in nats, mean over channels and pairs,
    * memory: the same relations with channels of the teacher from earlier batches, mean over
      channels and images; a step first enqueues some of its own,
    * mse: mean squared difference of the rows.

    Attributes:
        queue: Buffer (slots, positions) of unit vectors; random ones at first.
        pointer: Buffer (1,), int64, the slot that is written next.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        positions: int,
        *,
        slots: int = 10_000,
        enqueued: int = 256,
        contrast: int = 2048,
        temperature: float = 0.1,
        pool: int = 4,
        ranks: Ranks = ALONE,
        pairs: Ranks = ALONE,
    ) -> None:
        """A projection head and an empty queue.

        Args:
            student_channels: Ds.
            teacher_channels: Dt.
            positions: Of the pooled map, see `pooled_positions`.
            slots: Length of the queue.
            enqueued: Channels enqueued in a step, drawn from all images; at most.
            contrast: Slots drawn in a step.
            temperature: T.
            pool: Side of the average-pooling.
            ranks: Processes that share the batches; their queues stay equal.
            pairs: Processes whose images are paired with one another.
        """
        super().__init__()
        self.ranks, self.pairs = ranks, pairs
        self.enqueued = min(enqueued, slots)
        self.draws = min(contrast, slots)
        self.temperature = temperature
        self.pool = pool
        self.projection = ProjectionHead(student_channels, teacher_channels)
        self.register_buffer("queue", F.normalize(torch.randn(slots, positions), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> ChannelTerms:
        """Enqueue some of the teacher's channels and return the three terms.

        Args:
            student_feature: (N, Ds, h, w).
            teacher_feature: (N, Dt, h', w').

        Raises:
            UserError: Batches differ, or the map is not the one that the queue was made for.
        """
        student, teacher = paired_maps(student_feature, teacher_feature, "features")
        student, teacher = (F.avg_pool2d(f, self.pool, ceil_mode=True) for f in (student, teacher))
        if teacher.shape[2] * teacher.shape[3] != self.queue.shape[1]:
            raise UserError(
                f"The queue of channels was made for {self.queue.shape[1]} positions, but this "
                f"feature has {teacher.shape[2]} x {teacher.shape[3]} after pooling. Keep one crop "
                "size through the training."
            )
        student = as_float(self.projection(student))
        student_NDP, teacher_NDP = (F.normalize(f.flatten(2), dim=2) for f in (student, teacher))
        minibatch = _relations_in_batch(student_NDP, teacher_NDP, self.temperature, self.pairs)

        teacher_MP, student_MP = teacher_NDP.flatten(0, 1), student_NDP.flatten(0, 1)
        with torch.no_grad():
            all_MP = self.ranks.gather(teacher_MP)
            chosen = random_slots(len(all_MP), self.enqueued, teacher.device)
            new = all_MP[chosen].unsqueeze(0)
            _write(self.queue.unsqueeze(0), self.pointer, new, torch.ones_like(new[..., 0]) > 0)
        keys = self.queue[random_slots(len(self.queue), self.draws, self.queue.device)]
        keys = keys.to(student.dtype).unsqueeze(0)
        memory = soft_similarity_kl(
            student_MP, keys, teacher_MP, keys, temperature=self.temperature
        ) / max(1, len(student_MP))
        mse = (student_MP - teacher_MP).square().sum() / max(1, student_MP.numel())
        return ChannelTerms(minibatch, memory, mse)


def pooled_positions(height: int, width: int, *, pool: int = 4) -> int:
    """Positions of a feature map of that size after `ChannelRelations`' pooling.

    Rounded up: the published code rounds down and fails on odd maps.
    """
    return math.ceil(height / pool) * math.ceil(width / pool)


def random_slots(slots: int, count: int, device: torch.device) -> Tensor:
    """Up to `count` different numbers below `slots`, (count,) int64, from the global generator."""
    return torch.randperm(slots, device=device)[:count]


def _random_order(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Random numbers whose order decides which pixels are enqueued."""
    return torch.rand(shape, device=device)


def _relations_in_batch(
    student_NRD: Tensor, teacher_NRD: Tensor, temperature: float, ranks: Ranks
) -> Tensor:
    """Mean over pairs of images and rows of the KL of the first's relations with the second.

    The first are this rank's images, the second those of all ranks.
    """
    total = soft_similarity_kl(
        student_NRD.flatten(0, 1),
        ranks.gather(student_NRD),
        teacher_NRD.flatten(0, 1),
        ranks.gather(teacher_NRD),
        temperature=temperature,
    )
    images, rows = student_NRD.shape[:2]
    return total / max(1, rows * images**2 * ranks.size)


def _write(queue: Tensor, pointer: Tensor, vectors: Tensor, keep: Tensor) -> None:
    """Write vectors into ring buffers, in order, leaving out those that are not kept.

    Without waiting for the device: what is left out is sent to slots behind the others, where it
    writes back what is there.

    Args:
        queue: (C, S, D), changed in place.
        pointer: (C,) the slot of each queue that is written next, moved on in place.
        vectors: (C, M, D) with M <= S.
        keep: (C, M) bool.
    """
    count_C1 = keep.sum(1, keepdim=True)
    rank_kept = keep.cumsum(1) - 1
    rank_left_out = count_C1 + (~keep).cumsum(1) - 1
    slot_CM = pointer.unsqueeze(1) + torch.where(keep, rank_kept, rank_left_out)
    index_CMD = (slot_CM % queue.shape[1]).unsqueeze(2).expand(-1, -1, queue.shape[2])
    vectors = torch.where(keep.unsqueeze(2), vectors.to(queue.dtype), queue.gather(1, index_CMD))
    queue.scatter_(1, index_CMD, vectors)
    pointer.copy_((pointer + count_C1.squeeze(1)) % queue.shape[1])


def _conv_norm_relu(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
