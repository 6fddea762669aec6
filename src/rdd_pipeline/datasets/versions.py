"""What every versioned entry of this project does with its versions.

Beside them lies ``NAME/latest``, a link to the newest, so that a figure has a path that stays:
``pixels_tse.png/latest/pixels_tse.png``. What a run makes again as it was is no new version: the
one that is there stays the newest, and the run reads it and says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from kedro.io.core import AbstractDataset, AbstractVersionedDataset

from rdd_pipeline.files import link_whole

if TYPE_CHECKING:
    _Versioned = AbstractVersionedDataset[Any, Any]
else:  # Kedro gives every subclass of its own an __init__, which would hide that of the other base
    _Versioned = object

logger = logging.getLogger(__name__)

LATEST = "latest"


class Versions(_Versioned):
    """Mixed into a dataset with versions; its `save` begins with `_forget` and ends with `_stands`.

    A session reads what it has saved, whatever others save meanwhile.
    """

    _protocol: str
    _own: str | None = None

    @classmethod
    def _save_wrapper(cls, save_func: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        # Not Kedro's for versions: it warns where an earlier one stands for what was saved.
        wrapper: Any = AbstractDataset._save_wrapper
        wrapped: Callable[[Any, Any], None] = wrapper.__func__(cls, save_func)
        return wrapped

    @property
    def filepath(self) -> PurePosixPath:
        """The newest file, for whoever wants to know its size."""
        return self._get_load_path()

    def resolve_load_version(self) -> str | None:
        """The version that `load` reads."""
        if self._version and self._own and not self._version.load:
            return self._own
        return super().resolve_load_version()

    def resolve_save_version(self) -> str | None:
        """The version that holds what was saved, or that will."""
        return self._own if self._version and self._own else super().resolve_save_version()

    def _get_versions(self) -> list[str]:
        # Its name is behind all time stamps: Kedro would take it for the newest.
        found = super()._get_versions()
        return [path for path in found if PurePosixPath(path).parent.name != LATEST]

    def _newest(self) -> str | None:
        """Path of the newest version's content."""
        return next(iter(self._get_versions()), None) if self._version else None

    def _forget(self) -> None:
        """What was saved before is not what is saved now."""
        self._own = None
        self._clear_version_cache()

    def _stands(self, version: str | None) -> None:
        """Remember the version with what was saved, and let ``latest`` lead to the newest one."""
        self._clear_version_cache()
        self._own = version
        if not self._version or self._protocol != "file":
            return
        link = Path(self._filepath) / LATEST
        try:
            # Again, should another session have saved a newer one in between.
            while (newest := self._newest()) and _leads_to(link) != _version_of(newest):
                link_whole(_version_of(newest), link)
        except OSError as error:
            if link.is_dir():  # a copy that was made without links
                logger.warning("%s is no link and not the newest version. Delete it.", link)
            else:
                logger.debug("%s was not made: %s", link, error)


def _version_of(path: str) -> str:
    return PurePosixPath(path).parent.name


def _leads_to(link: Path) -> str | None:
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return None
