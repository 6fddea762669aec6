"""The checked images of a data set as a catalog entry."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset

from rdd_pipeline.config import DataParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Sample
from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import json_digest, read_regular, write_atomically

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{16}")


class ImagesDataset(AbstractDataset[Images, Images | None]):
    """An index with its label set, in a file that is named by the digest of what it holds.

    A session loads what it has saved itself, whatever others save meanwhile. One that has saved
    nothing (``--from-nodes``) loads what was ingested last with the same ``params:data``: pointers
    from the parameters' digest to the content's are kept beside the content. A notebook, which has
    not said what it expects, loads what was ingested last.

    ```yaml
    images:
      type: rdd_pipeline.datasets.ImagesDataset
      filepath: data/02_intermediate/scenes/images
    ```
    """

    def __init__(
        self, *, filepath: str, optional: bool = False, metadata: dict[str, Any] | None = None
    ) -> None:
        """Make a handle.

        Args:
            filepath: The folder with all of them.
            optional: Whether `load` gives None where nothing was ingested with the session's
                parameters, or what was is damaged: for what may go without images.
            metadata: Not read here.
        """
        self._folder = Path(filepath)
        self._optional = optional
        self.metadata = metadata
        self._wanted: dict[str, Any] | None = None
        self._saved: str | None = None

    def expect(self, data: DataParams) -> None:
        """Say which ``params:data`` this session has; a hook does it."""
        self._wanted = data.deciding()

    def save(self, data: Images) -> None:
        """Write the content and what points to it."""
        content = {
            "root": str(data.root),
            "packs": None if data.packs is None else str(data.packs),
            "image_size": data.image_size,
            "labels": data.labels.model_dump(mode="json"),
            "samples": [list(sample) for sample in data.samples],
        }
        digest = json_digest(content)
        # Also where it is there: it may be damaged.
        write_atomically(self._content(digest), json.dumps(content).encode())
        pointer = {"digest": digest, "data": self._wanted or {}}
        write_atomically(self._pointer(), json.dumps(pointer).encode())
        self._saved = digest

    def load(self) -> Images | None:
        """Read what this session saved, else what was ingested with its parameters.

        Raises:
            UserError: Nothing was, or the file is damaged, and it is not `optional`.
        """
        try:
            return self._ingested()
        except UserError as error:
            if not self._optional:
                raise
            logger.info("Without images: %s", error)
            return None

    def _ingested(self) -> Images:
        digest = self.find()
        content = _read(self._content(digest))
        if content is None or json_digest(content) != digest:
            raise UserError(
                f"{self._content(digest)} is missing or damaged. Run the data_ingestion pipeline "
                "again."
            )
        packs = content["packs"]
        return Images(
            Path(content["root"]),
            tuple(Sample(*row) for row in content["samples"]),
            LabelSet.model_validate(content["labels"]),
            None if content["image_size"] is None else (*content["image_size"],),
            None if packs is None else Path(packs),
        )

    def find(self) -> str:
        """Digest of what this session loads.

        Raises:
            UserError: Nothing has been ingested with its parameters.
        """
        if self._saved is not None:
            return self._saved
        pointer = _read_pointer(self._pointer())
        if pointer is not None:
            return str(pointer["digest"])
        pointers = sorted(self._folder.glob("data-*.json"), key=lambda path: -path.stat().st_mtime)
        last = next(filter(None, map(_read_pointer, pointers)), None)
        if last is None:
            raise UserError(
                f"No images have been ingested yet ({self._folder} is empty). Run the "
                "data_ingestion pipeline first."
            )
        if self._wanted is None:
            return str(last["digest"])
        differing = [
            f"data.{key} is {value}, was {last['data'].get(key)}"
            for key, value in self._wanted.items()
            if value != last["data"].get(key)
        ]
        reason = "; ".join(differing) or f"{self._pointer().name} is damaged"
        raise UserError(
            f"The images have not been ingested with these parameters ({reason}). Run the "
            "data_ingestion pipeline with them first."
        )

    def _content(self, digest: str) -> Path:
        return self._folder / f"images-{digest}.json"

    def _pointer(self) -> Path:
        return self._folder / f"data-{json_digest(self._wanted or {})}.json"

    def _exists(self) -> bool:
        return self._saved is not None or self._pointer().exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._folder.as_posix()}


def _read(path: Path) -> Mapping[str, Any] | None:
    """A JSON object; None where there is none."""
    try:
        content = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _read_pointer(path: Path) -> Mapping[str, Any] | None:
    """Digest of images and the parameters they were ingested with; None where it is damaged."""
    pointer = _read(path) or {}
    fits = isinstance(pointer.get("data"), dict) and _DIGEST.fullmatch(str(pointer.get("digest")))
    return pointer if fits else None
