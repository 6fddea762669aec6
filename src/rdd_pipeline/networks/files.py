"""Reading tensors from files that a user gives, without ever running code from them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rdd_pipeline.errors import UserError
from rdd_pipeline.files import require_regular_file

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
    path = require_regular_file(path, "Weights file")
    with path.open("rb") as stream:
        start = stream.read(256)
    try:
        if zipfile.is_zipfile(path) or start[:1] == b"\x80":
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
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
    return as_state_dict(content, source=str(path))


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
