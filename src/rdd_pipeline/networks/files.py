"""Reading tensors from files that a user gives, without ever running code from them."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rdd_pipeline.errors import UserError
from rdd_pipeline.files import require_regular_file

logger = logging.getLogger(__name__)

_LARGEST_HEADER = 2**24
"""Bytes; a tensor takes about a hundred."""
_unchecked: set[str] = set()
"""Files about which the log says that they have no digest."""

# Where training programs put the weights inside of what they save.
NESTS = ("state_dict", "model", "model_state_dict", "net", "network")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or a `.pth` that holds nothing but tensors.

    Args:
        path: the file. Its content decides the format, not its suffix. `~` is allowed.

    Returns:
        CPU tensors in the file's own types; a nesting such as {"state_dict": ...} and prefixes
        `module.` and `_orig_mod.` (of data parallel and compiled modules) are removed.

    Raises:
        UserError: no such file, no weights file, truncated, or a pickle that holds more than
            tensors and plain types (it is not run).
    """
    # Such files have no digest: a changed bit in them is a weight like any other.
    path = require_regular_file(path, "Weights file")
    with path.open("rb") as stream:
        start = stream.read(256)
    try:
        if zipfile.is_zipfile(path) or start[:1] == b"\x80":
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with path.open("rb") as stream:
                read_tensor_table(stream)
            content = safetensors.torch.load_file(path, device="cpu")
    except pickle.UnpicklingError as error:
        raise UserError(
            f"Weights file {path} holds Python objects beside tensors, or is damaged. Reading "
            "them would run code from the file, so it was not read. Save the state dict alone: "
            'safetensors.torch.save_file(model.state_dict(), "weights.safetensors").'
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{path} is not a readable weights file: {_kind(start, path)} "
            f"({str(error).splitlines()[0][:160] if str(error) else type(error).__name__}). "
            "Expected a whole safetensors file or a .pth with a state dict. Copy or download it "
            "again."
        ) from error
    tensors = as_state_dict(content, source=str(path))
    note_unchecked(path)
    return tensors


def note_unchecked(path: object) -> None:
    """Say once that a file has no digest of its tensors, so that damage in it goes unnoticed."""
    if str(path) not in _unchecked:
        _unchecked.add(str(path))
        logger.info(
            "%s has no digest of its weights, as files of others and of earlier versions: they "
            "are taken as they are.",
            path,
        )


def read_tensor_table(stream: BinaryIO, *, whole: bool = True) -> dict[str, Any]:
    """What a safetensors file says of its tensors, without them: by name, and ``__metadata__``.

    The lengths it claims are compared with the file's before anything of that length is read;
    those of the tensors if it has to be `whole`.

    Raises:
        ValueError: It is no such file, or not whole.
    """
    # The format: 8 bytes length, little endian, JSON, then the tensors.
    total = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    size = int.from_bytes(stream.read(8), "little")
    if total < 10 or not 2 <= size <= min(_LARGEST_HEADER, total - 8):
        raise ValueError("no safetensors file")
    try:
        content = json.loads(stream.read(size))
        if not isinstance(content, dict):
            raise ValueError("no safetensors file")
        tensors = [entry for name, entry in content.items() if name != "__metadata__"]
        end = max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
        _ = [math.prod(entry["shape"]) for entry in tensors]
    except (RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError("its header is no table of tensors") from error
    if whole and total != 8 + size + end:
        raise ValueError(f"it has {total} bytes and its header speaks of {8 + size + end}")
    return content


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are no numbers.

    Raises:
        UserError: NaN or infinite values, in which tensors.
    """
    wrong = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if wrong:
        raise UserError(
            f"{source} holds NaN or infinite weights, in {some(wrong)}. A network with them "
            "computes nothing: choose other weights, or train them again."
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # 8-bit floats have no arithmetic
        tensor = tensor.float()
    # One pass without a mask; a sum of large numbers may overflow, so infinite is not yet wrong.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def as_state_dict(content: object, *, source: str) -> dict[str, Tensor]:
    """The tensors by name inside of `content`, without nesting and wrapper prefixes.

    Raises:
        UserError: `content` is no state dict.
    """
    while isinstance(content, Mapping):
        nest = next((key for key in NESTS if isinstance(content.get(key), Mapping)), None)
        if nest is None:
            break
        content = content[nest]
    tensors: dict[str, Tensor] = {}
    if isinstance(content, Mapping):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        found = sorted(map(str, content))[:5] if isinstance(content, Mapping) else type(content)
        raise UserError(
            f"{source} holds no tensors by name (found {found}). Expected a state dict, plain or "
            f"under one of {', '.join(NESTS)}."
        )
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def some(items: Iterable[str], limit: int = 5) -> str:
    """The first few items and how many more there are, for a message."""
    listed = list(items)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def mismatch(
    missing: Iterable[str], unexpected: Iterable[str], misshaped: Iterable[str]
) -> str | None:
    """One sentence on what does not fit, or None when all does."""
    parts = [
        f"{len(items)} {what}: {some(items)}"
        for what, items in (
            ("missing", list(missing)),
            ("unexpected", list(unexpected)),
            ("of another shape", list(misshaped)),
        )
        if items
    ]
    return "; ".join(parts) or None


def _kind(start: bytes, path: Path) -> str:
    head = start.lstrip().lower()
    if not start:
        return "it is empty"
    if head.startswith((b"<!doctype", b"<html")):
        return "it is an HTML page, perhaps of a download that needs a log-in"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, the file itself was not fetched"
    if 8 < int.from_bytes(start[:8], "little") < 100_000_000 and start[8:9] == b"{":
        return f"it looks like a truncated or damaged safetensors file of {path.stat().st_size} B"
    return "its content is of no known format"
