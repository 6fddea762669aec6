"""Networks compiled by torch's own compiler, for `trainer.compile`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn

from rdd_pipeline.errors import UserError
from rdd_pipeline.networks import NetworkOutput


def compiled(network: nn.Module) -> Callable[[Tensor], NetworkOutput]:
    """The network as it is called in a step, compiled at the first call for images of that size.

    Dropout draws what it draws uncompiled. What was compiled is kept in a folder of this user
    alone, so that a second start reads it; torch's own default is a folder for temporary files
    with a name that others can guess, and it is unpickled.

    Raises:
        UserError: When called: torch cannot compile it here.
    """
    _keep_in_private_folder()
    torch._inductor.config.fallback_random = True
    torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
    call = torch.compile(network, dynamic=False)

    def forward(images: Tensor) -> NetworkOutput:
        try:
            output: NetworkOutput = call(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"torch {torch.__version__} cannot compile a network here ({reason[:200]}). Set "
                "trainer.compile=false."
            ) from error
        return output

    return forward


def _keep_in_private_folder() -> None:
    """Unless the environment says where."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdd_pipeline"
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = cache / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
