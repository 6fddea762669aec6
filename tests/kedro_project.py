"""Kedro sessions of this project in a folder of the test's own."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from matplotlib.figure import Figure

from rdd_pipeline.datasets.whole import WholeFigureDataset
from rdd_pipeline.drawing import Drawing
from rdd_pipeline.hooks.environments import environments

ROOT = Path(__file__).resolve().parents[1]


def _shared_configuration() -> Path:
    """``conf/`` with an empty ``conf/local``: what is one machine's own is not tested."""
    folder = Path(tempfile.mkdtemp(prefix="conf-"))
    atexit.register(shutil.rmtree, folder)
    (folder / "local").mkdir()
    for path in (ROOT / "conf").iterdir():
        if path.name != "local" and not _is_imported(path):
            (folder / path.name).symlink_to(path)
    return folder


def _is_imported(path: Path) -> bool:
    """Whether a user's own data set was imported here."""
    globals_file = path / "globals.yml"
    return globals_file.is_file() and globals_file.read_text().startswith("# Made by import_data")


CONF = _shared_configuration()
ENVIRONMENTS = [name for name in environments(CONF) if name != "local"]


def bootstrap() -> None:
    """Let Kedro know the project; needed in a process before any session, with all pipelines."""
    from kedro.framework.project import pipelines

    _know_the_project()
    pipelines.set_requested(None)  # a session knows the pipelines that it has run


@functools.cache
def _know_the_project() -> None:
    from kedro.framework.startup import bootstrap_project

    bootstrap_project(ROOT)


@contextmanager
def _blank_pictures() -> Iterator[None]:
    save = Figure.savefig

    def blank(figure: Figure, file: Any, *, metadata: Any = None, **settings: Any) -> None:
        if settings.get("format", "png") == "png":
            figure, settings = Figure((1, 1)), {"dpi": 8}
        save(figure, file, metadata=metadata, **settings)

    picture = WholeFigureDataset._picture

    def undrawn(dataset: WholeFigureDataset, data: Figure | Drawing) -> bytes:
        return picture(dataset, replace(data, draw=Figure) if isinstance(data, Drawing) else data)

    with (
        mock.patch.object(WholeFigureDataset, "_picture", undrawn),
        mock.patch.object(Figure, "savefig", blank),
    ):
        yield


class Project:
    """Data, work and results below `folder`; configuration and code of this repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(
        self,
        *pipelines: str,
        params: dict[str, Any] | None = None,
        rendered: bool = False,
        **options: Any,
    ) -> None:
        """`kedro run --pipelines=... --env=test` in this process.

        Without `rendered` figures are not drawn, half of the time of such a run: their files are
        blank and say what they are of.
        """
        from kedro.framework.session import KedroSession

        with (
            nullcontext() if rendered else _blank_pictures(),
            KedroSession.create(
                project_path=self.folder,
                conf_source=str(CONF),
                env="test",
                runtime_params=params,
                save_on_close=False,
            ) as session,
        ):
            session.run(pipeline_names=list(pipelines), **options)

    def versions(self, path: str) -> list[Path]:
        """Files of all versions of a catalog entry, or of one seed in it, oldest first."""
        place = self.folder / "data" / path
        by_seed = place.parent.glob(f"*/{place.parent.name}/{place.name}")
        found = sorted([*place.glob(f"*/{place.name}"), *by_seed])
        return [path for path in found if "latest" not in path.parts]

    def newest(self, path: str) -> Path:
        """File of the newest version."""
        return self.versions(path)[-1]

    def json(self, path: str) -> Any:
        """Content of the newest version of a JSON entry."""
        return json.loads(self.newest(path).read_text())
