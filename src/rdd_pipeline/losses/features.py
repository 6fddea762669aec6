"""Distillation losses on features: FitNet, AT, IFVD, CWD, DSD, MGD and Af-DCD.

Features have the shape (N, D, h, w). All positions count, ignored ones too (as published). A
student of another stride is resized (bilinear) to the teacher's size; losses that compare channels
expect the student at the teacher's width, see `ChannelAdapter`. Computing is done in float32
(float64 stays), whatever comes in and whatever autocast and the TF32 switches say. Layers that are
trained take any floating type, too: outside of autocast they compute in float32 (on CUDA in TF32
where the process allows it, as in the networks), inside they follow it. No gradient reaches the
teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdd_pipeline.collectives import ALONE, Ranks
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.logits import spatial_kl
from rdd_pipeline.losses.maps import (
    as_float,
    full_precision,
    matrix_product,
    paired_features,
    paired_logits,
    paired_maps,
    resize,
    resize_labels,
    rows_of,
)
from rdd_pipeline.losses.pixelwise import PixelLabels, pixel_labels


class ChannelAdapter(nn.Conv2d):
    """1x1 convolution without bias that brings the student's feature to the teacher's width.

    It is trained with the student: it belongs under DDP and into the checkpoint.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        """A layer for features of the given widths."""
        super().__init__(student_channels, teacher_channels, kernel_size=1, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        """Feature (N, Dt, h, w) from (N, Ds, h, w) of any floating type."""
        return super().forward(as_float(feature))


def fitnet_loss(adapted_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """FitNet: mean squared difference of the features, over all axes.

    Romero et al., ICLR 2015, arXiv 1412.6550.

    Args:
        adapted_feature: The student's, (N, D, h, w), after `ChannelAdapter`.
        teacher_feature: (N, D, h', w').

    Raises:
        UserError: Batches or widths differ.
    """
    student, teacher = paired_features(adapted_feature, teacher_feature)
    return (student - teacher).square().sum() / max(1, teacher.numel())


def at_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Attention transfer: mean squared difference of the two maps of attention.

    Attention is the mean of the squared channels, L2-normalized over the positions of an image;
    the mean runs over images and positions. Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928,
    in the form of the field's tables (the paper takes the norm of the difference).

    Args:
        student_feature: (N, Ds, h, w).
        teacher_feature: (N, Dt, h', w').

    Raises:
        UserError: Batches differ.
    """
    student, teacher = paired_maps(student_feature, teacher_feature, "features")
    return _mean_square(_attention(student) - _attention(teacher))


def ifvd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    ignore_index: int = 255,
) -> Tensor:
    """Intra-class feature variation: how similar each pixel is to the mean of its class.

    Mean squared difference, over images and positions, of the two networks' cosines between a
    pixel's feature and the mean feature of its class in its image. Labels are resized to the
    features by nearest neighbor; an ignored pixel is its own mean. Wang et al., ECCV 2020.

    Args:
        student_feature: (N, Ds, h, w).
        teacher_feature: (N, Dt, h', w').
        labels: (N, H, W), any integer type.
        num_classes: C.
        ignore_index: Label of ignored pixels.

    Raises:
        UserError: Batches differ or the labels are out of range.
    """
    student, teacher = paired_maps(student_feature, teacher_feature, "features")
    pixels = pixel_labels(
        resize_labels(labels, (teacher.shape[2], teacher.shape[3])),
        num_classes=num_classes,
        ignore_index=ignore_index,
    )
    student_cos = _cosine_to_class_mean(student, pixels, num_classes)
    return _mean_square(student_cos - _cosine_to_class_mean(teacher, pixels, num_classes))


def cwd_feature_loss(
    adapted_feature: Tensor,
    teacher_feature: Tensor,
    *,
    temperature: float = 4.0,
    student_channels: int | None = None,
) -> Tensor:
    """Channel-wise distillation of features: KL(teacher || student) over positions, in nats.

    ``T^2 / (N * D) * sum over images and channels of KL`` with p = softmax over positions of f / T.
    Shu et al., ICCV 2021, arXiv 2011.13256.

    Args:
        adapted_feature: The student's, (N, Dt, h, w), after `ChannelAdapter`.
        teacher_feature: (N, Dt, h', w').
        temperature: T.
        student_channels: D of the divisor. None: Dt, as the paper has it. The student's width
            before the adapter: preset `cirkd`, what the code behind the published tables does.

    Raises:
        UserError: Batches or widths differ.
    """
    student, teacher = paired_features(adapted_feature, teacher_feature)
    channels = teacher.shape[1] if student_channels is None else student_channels
    return spatial_kl(student, teacher, temperature=temperature) / max(1, channels)


def psd_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """DSD's pixel-wise similarity: how attention changes from one map of a network to another.

    Q is the attention of `at_loss` for each map; residuals R = normalize(Q_m - Q_n) for all pairs
    n < m; mean over pairs, images and positions of the squared difference of the two networks'
    residuals. Feng et al., IEEE TIP 2021, "Double similarity distillation".

    Args:
        student_maps: At least two maps (N, D, h, w) of any widths and sizes, by convention
            auxiliary logits, feature, logits.
        teacher_maps: As many. All maps are resized to the size of the first of these.

    Raises:
        UserError: Fewer than two maps, different numbers of maps, or batches differ.
    """
    if len(student_maps) != len(teacher_maps) or len(student_maps) < 2:
        raise UserError(
            f"Got {len(student_maps)} maps of the student and {len(teacher_maps)} of the teacher; "
            "expected the same number, at least two."
        )
    size = (teacher_maps[0].shape[-2], teacher_maps[0].shape[-1])
    student_attention, teacher_attention = [], []
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        student, teacher = paired_maps(student_map, resize(as_float(teacher_map), size), "maps")
        student_attention.append(_attention(student))
        teacher_attention.append(_attention(teacher))
    differences = [
        _mean_square(
            F.normalize(student_attention[m] - student_attention[n], dim=1)
            - F.normalize(teacher_attention[m] - teacher_attention[n], dim=1)
        )
        for n, m in combinations(range(len(student_maps)), 2)
    ]
    return torch.stack(differences).mean()


def csd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """DSD's category-wise similarity: how alike the classes' maps are.

    Logits are average-pooled 2x2, P = softmax over positions of z / T for each class; mean squared
    difference of the matrices P P^T (C x C) over images and entries. Feng et al., IEEE TIP 2021.

    Args:
        student_logits: (N, C, h, w).
        teacher_logits: (N, C, h', w').
        temperature: T.

    Raises:
        UserError: Batches or class counts differ.
    """
    student, teacher = paired_logits(student_logits, teacher_logits)

    def similarity(logits: Tensor) -> Tensor:
        pooled = F.avg_pool2d(logits, 2, ceil_mode=True).flatten(2)
        p_NCP = (pooled / temperature).softmax(2)
        return matrix_product(p_NCP, p_NCP.mT)

    return _mean_square(similarity(student) - similarity(teacher))


class MaskedGeneration(nn.Module):
    """The student's feature, most positions hidden, completed to look like the teacher's.

    1x1 convolution to the teacher's width, positions zeroed at random (one pattern per image for
    all channels), conv3x3-ReLU-conv3x3. Shared by MGD and Af-DCD. Its layers are trained with the
    student. The pattern comes from torch's global generator of the feature's device.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        mask_ratio: float = 0.75,
        align: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        """Layers for features of the given widths.

        Args:
            student_channels: Ds.
            teacher_channels: Dt.
            mask_ratio: Share of the positions that are zeroed.
            align: Whether there is a convolution to the teacher's width; without, Ds is Dt.
            ranks: Processes that share the batches, each image's pattern stays what it is in one.

        Raises:
            UserError: The ratio is not a probability.
        """
        super().__init__()
        if not 0 <= mask_ratio <= 1:
            raise UserError(f"mask_ratio is {mask_ratio}; expected a share between 0 and 1.")
        self.mask_ratio = mask_ratio
        self.ranks = ranks
        self.align = (
            nn.Conv2d(student_channels, teacher_channels, kernel_size=1) if align else nn.Identity()
        )
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
        )

    def forward(self, student_feature: Tensor, size: tuple[int, int]) -> Tensor:
        """Completed feature (N, Dt, *size) from the student's (N, Ds, h, w)."""
        aligned = resize(self.align(as_float(student_feature)), size)
        kept = self.ranks.rand(len(aligned), 1, *size, device=aligned.device) >= self.mask_ratio
        completed: Tensor = self.generation(aligned * kept)
        return completed


def mgd_loss(completed_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Masked generative distillation: squared error of the completed feature, sum / N.

    Yang et al., ECCV 2022, arXiv 2205.01529.

    Args:
        completed_feature: From `MaskedGeneration`, (N, Dt, h, w).
        teacher_feature: (N, Dt, h, w).

    Raises:
        UserError: Batches or widths differ.
    """
    student, teacher = paired_features(completed_feature, teacher_feature)
    return (student - teacher).square().sum() / max(1, teacher.shape[0])


def af_dcd_contrast_loss(
    completed_feature: Tensor,
    teacher_feature: Tensor,
    *,
    temperature: float = 0.07,
    groups: int = 16,
    pool: int = 4,
    patch: int = 4,
) -> Tensor:
    """Af-DCD's contrast: within a patch, each part of the student's feature finds its own.

    Both maps are max-pooled and cut in patches of patch x patch positions, the channels in groups:
    patch^2 * groups vectors a patch and network. Similarity is minus the L1 distance. For each
    vector of the student: cross-entropy in nats of finding, at the given temperature, the
    teacher's vector of the same position and group among that one and all those of other groups.
    Sum over groups, mean over positions and images. Fan et al., NeurIPS 2023, arXiv 2312.04168.

    Args:
        completed_feature: From `MaskedGeneration`, (N, Dt, h, w).
        teacher_feature: (N, Dt, h, w).
        temperature: Divides the similarities.
        groups: Number of channel groups; divides Dt.
        pool: Side of the max-pooling; made smaller where the map would not fill one patch.
        patch: Side of a patch. Rows and columns that do not fill one are left out.

    Raises:
        UserError: Batches or widths differ, groups do not divide the width, or the map is smaller
            than one patch.
    """
    student, teacher = paired_features(completed_feature, teacher_feature)
    channels, height, width = teacher.shape[1:]
    if channels % groups:
        raise UserError(
            f"Af-DCD cuts channels in {groups} groups, but the teacher's feature has {channels}. "
            "Choose a number of groups that divides it."
        )
    if min(height, width) < patch:
        raise UserError(
            f"Af-DCD needs maps of at least {patch} x {patch} positions, got {height} x {width}. "
            "Use a larger crop or a smaller patch."
        )
    pool = min(pool, min(height, width) // patch)

    def vectors(maps: Tensor) -> Tensor:
        """(patches of all images, vectors of a patch, channels of a group)."""
        maps = F.max_pool2d(maps, pool)
        rows, columns = maps.shape[2] // patch, maps.shape[3] // patch
        maps = maps[..., : rows * patch, : columns * patch]
        # Images, groups, channels of a group, rows of patches, y inside, columns of patches, x.
        split = maps.reshape(len(maps), groups, channels // groups, rows, patch, columns, patch)
        return split.permute(0, 3, 5, 4, 6, 1, 2).flatten(0, 2).flatten(1, 3)

    student_PVD, teacher_PVD = vectors(student), vectors(teacher)
    group = torch.arange(patch * patch * groups, device=student.device) % groups
    # The same group at another position is neither a negative nor the answer.
    neither = (group.unsqueeze(0) == group.unsqueeze(1)).fill_diagonal_(False)
    with full_precision(student):
        similarity_PVV = -torch.cdist(student_PVD, teacher_PVD, p=1) / temperature
    log_p_PVV = similarity_PVV.masked_fill(neither, -torch.inf).log_softmax(2)
    found = log_p_PVV.diagonal(dim1=1, dim2=2)
    return -groups * found.sum() / max(1, found.numel())


def _attention(maps_NDhw: Tensor) -> Tensor:
    """(N, h * w), of unit length for each image."""
    return F.normalize(maps_NDhw.square().mean(1).flatten(1), dim=1)


def _cosine_to_class_mean(feature_NDhw: Tensor, pixels: PixelLabels, num_classes: int) -> Tensor:
    """Cosine of each position's feature with the mean of its class in its image, (N * h * w,)."""
    images, _, height, width = feature_NDhw.shape
    feature_PD = rows_of(feature_NDhw).flatten(0, 1)
    valid_P = pixels.valid.flatten()
    image_P = torch.arange(images, device=valid_P.device).repeat_interleave(height * width)
    # One row for each class of each image, and a last one that takes the ignored pixels.
    row_P = image_P * num_classes + pixels.labels.flatten()
    row_P = torch.where(valid_P, row_P, images * num_classes)
    sums = feature_PD.new_zeros(images * num_classes + 1, feature_PD.shape[1])
    sums = sums.index_add(0, row_P, feature_PD)
    counts = sums.new_zeros(len(sums)).index_add(0, row_P, torch.ones_like(feature_PD[:, 0]))
    means = sums / (counts.unsqueeze(1) + 1e-6)
    # index_select rather than means[row_P]: its gradient is an index_add, too.
    mean_PD = torch.where(valid_P.unsqueeze(1), means.index_select(0, row_P), feature_PD)
    return F.cosine_similarity(feature_PD, mean_PD, dim=1)


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().sum() / max(1, difference.numel())
