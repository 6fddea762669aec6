"""Memory that a network's steps on a CPU free and need again.

glibc gives every tensor above a few megabytes back to the system when it is freed, and the system
clears each page of the next one: 2 to 10 % of a step, whose tensors are those of the step before.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
# An explicit threshold ends glibc's own adjusting: these are the largest it would come to.
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}

_depth = 0


@contextlib.contextmanager
def freed_memory_kept(device_type: str = "cpu") -> Iterator[None]:
    """Inside, memory that this process frees stays with it; afterwards it is given back.

    Nothing happens with another device, or where the C library is not glibc. No number that is
    computed changes.

    Args:
        device_type: `torch.device.type` of what computes.
    """
    global _depth
    glibc = _glibc() if device_type == "cpu" else None
    if glibc is None:
        yield
        return
    _depth += 1
    _set(glibc, _KEEPING)
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _set(glibc, _USUAL)
            glibc.malloc_trim(0)


def _set(glibc: ctypes.CDLL, options: dict[int, int]) -> None:
    mallopt: Callable[[int, int], int] = glibc.mallopt
    for option, value in options.items():
        mallopt(option, value)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    there = all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt"))
    return library if there else None
