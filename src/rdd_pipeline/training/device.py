"""Which device computes, in which precision."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Literal

import torch

from rdd_pipeline.config import TrainerParams
from rdd_pipeline.errors import UserError


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` into a device that is there.

    ``auto`` is a CUDA GPU or the CPU. An Apple GPU (``mps``) has to be asked for: nothing here has
    run on a real one.

    Raises:
        UserError: Another name, or no such GPU on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError) as error:
        raise UserError(_unknown(name)) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(_unknown(name))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"trainer.device is {name!r}, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices. Set trainer.device=auto or cpu."
        )
    if device.type == "mps" and (device.index or not torch.backends.mps.is_available()):
        raise UserError(
            f"trainer.device is {name!r}, but torch {torch.__version__} sees "
            f"{'only one' if torch.backends.mps.is_available() else 'no'} Apple GPU here. Set "
            "trainer.device=auto or cpu."
        )
    return device


def _unknown(name: str) -> str:
    return f"trainer.device is {name!r}; expected auto, cpu, cuda or cuda:N, or mps (on a Mac)."


def check_devices(trainer: TrainerParams) -> None:
    """Refuse devices that this machine does not have, before anything is read.

    Raises:
        UserError: Unknown device, no such GPU, fewer of them than `trainer.devices`, or no
            bfloat16 there.
    """
    # Which number `auto` means depends on the batch; it is one that is there.
    resolve_devices(trainer, batch_size=1)
    resolve_precision(trainer.precision, resolve_device(trainer.device))


def resolve_precision(
    precision: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> Literal["float32", "bfloat16"]:
    """`auto`: bfloat16 where the device has it in hardware, float32 elsewhere.

    On CPUs that is AVX512-BF16 or AMX: a step takes half to two thirds of the time there. Apple's
    GPUs compute in float32 unless asked.

    Raises:
        UserError: bfloat16 is asked for where torch has no autocast.
    """
    if precision == "bfloat16" and not torch.amp.is_autocast_available(device.type):
        raise UserError(
            f"trainer.precision is bfloat16, but torch {torch.__version__} has no autocast for "
            f"trainer.device={device.type}. Set trainer.precision=float32."
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and _cpu_has_bfloat16()
    return "bfloat16" if native else "float32"


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(name in flags for name in ("avx512_bf16", "amx_bf16"))


def resolve_devices(trainer: TrainerParams, batch_size: int) -> int:
    """Processes that train together on this machine.

    Raises:
        UserError: More GPUs than there are, or several where `trainer.device` names one.
    """
    device = resolve_device(trainer.device)
    one = device.type != "cuda" or device.index is not None
    if device.type == "mps" and (trainer.nodes > 1 or trainer.devices not in (1, "auto")):
        raise UserError(
            f"trainer.devices is {trainer.devices} and trainer.nodes {trainer.nodes}, but "
            "trainer.device=mps is a single GPU. Set both to 1."
        )
    if trainer.devices == "auto":
        there = 1 if one else torch.cuda.device_count()
        shares = [n for n in range(1, there + 1) if batch_size % (n * trainer.nodes) == 0]
        return max(shares, default=1)
    if trainer.devices > 1 and device.type == "cuda":
        if device.index is not None:
            raise UserError(
                f"trainer.devices is {trainer.devices}, but trainer.device names one GPU, "
                f"{trainer.device!r}. Set trainer.device=cuda, or trainer.devices=1."
            )
        if trainer.devices > torch.cuda.device_count():
            raise UserError(
                f"trainer.devices is {trainer.devices}, but torch {torch.__version__} sees "
                f"{torch.cuda.device_count()} CUDA devices. Lower it, or set it to auto."
            )
    return trainer.devices


def memory_format(trainer: TrainerParams, device: torch.device) -> torch.memory_format:
    """Order of a tensor's dimensions in memory: channels last where asked for, not on Apple's GPUs.

    Torch's MPS kernels were written for contiguous tensors.
    """
    channels_last = trainer.channels_last and device.type != "mps"
    return torch.channels_last if channels_last else torch.contiguous_format


def resolve_workers(
    workers: int | Literal["auto"], device: torch.device, trainings: int | None = None
) -> int:
    """Loader processes. On CPU they would only compete with the training for the cores.

    Args:
        workers: As in the parameters.
        device: Of the training.
        trainings: Processes on this machine, which share its cores; None: as many as torch's
            launcher says that there are.
    """
    if workers != "auto":
        return workers
    if device.type == "cpu":
        return 0
    share = (os.cpu_count() or 2) // (trainings or int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(8, max(1, share - 1))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that the device, or the machine, has no more memory."""
    # The CPU's allocator raises a plain RuntimeError; oneDNN cannot make its kernels then.
    words = ("DefaultCPUAllocator", "could not create a primitive", "could not create a memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        word in str(error) for word in words
    )


def unrepeatable_operation(error: BaseException) -> str | None:
    """The operation that torch refuses under `trainer.deterministic`, if that is the error."""
    name, found, _ = str(error).partition(" does not have a deterministic implementation")
    return name.rpartition(" ")[2] if found else None


def set_up(trainer: TrainerParams, device: torch.device) -> None:
    """Process-wide torch settings of a job."""
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    if trainer.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # As torch.use_deterministic_algorithms, which imports the compiler to tell it (`compiled`).
    torch.set_deterministic_debug_mode("error" if trainer.deterministic else "default")
    # A debugging aid that writes each new tensor twice; nothing here reads what was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not trainer.deterministic
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def peak_memory(device: torch.device) -> int:
    """Most bytes in use since `reset_peak_memory`; 0 where the system does not tell.

    CUDA: what torch has allocated there. CPU: resident memory of this process, libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    kilobytes = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * int(kilobytes.group(1)) if kilobytes else 0
