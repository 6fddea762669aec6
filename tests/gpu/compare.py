"""Comparisons with float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VALUE, GRADIENT = 1e-5, 1e-4  # what float32 gives; TF32 is off by 1e-4 and 1e-2
Loss = Callable[..., Tensor]


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors, also those in lists and dicts, on the device; floating ones of the type."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, dict):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device, dtype) for item in value)
    return value


def value_and_gradients(
    loss: Loss,
    students: list[Tensor],
    rest: dict[str, Any],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients in the students' maps, in float64 on the CPU."""
    place = torch.device(device)
    leaves = [tensor.requires_grad_() for tensor in moved(students, place, dtype)]
    value = loss(*leaves, **moved(rest, place, dtype))
    # What encloses the forward pass does not enclose this one in a training.
    with torch.autocast(place.type, enabled=False):
        gradients = torch.autograd.grad(value, leaves)
    assert value.dtype == dtype
    return value.detach().double().cpu(), [gradient.double().cpu() for gradient in gradients]


def assert_value(found: Tensor, expected: Tensor, tolerance: float = VALUE) -> None:
    error = abs(float(found) - float(expected)) / max(abs(float(expected)), 1e-30)
    assert error <= tolerance, f"value off by {error:.1e}: {float(found)}, not {float(expected)}"


def assert_gradient(found: Tensor, expected: Tensor, tolerance: float = GRADIENT) -> None:
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error <= tolerance, f"gradient off by {error:.1e}"


def assert_as_float64(
    loss: Loss,
    students: list[Tensor],
    rest: dict[str, Any],
    device: torch.device,
    *,
    expected: Loss | None = None,
) -> None:
    """Value and gradients on the device in float32 are those of float64 on the CPU.

    Args:
        loss: Called with the students' maps and the rest by name.
        students: Maps that get a gradient.
        rest: Other arguments.
        device: Where the loss is computed.
        expected: What is computed on the CPU; None: the same.
    """
    value, gradients = value_and_gradients(loss, students, rest, device=device, dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        wanted, wanted_gradients = value_and_gradients(
            expected or loss, students, rest, device="cpu", dtype=torch.float64
        )
    assert_value(value, wanted)
    for found, right in zip(gradients, wanted_gradients, strict=True):
        assert_gradient(found, right)
