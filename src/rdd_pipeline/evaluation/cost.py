"""What a network costs: parameters and multiply-accumulates."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rdd_pipeline.networks.probe import without_values


def without_auxiliary(network: nn.Module) -> nn.Module:
    """The network that is used: the same modules but for the auxiliary head.

    Nothing is copied, and the network that was given keeps its head.
    """
    if getattr(network, "auxiliary", None) is None:
        return network
    used = copy.copy(network)
    used._modules = {**network._modules, "auxiliary": None}
    return used


def count_parameters(network: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-accumulates of one image (3, height, width), in evaluation mode.

    Half of what torch's FLOP counter finds. Runs on a copy without storage: any size takes
    milliseconds, and the network is left as it is.
    """
    from torch.utils.flop_counter import FlopCounterMode  # brings Triton

    runnable, image = without_values(network, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        runnable(image)
    return int(counter.get_total_flops()) // 2


def measure_cost(network: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """Parameters and multiply-accumulates at an image size (height, width).

    Returns:
        ``parameters`` (trainable or not; buffers such as running means are none) and ``macs`` (of
        all products of matrices and convolutions) of the network as it is used, without its
        auxiliary head; ``trained_parameters`` and ``trained_macs`` of the network as it is trained,
        with the auxiliary head, as the tables of the papers have it.
    """
    used = without_auxiliary(network)
    return {
        "parameters": count_parameters(used),
        "macs": count_macs(used, size),
        "trained_parameters": count_parameters(network),
        "trained_macs": count_macs(network, size),
    }
