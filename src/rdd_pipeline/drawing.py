"""Figures that are drawn when they are needed: not again where the same one was saved.

Drawing takes longer than anything else in a run whose work is done. A figure is a function of what
it shows, the settings of its file and the code; a digest of these recognizes it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdd_pipeline.files import content_digest, json_digest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LIBRARIES = ("matplotlib", "numpy", "pandas", "pillow", "timm", "torch", "torchvision")
_EXTRAS = ("segmentation_models_pytorch",)


@dataclass(frozen=True)
class Drawing:
    """A figure to be drawn.

    Attributes:
        draw: Draws it.
        shows: Plain values that decide what it looks like: numbers, names, digests.
    """

    draw: Callable[[], Figure]
    shows: Any

    def digest(self, settings: Any) -> str:
        """Of what it shows, `settings` of its file, and the code and libraries that draw it."""
        return json_digest([self.shows, settings, code_digest()])


@cache
def code_digest() -> str:
    """Digest of this package; versions of Python and of the libraries that compute or draw."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    digests = [content_digest(path.read_bytes()) for path in sources]
    versions = [version(name) for name in _LIBRARIES]
    for name in _EXTRAS:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    return json_digest([digests, versions, sys.version])
