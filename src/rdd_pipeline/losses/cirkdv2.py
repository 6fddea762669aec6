"""CIRKDv2: CIRKD on a refined feature, FitNet, and relations of the channels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdd_pipeline.collectives import ALONE, Collectives
from rdd_pipeline.config import Option
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses import memory_bank
from rdd_pipeline.losses.base import (
    REFERENCE_POSITIONS,
    DistillationLoss,
    LossContext,
    positions,
)
from rdd_pipeline.losses.cirkd import cirkd_minibatch_loss, make_memory, relations_in_batch
from rdd_pipeline.losses.fitnet import fitnet_loss
from rdd_pipeline.losses.layers import ChannelAdapter, ProjectionHead
from rdd_pipeline.losses.maps import as_float, mean_square, paired_maps, rows_of
from rdd_pipeline.losses.similarity import soft_similarity_kl
from rdd_pipeline.networks import NetworkOutput


class ChannelLosses(NamedTuple):
    """Unweighted channel losses of CIRKDv2."""

    minibatch: Tensor
    memory: Tensor
    mse: Tensor


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
    """CIRKDv2's channel losses: how the channels, seen as maps, relate to one another.

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
        ranks: Collectives = ALONE,
        pairs: Collectives = ALONE,
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

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> ChannelLosses:
        """Enqueue some of the teacher's channels and return the three losses.

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
        minibatch = relations_in_batch(student_NDP, teacher_NDP, self.temperature, self.pairs)

        teacher_MP, student_MP = teacher_NDP.flatten(0, 1), student_NDP.flatten(0, 1)
        with torch.no_grad():
            all_MP = self.ranks.gather(teacher_MP)
            drawn = memory_bank.random_slots(len(all_MP), self.enqueued, teacher.device)
            new = all_MP[drawn].unsqueeze(0)
            memory_bank.write(
                self.queue.unsqueeze(0), self.pointer, new, torch.ones_like(new[..., 0]) > 0
            )
        keys = self.queue[memory_bank.random_slots(len(self.queue), self.draws, self.queue.device)]
        keys = keys.to(student.dtype).unsqueeze(0)
        memory = soft_similarity_kl(
            student_MP, keys, teacher_MP, keys, temperature=self.temperature
        ) / max(1, len(student_MP))
        mse = mean_square(student_MP - teacher_MP)
        return ChannelLosses(minibatch, memory, mse)


class CIRKDv2Loss(DistillationLoss):
    """CIRKDv2: CIRKD, FitNet and channel relations, all on a refined feature of the student.

    Options are those of `cirkd.CIRKDMemory`; those of `ChannelRelations` begin with
    ``channel_``.
    """

    def __init__(
        self, context: LossContext, *, attention_bias: bool = True, **options: Option
    ) -> None:
        super().__init__()
        narrow, wide = context.feature_widths
        height, width = context.teacher.feature.shape[2:]
        of_channels = {
            name.removeprefix("channel_"): options.pop(name)
            for name in list(options)
            if name.startswith("channel_")
        }
        self.refine = SelfAttentionBlock(narrow, bias=attention_bias)
        self.memory = make_memory(context, options)
        self.adapter = ChannelAdapter(narrow, wide)
        pool = int(of_channels.get("pool", 4))
        self.channels = ChannelRelations(
            narrow,
            wide,
            pooled_positions(height, width, pool=pool),
            ranks=context.ranks,
            pairs=context.related,
            **of_channels,  # type: ignore[arg-type]
        )
        self.related = context.related

    def forward(
        self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """See `DistillationLoss.forward`."""
        refined, target = self.refine(student.feature), teacher.feature
        memory = self.memory(refined, target, labels)
        channels = self.channels(refined, target)
        return {
            "cirkd_minibatch": cirkd_minibatch_loss(refined, target, ranks=self.related),
            "cirkd_pixel": memory.pixel,
            "cirkd_region": memory.region,
            "fitnet": fitnet_loss(self.adapter(refined), target),
            "channel_minibatch": channels.minibatch,
            "channel_memory": channels.memory,
            "channel_mse": channels.mse,
        }


def channel_mse_scale(context: LossContext) -> float:
    """The channels' mean squared difference: of unit length over pooled positions."""
    return positions(context.teacher.feature, 4) / (REFERENCE_POSITIONS / 16)


def pooled_positions(height: int, width: int, *, pool: int = 4) -> int:
    """Positions of a feature map of that size after `ChannelRelations`' pooling.

    Rounded up: the published code rounds down and fails on odd maps.
    """
    return math.ceil(height / pool) * math.ceil(width / pool)


def _conv_norm_relu(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
