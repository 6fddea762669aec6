"""What a network costs: parameters, multiply-accumulates, time for an image."""

from __future__ import annotations

import copy
import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rdd_pipeline.networks.probe import on_meta


class Latency(NamedTuple):
    """Time of one forward pass in milliseconds.

    Attributes:
        median_ms: median over the repeats.
        spread_ms: distance of the 25 % and the 75 % quantile.
        repeats: how many passes were timed.
        device: where.
    """

    median_ms: float
    spread_ms: float
    repeats: int
    device: str


class Cost(NamedTuple):
    """Size and work of a network for one image.

    Attributes:
        parameters: of the network as it is used, without its auxiliary head; trainable or not.
            Buffers such as running means are no parameters.
        macs: multiply-accumulates of all products of matrices and convolutions, likewise.
        trained_parameters: of the network as it is trained, with the auxiliary head, as the tables
            of the papers have it.
        trained_macs: likewise.
        published_macs: of the network as it is trained, by the counter behind the published tables
            ("FLOPs"), see `published_macs`; None where that means nothing.
        size: (height, width) of the image.
    """

    parameters: int
    macs: int
    trained_parameters: int
    trained_macs: int
    published_macs: int | None
    size: tuple[int, int]


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
    meta = on_meta(network)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta(torch.zeros(1, 3, *size, device="meta"))
    return int(counter.get_total_flops()) // 2


def published_macs(network: nn.Module, size: tuple[int, int]) -> int | None:
    """Multiply-accumulates as the RDD and CIRKD code bases count them.

    Their counter computes the output size of convolutions without the dilation, so dilated ones
    count for more positions than they have. It counts a linear layer for one position and no
    other product at all. It reproduces the FLOPs columns of the papers, and belongs beside those
    only.

    Returns:
        None for a network that applies linear layers to many positions, such as a transformer:
        the count would be a small part of the work.
    """
    total, meaningful = 0, True

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total, meaningful
        if isinstance(module, nn.Conv2d):
            total += _published_operations(module, inputs[0], output)
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()
            meaningful &= output.numel() == module.out_features

    meta = on_meta(network)
    for module in meta.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    with torch.no_grad():
        meta(torch.zeros(1, 3, *size, device="meta"))
    return total if meaningful else None


def measure_cost(network: nn.Module, size: tuple[int, int]) -> Cost:
    """Parameters and multiply-accumulates at an image size (height, width)."""
    used = without_auxiliary(network)
    return Cost(
        parameters=count_parameters(used),
        macs=count_macs(used, size),
        trained_parameters=count_parameters(network),
        trained_macs=count_macs(network, size),
        published_macs=published_macs(network, size),
        size=size,
    )


def measure_latency(
    network: nn.Module,
    size: tuple[int, int],
    *,
    batch_size: int = 1,
    repeats: int = 10,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    auxiliary: bool = False,
) -> Latency:
    """Time the forward pass of a batch in evaluation mode, weights as they are.

    Args:
        network: moved to `device`; its mode is restored.
        size: (height, width) of the images.
        batch_size: images a pass.
        repeats: passes that are timed, one by one.
        warmup: passes before, not timed: memory and algorithms are chosen in them.
        device: CUDA work is waited for before each reading of the clock.
        auxiliary: with the auxiliary head, which the network that is used does not need.

    Raises:
        ValueError: fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"Latency of {repeats} repeats was asked for; give 1 or more.")
    device = torch.device(device)
    training = network.training
    network.to(device).eval()
    timed = network if auxiliary else without_auxiliary(network)
    images = torch.zeros(batch_size, 3, *size, device=device)
    times: list[float] = []
    try:
        with torch.inference_mode():
            for step in range(warmup + repeats):
                _wait(device)
                start = time.perf_counter()
                timed(images)
                _wait(device)
                if step >= warmup:
                    times.append(1000 * (time.perf_counter() - start))
    finally:
        network.train(training)
    spread = 0.0
    if len(times) > 1:
        quarters = statistics.quantiles(times, n=4, method="inclusive")
        spread = quarters[2] - quarters[0]
    return Latency(statistics.median(times), spread, repeats, str(device))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _published_operations(conv: nn.Conv2d, given: Tensor, output: Tensor) -> int:
    positions = output.shape[0]
    if isinstance(conv.padding, str):  # "same": no dilation can enlarge the output
        return output.shape[0] * output.shape[2] * output.shape[3] * conv.weight.numel()
    for axis in (0, 1):
        room = given.shape[2 + axis] + 2 * conv.padding[axis] - conv.kernel_size[axis]
        positions *= room // conv.stride[axis] + 1
    return positions * conv.weight.numel()
