"""Generated road scenes with CamVid's classes, written as files in CamVid's layout.

They stand in for a data set on a fresh machine: no download, hard enough that a larger network is
clearly better than a small one. Each scene is a function of (seed, split, number, size) only.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdd_pipeline.config import SceneParams
from rdd_pipeline.errors import DataProblem
from rdd_pipeline.files import (
    content_digest,
    json_digest,
    read_regular,
    remove_leftovers,
    write_atomically,
)
from rdd_pipeline.scenes.street import SPLITS, render_scene

MARKER = "scenes.json"
VERSION = 2
"""Raised with every change that makes a scene look different."""


def scenes_digest(params: SceneParams) -> str:
    """Names the scenes of these parameters (16 hexadecimal digits)."""
    return json_digest([VERSION, params.model_dump(mode="json")])


def write_scenes(root: Path, params: SceneParams) -> int:
    """Make `root` hold exactly the scenes of `params`, in CamVid's layout.

    Several processes may do so at once. Files that are already there and right are kept: the marker
    `scenes.json`, completed last, holds the digest of each file, so interrupted or changed work is
    noticed. Its presence also tells our scenes from someone's own images, which are never touched.

    Returns:
        Number of scenes rendered; 0: all were there.

    Raises:
        DataProblem: The folder holds other images, or cannot be written.
    """
    counts = {split: int(getattr(params, split)) for split in SPLITS}
    wanted = {
        (split, number): f"{split}_{number:05d}.png"
        for split in SPLITS
        for number in range(counts[split])
    }
    look = {
        "version": VERSION,
        "seed": params.seed,
        "size": [params.height, params.width],
        "label_noise": params.label_noise,
    }
    try:
        known = _known_digests(root, look)
        check_folder(root)
        remove_leftovers(root)
        if not (root / MARKER).exists():
            root.mkdir(parents=True, exist_ok=True)
            write_atomically(root / MARKER, b"{}")
        digests: dict[str, str] = {}
        rendered = 0
        for split in SPLITS:
            for folder in (root / split, root / f"{split}annot"):
                folder.mkdir(parents=True, exist_ok=True)
        for (split, number), name in wanted.items():
            paths = (f"{split}/{name}", f"{split}annot/{name}")
            if all(_digest(root / path) == known.get(path, "") for path in paths):
                digests |= {path: known[path] for path in paths}
                continue
            noise = params.label_noise if split == "train" else 0.0
            scene = render_scene(params.seed, split, number, params.height, params.width, noise)
            for path, pixels in zip(paths, scene, strict=True):
                data = _png(pixels)
                write_atomically(root / path, data, durable=False)
                digests[path] = content_digest(data)
            rendered += 1
        _remove_others(root, set(digests))
        marker = {**look, "counts": counts, "files": digests}
        text = json.dumps(marker, indent=1, sort_keys=True).encode()
        if not (root / MARKER).is_file() or (root / MARKER).read_bytes() != text:
            write_atomically(root / MARKER, text)
    except OSError as error:
        raise DataProblem(
            f"The generated scenes cannot be written to {root} ({error.strerror or error}). Free "
            "some space, correct the permissions or set `data.path` to another folder."
        ) from error
    return rendered


def _known_digests(root: Path, look: dict[str, Any]) -> dict[str, str]:
    """Digests of an earlier generation with the same look; none if there was no such."""
    try:
        marker = json.loads(read_regular(root / MARKER))
        # Markers from before there was label noise.
        marker.setdefault("label_noise", 0.0)
        if any(marker.get(key) != value for key, value in look.items()):
            return {}
        return {str(path): str(digest) for path, digest in marker["files"].items()}
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        return {}


def check_folder(root: Path) -> None:
    """Refuse to write among someone's own images.

    Raises:
        DataProblem: There are images with other names, or there is no marker beside them.
    """
    marked, pictures = (root / MARKER).exists(), Image.registered_extensions()
    for split in SPLITS:
        ours = re.compile(rf"{split}_\d{{5,}}\.png")
        for folder in (root / split, root / f"{split}annot"):
            for path in sorted(folder.glob("*")):
                is_image = path.suffix.lower() in pictures
                if is_image and not (marked and ours.fullmatch(path.name)):
                    raise DataProblem(
                        f"{path} is not a generated scene, and scenes are to be generated in "
                        f"{root}. Set `data.layout` to the layout of these images, or `data.path` "
                        "to another folder."
                    )


def _remove_others(root: Path, keep: set[str]) -> None:
    """Remove scenes beyond the wanted number."""
    for split in SPLITS:
        for folder in (f"{split}", f"{split}annot"):
            for path in (root / folder).glob(f"{split}_*"):
                if f"{folder}/{path.name}" not in keep:
                    path.unlink()


def _digest(path: Path) -> str | None:
    try:
        return content_digest(path.read_bytes())
    except OSError:
        return None


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()
