"""Af-DCD: MGD's completion, and a contrast between the parts of the completed feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.base import DistillationLoss, LossContext
from rdd_pipeline.losses.maps import full_precision, paired_features
from rdd_pipeline.losses.mgd import complete, make_generator, mgd_loss
from rdd_pipeline.networks import NetworkOutput


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


class AfDCDLoss(DistillationLoss):
    """Af-DCD: MGD's completion, and a contrast between the parts of the completed stage.

    The published 16 groups of channels become as many as divide the teacher's width.
    """

    def __init__(
        self,
        context: LossContext,
        *,
        mask_ratio: float = 0.75,
        temperature: float = 0.07,
        groups: int = 16,
        pool: int = 4,
        patch: int = 4,
    ) -> None:
        super().__init__()
        width = context.stage_widths[1]
        self.generator = make_generator(context, mask_ratio)
        self.groups = max(g for g in range(1, groups + 1) if width % g == 0)
        self.temperature, self.pool, self.patch = temperature, pool, patch
        height, wide = context.teacher.stages[1].shape[2:]
        if min(height, wide) < patch:
            raise UserError(
                f"Af-DCD needs maps of at least {patch} x {patch} positions, the teacher's last "
                f"stage has {height} x {wide} for a training sample. Use a larger "
                "recipe.augment.crop or methods.options={af_dcd: {af_dcd: {patch: 2}}}."
            )

    def forward(
        self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """See `DistillationLoss.forward`."""
        completed, target = complete(self.generator, student, teacher), teacher.stages[1]
        contrast = af_dcd_contrast_loss(
            completed,
            target,
            temperature=self.temperature,
            groups=self.groups,
            pool=self.pool,
            patch=self.patch,
        )
        return {
            "af_dcd_feature": mgd_loss(completed, target),
            "af_dcd_contrast": contrast,
        }
