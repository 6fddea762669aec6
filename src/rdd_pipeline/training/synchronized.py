"""Layers that see the whole batch though it is computed in parts: batch norm and dropout.

Parts are what several processes hold of it (ranks), and what one of them computes at a time
(gradient accumulation). On CUDA, batch norm is torch's own `SyncBatchNorm` (by timm's conversion,
which knows its layers with a built-in activation). That one refuses CPU tensors, so there is one
for them here. Dropout draws the numbers that one process would draw for all images and applies its
share.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rdd_pipeline.collectives import Collectives
from rdd_pipeline.losses.maps import as_float


class MicroBatches:
    """Which images of the batch are being computed.

    Args:
        ranks: Processes that share the batch.
        parts: Parts in which each of them computes its share.

    Attributes:
        current: The part, 0 to parts - 1; set by whoever computes them.
    """

    def __init__(self, ranks: Collectives, parts: int = 1) -> None:
        self.ranks, self.parts, self.current = ranks, parts, 0

    @property
    def in_all(self) -> int:
        """Parts of the batch, over all ranks."""
        return self.ranks.size * self.parts

    def own(self, whole: Tensor) -> Tensor:
        """The current part's images of all."""
        images = len(whole) // self.in_all
        first = (self.ranks.rank * self.parts + self.current) * images
        return whole[first : first + images]


def convert_sync_layers(module: nn.Module, parts: MicroBatches, device: torch.device) -> None:
    """Put layers that know of the other parts in the place of those that do not.

    Batch norm counts in the images of all ranks, dropout draws the numbers for all parts.
    Parameters and buffers stay the same objects under the same names: optimizer and checkpoints
    notice nothing.
    """
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            if parts.ranks.group is not None:
                setattr(module, name, _synchronized(child, parts.ranks, device))
        elif type(child) in (nn.Dropout, nn.Dropout2d):
            setattr(module, name, _Dropout(child, parts))
        else:
            convert_sync_layers(child, parts, device)


class _Dropout(nn.Module):
    """`nn.Dropout` or `nn.Dropout2d` with its share of the numbers drawn for the whole batch."""

    def __init__(self, dropout: nn.Module, parts: MicroBatches) -> None:
        super().__init__()
        assert isinstance(dropout, nn.Dropout | nn.Dropout2d)
        self.p, self.maps, self.parts = dropout.p, isinstance(dropout, nn.Dropout2d), parts
        self.train(dropout.training)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of the same shape; unchanged in evaluation."""
        if not self.training or self.p == 0.0:
            return maps
        shape = (self.parts.in_all * len(maps), *maps.shape[1:])
        # In the layout of the maps: numbers are drawn in the order of memory.
        last = maps.dim() == 4 and maps.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        ones = torch.ones(shape, dtype=maps.dtype, device=maps.device).to(memory_format=layout)
        noise = F.dropout2d(ones, self.p) if self.maps else F.dropout(ones, self.p)
        return maps * self.parts.own(noise)


class _SynchronizedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all ranks, on any device; an activation may follow."""

    synchronized = True
    ranks: Collectives
    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalized maps (N, D, h, w) of this rank's images."""
        if not self.training:
            output = super().forward(input)
        else:
            # autocast leaves batch norm in the precision of its input, computed in float32.
            output, mean, variance, count = _Normalize.apply(
                input, self.weight, self.bias, self.eps, self.ranks
            )
            self._remember(mean, variance, count)
        activated: Tensor = self.act(self.drop(output))
        return activated

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), momentum)


def _synchronized(norm: _BatchNorm, ranks: Collectives, device: torch.device) -> nn.Module:
    from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm

    if device.type == "cuda":
        converted: nn.Module = convert_sync_batchnorm(norm, ranks.group)  # type: ignore[no-untyped-call]
        return converted
    new = _SynchronizedBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    new.drop, new.act = nn.Identity(), nn.Identity()
    if isinstance(norm, BatchNormAct2d):
        new.drop, new.act = norm.get_submodule("drop"), norm.get_submodule("act")
    new.ranks = ranks
    new.train(norm.training)
    return new


class _Normalize(torch.autograd.Function):
    """(x - mean) / deviation * weight + bias over images and positions of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        ranks: Collectives,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = as_float(maps)
        axes = [0, *range(2, x.dim())]
        own_variance, own_mean = torch.var_mean(x, axes, correction=0)
        own_count = own_mean.new_full((1,), x.numel() / x.shape[1])
        own = torch.cat([own_mean, own_variance, own_count])
        together = ranks.gather(own.unsqueeze(0))
        channels = x.shape[1]
        means, variances = together[:, :channels], together[:, channels:-1]
        counts = together[:, -1:]
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        # Deviations inside the ranks and between them: no difference of large squares.
        variance = ((variances + (means - mean).square()) * counts).sum(0) / count
        deviation = (variance + eps).sqrt()
        normalized = (x - _along(mean, x)) / _along(deviation, x)
        output = normalized
        if weight is not None and bias is not None:
            output = torch.addcmul(_along(bias, x), normalized, _along(weight, x))
        ctx.ranks, ctx.axes = ranks, axes
        ctx.save_for_backward(normalized, deviation, weight, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(maps.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        normalized, deviation, weight, count = ctx.saved_tensors
        grad = as_float(grad_output)
        grad_bias, grad_weight = grad.sum(ctx.axes), (grad * normalized).sum(ctx.axes)
        sums = ctx.ranks.total(torch.stack([grad_bias, grad_weight]))
        mean_grad, mean_product = sums / count
        scale = deviation.reciprocal() if weight is None else weight / deviation
        centered = grad - _along(mean_grad, grad) - normalized * _along(mean_product, grad)
        grad_maps = (centered * _along(scale, grad)).to(grad_output.dtype)
        if weight is None:
            return grad_maps, None, None, None, None
        return grad_maps, grad_weight, grad_bias, None, None


def _along(channels_D: Tensor, maps: Tensor) -> Tensor:
    """(D,) as (1, D, 1, ...), to go with maps (N, D, ...)."""
    return channels_D.view(1, -1, *[1] * (maps.dim() - 2))
