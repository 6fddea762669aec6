"""Which file is meant by the path of a network: a file, or a versioned entry of the catalog."""

from __future__ import annotations

import os
from pathlib import Path

from rdd_pipeline.errors import UserError
from rdd_pipeline.files import VERSION, require_regular_file

SUFFIX = ".safetensors"


def find_network(path: str | os.PathLike[str], seed: int | str | None = None) -> Path:
    """The file of a trained network.

    Args:
        path: A checkpoint, or a folder: the catalog entry (``data/06_models/DATA/student_tse``, of
            which the newest version is taken), one of its versions, or the files of its seeds.
            `~` is allowed.
        seed: Which of several seeds; None: the first one.

    Raises:
        UserError: There is nothing, no network in the folder, or none of that seed.
    """
    place = Path(os.path.expanduser(path))
    if not place.is_dir():
        return require_regular_file(place, "Network")
    for folder in _folders(place):
        files = {file.stem: file for file in sorted(folder.glob(f"*{SUFFIX}"), key=_in_order)}
        if not files:
            continue
        if seed is None:
            return next(iter(files.values()))
        if str(seed) not in files:
            raise UserError(
                f"{folder} holds networks of the seeds {', '.join(files)}, none of {seed}. Choose "
                "one of them."
            )
        return files[str(seed)]
    raise UserError(
        f"{place} is a folder without networks: expected SEED{SUFFIX} in it, or an entry of the "
        f"catalog such as student_tse, with VERSION/student_tse/SEED{SUFFIX}. Give the path of a "
        "network's file, or train one first."
    )


def _folders(place: Path) -> list[Path]:
    """Where files may be: here, in a version (or `latest`), in the versions from the newest on."""
    versions = sorted(
        (item for item in place.iterdir() if VERSION.fullmatch(item.name)), reverse=True
    )
    entries = [version / place.name for version in versions]
    return [place, place / place.parent.name, *entries]


def _in_order(file: Path) -> tuple[int, str]:
    return len(file.stem), file.stem  # seed 10 after seed 9
