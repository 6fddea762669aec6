"""What a network returns for an image size, found without computing: on the meta device."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rdd_pipeline.errors import UserError
from rdd_pipeline.networks.foreign import ForeignNetwork
from rdd_pipeline.networks.network import Network, NetworkOutput


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


def without_values(network: nn.Module, size: tuple[int, int]) -> tuple[nn.Module, Tensor]:
    """A network and an image (1, 3, *size) that give shapes and costs at the least expense.

    Those are a copy and an image on the meta device; the network itself, in evaluation mode, and an
    image of zeros where other code cannot do without values.

    Raises:
        UserError: Other code fails on such an image.
    """
    image = torch.zeros(1, 3, *size, device="meta")
    if not isinstance(network, ForeignNetwork):
        return on_meta(network), image
    try:
        copied = on_meta(network)
        with torch.no_grad():
            copied(image)
    except UserError:
        raise
    except Exception:  # whatever other code raises
        return network.eval(), _accepted_image(network, size)
    return copied, image


def _accepted_image(network: ForeignNetwork, size: tuple[int, int]) -> Tensor:
    image = torch.zeros(1, 3, *size)
    try:
        with torch.no_grad():
            network.eval()(image)
    except UserError:
        raise
    except Exception as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"teacher.module cannot be run on an image of {size[0]} x {size[1]}: {line}. Is it too "
            "small, or no multiple of something?"
        ) from error
    return image


def output_shapes(network: Network, size: tuple[int, int]) -> NetworkOutput:
    """Outputs for one image of that size (height, width), on the meta device: shapes, no values."""
    runnable, image = without_values(network, size)
    with torch.no_grad():
        output: NetworkOutput = runnable(image)
    aux = None if output.aux_logits is None else output.aux_logits.to("meta")
    early, late = (stage.to("meta") for stage in output.stages)
    return NetworkOutput(output.logits.to("meta"), aux, output.feature.to("meta"), (early, late))
