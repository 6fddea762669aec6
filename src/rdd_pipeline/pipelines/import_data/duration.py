"""How long the trainings of a new environment take on this machine's CPUs, by a step of each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import yaml  # type: ignore[import-untyped,unused-ignore]

from rdd_pipeline.config import NetworkParams, RecipeParams
from rdd_pipeline.networks import network_from_params
from rdd_pipeline.training.device import resolve_precision

_SAMPLE = 2
"""Images of the steps that are measured."""
_STEPS = 3
_GAIN = 0.8
"""Exponent of the number of threads: two are 1.7 times as fast as one."""
_REST = 1.3
"""Times the steps: losses, validation, pictures, the start of the programs."""


def distillation_minutes(parameters: str, num_classes: int) -> float:
    """Minutes of `distill_tse` on CPUs that do nothing else: teacher, student alone, RDD.

    Measured in seconds of CPU, so that what else runs now counts little.

    Args:
        parameters: `parameters.yml` of the environment.
        num_classes: Of the data set.
    """
    values = yaml.safe_load(parameters)
    recipe, of_teacher = (RecipeParams(**values[name]) for name in ("recipe", "teacher_recipe"))
    student = _step_seconds(NetworkParams(**values["student"]), recipe, num_classes)
    teacher = _step_seconds(NetworkParams(**values["teacher"]["network"]), of_teacher, num_classes)
    # The teacher of a distillation is only computed forwards, a third of a step.
    seconds = recipe.iterations * (2 * student + teacher / 3) + of_teacher.iterations * teacher
    return _REST * seconds / 60 + 0.5


def _step_seconds(params: NetworkParams, recipe: RecipeParams, num_classes: int) -> float:
    network = network_from_params(params, num_classes=num_classes, pretrained=False).train()
    images = torch.zeros(_SAMPLE, 3, *recipe.augment.crop)
    fast = resolve_precision("auto", torch.device("cpu")) == "bfloat16"

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
            loss = network(images).logits.float().square().mean()
        loss.backward()

    threads = torch.get_num_threads()
    # Where other programs run, several threads spend most of their time waiting for one another.
    torch.set_num_threads(1)
    try:
        step()  # the first one makes what the others have
        seconds = min(_cpu_seconds(step) for _ in range(_STEPS))
    finally:
        torch.set_num_threads(threads)
    return seconds / math.pow(threads, _GAIN) * recipe.batch_size / _SAMPLE


def _cpu_seconds(work: Callable[[], None]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin
