"""Learning rate and optimizer. Iterations count from 1, as in the published recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from rdd_pipeline.config import OptimizerParams


def learning_rate(params: OptimizerParams, iteration: int, iterations: int) -> float:
    """``lr * (1 - (iteration - 1) / iterations) ** power``, after a linear warm-up if there is one.

    A pure function of the iteration: nothing about the schedule has to be stored or resumed.
    """
    if not 1 <= iteration <= iterations:
        raise ValueError(f"Iteration {iteration} is outside 1..{iterations}.")
    rate: float = params.lr * (1.0 - (iteration - 1) / iterations) ** params.power
    if iteration <= params.warmup:
        rate *= iteration / (params.warmup + 1)
    return rate


ADVERSARY_LR, ADVERSARY_BETAS = 4e-4, (0.9, 0.99)
"""Adam of SKD's discriminator (Liu et al. 2019); its rate stays as it is."""


def build_adversary_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer | None:
    """Adam over the modules that learn against the student; None where there are none."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        return None
    return torch.optim.Adam(
        trainable, lr=ADVERSARY_LR, betas=ADVERSARY_BETAS, fused=fused(trainable)
    )


LR_FACTOR = "lr_factor"
"""Key of a parameter group: its learning rate as a factor of the schedule's; 1 where missing."""


def build_optimizer(
    params: OptimizerParams,
    parameters: Iterable[nn.Parameter],
    *,
    backbone: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """SGD with momentum (the field's recipe) or AdamW over all trainable parameters.

    With a `backbone_lr_factor` other than 1 those of the backbone are a group of their own.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    shared = {"lr": params.lr, "weight_decay": params.weight_decay, "fused": fused(trainable)}
    groups: list[Any] = trainable
    if params.backbone_lr_factor != 1.0:
        ids = {id(parameter) for parameter in backbone}
        own = [p for p in trainable if id(p) in ids]
        rest = [p for p in trainable if id(p) not in ids]
        groups = [{"params": rest}, {"params": own, LR_FACTOR: params.backbone_lr_factor}]
        groups = [group for group in groups if group["params"]]
    if params.name == "sgd":
        return torch.optim.SGD(groups, momentum=params.momentum, **shared)  # type: ignore[arg-type]
    return torch.optim.AdamW(groups, betas=params.betas, **shared)  # type: ignore[arg-type]


def fused(parameters: Sequence[nn.Parameter]) -> bool | None:
    """Whether one kernel updates all: on CUDA, where it also knows a step that is not to be taken.

    None: torch's own choice.
    """
    return True if parameters and all(parameter.is_cuda for parameter in parameters) else None
