"""A network that is not trained any more, made ready to be asked often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rdd_pipeline.networks.foreign import ForeignNetwork
from rdd_pipeline.networks.network import Network

_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_CAST_BY_AUTOCAST = (*_CONVOLUTIONS, nn.Linear)
_SIZE = 64
"""Height and width of the image on which a network is looked at."""
_TOLERANCE = 1e-3
"""Largest deviation that is rounding, as a share of the largest value. A wrong pair gives 1."""


def freeze(network: Network, autocast: torch.dtype | None) -> Network:
    """The network in evaluation mode with as little to compute as its outputs need.

    Batch norm becomes part of the convolution before it, and weights that autocast would cast in
    every step are cast once. The outputs are equal but for rounding. The state dict is another
    one: a frozen network is not for saving.

    Args:
        network: Changed in place, on any device. In one of other code, which may cast and call its
            layers as it likes, nothing is folded or cast.
        autocast: Type that autocast computes in; None: no autocast.
    """
    network.eval().requires_grad_(False)
    if isinstance(network, ForeignNetwork):
        return network
    _fold_batch_norm(network)
    if autocast is not None:
        for module in network.modules():
            if type(module) in _CAST_BY_AUTOCAST:
                module.to(autocast)
    return network


class _Pair(NamedTuple):
    convolution: nn.Conv2d
    norm: nn.BatchNorm2d


@torch.no_grad()
def _fold_batch_norm(network: Network) -> None:
    """Fold where nothing but the batch norm takes the convolution's output; else change nothing."""
    parameter = next(network.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, _SIZE, _SIZE, generator=generator).to(parameter)
    with _watched(network) as pairs:
        before = _tensors(network, image)
    before_folding = [
        (pair, pair.convolution.weight, pair.convolution.bias, _replace(network, pair))
        for pair in pairs
    ]
    after = _tensors(network, image)
    if all(_equal(*tensors) for tensors in zip(after, before, strict=True)):
        return
    for (convolution, norm), weight, bias, names in before_folding:
        convolution.weight, convolution.bias = weight, bias
        for name in names:
            network.set_submodule(name, norm)


@contextmanager
def _watched(network: nn.Module) -> Iterator[list[_Pair]]:
    """Notes which batch norm gets which convolution's output, where each is called once."""
    calls: Counter[nn.Module] = Counter()
    made: list[tuple[nn.Conv2d, Tensor]] = []  # holds the outputs, so that none has another's id
    found: list[_Pair] = []
    pairs: list[_Pair] = []

    def after_convolution(module: nn.Module, _: object, output: Tensor) -> None:
        calls[module] += 1
        if type(module) in _CONVOLUTIONS:
            made.append((module, output))  # type: ignore[arg-type]

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[module] += 1
        for convolution, output in made:
            if output is inputs[0]:
                found.append(_Pair(convolution, module))  # type: ignore[arg-type]

    hooks = [
        module.register_forward_hook(after_convolution)
        if type(module) in _CONVOLUTIONS
        else module.register_forward_pre_hook(before_norm)
        for module in network.modules()
        if type(module) in (*_CONVOLUTIONS, nn.BatchNorm2d, BatchNormAct2d)
    ]
    try:
        yield pairs
    finally:
        for hook in hooks:
            hook.remove()
    uses = Counter(pair.convolution for pair in found)
    pairs += [
        pair
        for pair in found
        if uses[pair.convolution] == 1 and calls[pair.convolution] == calls[pair.norm] == 1
    ]


def _replace(network: nn.Module, pair: _Pair) -> list[str]:
    """Fold one pair; returns the norm's names."""
    convolution, norm = pair
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,  # type: ignore[arg-type]
        norm.running_var,  # type: ignore[arg-type]
        norm.eps,
        norm.weight,
        norm.bias,
    )
    convolution.requires_grad_(False)
    names = [name for name, module in network.named_modules() if module is norm]
    for name in names:
        network.set_submodule(name, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
    return names


def _tensors(network: Network, image: Tensor) -> list[Tensor]:
    logits, aux_logits, feature, stages = network(image)
    return [logits, feature, *stages, *([] if aux_logits is None else [aux_logits])]


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())
