"""What was changed in a copy of a folder."""

from __future__ import annotations

import filecmp
from pathlib import Path

NO_PLACES = ["__pycache__", "rdd_pipeline.egg-info"]


def changed_places(before: Path, after: Path, prefix: str = "") -> list[str]:
    """Changed files, new files and new folders; nothing may be gone."""
    found: list[str] = []

    def walk(comparison: filecmp.dircmp[str], inside: str) -> None:
        found.extend(inside + name for name in (*comparison.diff_files, *comparison.right_only))
        assert not comparison.left_only
        for name, below in comparison.subdirs.items():
            walk(below, f"{inside}{name}/")

    walk(filecmp.dircmp(before, after, ignore=NO_PLACES), prefix)
    return sorted(found)
