"""Workers something happens to; in a module of their own, for the processes import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from rdd_pipeline.errors import NonFiniteLossError, UserError
from rdd_pipeline.launching import worker
from rdd_pipeline.training.step import TrainingStep

RANK, ATTEMPT = "RANK", "TORCHELASTIC_RESTART_COUNT"


def _before_each_step(act: Callable[[int], None]) -> None:
    forward = TrainingStep.forward

    def patched(self, images, labels, iteration):
        act(iteration)
        return forward(self, images, labels, iteration)

    TrainingStep.forward = patched


def killed_once(*task) -> None:
    """Process 1 is gone in iteration 3, as if by `kill -9`; the second time all goes well."""

    def act(iteration: int) -> None:
        if iteration == 3 and os.environ[RANK] == "1" and os.environ[ATTEMPT] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    _before_each_step(act)
    worker.train_worker(*task)


def always_fails(*task) -> None:
    """Process 1 has a fault of its own in iteration 3, every time."""

    def act(iteration: int) -> None:
        if iteration == 3 and os.environ[RANK] == "1":
            raise ZeroDivisionError("a fault of its own")

    _before_each_step(act)
    worker.train_worker(*task)


def wrong_input(*task) -> None:
    """Process 1 meets something that is the user's to mend."""

    def act(iteration: int) -> None:
        if iteration == 3 and os.environ[RANK] == "1":
            raise UserError("image 7 is not what it was. Put it back.")

    _before_each_step(act)
    worker.train_worker(*task)


def diverges(*task) -> None:
    """The loss is NaN in iteration 3, which all processes agree on."""

    def act(iteration: int) -> None:
        if iteration == 3:
            raise NonFiniteLossError("loss = nan. The step was not taken.")

    _before_each_step(act)
    worker.train_worker(*task)


def slow(*task) -> None:
    """Takes long enough for a signal to come in between."""
    _before_each_step(lambda iteration: time.sleep(0.5))
    worker.train_worker(*task)
