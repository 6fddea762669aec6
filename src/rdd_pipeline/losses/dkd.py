"""DKD, decoupled knowledge distillation: the target class apart from the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rdd_pipeline.collectives import ALONE, Collectives
from rdd_pipeline.losses.base import DistillationLoss, FunctionalLoss, LossContext
from rdd_pipeline.losses.maps import paired_logits, resize_labels
from rdd_pipeline.losses.pixelwise import pixel_labels
from rdd_pipeline.networks import NetworkOutput


class DKDLosses(NamedTuple):
    """Unweighted losses of DKD; on ImageNet the paper's weights are 1 and 0.5."""

    target: Tensor
    rest: Tensor


def dkd_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = 255,
    ranks: Collectives = ALONE,
) -> DKDLosses:
    """DKD at every labeled position, as its paper has it for the one label of an image.

    With p = softmax(z / T) and the label y,

    * target: ``T^2 * mean of KL(b_t || b_s)`` of two probabilities, b = (p_y, 1 - p_y),
    * rest: ``T^2 * mean of KL(q_t || q_s)`` of the other classes, q = p without y, normalized,

    in nats, means over the positions whose label is not ignored. KD is ``target + (1 - p_y of the
    teacher) * rest`` at each of them; here the second part counts fully. Zhao et al., CVPR 2022,
    arXiv 2203.08679. The application to every pixel is ours: no segmentation was published.

    Args:
        student_logits: (N, C, h, w).
        teacher_logits: (N, C, h', w').
        labels: (N, H, W), any integer type; resized to h' x w' by nearest neighbor.
        temperature: T.
        ignore_index: Label of ignored pixels.
        ranks: Processes that share the batch: the means are those of all ranks' positions.

    Returns:
        Both losses, 0 with zero gradient when no position is labeled; `rest` also of two classes.

    Raises:
        UserError: Batches, class counts or labels do not fit.
    """
    student, teacher = paired_logits(student_logits, teacher_logits)
    classes = teacher.shape[1]
    size = teacher.shape[2], teacher.shape[3]
    small = resize_labels(labels, size)
    pixels = pixel_labels(small, num_classes=classes, ignore_index=ignore_index)
    valid = pixels.valid.unsqueeze(1)
    # Before the softmax: masking the result would leave 0 * NaN in the gradient.
    student, teacher = (torch.where(valid, z, 0) / temperature for z in (student, teacher))
    chosen = torch.where(pixels.valid, small, 0).unsqueeze(1)
    target = torch.zeros_like(teacher, dtype=torch.bool).scatter_(1, chosen, True)
    share = temperature**2 / ranks.divisor(pixels.valid.count_nonzero())

    def binary(logits: Tensor) -> Tensor:
        whole = logits.logsumexp(1, keepdim=True)
        rest = logits.masked_fill(target, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([logits.gather(1, chosen), rest], 1) - whole

    def others(logits: Tensor) -> Tensor:
        """Logarithms of q; 0 at the target, which then adds nothing to a divergence."""
        return logits.masked_fill(target, -torch.inf).log_softmax(1).masked_fill(target, 0)

    if classes < 2:
        nothing = student.sum() * 0
        return DKDLosses(nothing, nothing)
    losses = []
    for part in (binary, others):
        kl = F.kl_div(part(student), part(teacher), reduction="none", log_target=True)
        losses.append(share * torch.where(valid, kl, 0).sum())
    return DKDLosses(*losses)


def build_dkd(context: LossContext, *, temperature: float = 1.0) -> DistillationLoss:
    """`dkd_losses` of both networks' logits."""

    def losses(student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> dict[str, Tensor]:
        found = dkd_losses(
            student.logits,
            teacher.logits,
            labels,
            temperature=temperature,
            ignore_index=context.ignore_index,
            ranks=context.ranks,
        )
        return {"dkd_target": found.target, "dkd_rest": found.rest}

    return FunctionalLoss(losses)
