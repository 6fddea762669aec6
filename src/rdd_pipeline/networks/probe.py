"""What a network returns for an image size, found without computing: on the meta device."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rdd_pipeline.networks.network import NetworkOutput, SegmentationNetwork


def on_meta(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode without storage; the network is left as it is."""
    # A copy through the meta device: a deep copy on the real one would double the memory.
    memo = {
        id(tensor): nn.Parameter(tensor.to("meta"), requires_grad=False)
        if isinstance(tensor, nn.Parameter)
        else tensor.to("meta")
        for tensor in [*network.parameters(), *network.buffers()]
    }
    return copy.deepcopy(network, memo).eval()


def output_shapes(network: SegmentationNetwork, size: tuple[int, int]) -> NetworkOutput:
    """Outputs for one image of that size (height, width), on the meta device: shapes, no values."""
    with torch.no_grad():
        output: NetworkOutput = on_meta(network)(torch.zeros(1, 3, *size, device="meta"))
    return output
