"""Distillation losses as modules with one signature, so that an objective can add them up.

A term turns the outputs of both networks into one scalar. Most hold no state and only name the
tensors a pure function of `rdd_pipeline.losses` wants; adapters, projection heads and queues are
ordinary submodules and buffers, hence trained, moved and checkpointed with the student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.logits import kd_loss
from rdd_pipeline.networks import NetworkOutput


class LossTerm(nn.Module):
    """Base of all terms."""

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Tensor:
        """Return the unweighted loss, a float32 scalar.

        Args:
            student: Outputs of the trained network for the batch.
            teacher: Outputs of the frozen network for the same batch, without graph.
            labels: (B, H, W) train ids.
        """
        raise NotImplementedError


class KnowledgeDistillation(LossTerm):
    """Pixel-wise KL between the class distributions of both networks (Hinton et al. 2015)."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Tensor:
        """See `LossTerm.forward`."""
        return kd_loss(student.logits, teacher.logits, temperature=self.temperature)


TERMS: dict[str, Callable[..., LossTerm]] = {"kd": KnowledgeDistillation}


def build_term(name: str, options: Mapping[str, float | str | bool]) -> LossTerm:
    """Build the term `name` of a method.

    Raises:
        UserError: No term has that name.
    """
    if name not in TERMS:
        raise UserError(
            f"There is no loss term {name!r}. The terms are: {', '.join(sorted(TERMS))}."
        )
    return TERMS[name](**options)
