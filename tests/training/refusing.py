"""CUDA's refusals under ``torch.use_deterministic_algorithms``, on any machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# From the documentation of torch.use_deterministic_algorithms: what raises on CUDA tensors. Plain
# bilinear resizing is missing because torch computes it in another way there (`F.interpolate`).
_REFUSED = {
    aten.adaptive_max_pool2d_backward,
    aten.avg_pool3d_backward,
    aten._adaptive_avg_pool2d_backward,
    aten._adaptive_avg_pool3d_backward,
    aten.fractional_max_pool2d_backward,
    aten.grid_sampler_2d_backward,
    aten.histc,
    aten.kthvalue,  # in older versions
    aten.max_unpool2d,
    aten.median.dim,
    aten.nll_loss_forward,
    aten.nll_loss2d_forward,
    aten.nll_loss2d_backward,
    aten.put,
    aten.put_,
    aten.reflection_pad2d_backward,
    aten.scatter_reduce,
    aten.upsample_bicubic2d_backward,
    aten.upsample_linear1d_backward,
    aten.upsample_trilinear3d_backward,
    aten._upsample_bicubic2d_aa_backward,
    aten._upsample_bilinear2d_aa_backward,
}


class RefusesLikeCuda(TorchDispatchMode):
    """Inside the block, what CUDA refuses is refused, in torch's words."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named: dict[str, Any] = dict(kwargs or {})
        packet: Callable[..., Any] = func.overloadpacket
        weights = named.get("weights", args[1] if len(args) > 1 else None)
        if (
            packet in _REFUSED
            or func in _REFUSED
            or (packet is aten.bincount and weights is not None)
        ):
            raise RuntimeError(
                f"{packet} does not have a deterministic implementation, but you set "
                "'torch.use_deterministic_algorithms(True)'."
            )
        return func(*args, **named)
